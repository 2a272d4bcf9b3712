"""Conditions under which speech is hard to transcribe: each turns a list of clips into the audio of that condition.

All are listed in CONDITIONS. Most of them alter one clip at a time; others join clips, or cut joined clips into pieces.
Noise is drawn from the seed, the condition's name and the clip's number, so that a condition gives the same audio
whichever others run beside it. soxr does the resampling.
"""

import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

TELEPHONE_RATE = 8000  # Hz
CLIPPING_GAIN = 10.0  # 20 dB over full scale
VOICES = 5  # that speak at once in babble
SOFT_SECONDS = 1.0  # at each end of a clip with soft ends
# Clips are joined to this length before they are cut, so that pieces of every length begin at different places in them.
CUT_SECONDS = 60.0
CUTS = (5, 7, 9, 11, 14)  # seconds of a piece, and the steps around each: models fail at single lengths
CUT_STEPS = (-0.2, -0.1, 0.0, 0.1, 0.2)
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


@dataclass(frozen=True)
class Part:
    """Where in a take a clip, or a part of a clip, lies; in samples."""

    clip: int
    begin: int
    end: int


@dataclass(frozen=True)
class Take:
    """The audio that an engine is given at one time."""

    samples: np.ndarray  # [N], mono
    parts: tuple[Part, ...]

    def between(self, begin: int, end: int) -> "Take":
        """The samples from `begin` to `end`, and the parts of clips that lie between them."""
        parts = []
        for part in self.parts:
            inner = max(part.begin, begin), min(part.end, end)
            if inner[0] < inner[1]:
                parts.append(Part(part.clip, inner[0] - begin, inner[1] - begin))
        return Take(self.samples[begin:end], tuple(parts))


# ---- what is done to one clip: the speech, the clip's number and a generator for noise → samples [N]


Alter = Callable[[Speech, int, np.random.Generator], np.ndarray]


def unaltered(speech: Speech, clip: int, draw: np.random.Generator) -> np.ndarray:
    """The samples as they are."""
    return speech.clips[clip]


def attenuated(speech: Speech, clip: int, draw: np.random.Generator, *, db: float) -> np.ndarray:
    """The samples made quieter by `db`, and rounded to 16 bits as a recording of that level is."""
    quiet = np.rint(speech.clips[clip] * 10 ** (-db / 20) * FULL_SCALE_16_BITS) / FULL_SCALE_16_BITS
    return quiet.astype(np.float32)


def soft_ends(speech: Speech, clip: int, draw: np.random.Generator, *, db: float) -> np.ndarray:
    """The samples with the first and the last second, each at most a third of the clip, made quieter by `db`."""
    samples = speech.clips[clip].copy()
    count = min(round(SOFT_SECONDS * speech.sample_rate), len(samples) // 3)
    for end in (samples[:count], samples[len(samples) - count :]):
        end *= 10 ** (-db / 20)
    return samples


def clipped(speech: Speech, clip: int, draw: np.random.Generator) -> np.ndarray:
    """The samples amplified until their peak is 20 dB over full scale, and cut off at full scale."""
    samples = speech.clips[clip]
    peak = float(np.abs(samples).max()) or 1.0
    return np.clip(samples * (CLIPPING_GAIN / peak), -1, 1).astype(np.float32)


def by_telephone(speech: Speech, clip: int, draw: np.random.Generator) -> np.ndarray:
    """The samples as a telephone's 8 kHz keep them, at the rate and length that they had."""
    import soxr

    samples = speech.clips[clip]
    narrow = soxr.resample(samples, speech.sample_rate, TELEPHONE_RATE)
    wide: np.ndarray = soxr.resample(narrow, TELEPHONE_RATE, speech.sample_rate)
    return np.pad(wide, (0, max(len(samples) - len(wide), 0)))[: len(samples)]


def at_speed(speech: Speech, clip: int, draw: np.random.Generator, *, speed: float) -> np.ndarray:
    """The samples played `speed` times as fast, which raises their pitch by the same factor."""
    import soxr

    played: np.ndarray = soxr.resample(speech.clips[clip], speed, 1.0)
    return played


def in_noise(speech: Speech, clip: int, draw: np.random.Generator, *, noise: Alter, snr_db: float) -> np.ndarray:
    """The samples with noise at a signal-to-noise ratio, which is taken from the powers over the whole clip."""
    samples = speech.clips[clip]
    added = noise(speech, clip, draw)
    power, noise_power = (float(np.mean(np.square(one, dtype=np.float64))) for one in (samples, added))
    gain = math.sqrt(power / (noise_power or 1.0)) * 10 ** (-snr_db / 20)
    mixed: np.ndarray = (samples + gain * added).astype(np.float32)
    return mixed


def white_noise(speech: Speech, clip: int, draw: np.random.Generator) -> np.ndarray:
    """White noise as long as the clip."""
    return draw.standard_normal(len(speech.clips[clip]))


def babble(speech: Speech, clip: int, draw: np.random.Generator) -> np.ndarray:
    """Several other clips at once, all equally loud and each repeated from a random start, as long as the clip."""
    count = len(speech.clips[clip])
    others = [i for i in range(len(speech.clips)) if i != clip and speech.clips[i].any()]
    total = np.zeros(count)
    for other in draw.choice(others, min(VOICES, len(others)), replace=False):
        voice = speech.clips[other]
        start = int(draw.integers(len(voice)))
        repeated = np.resize(np.roll(voice, -start), count)
        total += repeated / np.sqrt(np.mean(np.square(voice, dtype=np.float64)))
    return total


# ---- conditions


@dataclass(frozen=True)
class Condition:
    """What is done to the clips: each is altered, gets silence around it, and may be joined with the clips that follow;
    what is joined may be cut into pieces. --stress selects conditions by their `kind`."""

    name: str
    kind: str
    alter: Alter = unaltered
    before: float = 0.0  # seconds of silence before each clip
    after: float = 0.0  # seconds of silence after each clip
    join: float = 0.0  # seconds that joined clips last, or a little longer; 0: each clip by itself
    exact: bool = False  # whether they last exactly so long: fewer clips, with equal silence before each
    cut: tuple[float, ...] = ()  # seconds of the pieces of what is joined, in turn, wherever the cuts fall; (): no cuts
    needs_others: bool = False  # whether a clip is altered with the sound of others

    def possible(self, speech: Speech) -> bool:
        """Whether the speech has what the condition needs."""
        return not self.needs_others or sum(bool(clip.any()) for clip in speech.clips) > 1

    def groups(self, durations: Sequence[float]) -> Iterator[tuple[int, ...]]:
        """The numbers of the clips, in the groups that audio is made from.

        The last joined group continues with the first clips, to be as long as the others; where it is cut into pieces,
        it ends with the last clip.
        durations: the seconds of each clip.
        """
        first, count = 0, len(durations)
        while first < count:
            group: list[int] = []
            length = 0.0
            for clip in itertools.count(first):
                longer = length + durations[clip % count] + self.after
                is_full = longer > self.join if self.exact else length >= self.join
                if (group and is_full) or (self.cut and clip == count):
                    break
                group.append(clip % count)
                length = longer
            first += len(group)
            yield tuple(group)

    def takes(self, group: Sequence[int], speech: Speech) -> list[Take]:
        """The audio made from one group of clips; the transcripts of these takes together are that of the group."""
        name = zlib.crc32(self.name.encode())
        altered = [self.alter(speech, clip, np.random.default_rng([speech.seed, name, clip])) for clip in group]
        before, after, length = (round(s * speech.sample_rate) for s in (self.before, self.after, self.join))
        if self.exact:
            before = max(length - sum(map(len, altered)), 0) // len(group)
        begins = itertools.accumulate((len(one) + after + before for one in altered), initial=before)
        parts = tuple(
            Part(clip, begin, begin + len(one)) for clip, begin, one in zip(group, begins, altered, strict=False)
        )
        joined = Take(np.concatenate([np.pad(one, (before, after)) for one in altered]), parts)
        if not self.cut:
            return [joined]
        start = group[0] % len(self.cut)  # so that the groups do not begin with the same piece
        lengths = itertools.cycle((*self.cut[start:], *self.cut[:start]))
        return list(_pieces(joined, (round(seconds * speech.sample_rate) for seconds in lengths)))


def _pieces(take: Take, sizes: Iterator[int]) -> Iterator[Take]:
    """The take in pieces of these samples; a remainder under half a piece stays with the last piece."""
    begin, length = 0, len(take.samples)
    while begin < length:
        size = next(sizes)
        end = begin + size if begin + 1.5 * size <= length else length
        yield take.between(begin, end)
        begin = end


def _noisy(name: str, noise: Alter, *, needs_others: bool = False) -> Iterator[Condition]:
    for db in (20, 12, 5):
        alter = partial(in_noise, noise=noise, snr_db=db)
        yield Condition(f"{name}, {db} dB", "noise", alter, needs_others=needs_others)


CLEAN = Condition("as it is", "clean")
CONDITIONS = (
    CLEAN,
    *(Condition(f"-{db} dB", "level", partial(attenuated, db=db)) for db in (20, 40)),
    Condition("ends 25 dB softer", "level", partial(soft_ends, db=25)),
    Condition("clipped", "level", clipped),
    *(Condition(f"{s:g} s of silence around", "silence", before=s, after=s) for s in (0.3, 0.5, 1.0)),
    Condition("0.5 s of silence in front", "silence", before=0.5),
    Condition("0.5 s of silence behind", "silence", after=0.5),
    *_noisy("white noise", white_noise),
    *_noisy("babble", babble, needs_others=True),
    Condition("telephone, 8 kHz", "telephone", by_telephone),
    *(Condition(f"speed {speed}", "speed", partial(at_speed, speed=speed)) for speed in (0.9, 1.1)),
    *(
        Condition(f"cut to {s - 0.2:g} to {s + 0.2:g} s", "cut", join=CUT_SECONDS, cut=tuple(s + x for x in CUT_STEPS))
        for s in CUTS
    ),
    *(Condition(f"joined to {s} s", "join", join=s) for s in (30, 60, 120)),
    *(Condition(f"joined to {s} s, with pauses", "join", join=s, after=PAUSE_SECONDS) for s in (30, 60, 120)),
    # A last window of 2.5 s, where GenAI's windows have the 60 s that are the default.
    Condition("-30 dB, joined to 62.5 s", "join", partial(attenuated, db=30), join=62.5, exact=True),
)
KINDS = tuple(dict.fromkeys(condition.kind for condition in CONDITIONS if condition is not CLEAN))


def conditions_of(kinds: Sequence[str]) -> list[Condition]:
    """CLEAN, which the others are compared with, and the conditions of these kinds; no kinds stand for all."""
    return [each for each in CONDITIONS if each is CLEAN or not kinds or each.kind in kinds]
