"""Transcribe real speech with NeMo, plain ONNX Runtime and ONNX Runtime GenAI side by side, and count the words.

In: a model folder; clips (any format, rate and channels that libsndfile reads), or a NeMo manifest of clips with text.
Out: per clip, or per corpus, a table: engine, speed, word error rate against the text and against NeMo, transcript.
Every engine gets the same samples: mono, resampled once to the model's rate. NeMo computes its features itself and raw
ONNX Runtime is given those (with --skip_nemo: GenAI's); GenAI computes its own. An optimized folder brings along the
exported one that it was made from. Exit status 1 when float32 ONNX differs from NeMo in a token for no listed reason.

    python test_real_speech.py --audio samples/jfk.wav
    python test_real_speech.py --manifest samples/manifest.jsonl
"""

import argparse
import time
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.clips import Clip, read_clips
from common.console import CheckError, Parser, run
from common.decode import GENAI_RULE, NEMO_RULE
from common.files import MODEL_DIR_HELP, check_output_file, default_model_dir, read_manifest, write_json
from common.model import find_checkpoint, load_model, recorded_checkpoint
from common.runtime import GenAI, Nemo, RawOrt
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
    return parser.parse_args(argv)


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


class Folder:
    """A model folder in both of its runtimes."""

    def __init__(self, path: Path):
        self.path, self.genai, self.raw = path, GenAI(path), RawOrt(path)
        optimized = read_manifest(path).get("optimize")
        flags = optimized["flags"] if optimized else {"skip_quantization": True}
        self.is_float32 = flags["skip_quantization"] and flags.get("decoder_joint_precision", "fp32") == "fp32"

    @property
    def raw_name(self) -> str:
        return f"ONNX Runtime {self.path.name}"

    @property
    def genai_name(self) -> str:
        return f"GenAI {self.path.name}"


def _compare(args: argparse.Namespace) -> None:
    if args.json:
        check_output_file(args.json)
    listed = read_clips(args.manifest) if args.manifest else [Clip(path) for path in args.audio]
    clips = [HeardClip(**vars(clip)) for clip in listed]
    folders = [Folder(path) for path in _folders(args.model_dir or default_model_dir())]
    nemo = None if args.skip_nemo else _load_nemo(args.model_name, folders[-1])
    sample_rate = folders[0].genai.config.sample_rate
    noise = np.random.default_rng(0).normal(0, 0.1, sample_rate).astype(np.float32)
    transcribe(HeardClip(SAMPLE), noise, folders, nemo)  # warm-up: the first run of an engine allocates

    differences = []
    few = len(clips) <= MAX_PRINTED_CLIPS
    for clip in tqdm(clips, unit="clip", leave=False, disable=few or None):  # None: no bar in a pipe
        samples = folders[0].genai.config.read_audio(clip.path)
        clip.seconds = len(samples) / sample_rate
        differences += [(clip, *found) for found in transcribe(clip, samples, folders, nemo)]
        if few:
            print_clip(clip)
    if len(clips) > 1 or args.manifest:
        print_corpus(clips)
    if args.json:
        write_json(args.json, results(clips, differences))
    judge(differences)
    if nemo:
        print_verdict(clips, folders, differences)


def _load_nemo(model_name: str | None, folder: Folder) -> Nemo:
    checkpoint = find_checkpoint(model_name) if model_name else recorded_checkpoint(folder.path)
    nemo = Nemo(load_model(checkpoint))
    if nemo.model.decoder.blank_idx != folder.genai.config.blank_id:
        raise ValueError(f"{checkpoint} has another vocabulary than {folder.path}: it was not exported from there")
    return nemo


def _folders(folder: Path) -> list[Path]:
    """The exported folder that `folder` was optimized from, where it is still there, and `folder`."""
    source = read_manifest(folder).get("optimize", {}).get("model_dir")
    exported = folder / source if source else None
    return [Path(exported).resolve(), folder] if exported and exported.is_dir() else [folder]


def transcribe(
    clip: HeardClip, samples: np.ndarray, folders: list[Folder], nemo: Nemo | None
) -> list[tuple[str, Difference]]:
    """Fill `clip.heard`; return where a float32 engine parts from NeMo, or GenAI from the raw baseline."""
    text = folders[0].genai.text
    features, features_seconds = _timed((nemo or folders[0].genai).features, samples)
    reference = None
    if nemo:
        reference, seconds = _timed(nemo.transcribe, features)
        clip.heard[NEMO] = Heard(reference[0], text(reference[0]), features_seconds + seconds)
        if not folders[0].genai.config.fits_one_window(clip.seconds):
            reference = None  # NeMo sees the whole clip at once; a window does not, and may well say something else
    differences = []
    for folder in folders:
        traced, seconds = _timed(folder.raw.transcribe, features, NEMO_RULE if nemo else GENAI_RULE)
        clip.heard[folder.raw_name] = Heard(traced.tokens, text(traced.tokens), features_seconds + seconds)
        tokens, seconds = _timed(folder.genai.transcribe, samples)
        clip.heard[folder.genai_name] = Heard(tokens, text(tokens), seconds)
        if not folder.is_float32:
            continue
        if reference:
            differences.append((folder.raw_name, first_difference(*reference, traced)))
        if not reference or tokens != reference[0]:
            baseline = folder.raw.transcribe(folder.genai.features(samples)) if nemo else traced
            difference = first_token_difference(baseline, tokens)
            if reference and difference is None:
                difference = first_difference(*reference, baseline)
            differences.append((folder.genai_name, difference))
    return [(engine, difference) for engine, difference in differences if difference]


def _timed(function, *args):
    start = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - start


def print_clip(clip: HeardClip) -> None:
    """A table for one clip; WER in %, as written."""
    print(f"{clip.path}  {clip.seconds:.1f} s" + ("" if clip.text is None else f"  {clip.text!r}"))
    rows = [("  engine", "RTFx", "WER", "against NeMo", "transcript")]
    for engine, heard in clip.heard.items():
        nemo = clip.heard[NEMO].text if NEMO in clip.heard and engine != NEMO else None
        rates = (_percent(reference, heard.text) for reference in (clip.text, nemo))
        rows.append((f"  {engine}", f"{clip.seconds / heard.seconds:.1f}", *rates, heard.text))
    _print_table(rows)


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


def results(clips: list[HeardClip], differences: list[tuple[HeardClip, str, Difference]]) -> dict:
    """Everything, for --json."""
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
                "engines": {engine: asdict(heard) for engine, heard in clip.heard.items()},
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


if __name__ == "__main__":
    raise SystemExit(main())
