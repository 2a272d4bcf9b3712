"""Transcribe real speech with NeMo, plain ONNX Runtime and ONNX Runtime GenAI side by side, and count the words.

In: a model folder; clips (any format, rate and channels that libsndfile reads), or a NeMo manifest of clips with text.
Out: per clip, or per corpus, a table: engine, speed, word error rate against the text and against NeMo, transcript.
Every engine gets the same samples: mono, resampled once to the model's rate. NeMo computes its features itself and raw
ONNX Runtime is given those (with --skip_nemo: GenAI's); GenAI computes its own. An optimized folder brings along the
exported one that it was made from. NeMo's row is NeMo's own text, GenAI's rows are GenAI's, and those of plain ONNX
Runtime are what Hugging Face's `tokenizers` makes of its tokens. Exit status 1 when float32 ONNX differs from NeMo in a
token for no listed reason, or in a word's time by more than an encoder frame, or when an engine shows NeMo's own tokens
as another text than NeMo does and no rule in common/transcripts.py explains it.

Engines are loaded when their turn comes, and a line is printed when it is there: with --skip_nemo, the first as soon as
GenAI has it. Speed is that of a warm engine, features included; of a batch's time each clip has its share by length.

    python test_real_speech.py --audio my.wav --skip_nemo
    python test_real_speech.py --audio my.wav --skip_nemo --timestamps --srt my.srt
    python test_real_speech.py --manifest samples/manifest.jsonl
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import TextIO

# First of all, since a package that is missing below is then reported in one line (common/__init__.py).
from common.console import Parser, run

# isort: split

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from common.clips import Clip, read_clips
from common.decode import GENAI_RULE, NEMO_RULE, Hypothesis
from common.download import find_checkpoint
from common.files import (
    CHECKPOINT,
    EXPORTED,
    FILES,
    MANIFEST,
    MODEL_DIR_HELP,
    check_outputs,
    default_model_dir,
    is_float16,
    is_standard_output,
    json_text,
    read_location,
    read_manifest,
    write_output,
)
from common.identity import check_one_checkpoint, check_same_checkpoint
from common.layouts import GENAI, genai_folder
from common.model import load_model, recorded_checkpoint
from common.runtime import GenAI, Nemo, RawOrt, RuntimeConfig
from common.timestamps import Pieces, Word, srt, words
from common.transcripts import (
    Difference,
    TextRule,
    excused_by,
    first_difference,
    first_token_difference,
    ids_of_other_words,
    text_rules,
)
from common.verdict import (
    NEMO,
    Engines,
    FoundDifference,
    Heard,
    HeardClip,
    clip_notes,
    corpus_row,
    judge_texts,
    judge_times,
    judge_tokens,
    percent,
    percent_against_nemo,
    print_corpus,
    print_verdict,
    print_warnings,
)

SAMPLE = Path(__file__).resolve().parent / "samples" / "jfk.wav"
# More transcripts than a person reads; they are in the --json file.
MAX_PRINTED_CLIPS = 20
# Of as much audio clips are sorted by length into batches: more pad less, and take more memory, 8 MB a minute.
POOL_SECONDS = 1200


MANIFEST_HELP = """NeMo manifest: JSON lines with audio_filepath and text, and offset and duration in seconds where a
clip is a segment of its file"""
JSON_HELP = """write every transcript and figure to FILE; - is the standard output, and all else is then printed to
the error output"""
SRT_HELP = "write the words of one clip as subtitles to FILE; - as for --json"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model_dir", type=Path, help=MODEL_DIR_HELP)
    reference = parser.add_mutually_exclusive_group()
    reference.add_argument("--model_name", help="NeMo reference (the checkpoint in manifest.json)")
    reference.add_argument("--skip_nemo", action="store_true", help="do without NeMo, which is then not even imported")
    clips = parser.add_mutually_exclusive_group()
    clips.add_argument("--audio", type=Path, nargs="+", default=[SAMPLE], help="clips (samples/jfk.wav)")
    clips.add_argument("--manifest", type=Path, help=MANIFEST_HELP)
    parser.add_argument("--json", type=Path, metavar="FILE", help=JSON_HELP)
    parser.add_argument(
        "--batch_size", type=int, default=1, help="clips that plain ONNX Runtime takes at a time (%(default)s)"
    )
    parser.add_argument(
        "--timestamps", action="store_true",
        help="print each word with its start and end in seconds, by plain ONNX Runtime (GenAI tells no times); with "
        "NeMo, compare them with its own",
    )  # fmt: skip
    parser.add_argument("--srt", type=Path, metavar="FILE", help=SRT_HELP)
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f"argument --batch_size: wanted 1 or more, found {args.batch_size}")
    if args.srt and (args.manifest or len(args.audio) != 1):
        parser.error("argument --srt: wanted one clip, given with --audio, for one file of subtitles")
    return args


def main(argv: list[str] | None = None) -> int:
    return run(_compare_beside_output, parse_args(argv))


def _compare_beside_output(args: argparse.Namespace) -> None:
    """Compare; where a result goes to the standard output, to be read by a program, print to the error output."""
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr if any(map(is_standard_output, _outputs(args))) else stdout):
        _compare(args, stdout)


def _outputs(args: argparse.Namespace) -> list[Path]:
    return [path for path in (args.json, args.srt) if path]


class Folder:
    """A model folder in both of its runtimes, each loaded and warm (its first run allocates) when it is asked for."""

    def __init__(self, path: Path):
        self.path, self.config, manifest = path, RuntimeConfig.read(path), read_manifest(path)
        optimized = manifest.get("optimize")
        flags = {"skip_quantization": True} if optimized is None else optimized.get("flags", {})
        unquantized = flags.get("skip_quantization") and flags.get("decoder_joint_precision", "fp32") == "fp32"
        self.is_float32 = unquantized and not is_float16(manifest)
        self.genai_name, self.raw_name = f"GenAI {path.name}", f"ONNX Runtime {path.name}"
        self.engines = Engines(self.genai_name, self.raw_name, self.is_float32)

    @cached_property
    def genai(self) -> GenAI:
        genai = GenAI(self.path)
        genai.transcribe(self.noise)
        return genai

    @cached_property
    def raw(self) -> RawOrt:
        raw = RawOrt(self.path)
        raw.transcribe(self.genai.features(self.noise))
        return raw

    @cached_property
    def pieces(self) -> Pieces:
        return Pieces.read(self.path)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Hugging Face's reader of tokenizer.json, for plain ONNX Runtime; GenAI has its own."""
        return Tokenizer.from_file(str(self.path / "tokenizer.json"))

    def raw_text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens).strip()

    @property
    def noise(self) -> np.ndarray:
        """A second of it, to get warm on."""
        return np.random.default_rng(0).normal(0, 0.1, self.config.sample_rate).astype(np.float32)


@dataclass
class Recording:
    """A clip while the engines hear it."""

    clip: HeardClip
    samples: np.ndarray
    features: np.ndarray | None = None  # [M, T]
    features_seconds: float = 0.0  # that they took
    reference: tuple[list[int], list[int]] | None = None  # NeMo's tokens and their frames, where both must be met
    traced: dict[str, Hypothesis] = field(default_factory=dict)  # by engine

    def compute_features(self, source: GenAI | Nemo) -> None:
        if self.features is None:
            self.features, self.features_seconds = _timed(source.features, self.samples)


def _compare(args: argparse.Namespace, stdout: TextIO) -> None:
    listed = read_clips(args.manifest) if args.manifest else [Clip(path) for path in args.audio]
    clips = [HeardClip(**vars(clip)) for clip in listed]
    paths = _folders(genai_folder(args.model_dir or default_model_dir()))
    for path in paths:
        check_one_checkpoint(path)
        check_same_checkpoint(paths[0], path)
    folders = [Folder(path) for path in paths]
    check_outputs(_outputs(args), [*_inputs(args, folders), *(clip.path for clip in clips)])
    folders[0].config.check_clips(clips)
    config = folders[0].genai.config  # loads GenAI: what a folder lacks shows before NeMo takes its time
    nemo = None if args.skip_nemo else _load_nemo(args.model_name, folders[0])
    times = args.timestamps or args.srt is not None
    rules = text_rules(nemo.sentencepiece_model) if nemo else ()
    engines_of = [folder.engines for folder in folders]
    window = config.chunk / config.sample_rate

    differences = []
    few, alone = len(clips) <= MAX_PRINTED_CLIPS, args.batch_size == 1
    with tqdm(total=len(clips), unit="clip", leave=False, disable=few or None) as progress:  # None: no bar in a pipe
        for pool in read_pools(clips, config, alone):
            engines = transcribe(pool, folders, nemo, args.batch_size, times)
            if few and alone:
                print_clip(pool[0].clip, engines, folders, rules)
            for _ in engines:
                pass
            for recording in pool:
                if few and not alone:
                    print_clip(recording.clip, recording.clip.heard, folders, rules)
                for note in clip_notes(recording.clip, rules, window) if few else ():
                    print(f"  {note}")
                if few and args.timestamps:
                    print_words(recording.clip.heard[folders[0].raw_name].words, config.frame_seconds)
                differences += compare(recording, folders, nemo, alone)
            progress.update(len(pool))
    if len(clips) > 1 or args.manifest:
        print_corpus(clips, rules)
    if args.json:
        write_output(args.json, json_text(results(clips, differences, rules, config.frame_seconds)), stdout)
    if args.srt:
        write_output(args.srt, srt(clips[0].heard[folders[0].raw_name].words, config.frame_seconds), stdout)
    print_warnings(clips, engines_of, rules)
    print_verdict(clips, engines_of, differences, rules, window)
    judge_tokens(differences)
    judge_texts(clips, engines_of, rules)
    if nemo and times:
        judge_times(clips, engines_of, ids_of_other_words(nemo.sentencepiece_model))


def _inputs(args: argparse.Namespace, folders: list[Folder]) -> Iterator[Path]:
    """What is read, clips aside, and must not be written over."""
    if args.manifest:
        yield args.manifest
    if args.model_name:
        yield Path(args.model_name)
    for folder in folders:
        manifest = read_manifest(folder.path)
        yield from (folder.path / name for name in {MANIFEST, *GENAI.files, *manifest.get(FILES, {})})
        if checkpoint := read_location(folder.path, CHECKPOINT):
            yield checkpoint


def _load_nemo(model_name: str | None, folder: Folder) -> Nemo:
    checkpoint = find_checkpoint(model_name) if model_name else recorded_checkpoint(folder.path)
    nemo = Nemo(load_model(checkpoint))
    if nemo.model.decoder.blank_idx != folder.config.blank_id:
        raise ValueError(f"{checkpoint} has another vocabulary than {folder.path}: it was not exported from there")
    nemo.transcribe(nemo.features(folder.noise))
    return nemo


def _folders(folder: Path) -> list[Path]:
    """`folder`, and the exported folder that it was optimized from, where that is still there."""
    exported = read_location(folder, EXPORTED)
    return [folder, exported.resolve()] if exported and exported.is_dir() else [folder]


def read_pools(clips: list[HeardClip], config: RuntimeConfig, alone: bool) -> Iterator[list[Recording]]:
    """The clips with their samples: one at a time, or pools to make batches of. Raises as read_clip does."""
    pool, seconds = [], 0.0
    for clip in clips:
        pool.append(Recording(clip, config.read_clip(clip)))
        clip.seconds = len(pool[-1].samples) / config.sample_rate
        clip.one_window = config.fits_one_window(clip.seconds)
        seconds += clip.seconds
        if alone or seconds >= POOL_SECONDS or clip is clips[-1]:
            yield pool
            pool, seconds = [], 0.0


def transcribe(
    pool: list[Recording], folders: list[Folder], nemo: Nemo | None, batch_size: int, times: bool
) -> Iterator[str]:
    """Let each engine hear the whole pool; yield its name when every clip's `heard` has it. times: of words, too."""
    if nemo:
        for recording in pool:
            recording.compute_features(nemo)
            reference, seconds = _timed(nemo.transcribe, recording.features)
            spoken = [Word(*word) for word in nemo.words(recording.features)] if times else None
            seconds += recording.features_seconds
            recording.clip.heard[NEMO] = Heard(reference.tokens, reference.text, seconds, spoken)
            if recording.clip.one_window:  # a window of a longer clip may well say something else
                recording.reference = reference.tokens, reference.frames
        yield NEMO
    for folder in folders:
        for recording in pool:
            tokens, seconds = _timed(folder.genai.transcribe, recording.samples)
            recording.clip.heard[folder.genai_name] = Heard(tokens, folder.genai.text(tokens), seconds)
        yield folder.genai_name
        for recording in pool:
            recording.compute_features(folder.genai)
        features = [recording.features for recording in pool]
        rule = NEMO_RULE if nemo else GENAI_RULE
        traced, seconds = _timed(folder.raw.transcribe_all, features, rule, batch_size)
        per_second = seconds / sum(recording.clip.seconds for recording in pool)
        for recording, found in zip(pool, traced, strict=True):
            seconds = recording.features_seconds + per_second * recording.clip.seconds
            spoken = words(found.emitted, folder.pieces) if times else None
            recording.clip.heard[folder.raw_name] = Heard(found.tokens, folder.raw_text(found.tokens), seconds, spoken)
            recording.traced[folder.raw_name] = found
        yield folder.raw_name


def compare(recording: Recording, folders: list[Folder], nemo: Nemo | None, alone: bool) -> list[FoundDifference]:
    """Where a float32 engine parts from NeMo, or GenAI from the raw baseline, given its features alone in a batch."""
    clip, reference, differences = recording.clip, recording.reference, []

    def add(engine: str, difference: Difference | None, found: Hypothesis) -> None:
        if difference and difference.excuse and nemo:
            difference = excused_by(nemo.trace(recording.features), difference, found)
        if difference:
            differences.append((clip, engine, difference))

    for folder in folders:
        if not folder.is_float32:
            continue
        traced, tokens = recording.traced[folder.raw_name], clip.heard[folder.genai_name].tokens
        if reference:
            add(folder.raw_name, first_difference(*reference, traced), traced)
        if tokens == (reference[0] if reference else None if nemo else traced.tokens):
            continue
        baseline = folder.raw.transcribe(folder.genai.features(recording.samples)) if nemo or not alone else traced
        difference = first_token_difference(baseline, tokens)
        if reference and difference is None:
            difference = first_difference(*reference, baseline)
        add(folder.genai_name, difference, baseline)
        if not nemo:  # the same features in a batch
            add(folder.raw_name, first_difference(baseline.tokens, baseline.frames, traced), traced)
    return differences


def _timed(function, *args):
    start = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - start


def print_clip(clip: HeardClip, engines: Iterable[str], folders: list[Folder], rules: Sequence[TextRule]) -> None:
    """A table for one clip, a line an engine, as they come; WER in %, as written."""
    print(f"{clip.path}{clip.segment}  {clip.seconds:.1f} s" + ("" if clip.text is None else f"  {clip.text!r}"))
    width = max(len(name) for folder in folders for name in (folder.genai_name, folder.raw_name))
    row = f"  {{:{width}}}  {{:<6}}  {{:<5}}  {{:<12}}  {{}}".format
    print(row("engine", "RTFx", "WER", "against NeMo", "transcript"), flush=True)
    for engine in engines:
        heard = clip.heard[engine]
        rates = percent(clip.text, heard.text), percent_against_nemo(clip, engine, rules)
        print(row(engine, f"{clip.seconds / heard.seconds:.1f}", *rates, heard.text), flush=True)


def print_words(words: list[Word], frame_seconds: float) -> None:
    """A line a word: start and end in seconds."""
    for word in words:
        print(f"  {word.start * frame_seconds:8.2f} {word.end * frame_seconds:8.2f}  {word.text}")


def results(
    clips: list[HeardClip], differences: list[FoundDifference], rules: Sequence[TextRule], frame_seconds: float
) -> dict:
    """Everything, for --json."""

    def plain(heard: Heard) -> dict:
        times = ((word.text, word.start * frame_seconds, word.end * frame_seconds) for word in heard.words or ())
        spoken = [{"text": text, "start": round(start, 3), "end": round(end, 3)} for text, start, end in times]
        return asdict(heard) | {"words": None if heard.words is None else spoken}

    rows = {engine: corpus_row(clips, engine, rules) for engine in clips[0].heard}
    return {
        "engines": {
            engine: {key: asdict(value) if is_dataclass(value) else value for key, value in row.items()}
            for engine, row in rows.items()
        },
        "clips": [
            {
                "audio_filepath": str(clip.path),
                "offset": clip.offset,
                "seconds": clip.seconds,
                "text": clip.text,
                "engines": {engine: plain(heard) for engine, heard in clip.heard.items()},
            }
            for clip in clips
        ],
        "differences": [
            {"audio_filepath": str(clip.path), "offset": clip.offset, "engine": engine, **asdict(difference)}
            for clip, engine, difference in differences
        ],
    }


if __name__ == "__main__":
    raise SystemExit(main())
