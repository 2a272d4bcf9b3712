"""What a word error rate over short clips does not show: speech without a word, and a phrase again and again.

* The samples are cut into frames of 30 ms. The level of speech in a clip is the mean power of the frames that are at
  most 10 dB below the mean power of all (the relative gate of ITU-R BS.1770). Frames at most 20 dB below that level are
  *speech*: pauses in a quiet room are not, and digital silence never is.
* A token stands at the encoder frame at which it was emitted, and lasts as long as the model's longest duration (0.32 s
  in published checkpoints). Marks and special tokens are no words. These frames are the library's own for NeMo and
  transformers; plain ONNX Runtime has them too. GenAI gives none, so nothing is known of its blank stretches.
* A blank stretch lies between two tokens, before the first or after the last, and holds more than 3 s of speech. It
  begins and ends with a frame of speech, and does not count the pauses within it.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.checkpoint.tokenizer import SPACE
from common.cli import print_table
from common.evaluate.words import MAX_PRINTED_CLIPS, NONE, Pieces, normalize
from common.run.config import RuntimeConfig
from common.run.decode import Transcript

FRAME_SECONDS = 0.03
GATE_DB = 10.0
RANGE_DB = 20.0  # below the level of speech
SILENCE = 1e-9  # power: -90 dB of full scale, the least that 16 bits hold
MIN_SECONDS = 3.0  # of speech in a blank stretch
EDGE_SECONDS = 0.5  # at each end of a blank stretch, in which a word of another engine may be its neighbour
# The shortest phrase of up to eight words that is there four times in a row or more.
REPEATED = re.compile(r"(?<!\S)(\S+(?: \S+){0,7}?)(?: \1){3,}(?!\S)")


@dataclass(frozen=True)
class Blank:
    """A stretch of speech without a word, in seconds. The names of the fields are keys of JSON, and below as well."""

    start: float
    end: float
    speech: float  # of this, at the level of speech
    reference_has_words: bool | None = None  # None: there is no other engine with times to compare with


@dataclass(frozen=True)
class Flaws:
    """What is suspicious in one engine's transcript, whatever its word errors."""

    blank: list[Blank] | None  # None: the engine gives no times
    repeated: list[str]  # phrases, without case and punctuation, that the clip's text does not repeat

    @property
    def alone(self) -> list[Blank]:
        """The blank stretches in which the reference has words."""
        return [each for each in self.blank or () if each.reference_has_words]

    def __add__(self, other: "Flaws") -> "Flaws":
        """These flaws, and the flaws of the same engine in audio that follows."""
        known = None if self.blank is None or other.blank is None else self.blank + other.blank
        return Flaws(known, self.repeated + other.repeated)


def find_flaws(
    samples: np.ndarray,
    transcripts: Mapping[str, Transcript],
    pieces: Pieces,
    config: RuntimeConfig,
    *,
    reference: str | None,
    text: str | None,
    begin: float = 0.0,
) -> dict[str, Flaws]:
    """The flaws of each engine's transcript of mono samples [N]. In a clip whose text has no word nobody speaks.

    reference: the engine that the others are compared with, where there is one. begin: seconds of audio before these.
    """
    speech = speech_frames(samples, config.sample_rate)
    if text is not None and not normalize(text):
        speech[:] = False
    times = {  # when each token that belongs to a word was emitted, in seconds
        name: [
            frame * config.frame_seconds
            for token, frame in zip(made.tokens, made.frames, strict=True)
            if token not in pieces.special and pieces.names[token].lstrip(SPACE) not in pieces.marks
        ]
        for name, made in transcripts.items()
        if made.frames is not None
    }
    expected = times.get(reference or "")
    lasting = max(config.durations) * config.frame_seconds
    allowed = repeated_phrases(text or "")
    flaws = {}
    for name, made in transcripts.items():
        blank = []
        for each in blank_stretches(speech, times.get(name, ()), lasting):
            has_words = None
            if expected is not None and name != reference:
                has_words = any(each.start + EDGE_SECONDS <= time <= each.end - EDGE_SECONDS for time in expected)
            blank.append(Blank(each.start + begin, each.end + begin, each.speech, has_words))
        repeated = [phrase for phrase in repeated_phrases(made.text) if phrase not in allowed]
        flaws[name] = Flaws(blank if name in times else None, repeated)
    return flaws


def speech_frames(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """samples [N] → whether each frame of 30 ms is speech, [F]; a shorter rest is left out."""
    size = round(FRAME_SECONDS * sample_rate)
    frames = samples[: len(samples) // size * size].reshape(-1, size)
    power = np.einsum("fs,fs->f", frames, frames) / size
    loud = power[power >= power.mean() * 10 ** (-GATE_DB / 10)] if len(power) else power
    level = float(loud.mean()) if len(loud) else 0.0
    speech: np.ndarray = power >= max(level * 10 ** (-RANGE_DB / 10), SILENCE)
    return speech


def blank_stretches(speech: np.ndarray, times: Iterable[float], lasting: float) -> Iterator[Blank]:
    """The stretches of `speech` [F] between words that begin at these times, in seconds and ascending, and last so
    long."""
    begin = 0
    for time in (*times, math.inf):
        end = int(min(time / FRAME_SECONDS, len(speech)))
        inside = begin + np.flatnonzero(speech[begin:end])
        if len(inside) * FRAME_SECONDS > MIN_SECONDS:
            start, stop, seconds = (n * FRAME_SECONDS for n in (int(inside[0]), int(inside[-1]) + 1, len(inside)))
            yield Blank(round(start, 2), round(stop, 2), round(seconds, 2))
        begin = math.ceil((time + lasting) / FRAME_SECONDS) if time < math.inf else end


def repeated_phrases(text: str) -> list[str]:
    """The words or phrases that follow each other four times or more, each once, without case and punctuation."""
    return list(dict.fromkeys(match[1] for match in REPEATED.finditer(normalize(text))))


def flaws_table(clips: Iterable[tuple[str, Mapping[str, Flaws]]], reference: str | None) -> list[tuple[str, ...]]:
    """Titles, and a row for each flaw: clip, engine, what it is, and what the reference has there. Rows where only an
    engine of ours is blank come first; [] for no flaw."""
    there = {True: "has words there", False: "blank as well", None: NONE}
    rows = []
    for clip, flaws in clips:
        for engine, each in flaws.items():
            for blank in each.blank or ():
                stretch = f"blank {blank.start:.1f} to {blank.end:.1f} s, {blank.speech:.1f} s of it speech"
                rows.append((clip, engine, stretch, there[blank.reference_has_words]))
            rows += [(clip, engine, f"repeated {phrase!r}", NONE) for phrase in each.repeated]
    rows.sort(key=lambda row: row[3] != there[True])
    return [("clip", "engine", "suspicious", reference or "reference"), *rows] if rows else []


def print_flaws(table: Sequence[tuple[str, ...]], without_times: Iterable[str] = ()) -> None:
    """Print the table, cut off where it is long, and name the engines of whose blank stretches nothing is known."""
    print_table(table[: MAX_PRINTED_CLIPS + 1])
    if len(table) > MAX_PRINTED_CLIPS + 1:
        print(f"and {len(table) - MAX_PRINTED_CLIPS - 1} more, which are in the results")
    meaning = "blank for more than 3 s of speech, or repeats words four times in a row (docs/stress.md)"
    print(f"suspicious: it is {meaning}" if table else f"no transcript is {meaning}")
    if names := ", ".join(without_times):
        print(f"blank stretches are not known of {names}, since GenAI gives no times")
