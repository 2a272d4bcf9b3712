"""What an optimized folder costs in words: float32 and it, on the same clips, judged by how far the error rate rises.

Both run in plain ONNX Runtime by GenAI's greedy rule, on the features of GenAI's processor, which the optimized folder
itself is loaded for; NeMo is not needed.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.clips import Clip
from common.console import CheckError
from common.optimize import sqnr_db
from common.runtime import MAPPED, GenAI, RawOrt
from common.transcripts import (
    WordErrorRate,
    high_error_warning,
    normalize,
    word_changes,
    word_error_rate,
    word_errors,
)

CONTEXT = 4  # words shown before and after a change
MAX_PRINTED_CLIPS = 20  # more than a person reads; they are all in the report


@dataclass(frozen=True)
class Heard:
    """One clip, and what both folders made of it."""

    name: str
    lang: str | None
    seconds: float
    text: str
    float32: str
    optimized: str
    sqnr_db: float  # of the encoder's output, infinite where both are equal

    @property
    def errors(self) -> tuple[int, int]:
        """Word errors of both, normalised."""
        text, *heard = (normalize(words) for words in (self.text, self.float32, self.optimized))
        return tuple(word_errors(text, words)[0] for words in heard)


@dataclass(frozen=True)
class Words:
    """Word error rates over all clips, or over those of one language; `increase` in percentage points."""

    lang: str | None
    clips: int
    float32: WordErrorRate
    optimized: WordErrorRate
    increase: WordErrorRate

    def __str__(self) -> str:
        rise = self.increase
        if not rise.words:
            return f"WER {self.float32} → {self.optimized}  of no words"
        points = f"{rise.percent:+.2f} points [{rise.low:+.2f}, {rise.high:+.2f}]"
        return f"WER {self.float32} → {self.optimized}  {points} of {rise.words} words"


def listen(
    exported: Path,
    optimized: Path,
    manifest: Path,
    clips: list[Clip],
    progress: Callable[[list[Clip]], Iterable[Clip]] = lambda clips: clips,
) -> list[Heard]:
    """Transcribe the clips of `manifest` with both folders. Raises CheckError where the optimized one fails, and as
    RawOrt, GenAI and read_audio do.

    Each folder's tokens are shown by its own tokenizer, so that one that loses words is counted.
    Float32 weights stay in the data file: both models are in memory at once, and one of them is small.
    """
    from tokenizers import Tokenizer

    genai, float32, small = GenAI(optimized), _Tapped(exported, MAPPED), _Tapped(optimized)
    exported_tokenizer = Tokenizer.from_file(str(exported / "tokenizer.json"))
    heard = []
    for clip in progress(clips):
        samples = genai.config.read_clip(clip)
        features = genai.features(samples)
        wanted, wanted_encoded = float32.hear(features)
        try:
            found, found_encoded = small.hear(features)
        except ValueError as error:
            raise CheckError(f"the optimized model fails on {clip.path}: {error}") from error
        heard.append(
            Heard(
                _name(clip.path, manifest) + clip.segment,
                clip.lang,
                len(samples) / genai.config.sample_rate,
                clip.text,
                exported_tokenizer.decode(wanted).strip(),
                genai.text(found),
                sqnr_db(wanted_encoded, found_encoded),
            )
        )
    return heard


class _Tapped(RawOrt):
    """The raw path, whose encoder's outputs are kept for a clip."""

    def encode(self, features: Sequence[np.ndarray]) -> list[np.ndarray]:
        encoded = super().encode(features)
        self.encoded += encoded
        return encoded

    def hear(self, features: np.ndarray) -> tuple[list[int], np.ndarray]:
        """features [M, T] → tokens, and what the encoder gave in all windows, [S, D]"""
        self.encoded: list[np.ndarray] = []
        return self.transcribe(features).tokens, np.concatenate(self.encoded)


def _name(path: Path, manifest: Path) -> str:
    """A clip's path below its manifest, or its name alone: a report shows no home directory."""
    return path.relative_to(manifest.parent).as_posix() if path.is_relative_to(manifest.parent) else path.name


def word_table(heard: list[Heard], write: Callable[[str], str] = normalize) -> list[Words]:
    """Error rates over all clips, then by language where clips have one; texts compared as `write` writes them."""
    langs = sorted({clip.lang for clip in heard if clip.lang is not None})
    groups = [(None, heard), *((lang, [clip for clip in heard if clip.lang == lang]) for lang in langs)]
    table = []
    for lang, clips in groups:
        texts, float32, optimized = (
            [write(getattr(clip, field)) for clip in clips] for field in ("text", "float32", "optimized")
        )
        rates = (word_error_rate(texts, float32), word_error_rate(texts, optimized))
        table.append(Words(lang, len(clips), *rates, word_error_rate(texts, optimized, float32)))
    return table


def changed(heard: list[Heard]) -> list[Heard]:
    """The clips of which the two say different words, those that got worse by most first."""
    unlike = [clip for clip in heard if clip.float32 != clip.optimized]
    return sorted(unlike, key=lambda clip: clip.errors[0] - clip.errors[1])


def marked(clip: Heard) -> list[tuple[str, str]]:
    """Runs of words of both transcripts as written; what is equal and far from any change is cut to an ellipsis."""
    runs = word_changes(clip.float32, clip.optimized)
    last = len(runs) - 1
    return [
        (shown, shown) if one == other and (shown := _shortened(one, i == 0, i == last)) else (one, other)
        for i, (one, other) in enumerate(runs)
    ]


def _shortened(words: str, first: bool, last: bool) -> str:
    """The ends of an equal run that are near a change."""
    split = words.split()
    begin, end = 0 if first else CONTEXT, 0 if last else CONTEXT
    return words if len(split) <= begin + end + 1 else " ".join([*split[:begin], "…", *split[len(split) - end :]])


def print_words(table: list[Words], heard: list[Heard]) -> None:
    """A line a language, and the clips that changed: [old → new], with their errors before and after."""
    for words in table[1:]:
        print(f"  {words.lang}: {words.clips} clips  {words}")
    warning = high_error_warning(table[0].float32)
    if warning:
        print(warning)
    for side in ("float32", "optimized"):
        if not any(getattr(clip, side).strip() for clip in heard):
            print(f"warning: every transcript of the {side} model is empty, so nothing can be said of its words")
    unlike = changed(heard)
    for clip in unlike[:MAX_PRINTED_CLIPS]:
        text = " ".join(one if one == other else f"[{one or '–'} → {other or '–'}]" for one, other in marked(clip))
        print(f"  {clip.name}: {clip.errors[0]} → {clip.errors[1]} errors  {text}")
    if len(unlike) > MAX_PRINTED_CLIPS:
        print(f"  and {len(unlike) - MAX_PRINTED_CLIPS} more clips")


def judge(table: list[Words], limit: float) -> None:
    """Raise CheckError if the error rate over all clips, or that of one language, rises by more than `limit` points.

    A language that got worse may hide in the whole, so each is held to the limit; where it has few words, one decides.
    Where its clips are silent it has no rate, and words that were inserted count in the whole.
    """
    if not table[0].increase.words:
        raise CheckError("expected texts with words to judge by, got none, so nothing was compared; nothing is written")
    beyond = [
        f"{words.increase.percent:+.2f} points{f' in {words.lang}' if words.lang else ''} "
        f"({words.increase.errors} of {words.increase.words} words)"
        for words in table
        if words.increase.words and words.increase.percent > limit
    ]
    if beyond:
        raise CheckError(
            f"the word error rate rises by {', '.join(beyond)}, wanted at most +{limit:g}; nothing is written "
            "(without --max_wer_increase the folder is, with a report of it)"
        )
