"""Conditions under which speech is hard to transcribe: each turns a list of clips into the audio of that condition.

A condition is registered once, in CONDITIONS. Most of them alter one clip at a time; others join clips, or cut joined
clips into pieces. Noise is drawn from the seed, the condition's name and the clip's number, so that a condition gives
the same audio whichever others run beside it. soxr does the resampling.
"""

import itertools
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

TELEPHONE_RATE = 8000  # Hz
CLIPPING_GAIN = 10.0  # 20 dB over full scale
VOICES = 5  # that speak at once in babble
# Clips are joined to this length before they are cut, so that pieces of every length begin at different places in them.
CUT_SECONDS = 60.0
PAUSE_SECONDS = 1.0  # between clips that are joined with pauses
FULL_SCALE_16_BITS = 2.0**15


@dataclass(frozen=True)
class Speech:
    """The clips that conditions alter, and what else conditions need."""

    clips: Sequence[np.ndarray]  # mono samples [N] of each
    sample_rate: int  # Hz
    seed: int = 0

    @property
    def durations(self) -> list[float]:
        """Seconds of each clip."""
        return [len(clip) / self.sample_rate for clip in self.clips]

    def random(self, condition: str, clip: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(condition.encode()), clip])


@dataclass(frozen=True)
class Part:
    """Where in a take a clip, or a part of a clip, lies; in seconds."""

    clip: int
    begin: float
    end: float
    whole: bool = True  # whether the take holds the whole clip


@dataclass(frozen=True)
class Take:
    """The audio that an engine is given at one time."""

    samples: np.ndarray  # [N], mono
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Condition(ABC):
    """What is done to the clips; --stress selects conditions by their `kind`."""

    name: str
    kind: str

    @abstractmethod
    def takes(self, group: Sequence[int], speech: Speech) -> list[Take]:
        """The audio made from one group of clips; the transcripts of these takes together are that of the group."""

    def groups(self, durations: Sequence[float]) -> Iterator[tuple[int, ...]]:
        """The numbers of the clips, in the groups that audio is made from; here each clip by itself.

        durations: the seconds of each clip.
        """
        return ((clip,) for clip in range(len(durations)))

    def possible(self, speech: Speech) -> bool:
        """Whether the speech has what the condition needs."""
        return bool(speech.clips)


# ---- one clip at a time: samples in, samples out


Alter = Callable[[np.ndarray], np.ndarray]


def attenuate(samples: np.ndarray, db: float) -> np.ndarray:
    """The samples made quieter by `db`, and rounded to 16 bits as a recording of that level is."""
    quiet = np.rint(samples * 10 ** (-db / 20) * FULL_SCALE_16_BITS) / FULL_SCALE_16_BITS
    return quiet.astype(np.float32)


def clip_peaks(samples: np.ndarray) -> np.ndarray:
    """The samples amplified until their peak is 20 dB over full scale, and cut off at full scale."""
    peak = float(np.abs(samples).max()) or 1.0
    return np.clip(samples * (CLIPPING_GAIN / peak), -1, 1).astype(np.float32)


def mix(samples: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Samples mixed with noise [N] at a signal-to-noise ratio, taken from their powers over the whole clip."""
    power, noise_power = (float(np.mean(np.square(one, dtype=np.float64))) for one in (samples, noise))
    gain = math.sqrt(power / (noise_power or 1.0)) * 10 ** (-snr_db / 20)
    mixed: np.ndarray = (samples + gain * noise).astype(np.float32)
    return mixed


def telephone(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """The samples as a telephone's 8 kHz keep them, at the rate and length that they had."""
    import soxr

    narrow = soxr.resample(samples, sample_rate, TELEPHONE_RATE)
    wide: np.ndarray = soxr.resample(narrow, TELEPHONE_RATE, sample_rate)
    return np.pad(wide, (0, max(len(samples) - len(wide), 0)))[: len(samples)]


def at_speed(samples: np.ndarray, speed: float) -> np.ndarray:
    """The samples played `speed` times as fast, which raises their pitch by the same factor."""
    import soxr

    played: np.ndarray = soxr.resample(samples, speed, 1.0)
    return played


def babble(speech: Speech, clip: int, draw: np.random.Generator) -> np.ndarray:
    """Several other clips at once, all equally loud and each repeated from a random start, as long as clip `clip`."""
    count = len(speech.clips[clip])
    others = [i for i in range(len(speech.clips)) if i != clip and speech.clips[i].any()]
    total = np.zeros(count)
    for other in draw.choice(others, min(VOICES, len(others)), replace=False):
        voice = speech.clips[other]
        start = int(draw.integers(len(voice)))
        repeated = np.resize(np.roll(voice, -start), count)
        total += repeated / np.sqrt(np.mean(np.square(voice, dtype=np.float64)))
    return total


@dataclass(frozen=True)
class Altered(Condition):
    """Each clip altered by itself."""

    alter: Callable[[np.ndarray, int], np.ndarray]  # samples and their rate in Hz → samples
    lead_seconds: float = 0.0  # of silence before and after

    def takes(self, group: Sequence[int], speech: Speech) -> list[Take]:
        (clip,) = group
        altered = self.alter(speech.clips[clip], speech.sample_rate)
        lead = round(self.lead_seconds * speech.sample_rate)
        end = (lead + len(altered)) / speech.sample_rate
        return [Take(np.pad(altered, lead), (Part(clip, self.lead_seconds, end),))]


@dataclass(frozen=True)
class Noisy(Condition):
    """Each clip in noise."""

    snr_db: float
    noise: Callable[[Speech, int, np.random.Generator], np.ndarray]
    needs_others: bool = False

    def takes(self, group: Sequence[int], speech: Speech) -> list[Take]:
        (clip,) = group
        samples = speech.clips[clip]
        mixed = mix(samples, self.noise(speech, clip, speech.random(self.name, clip)), self.snr_db)
        return [Take(mixed, (Part(clip, 0.0, len(samples) / speech.sample_rate),))]

    def possible(self, speech: Speech) -> bool:
        return not self.needs_others or sum(bool(clip.any()) for clip in speech.clips) > 1


def white_noise(speech: Speech, clip: int, draw: np.random.Generator) -> np.ndarray:
    return draw.standard_normal(len(speech.clips[clip]))


# ---- several clips at a time


@dataclass(frozen=True)
class Joined(Condition):
    """Clips one after the other until they last `seconds` or a little longer."""

    seconds: float
    pause: float = 0.0  # seconds of silence after each clip
    repeats: bool = True  # whether the last group continues with the first clips, to be as long as the others

    def groups(self, durations: Sequence[float]) -> Iterator[tuple[int, ...]]:
        clips = range(len(durations))
        order = itertools.cycle(clips) if self.repeats else iter(clips)
        used = 0
        while used < len(durations):
            group: list[int] = []
            length = 0.0
            while length < self.seconds and (clip := next(order, None)) is not None:
                group.append(clip)
                length += durations[clip] + self.pause
            used += len(group)
            yield tuple(group)

    def takes(self, group: Sequence[int], speech: Speech) -> list[Take]:
        silence = round(self.pause * speech.sample_rate)
        samples = np.concatenate([np.pad(speech.clips[clip], (0, silence)) for clip in group])
        parts = []
        begin = 0.0
        for clip in group:
            seconds = len(speech.clips[clip]) / speech.sample_rate
            parts.append(Part(clip, begin, begin + seconds))
            begin += seconds + silence / speech.sample_rate
        return [Take(samples, tuple(parts))]


@dataclass(frozen=True)
class Cut(Joined):
    """Joined clips, cut into pieces of `piece` seconds wherever the cuts fall; a remainder under half a piece stays
    with the last piece."""

    piece: float = 5.0

    def takes(self, group: Sequence[int], speech: Speech) -> list[Take]:
        (joined,) = super().takes(group, speech)
        rate = speech.sample_rate
        size = round(self.piece * rate)
        count = max(round(len(joined.samples) / size), 1)
        bounds = [*(size * i for i in range(count)), len(joined.samples)]
        return [
            Take(joined.samples[begin:end], tuple(_within(joined.parts, begin / rate, end / rate)))
            for begin, end in itertools.pairwise(bounds)
        ]


def _within(parts: Sequence[Part], begin: float, end: float) -> Iterator[Part]:
    """The parts of a take that lie between `begin` and `end`, with their seconds counted from `begin`."""
    for part in parts:
        inner = max(part.begin, begin), min(part.end, end)
        if inner[0] < inner[1]:
            yield Part(part.clip, inner[0] - begin, inner[1] - begin, inner == (part.begin, part.end))


# ---- the registry


def _unaltered(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    return samples


def _per_sample(function: Alter) -> Callable[[np.ndarray, int], np.ndarray]:
    """An alteration that does not depend on the rate."""
    return lambda samples, sample_rate: function(samples)


CLEAN = Altered("as it is", "clean", _unaltered)
CONDITIONS: tuple[Condition, ...] = (
    CLEAN,
    *(Altered(f"{-db} dB", "level", _per_sample(partial(attenuate, db=db))) for db in (20, 40)),
    Altered("clipped", "level", _per_sample(clip_peaks)),
    *(Altered(f"{s:g} s of silence around", "silence", _unaltered, lead_seconds=s) for s in (0.3, 0.5, 1.0)),
    *(Noisy(f"white noise, {db} dB", "noise", db, white_noise) for db in (20, 12, 5)),
    *(Noisy(f"babble, {db} dB", "noise", db, babble, needs_others=True) for db in (20, 12, 5)),
    Altered("telephone, 8 kHz", "telephone", telephone),
    *(Altered(f"speed {speed}", "speed", _per_sample(partial(at_speed, speed=speed))) for speed in (0.9, 1.1)),
    *(Cut(f"cut to {piece} s", "cut", CUT_SECONDS, repeats=False, piece=piece) for piece in range(5, 15)),
    *(Joined(f"joined to {s} s", "join", s) for s in (30, 60, 120)),
    *(Joined(f"joined to {s} s, with pauses", "join", s, PAUSE_SECONDS) for s in (30, 60, 120)),
)
KINDS = tuple(dict.fromkeys(condition.kind for condition in CONDITIONS if condition is not CLEAN))


def conditions_of(kinds: Sequence[str]) -> list[Condition]:
    """CLEAN, which the others are compared with, and the conditions of these kinds; no kinds stand for all."""
    return [each for each in CONDITIONS if each is CLEAN or not kinds or each.kind in kinds]
