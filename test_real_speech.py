"""Transcribe real speech with NeMo, plain ONNX Runtime and ONNX Runtime GenAI side by side, and count the words.

In: a model folder; clips (any format, rate and channels that libsndfile reads), or a NeMo manifest of clips with text.
Out: per clip, or per corpus, a table: engine, speed, word error rate against the text and against NeMo, transcript.
Every engine gets the same samples: mono, resampled once to the model's rate. NeMo computes its features itself and raw
ONNX Runtime is given those (with --skip_nemo: GenAI's); GenAI computes its own. An optimized folder brings along the
exported one that it was made from. Exit status 1 when float32 ONNX differs from NeMo in a token for no listed reason,
or in a word's time by more than an encoder frame.

Engines are loaded when their turn comes, and a line is printed when it is there: with --skip_nemo, the first as soon as
GenAI has it. Speed is that of a warm engine, features included; of a batch's time each clip has its share by length.

    python test_real_speech.py --audio my.wav --skip_nemo
    python test_real_speech.py --audio my.wav --skip_nemo --timestamps --srt my.srt
    python test_real_speech.py --manifest samples/manifest.jsonl
"""

import argparse
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.clips import Clip, read_clips
from common.console import CheckError, Parser, run
from common.decode import GENAI_RULE, NEMO_RULE, Hypothesis
from common.download import find_checkpoint
from common.files import (
    EXPORTED,
    MODEL_DIR_HELP,
    check_output_file,
    default_model_dir,
    is_float16,
    read_location,
    read_manifest,
    write_json,
    write_text,
)
from common.layouts import genai_folder
from common.model import load_model, recorded_checkpoint
from common.runtime import GenAI, Nemo, RawOrt, RuntimeConfig
from common.timestamps import Pieces, Word, furthest_apart, srt, words
from common.transcripts import (
    CONFIDENCE,
    Difference,
    first_difference,
    first_token_difference,
    normalize,
    word_error_rate,
    word_errors,
)

SAMPLE = Path(__file__).resolve().parent / "samples" / "jfk.wav"
NEMO = "NeMo"
# More transcripts than a person reads; they are in the --json file.
MAX_PRINTED_CLIPS = 20
# Of as much audio clips are sorted by length into batches: more pad less, and take more memory, 8 MB a minute.
POOL_SECONDS = 1200
# Furthest that a word's time may be from NeMo's, in encoder frames.
TIMES_TOLERANCE = 1


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model_dir", type=Path, help=MODEL_DIR_HELP)
    reference = parser.add_mutually_exclusive_group()
    reference.add_argument("--model_name", help="NeMo reference (the checkpoint in manifest.json)")
    reference.add_argument("--skip_nemo", action="store_true", help="do without NeMo, which is then not even imported")
    clips = parser.add_mutually_exclusive_group()
    clips.add_argument("--audio", type=Path, nargs="+", default=[SAMPLE], help="clips (samples/jfk.wav)")
    clips.add_argument("--manifest", type=Path, help="NeMo manifest: JSON lines with audio_filepath and text")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every transcript and figure to FILE")
    parser.add_argument(
        "--batch_size", type=int, default=1, help="clips that plain ONNX Runtime takes at a time (%(default)s)"
    )
    parser.add_argument(
        "--timestamps", action="store_true",
        help="print each word with its start and end in seconds, by plain ONNX Runtime (GenAI tells no times); with "
        "NeMo, compare them with its own",
    )  # fmt: skip
    parser.add_argument("--srt", type=Path, metavar="FILE", help="write the words of one clip as subtitles to FILE")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f"argument --batch_size: wanted 1 or more, found {args.batch_size}")
    if args.srt and (args.manifest or len(args.audio) != 1):
        parser.error("argument --srt: wanted one clip, given with --audio, for one file of subtitles")
    return args


def main(argv: list[str] | None = None) -> int:
    return run(_compare, parse_args(argv))


@dataclass
class HeardClip(Clip):
    """One clip and what each engine made of it."""

    seconds: float = 0.0
    heard: dict[str, "Heard"] = field(default_factory=dict)


@dataclass(frozen=True)
class Heard:
    """One engine's result on one clip; `seconds` is the time it took, features included."""

    tokens: list[int]
    text: str
    seconds: float
    words: list[Word] | None = None  # where times were asked for, of the engines that tell them


class Folder:
    """A model folder in both of its runtimes, each loaded and warm (its first run allocates) when it is asked for."""

    def __init__(self, path: Path):
        self.path, self.config, manifest = path, RuntimeConfig.read(path), read_manifest(path)
        optimized = manifest.get("optimize")
        flags = optimized["flags"] if optimized else {"skip_quantization": True}
        unquantized = flags["skip_quantization"] and flags.get("decoder_joint_precision", "fp32") == "fp32"
        self.is_float32 = unquantized and not is_float16(manifest)
        self.genai_name, self.raw_name = f"GenAI {path.name}", f"ONNX Runtime {path.name}"

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


def _compare(args: argparse.Namespace) -> None:
    for output in filter(None, (args.json, args.srt)):
        check_output_file(output)
    listed = read_clips(args.manifest) if args.manifest else [Clip(path) for path in args.audio]
    clips = [HeardClip(**vars(clip)) for clip in listed]
    folders = [Folder(path) for path in _folders(genai_folder(args.model_dir or default_model_dir()))]
    config = folders[0].genai.config  # loads GenAI: what a folder lacks shows before NeMo takes its time
    nemo = None if args.skip_nemo else _load_nemo(args.model_name, folders[0])
    times = args.timestamps or args.srt is not None

    differences = []
    few, alone = len(clips) <= MAX_PRINTED_CLIPS, args.batch_size == 1
    with tqdm(total=len(clips), unit="clip", leave=False, disable=few or None) as progress:  # None: no bar in a pipe
        for pool in read_pools(clips, config, alone):
            engines = transcribe(pool, folders, nemo, args.batch_size, times)
            if few and alone:
                print_clip(pool[0].clip, engines, folders)
            for _ in engines:
                pass
            for recording in pool:
                if few and not alone:
                    print_clip(recording.clip, recording.clip.heard, folders)
                if few and args.timestamps:
                    print_words(recording.clip.heard[folders[0].raw_name].words, config.frame_seconds)
                differences += compare(recording, folders, nemo, alone)
            progress.update(len(pool))
    if len(clips) > 1 or args.manifest:
        print_corpus(clips)
    if args.json:
        write_json(args.json, results(clips, differences, config.frame_seconds))
    if args.srt:
        write_text(args.srt, srt(clips[0].heard[folders[0].raw_name].words, config.frame_seconds))
    judge(differences)
    if nemo:
        print_verdict(clips, folders, differences)
    if nemo and times:
        judge_times(clips, folders)


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
    """The clips with their samples: one at a time, or pools to make batches of. Raises as read_audio does."""
    pool, seconds = [], 0.0
    for clip in clips:
        pool.append(Recording(clip, config.read_audio(clip.path)))
        clip.seconds = len(pool[-1].samples) / config.sample_rate
        seconds += clip.seconds
        if alone or seconds >= POOL_SECONDS or clip is clips[-1]:
            yield pool
            pool, seconds = [], 0.0


def transcribe(
    pool: list[Recording], folders: list[Folder], nemo: Nemo | None, batch_size: int, times: bool
) -> Iterator[str]:
    """Let each engine hear the whole pool; yield its name when every clip's `heard` has it. times: of words, too."""
    text = folders[0].genai.text
    if nemo:
        for recording in pool:
            recording.compute_features(nemo)
            reference, seconds = _timed(nemo.transcribe, recording.features)
            spoken = [Word(*word) for word in nemo.words(recording.features)] if times else None
            seconds += recording.features_seconds
            recording.clip.heard[NEMO] = Heard(reference[0], text(reference[0]), seconds, spoken)
            if folders[0].config.fits_one_window(recording.clip.seconds):
                recording.reference = reference  # a window of a longer clip may well say something else
        yield NEMO
    for folder in folders:
        for recording in pool:
            tokens, seconds = _timed(folder.genai.transcribe, recording.samples)
            recording.clip.heard[folder.genai_name] = Heard(tokens, text(tokens), seconds)
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
            recording.clip.heard[folder.raw_name] = Heard(found.tokens, text(found.tokens), seconds, spoken)
            recording.traced[folder.raw_name] = found
        yield folder.raw_name


def compare(
    recording: Recording, folders: list[Folder], nemo: Nemo | None, alone: bool
) -> list[tuple[HeardClip, str, Difference]]:
    """Where a float32 engine parts from NeMo, or GenAI from the raw baseline, given its features alone in a batch."""
    clip, reference, differences = recording.clip, recording.reference, []
    for folder in folders:
        if not folder.is_float32:
            continue
        traced, tokens = recording.traced[folder.raw_name], clip.heard[folder.genai_name].tokens
        if reference:
            differences.append((folder.raw_name, first_difference(*reference, traced)))
        if tokens == (reference[0] if reference else None if nemo else traced.tokens):
            continue
        baseline = folder.raw.transcribe(folder.genai.features(recording.samples)) if nemo or not alone else traced
        difference = first_token_difference(baseline, tokens)
        if reference and difference is None:
            difference = first_difference(*reference, baseline)
        differences.append((folder.genai_name, difference))
        if not nemo:  # the same features in a batch
            differences.append((folder.raw_name, first_difference(baseline.tokens, baseline.frames, traced)))
    return [(clip, engine, difference) for engine, difference in differences if difference]


def _timed(function, *args):
    start = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - start


def print_clip(clip: HeardClip, engines: Iterable[str], folders: list[Folder]) -> None:
    """A table for one clip, a line an engine, as they come; WER in %, as written."""
    print(f"{clip.path}  {clip.seconds:.1f} s" + ("" if clip.text is None else f"  {clip.text!r}"))
    width = max(len(name) for folder in folders for name in (folder.genai_name, folder.raw_name))
    row = f"  {{:{width}}}  {{:<6}}  {{:<5}}  {{:<12}}  {{}}".format
    print(row("engine", "RTFx", "WER", "against NeMo", "transcript"), flush=True)
    for engine in engines:
        heard = clip.heard[engine]
        nemo = clip.heard[NEMO].text if NEMO in clip.heard and engine != NEMO else None
        rates = (_percent(reference, heard.text) for reference in (clip.text, nemo))
        print(row(engine, f"{clip.seconds / heard.seconds:.1f}", *rates, heard.text), flush=True)


def print_words(words: list[Word], frame_seconds: float) -> None:
    """A line a word: start and end in seconds."""
    for word in words:
        print(f"  {word.start * frame_seconds:8.2f} {word.end * frame_seconds:8.2f}  {word.text}")


def _percent(reference: str | None, hypothesis: str) -> str:
    if reference is None:
        return "–"
    errors, words = word_errors(reference, hypothesis)
    return f"{100 * errors / max(words, 1):.1f}"


def print_corpus(clips: list[HeardClip]) -> None:
    """One table over all clips, a line an engine."""
    seconds = sum(clip.seconds for clip in clips)
    print(
        f"{len(clips)} clips, {seconds:.0f} s; WER with its {CONFIDENCE} % bootstrap interval over clips; normalised:"
    )
    print("without case and punctuation (whisper_normalizer); against NeMo: as written")
    rows = [("engine", "RTFx", "WER", "normalised WER", "against NeMo", "clips unlike NeMo")]
    for engine in clips[0].heard:
        row = corpus_row(clips, engine)
        rates = (str(row.get(key, "–")) for key in ("wer", "normalised_wer", "wer_against_nemo", "clips_unlike_nemo"))
        rows.append((engine, f"{row['rtfx']:.1f}", *rates))
    _print_table(rows)


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def corpus_row(clips: list[HeardClip], engine: str) -> dict:
    """One engine's figures over the clips; a WER only where there is something to compare with."""
    heard = [clip.heard[engine] for clip in clips]
    row = {"rtfx": sum(clip.seconds for clip in clips) / sum(one.seconds for one in heard)}
    pairs = [(clip.text, one.text) for clip, one in zip(clips, heard, strict=True) if clip.text is not None]
    if pairs:
        references, hypotheses = zip(*pairs, strict=True)
        row["wer"] = word_error_rate(references, hypotheses)
        row["normalised_wer"] = word_error_rate([*map(normalize, references)], [*map(normalize, hypotheses)])
    if NEMO in clips[0].heard and engine != NEMO:
        nemo = [clip.heard[NEMO] for clip in clips]
        row["wer_against_nemo"] = word_error_rate([one.text for one in nemo], [one.text for one in heard])
        row["clips_unlike_nemo"] = sum(one.tokens != other.tokens for one, other in zip(nemo, heard, strict=True))
    return row


def results(clips: list[HeardClip], differences: list[tuple[HeardClip, str, Difference]], frame_seconds: float) -> dict:
    """Everything, for --json."""

    def plain(heard: Heard) -> dict:
        times = ((word.text, word.start * frame_seconds, word.end * frame_seconds) for word in heard.words or ())
        spoken = [{"text": text, "start": round(start, 3), "end": round(end, 3)} for text, start, end in times]
        return asdict(heard) | {"words": None if heard.words is None else spoken}

    rows = {engine: corpus_row(clips, engine) for engine in clips[0].heard}
    return {
        "engines": {
            engine: {key: asdict(value) if is_dataclass(value) else value for key, value in row.items()}
            for engine, row in rows.items()
        },
        "clips": [
            {
                "audio_filepath": str(clip.path),
                "seconds": clip.seconds,
                "text": clip.text,
                "engines": {engine: plain(heard) for engine, heard in clip.heard.items()},
            }
            for clip in clips
        ],
        "differences": [
            {"audio_filepath": str(clip.path), "engine": engine, **asdict(difference)}
            for clip, engine, difference in differences
        ],
    }


def judge(differences: list[tuple[HeardClip, str, Difference]]) -> None:
    """List every difference of a float32 engine; raise CheckError if one has no excuse."""
    for clip, engine, difference in differences:
        print(
            f"{clip.path}: {engine} parts at emission {difference.index}, frame {difference.frame}: token "
            f"{difference.found} for {difference.wanted}; {difference.excuse or 'nothing excuses it'}"
        )
    unexcused = [difference for *_, difference in differences if difference.excuse is None]
    if unexcused:
        raise CheckError(f"float32 ONNX differs from its reference in {len(unexcused)} cases, listed above")


def print_verdict(
    clips: list[HeardClip], folders: list[Folder], differences: list[tuple[HeardClip, str, Difference]]
) -> None:
    """Say in one line what the comparison of float32 with NeMo came to."""
    config = folders[0].genai.config
    compared = [clip for clip in clips if config.fits_one_window(clip.seconds)]
    if any(folder.is_float32 for folder in folders) and compared:
        unlike = {clip.path for clip, *_ in differences}
        equal = sum(clip.path not in unlike for clip in compared)
        print(f"float32 ONNX equals NeMo token for token on {equal} of {len(compared)} clips of one window")


def judge_times(clips: list[HeardClip], folders: list[Folder]) -> None:
    """Say how far the words of float32 ONNX are from NeMo's own times; raise CheckError if further than the tolerance.

    Compared are clips of one window whose tokens are the same, without bytes, of which NeMo makes other words.
    """
    for folder in (folder for folder in folders if folder.is_float32):
        count = furthest = 0
        for clip in clips:
            wanted, found = clip.heard[NEMO], clip.heard[folder.raw_name]
            odd = (folder.pieces.byte_ids | folder.pieces.special).intersection(wanted.tokens)
            if odd or wanted.tokens != found.tokens or not folder.config.fits_one_window(clip.seconds):
                continue
            count += len(wanted.words)
            furthest = max(furthest, furthest_apart(wanted.words, found.words))
        print(f"{folder.raw_name}: {count} words, none further from NeMo's own times than {furthest} encoder frames")
        if furthest > TIMES_TOLERANCE:
            raise CheckError(f"wanted words within {TIMES_TOLERANCE} encoder frame of NeMo's own, found {furthest}")


if __name__ == "__main__":
    raise SystemExit(main())
