"""What engines lose where speech is hard: the clips under the conditions of one table, CONDITIONS, word by word.

Most conditions alter one clip at a time; others join clips, or cut joined clips into pieces. Noise is drawn from the
seed, the condition's name and the clip's number, so that a condition gives the same audio whichever others run beside
it. soxr does the resampling.

Each transcript is aligned with two references, without case and punctuation: the engine's own transcript of the same
clips as they are, which shows what the condition costs that engine, and the clips' texts, by which engines can be
compared. All engines are given the same features, except for GenAI, which computes its own.
"""

import itertools
import math
import re
import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import CheckError, Parser, print_table, progress_bar
from common.evaluate.blanks import Flaws, find_flaws, flaws_table, print_flaws
from common.evaluate.engines import (
    GENAI_ENGINE,
    ONNX_ENGINE,
    Engine,
    OpenFolder,
    Recording,
    genai_engine,
    library_engine,
    onnx_engine,
)
from common.evaluate.words import NONE, WordCounts, changes_text, normalize, word_counts
from common.run.audio import Clip
from common.run.decode import Transcript
from common.run.genai import GenAI
from common.run.reference import Reference

FLOAT32, OPTIMIZED = "float32", "optimized"  # the names of their rows
VOICES = 5  # that speak at once in babble
SOFT_SECONDS = 1.0  # at each end of a clip with soft ends
FULL_SCALE_16_BITS = 2.0**15
WHOLE = ", one window"  # end of the name of an engine that does not cut long audio into windows
MAX_WORST = 10  # clips that are listed
MAX_LINE = 300  # characters of the words of one
HEADER = (
    *("condition", "engine", "clean: lost", "added", "changed", "text: lost", "added", "changed", "missed"),
    *("empty", "blank", "alone", "repeated"),
)


# ---- what is done to one clip: the speech, the clip's number, how much, and a generator for noise → samples [N]


@dataclass(frozen=True)
class Speech:
    """The clips that conditions alter, and what else conditions need."""

    clips: Sequence[np.ndarray]  # mono samples [N] of each
    sample_rate: int  # Hz
    seed: int = 0
    hop_length: int = 1  # samples; engines need a whole number of hops (RuntimeConfig.read_clip)

    @property
    def durations(self) -> list[float]:
        """Seconds of each clip."""
        return [len(clip) / self.sample_rate for clip in self.clips]


Alter = Callable[[Speech, int, float, np.random.Generator], np.ndarray]


def attenuated(speech: Speech, clip: int, db: float, draw: np.random.Generator) -> np.ndarray:
    """The samples made quieter by `db`, and rounded to 16 bits as a recording of that level is."""
    quiet = np.rint(speech.clips[clip] * 10 ** (-db / 20) * FULL_SCALE_16_BITS) / FULL_SCALE_16_BITS
    return quiet.astype(np.float32)


def soft_ends(speech: Speech, clip: int, db: float, draw: np.random.Generator) -> np.ndarray:
    """The samples with the first and the last second, each at most a third of the clip, made quieter by `db`."""
    samples = speech.clips[clip].copy()
    count = min(round(SOFT_SECONDS * speech.sample_rate), len(samples) // 3)
    for end in (samples[:count], samples[len(samples) - count :]):
        end *= 10 ** (-db / 20)
    return samples


def clipped(speech: Speech, clip: int, gain: float, draw: np.random.Generator) -> np.ndarray:
    """The samples amplified until their peak is `gain`, and cut off at full scale."""
    samples = speech.clips[clip]
    peak = float(np.abs(samples).max()) or 1.0
    return np.clip(samples * (gain / peak), -1, 1).astype(np.float32)


def narrow_band(speech: Speech, clip: int, rate: float, draw: np.random.Generator) -> np.ndarray:
    """The samples as a telephone of `rate` in Hz keeps them, at the rate and length that they had."""
    import soxr

    samples = speech.clips[clip]
    wide: np.ndarray = soxr.resample(soxr.resample(samples, speech.sample_rate, rate), rate, speech.sample_rate)
    return np.pad(wide, (0, max(len(samples) - len(wide), 0)))[: len(samples)]


def at_speed(speech: Speech, clip: int, speed: float, draw: np.random.Generator) -> np.ndarray:
    """The samples played `speed` times as fast, which raises their pitch by the same factor."""
    import soxr

    played: np.ndarray = soxr.resample(speech.clips[clip], speed, 1.0)
    return played


def in_white_noise(speech: Speech, clip: int, snr_db: float, draw: np.random.Generator) -> np.ndarray:
    """The samples with white noise."""
    return _mixed(speech.clips[clip], draw.standard_normal(len(speech.clips[clip])), snr_db)


def in_babble(speech: Speech, clip: int, snr_db: float, draw: np.random.Generator) -> np.ndarray:
    """The samples with several other clips at once, all equally loud and each repeated from a random start."""
    samples = speech.clips[clip]
    others = [i for i in range(len(speech.clips)) if i != clip and speech.clips[i].any()]
    babble = np.zeros(len(samples))
    for other in draw.choice(others, min(VOICES, len(others)), replace=False):
        voice = speech.clips[other]
        repeated = np.resize(np.roll(voice, -int(draw.integers(len(voice)))), len(samples))
        babble += repeated / np.sqrt(np.mean(np.square(voice, dtype=np.float64)))
    return _mixed(samples, babble, snr_db)


def _mixed(samples: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Samples and noise, both [N], at a signal-to-noise ratio, which is taken from the powers over the whole clip."""
    power, noise_power = (float(np.mean(np.square(one, dtype=np.float64))) for one in (samples, noise))
    gain = math.sqrt(power / (noise_power or 1.0)) * 10 ** (-snr_db / 20)
    mixed: np.ndarray = (samples + gain * noise).astype(np.float32)
    return mixed


# ---- conditions


@dataclass(frozen=True)
class Condition:
    """What is done to the clips: each is altered, gets silence around it, and may be joined with the clips that follow;
    what is joined may be cut into pieces. --stress selects conditions by their `kind`."""

    name: str
    kind: str
    alter: Alter | None = None  # None: the samples as they are
    amount: float = 0.0  # of alteration, as `alter` takes it
    before: float = 0.0  # seconds of silence before each clip
    after: float = 0.0  # seconds of silence after each clip
    join: float = 0.0  # seconds that joined clips last, or a little longer; 0: each clip by itself
    exact: bool = False  # whether they last exactly so long: fewer clips, with equal silence before each
    cut: tuple[float, ...] = ()  # seconds of the pieces of what is joined, in turn, wherever the cuts fall; (): no cuts

    def possible(self, speech: Speech) -> bool:
        """Whether the speech has what the condition needs: babble is made of other clips."""
        return self.alter is not in_babble or sum(bool(clip.any()) for clip in speech.clips) > 1

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

    def takes(self, group: Sequence[int], speech: Speech) -> list[np.ndarray]:
        """The audio made from one group of clips, as the samples [N] that an engine is given at one time; the
        transcripts of these takes together are the group's. A remainder under half a piece stays with the last one."""
        altered = []
        for clip in group:
            draw = np.random.default_rng([speech.seed, zlib.crc32(self.name.encode()), clip])
            altered.append(self.alter(speech, clip, self.amount, draw) if self.alter else speech.clips[clip])
        before, after, length = (round(s * speech.sample_rate) for s in (self.before, self.after, self.join))
        if self.exact:
            before = max(length - sum(map(len, altered)), 0) // len(group)
        samples = np.concatenate([np.pad(one, (before, after)) for one in altered])
        start = group[0] % max(len(self.cut), 1)  # so that the groups do not begin with the same piece
        sizes = itertools.cycle(round(s * speech.sample_rate) for s in (*self.cut[start:], *self.cut[:start]))
        ends = [0]
        while self.cut and ends[-1] + 1.5 * (size := next(sizes)) <= len(samples):
            ends.append(ends[-1] + size)
        pieces = np.split(samples, ends[1:])
        return [piece[: len(piece) // speech.hop_length * speech.hop_length] for piece in pieces]


CLEAN = Condition("as it is", "clean")
CONDITIONS = (
    CLEAN,
    *(Condition(f"-{db} dB", "level", attenuated, db) for db in (20, 40)),
    Condition("ends 25 dB softer", "level", soft_ends, 25),
    Condition("clipped", "level", clipped, 10),  # 20 dB over full scale
    *(Condition(f"{s:g} s of silence around", "silence", before=s, after=s) for s in (0.3, 0.5, 1.0)),
    Condition("0.5 s of silence in front", "silence", before=0.5),
    Condition("0.5 s of silence behind", "silence", after=0.5),
    *(Condition(f"white noise, {db} dB", "noise", in_white_noise, db) for db in (20, 12, 5)),
    *(Condition(f"babble, {db} dB", "noise", in_babble, db) for db in (20, 12, 5)),
    Condition("telephone, 8 kHz", "telephone", narrow_band, 8000),
    *(Condition(f"speed {speed}", "speed", at_speed, speed) for speed in (0.9, 1.1)),
    # Models fail at single lengths, so there are steps around each; joined clips are cut at different places.
    *(
        Condition(f"cut to {s - 0.2:g} to {s + 0.2:g} s", "cut", join=60, cut=(s - 0.2, s - 0.1, s, s + 0.1, s + 0.2))
        for s in (5, 7, 9, 11, 14)
    ),
    *(Condition(f"joined to {s} s", "join", join=s) for s in (30, 60, 120)),
    *(Condition(f"joined to {s} s, with pauses", "join", join=s, after=1) for s in (30, 60, 120)),
    # A last window of 2.5 s, where GenAI's windows have the 60 s that are the default.
    Condition("-30 dB, joined to 62.5 s", "join", attenuated, 30, join=62.5, exact=True),
)
KINDS = tuple(dict.fromkeys(condition.kind for condition in CONDITIONS if condition is not CLEAN))


# ---- the flags


@dataclass(frozen=True)
class StressOptions:
    """The flags of a stress test, under their own names."""

    stress: Sequence[str] | None = None  # kinds of conditions; empty: all; None: no stress test
    max_lost_words: float | None = None  # percentage points over float32
    stress_dir: Path | None = None  # where the audio of the worst clips is written
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for flags that need --stress, an impossible limit, and a folder that is not empty, in which
        the audio of two runs would be mixed."""
        if self.stress is None and (self.stress_dir or self.max_lost_words is not None):
            raise ValueError("--stress_dir and --max_lost_words need --stress; add it")
        if self.max_lost_words is not None and not self.max_lost_words >= 0:
            raise ValueError(f"--max_lost_words is a number of points, 0 or more, not {self.max_lost_words}")
        if self.stress_dir and self.stress_dir.exists() and any(self.stress_dir.iterdir()):
            raise ValueError(f"--stress_dir needs a new or empty folder, and {self.stress_dir} is none; give another")


def add_stress_flags(parser: Parser) -> None:
    """Add the fields of StressOptions as flags."""
    kinds = ", ".join(KINDS)
    parser.add_argument("--stress", nargs="*", choices=KINDS, metavar="KIND",
                        help="transcribe the clips where speech is hard, and count the words lost, added and changed; "
                             f"KIND: any of {kinds} (all of them)")  # fmt: skip
    parser.add_argument("--max_lost_words", type=float, metavar="POINTS",
                        help="with --stress: percentage points by which the words that the optimized model loses or "
                             "changes may be more than float32's, under each condition. If it is exceeded, or "
                             "the model is blank where float32 has words, the exit status is 1 (no limit)")  # fmt: skip
    parser.add_argument("--stress_dir", type=Path, metavar="FOLDER",
                        help="with --stress: write the audio of the worst clips there")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise of --stress (%(default)s)")


# ---- a test and its results


Case = tuple[Condition, tuple[int, ...]]  # a condition and the numbers of the clips that its audio is made from


@dataclass(frozen=True, kw_only=True)
class StressResult(Flaws):
    """One engine's result in one case; its flaws are in seconds of the takes one after the other. The names of the
    fields are keys of --json."""

    condition: str
    clips: list[str]  # names
    engine: str
    transcript: str
    against_clean: WordCounts  # its own transcript of the clips as they are
    against_text: WordCounts  # the clips' texts
    windows: dict[str, int]  # `takes`, none where the text has no words, and those without a word, `empty`


def total(counts: Iterable[WordCounts]) -> WordCounts:
    """The sums of one count or more."""
    return WordCounts(*map(sum, zip(*map(astuple, counts), strict=True)))


@dataclass
class StressTest:
    """The clips, the engines that transcribe them, and the results.

    All samples are read at once, 230 MB per hour of audio, since the clips serve as noise for each other.
    """

    engines: Sequence[Engine]  # plain ONNX Runtime has long audio in one window as well
    features_by: Reference | GenAI
    folder: OpenFolder  # any of the model's: its configuration and tokens
    clips: Sequence[Clip]
    options: StressOptions
    baseline: str = FLOAT32  # the engine to compare with; its transcript of a clip without a text stands for the text
    judged: str = OPTIMIZED  # the engine that is held to a limit, and whose worst clips are listed
    results: dict[Case, dict[str, StressResult]] = field(default_factory=dict)  # by engine, in the order of the table
    clean: dict[tuple[str, int], str] = field(default_factory=dict)  # transcripts as they are, by engine and clip

    @cached_property
    def speech(self) -> Speech:
        """The samples of the clips. Raises as read_clip does."""
        config = self.folder.config
        samples = [config.read_clip(clip) for clip in self.clips]
        return Speech(samples, config.sample_rate, self.options.seed, config.hop_length)

    @property
    def conditions(self) -> list[Condition]:
        """CLEAN, which the others are compared with, and the conditions of --stress that can be made from the clips."""
        kinds = (CLEAN.kind, *(self.options.stress or KINDS))
        return [each for each in CONDITIONS if each.kind in kinds and each.possible(self.speech)]

    def name_of(self, case: Case) -> str:
        """The condition, the name of the first clip, and how many clips follow."""
        condition, group = case
        following = f" and {len(group) - 1} more" if len(group) > 1 else ""
        return f"{condition.name}, {self.clips[group[0]].label}{following}"

    def text_of(self, group: Sequence[int]) -> str:
        """The texts of clips by which engines are compared."""
        texts = [(self.clips[clip].text, clip) for clip in group]
        return " ".join(self.clean[self.baseline, clip] if text is None else text for text, clip in texts)

    def run(self) -> "StressTest":
        """Let all engines transcribe the clips under all conditions; print a table and the worst clips, and write their
        audio. Raises CheckError where an engine fails on a take, and as read_clip does."""
        durations = self.speech.durations
        cases = [(condition, group) for condition in self.conditions for group in condition.groups(durations)]
        self._print_outlook(sum(durations[clip] for _, group in cases for clip in group))
        with progress_bar(total=sum(len(group) for _, group in cases), task="stress", unit="clip") as bar:
            for case in cases:
                self.results[case] = self._results_of(case)
                bar.update(len(case[1]))
        self._print_table()
        self._print_worst()
        return self

    def _print_outlook(self, seconds: float) -> None:
        """Say what will be done, and by the first clip about how long it takes. seconds: of audio for each engine."""
        recording = Recording(self.speech.clips[0], self.features_by)
        took = sum(engine.transcribe([recording])[0].seconds for engine in self.engines)
        expected = took * seconds / self.speech.durations[0]
        print(
            f"{len(self.clips)} clips under {len(self.conditions)} conditions are {seconds / 60:.1f} min of audio for "
            f"each of {len(self.engines)} engines, which takes about "
            + (f"{expected:.0f} s" if expected < 100 else f"{expected / 60:.0f} min"),
            flush=True,
        )

    def _results_of(self, case: Case) -> dict[str, StressResult]:
        """The results of the engines by their names."""
        condition, group = case
        config = self.folder.config
        takes = condition.takes(group, self.speech)
        recordings = [Recording(take, self.features_by) for take in takes]
        transcripts: dict[str, list[Transcript]] = {}
        engines = [*self.engines]
        if all(len(take) > config.chunk for take in takes):
            cutting = [(each.name, each.folder) for each in engines if each.folder and each.kind == ONNX_ENGINE]
            engines += [onnx_engine(name + WHOLE, folder, whole=True) for name, folder in cutting]
        for engine in engines:
            try:
                transcripts[engine.name] = engine.transcribe(recordings)
            except ValueError as error:
                raise CheckError(f"{engine.name} fails on {self.name_of(case)}: {error}") from error
            if condition is CLEAN:
                self.clean[engine.name, group[0]] = transcripts[engine.name][0].text
        text = self.text_of(group)
        begin = 0.0
        flaws = dict.fromkeys(transcripts, Flaws([], []))
        for number, take in enumerate(takes):
            made = {name: own[number] for name, own in transcripts.items()}
            found = find_flaws(take, made, self.folder.pieces, config, reference=self.baseline, text=text, begin=begin)
            flaws = {name: own + found[name] for name, own in flaws.items()}
            begin += len(take) / config.sample_rate
        results = {}
        for name, own in transcripts.items():
            transcript = " ".join(each.text for each in own)
            clean = " ".join(self.clean[name.removesuffix(WHOLE), clip] for clip in group)
            empty = [not normalize(each.text) for each in own] if normalize(text) else []
            results[name] = StressResult(
                condition=condition.name,
                clips=[self.clips[clip].label for clip in group],
                engine=name,
                transcript=transcript,
                against_clean=word_counts(normalize(clean), normalize(transcript)),
                against_text=word_counts(normalize(text), normalize(transcript)),
                windows={"takes": len(empty), "empty": sum(empty)},
                blank=flaws[name].blank,
                repeated=flaws[name].repeated,
            )
        return results

    # ---- what is found

    def rows(self) -> list[dict[str, Any]]:
        """A row of figures for each condition and engine, by their keys in the report's JSON. An engine that is given
        only some of the takes is compared on those.

        `points`: the share of the texts' words that are missed, beyond the baseline's, in percentage points; None for
        the baseline, or for no words. `blank`: stretches; None where the engine gives no times. `alone`: of these,
        stretches in which the baseline has words; None for the baseline as well.
        """
        rows = []
        names = dict.fromkeys((condition, name) for (condition, _), by in self.results.items() for name in by)
        for condition, name in names:
            cases = [by for (other, _), by in self.results.items() if other is condition and name in by]
            own = [by[name] for by in cases]
            text = total(each.against_text for each in own)
            expected = total(by[self.baseline].against_text for by in cases)
            is_other, has_times = name != self.baseline, all(each.blank is not None for each in own)
            rows.append(
                {
                    "condition": condition.name,
                    "engine": name,
                    "clean": asdict(total(each.against_clean for each in own)),
                    "text": asdict(text),
                    "windows": {key: sum(each.windows[key] for each in own) for key in ("takes", "empty")},
                    "points": text.percent_missed - expected.percent_missed if is_other and text.words else None,
                    "blank": sum(len(each.blank or ()) for each in own) if has_times else None,
                    "alone": sum(len(each.alone) for each in own) if is_other and has_times else None,
                    "repeated": sum(len(each.repeated) for each in own),
                }
            )
        return rows

    def worst(self) -> list[Case]:
        """The cases in which the judged engine is blank alone, and those with the most errors beyond the baseline's or,
        where it is the baseline itself, beyond its own on clean clips. Cases without either are left out."""
        badness = {}
        for case, by in self.results.items():
            own, excess = by[self.judged], by[self.judged].against_clean.errors
            if self.judged != self.baseline:
                excess = own.against_text.errors - by[self.baseline].against_text.errors
            if excess > 0 or own.alone:
                badness[case] = (len(own.alone), excess)
        return sorted(badness, key=badness.__getitem__, reverse=True)[:MAX_WORST]

    def flaws_table(self) -> list[tuple[str, ...]]:
        """The flaws of the judged engine and of the baseline, as flaws_table of `blanks` gives them."""
        names = dict.fromkeys((self.baseline, self.judged))
        cases = [(self.name_of(case), {name: by[name] for name in names}) for case, by in self.results.items()]
        return flaws_table(cases, self.baseline)

    def as_json(self) -> dict[str, Any]:
        """Every transcript and count, for --json."""
        results = [asdict(result) for by in self.results.values() for result in by.values()]
        return {"seed": self.options.seed, "results": results}

    def judge(self) -> None:
        """Raise CheckError where, under any condition, the judged engine's share of missed words is more than
        --max_lost_words points above the baseline's, or it is blank where the baseline has words."""
        limit = self.options.max_lost_words
        if limit is None:
            return
        rows = [row for row in self.rows() if row["engine"] == self.judged and row["points"] is not None]
        if not rows:
            raise CheckError("no clip has words, so nothing was compared under stress; give clips with speech")
        beyond = [f"{row['condition']!r} {row['points']:+.2f} points" for row in rows if row["points"] > limit]
        if beyond:
            raise CheckError(
                f"under stress {self.judged} misses more words than {self.baseline}: {', '.join(beyond)}; the limit "
                f"is +{limit:g} points under each condition"
            )
        alone = [f"{row['condition']!r}" for row in rows if row["alone"]]
        if alone:
            raise CheckError(
                f"under stress {self.judged} is blank where {self.baseline} has words: in {', '.join(alone)}; with "
                "--max_lost_words no blank stretch of its own is accepted"
            )

    # ---- what is printed

    def _print_table(self) -> None:
        """What the columns mean, the table, and what cutting into windows costs: the errors on takes longer than a
        window, in windows and as a whole."""
        no_texts = all(clip.text is None for clip in self.clips)
        against = f"{self.baseline}'s transcripts of them as they are" if no_texts else "their texts"
        print("clean: words lost, added and changed against the engine's own transcripts of the clips as they are")
        print(f"text: the same against {against}; missed: lost or changed, and points over {self.baseline}")
        print(f"empty: transcripts without a word; alone: blank stretches in which {self.baseline} has words")
        rows = self.rows()
        print_table([HEADER, *map(_cells, rows, [None, *rows])])
        for name in (engine.name for engine in self.engines):
            long = [by for by in self.results.values() if name + WHOLE in by]
            if long:
                cut, whole = (total(by[each].against_text for by in long) for each in (name, name + WHOLE))
                print(
                    f"seams of windows of {self.folder.config.window_seconds:g} s: {name} has {cut.errors} of "
                    f"{cut.words} words wrong in {len(long)} joined clips, and {whole.errors} where each is one window"
                )
        print_flaws(self.flaws_table(), dict.fromkeys(row["engine"] for row in rows if row["blank"] is None))

    def _print_worst(self) -> None:
        """A line for each of the worst cases: the words of the baseline, or of the clean clips, and what replaces them,
        cut off where it is long. Their audio goes to --stress_dir as WAV, a file for each take."""
        import soundfile

        folder = self.options.stress_dir
        for number, case in enumerate(self.worst(), 1):
            condition, group = case
            before = self.results[case][self.baseline].transcript
            if self.judged == self.baseline:
                before = " ".join(self.clean[self.judged, clip] for clip in group)
            changes = changes_text(before, self.results[case][self.judged].transcript)
            print(f"  {number}. {self.name_of(case)}: {textwrap.shorten(changes, MAX_LINE, placeholder=' …')}")
            if folder:
                folder.mkdir(exist_ok=True)
                title = f"{number:02} {condition.name} {self.clips[group[0]].label}"
                name = re.sub(r"[^\w.,-]+", "_", title).strip("_")
                takes = condition.takes(group, self.speech)
                for piece, take in enumerate(takes, 1):
                    path = folder / f"{name}{f'_{piece}' if len(takes) > 1 else ''}.wav"
                    soundfile.write(path, take, self.speech.sample_rate, subtype="FLOAT")


def _cells(row: dict[str, Any], previous: dict[str, Any] | None) -> tuple[str, ...]:
    """A line of the table; the condition is named in the first of its rows."""
    clean, text, windows = row["clean"], row["text"], row["windows"]
    points = "" if row["points"] is None else f" {row['points']:+.2f}"
    return (
        "" if previous and previous["condition"] == row["condition"] else row["condition"],
        row["engine"],
        *(str(counts[kind]) for counts in (clean, text) for kind in ("lost", "added", "changed")),
        f"{WordCounts(**text).percent_missed:.2f} %{points}" if text["words"] else NONE,
        f"{windows['empty']} of {windows['takes']}" if windows["takes"] else NONE,
        *(NONE if row[key] is None else str(row[key]) for key in ("blank", "alone", "repeated")),
    )


def stress_compared(
    folders: Sequence[OpenFolder],
    kinds: frozenset[str],
    reference: Reference | None,
    clips: Sequence[Clip],
    options: StressOptions,
) -> StressTest:
    """The stress test of the engines of a comparison, `kinds` of ENGINES. Raises ValueError where there is a limit but
    no float32 folder to compare with."""
    optimized, *exported = folders
    if options.max_lost_words is not None and not exported:
        raise ValueError(
            f"--max_lost_words needs an optimized folder and the exported one beside it, and {optimized.path} is alone"
        )
    names = [OPTIMIZED if exported or not optimized.is_float32 else FLOAT32, FLOAT32]
    engines = [library_engine(reference)] if reference else []
    for folder, name in reversed(list(zip(folders, names, strict=False))):
        if ONNX_ENGINE in kinds:
            engines.append(onnx_engine(name, folder))
        if GENAI_ENGINE in kinds:
            engines.append(genai_engine(f"{name}, GenAI" if ONNX_ENGINE in kinds else name, folder))
    return StressTest(
        engines,
        reference or optimized.genai,
        optimized,
        clips,
        options,
        baseline=FLOAT32 if exported else names[0] if reference is None else reference.name,
        judged=names[0],
    )
