"""Transcribe real speech with NeMo, plain ONNX Runtime and ONNX Runtime GenAI side by side, and count the words.

For a checkpoint of transformers, transformers takes the place of NeMo.

In: a model folder; clips (any format, rate and channels that libsndfile reads), or a clip list with texts, in the
format of NeMo's manifests.
Out: a transcript of each clip, of all engines where they differ, and a table over all clips: engine, speed, word error
rate against the text and against NeMo. All engines are given the same samples: mono, resampled once to the model's
rate. NeMo computes its own features and plain ONNX Runtime is given those (without NeMo: GenAI's); GenAI computes its
own. With an optimized folder the exported folder that it was made from is compared, too. NeMo's row shows NeMo's own
text, GenAI's rows show GenAI's, and the rows of plain ONNX Runtime show the text that Hugging Face's `tokenizers` gives
for its tokens.

With --stress the script instead shows what is lost where speech is hard: quiet, clipped, with silence, in noise, by
telephone, fast and slow, cut and joined. NeMo and the folders in plain ONNX Runtime are tested (in GenAI with --engines
genai).

It exits with status 1 if float32 ONNX differs from NeMo in a token for no listed reason, or in a word's time by more
than one encoder frame, or if an engine shows NeMo's own tokens as another text than NeMo does and no rule in
common/evaluate/text_rules.py explains it; with --stress, if more words are lost than --max_lost_words allows.

Engines are loaded when their turn comes. Their speed is measured after a first run, with and without the features; the
time of a batch is divided among its clips by their length.

    python test_real_speech.py --audio my.wav --skip_nemo
    python test_real_speech.py --audio my.wav --skip_nemo --timestamps --srt my.srt
    python test_real_speech.py --manifest samples/manifest.jsonl --html speech.html
    python test_real_speech.py --manifest samples/manifest.jsonl --skip_nemo --stress --max_lost_words 2
"""

import argparse
import itertools
from pathlib import Path
from typing import TextIO

# Imported first, so that a package that is missing below is reported in one line (common/__init__.py).
from common.cli import MODEL_DIR_HELP, PUBLISH_COMMAND, Parser, count, default_model_dir, options_of, run

# isort: split

from common.evaluate.compare import ComparedClip, Comparison
from common.evaluate.engines import (
    ENGINES,
    GENAI_ENGINE,
    NEMO_ENGINE,
    ONNX_ENGINE,
    add_engine_flags,
    engines_of,
    input_files,
    load_reference,
    open_folders,
)
from common.evaluate.stress import StressOptions, add_stress_flags, stress_compared
from common.evaluate.verdict import judge, print_corpus, transcribe_and_print
from common.evaluate.words import MAX_PRINTED_CLIPS, SUBTITLES, subtitle_paths
from common.folder import check_outputs, json_text, output_path, printing_beside, write_output
from common.layouts import genai_folder
from common.report.clips_page import comparison_page, stress_page
from common.run.audio import Clip, read_clips

SAMPLE = Path(__file__).resolve().parent / "samples" / "jfk.wav"
MANIFEST_HELP = """clip list: JSON lines with audio_filepath and text, and offset and duration in seconds where a
clip is a segment of its file"""
JSON_HELP = """write every transcript and figure to FILE; - is the standard output, and all else is then printed to
standard error"""
TIMESTAMPS_HELP = """print each word with its start and end in seconds, by plain ONNX Runtime (GenAI gives no times);
with NeMo, compare them with NeMo's own"""
HTML_HELP = """write a page to FILE to look at and listen to: each clip with its audio, and the engines' words one
below the other, with their times and confidences; with --stress its table and the worst clips (for -, see --json)"""
SUBTITLE_HELP = """write subtitles: for one clip to the file PATH (for -, see --json), for several to files in the
folder PATH"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    add("--model_dir", type=Path, help=MODEL_DIR_HELP)
    add_engine_flags(parser)
    clips = parser.add_mutually_exclusive_group()
    clips.add_argument("--audio", type=Path, nargs="+", default=[SAMPLE], help="clips (samples/jfk.wav)")
    clips.add_argument("--manifest", type=Path, help=MANIFEST_HELP)
    add("--json", type=output_path, metavar="FILE", help=JSON_HELP)
    add("--batch_size", type=count, default=1, help="clips that plain ONNX Runtime takes at a time (%(default)s)")
    add("--timestamps", action="store_true", help=TIMESTAMPS_HELP)
    add("--html", type=output_path, metavar="FILE", help=HTML_HELP)
    for suffix in SUBTITLES:
        add(f"--{suffix}", type=output_path, metavar="PATH", help=SUBTITLE_HELP)
    add_stress_flags(parser)
    args = parser.parse_args(argv)
    if args.engines is None:  # GenAI only on request, since it doubles the time of a stress test
        args.engines = frozenset(ENGINES) - ({GENAI_ENGINE} if args.stress is not None else set())
    args.engines -= {NEMO_ENGINE} if args.skip_nemo else set()
    if args.model_name and NEMO_ENGINE not in args.engines:
        parser.error("--model_name needs nemo among --engines")
    if not args.engines:
        parser.error("--engines needs genai or onnx where --skip_nemo is given")
    if args.checkpoint_format and not args.model_name:
        parser.error("--checkpoint_format needs --model_name")
    with_times = [f"--{name}" for name in ("timestamps", *SUBTITLES) if getattr(args, name)]
    if with_times and args.stress is not None:
        parser.error(f"{with_times[0]} cannot be combined with --stress")
    if with_times and ONNX_ENGINE not in args.engines:
        parser.error(f"{with_times[0]} needs onnx among --engines")
    return args


def main(argv: list[str] | None = None) -> int:
    return run(_compare_beside_output, parse_args(argv))


def _compare_beside_output(args: argparse.Namespace) -> None:
    with printing_beside((args.json, args.html, args.srt, args.vtt)) as stdout:
        _compare(args, stdout)


def _compare(args: argparse.Namespace, stdout: TextIO) -> None:
    stress = options_of(StressOptions, args)
    listed = read_clips(args.manifest) if args.manifest else [Clip(path) for path in args.audio]
    clips = [ComparedClip(**vars(clip)) for clip in listed]
    subtitles = {suffix: subtitle_paths(path, suffix, clips) for suffix in SUBTITLES if (path := getattr(args, suffix))}
    folders = open_folders(genai_folder(args.model_dir or default_model_dir()), args.folders)
    outputs = [path for path in (args.json, args.html, *itertools.chain(*subtitles.values())) if path]
    new_folders = [getattr(args, suffix) for suffix in subtitles if len(clips) > 1]
    check_outputs(outputs, input_files(folders, clips, args.manifest, args.model_name), new_folders)
    name, config = folders[0].path.name, folders[0].config
    config.check_clips(clips)
    if GENAI_ENGINE in args.engines:
        _ = folders[0].genai  # loaded now, so that a fault of the folder shows before NeMo takes its time
    reference = None
    if NEMO_ENGINE in args.engines:
        reference = load_reference(folders[0], args.model_name, args.checkpoint_format)
    if args.stress is not None:
        test = stress_compared(folders, args.engines, reference, clips, stress).run()
        if args.json:
            write_output(args.json, json_text(test.as_json()), stdout)
        if args.html:
            write_output(args.html, stress_page(f"{name} under stress", test), stdout)
        test.judge()
        return

    with_times = bool(args.timestamps or subtitles or args.html)
    engines = engines_of(folders, args.engines, reference, batch_size=args.batch_size, with_times=with_times)
    comparison = Comparison(
        clips=clips, folders=folders, engines=engines, reference=reference, batch_size=args.batch_size
    )
    transcribe_and_print(comparison, print_times=args.timestamps)
    print_corpus(comparison)
    if args.json:
        write_output(args.json, json_text(comparison.as_json()), stdout)
    elif len(clips) > MAX_PRINTED_CLIPS:
        print("the transcripts of so many clips are not printed; --json FILE writes them")
    if args.html:
        write_output(args.html, comparison_page(f"{name} on speech", comparison), stdout)
    for suffix, paths in subtitles.items():
        for clip, path in zip(clips, paths, strict=True):
            path.parent.mkdir(exist_ok=True)
            write_output(path, SUBTITLES[suffix](comparison.words(clip), config.frame_seconds), stdout)
    judge(comparison, with_times=bool(reference and with_times))
    if reference:
        print(f"if the words are good enough to publish, next: {PUBLISH_COMMAND.format(folders[0].path)}")


if __name__ == "__main__":
    raise SystemExit(main())
