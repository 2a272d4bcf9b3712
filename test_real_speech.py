"""Transcribe real speech with NeMo, plain ONNX Runtime and ONNX Runtime GenAI side by side, and count the words.

For a checkpoint of transformers, transformers takes the place of NeMo.

In: a model folder; clips (any format, rate and channels that libsndfile reads), or a NeMo manifest of clips with text.
Out: for each clip, or over all clips, a table: engine, speed, word error rate against the text and against NeMo,
transcript. All engines are given the same samples: mono, resampled once to the model's rate. NeMo computes its own
features and plain ONNX Runtime is given those (with --skip_nemo: GenAI's); GenAI computes its own. With an optimized
folder the exported one that it was made from is compared, too. NeMo's row is NeMo's own text, GenAI's rows are GenAI's,
and those of plain ONNX Runtime are what Hugging Face's `tokenizers` makes of its tokens.

Exit status 1 when float32 ONNX differs from NeMo in a token for no listed reason, or in a word's time by more than one
encoder frame, or when an engine shows NeMo's own tokens as another text than NeMo does and no rule in
common/evaluate/text_rules.py explains it.

Engines are loaded when their turn comes, and a line is printed as soon as one has transcribed a clip. Speed is that of
an engine that has run before, features included; of a batch's time each clip has its share by length.

    python test_real_speech.py --audio my.wav --skip_nemo
    python test_real_speech.py --audio my.wav --skip_nemo --timestamps --srt my.srt
    python test_real_speech.py --manifest samples/manifest.jsonl
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

# First of all, since a package that is missing below is then reported in one line (common/__init__.py).
from common.cli import Parser, run

# isort: split

from common.checkpoint import FORMAT_HELP, FORMAT_NAMES
from common.cli import MODEL_DIR_HELP, default_model_dir
from common.evaluate.engines import ComparedFolder, load_reference, open_folders
from common.evaluate.side_by_side import SideBySide, with_progress
from common.evaluate.subtitles import srt
from common.evaluate.tables import ClipTables, print_corpus
from common.evaluate.text_rules import ids_of_other_words
from common.evaluate.transcripts import ComparedClip, Comparison
from common.evaluate.verdict import judge_texts, judge_times, judge_tokens, print_verdict, print_warnings
from common.folder.outputs import check_outputs, is_standard_output, json_text, write_output
from common.layouts.genai import genai_folder
from common.run.clips import Clip, read_clips

SAMPLE = Path(__file__).resolve().parent / "samples" / "jfk.wav"
MAX_PRINTED_CLIPS = 20  # transcripts of more clips than a person reads are in the --json file alone
MANIFEST_HELP = """NeMo manifest: JSON lines with audio_filepath and text, and offset and duration in seconds where a
clip is a segment of its file"""
JSON_HELP = """write every transcript and figure to FILE; - is the standard output, and all else is then printed to
the error output"""
SRT_HELP = "write the words of one clip as subtitles to FILE; - as for --json"
TIMESTAMPS_HELP = """print each word with its start and end in seconds, by plain ONNX Runtime (GenAI gives no times);
with NeMo, compare them with NeMo's own"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__ or "")
    parser.add_argument("--model_dir", type=Path, help=MODEL_DIR_HELP)
    reference = parser.add_mutually_exclusive_group()
    reference.add_argument("--model_name", help="checkpoint of the reference (the one in manifest.json)")
    reference.add_argument("--skip_nemo", action="store_true", help="do without NeMo, which is then not even imported")
    parser.add_argument("--checkpoint_format", choices=FORMAT_NAMES, help=FORMAT_HELP)
    clips = parser.add_mutually_exclusive_group()
    clips.add_argument("--audio", type=Path, nargs="+", default=[SAMPLE], help="clips (samples/jfk.wav)")
    clips.add_argument("--manifest", type=Path, help=MANIFEST_HELP)
    parser.add_argument("--json", type=Path, metavar="FILE", help=JSON_HELP)
    batch_help = "clips that plain ONNX Runtime takes at a time (%(default)s)"
    parser.add_argument("--batch_size", type=int, default=1, help=batch_help)
    parser.add_argument("--timestamps", action="store_true", help=TIMESTAMPS_HELP)
    parser.add_argument("--srt", type=Path, metavar="FILE", help=SRT_HELP)
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f"argument --batch_size: expected 1 or more, got {args.batch_size}")
    if args.checkpoint_format and not args.model_name:
        parser.error("argument --checkpoint_format: expected --model_name with it")
    if args.srt and (args.manifest or len(args.audio) != 1):
        parser.error("argument --srt: expected one clip, given with --audio, for one file of subtitles")
    return args


def main(argv: list[str] | None = None) -> int:
    return run(_compare_beside_output, parse_args(argv))


def _compare_beside_output(args: argparse.Namespace) -> None:
    """Compare; where a result goes to the standard output, to be read by a program, print to the error output."""
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr if any(map(is_standard_output, _outputs(args))) else stdout):
        _compare(args, stdout)


def _compare(args: argparse.Namespace, stdout: TextIO) -> None:
    listed = read_clips(args.manifest) if args.manifest else [Clip(path) for path in args.audio]
    clips = [ComparedClip.of(clip) for clip in listed]
    folders = open_folders(genai_folder(args.model_dir or default_model_dir()))
    check_outputs(_outputs(args), _inputs(args, folders, clips))
    folders[0].config.check_clips(clips)
    config = folders[0].genai.config  # loads GenAI: what a folder lacks shows before NeMo takes its time
    loaded = None if args.skip_nemo else load_reference(folders[0], args.model_name, args.checkpoint_format)
    reference, rules = loaded or (None, ())
    with_times = args.timestamps or args.srt is not None
    engines = SideBySide(folders, reference, args.batch_size, with_times)
    comparison = Comparison(
        clips=clips,
        engines=[folder.engines for folder in folders],
        rules=rules,
        window_seconds=config.chunk / config.sample_rate,
        frame_seconds=config.frame_seconds,
    )

    _transcribe(engines, comparison, print_times=args.timestamps)
    if len(clips) > 1 or args.manifest:
        print_corpus(comparison)
    if args.json:
        write_output(args.json, json_text(comparison.as_json()), stdout)
    if args.srt:
        words = clips[0].transcripts[folders[0].engines.raw].words or []
        write_output(args.srt, srt(words, config.frame_seconds), stdout)
    print_warnings(comparison)
    print_verdict(comparison)
    judge_tokens(comparison.differences)
    judge_texts(comparison)
    if reference and with_times:
        judge_times(comparison, ids_of_other_words(reference.sentencepiece_model))


def _transcribe(engines: SideBySide, comparison: Comparison, *, print_times: bool) -> None:
    """Let every engine transcribe every clip, and collect the differences; print tables of a few clips, and a progress
    bar for many."""
    pools = engines.read(comparison.clips)
    if len(comparison.clips) > MAX_PRINTED_CLIPS:
        for pool in with_progress(pools, len(comparison.clips)):
            engines.transcribe(pool, lambda engine: None)
            comparison.differences.extend(engines.differences(pool))
        return
    names = [name for each in comparison.engines for name in (each.genai, each.raw)]
    tables = ClipTables(
        names if engines.reference is None else [engines.reference.name, *names],
        comparison.rules,
        comparison.window_seconds,
        comparison.frame_seconds,
        words_of=names[1] if print_times else None,
    )
    for pool in pools:
        tables.begin(pool)
        engines.transcribe(pool, tables.engine_done)
        tables.finish(pool)
        comparison.differences.extend(engines.differences(pool))


def _outputs(args: argparse.Namespace) -> list[Path]:
    return [path for path in (args.json, args.srt) if path]


def _inputs(args: argparse.Namespace, folders: Sequence[ComparedFolder], clips: Sequence[Clip]) -> Iterator[Path]:
    """What is read, and must not be written over."""
    if args.manifest:
        yield args.manifest
    if args.model_name:
        yield Path(args.model_name)
    for folder in folders:
        yield from folder.files()
    yield from (clip.path for clip in clips)


if __name__ == "__main__":
    raise SystemExit(main())
