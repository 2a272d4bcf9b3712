"""What engines lose where speech is hard: the clips under the conditions of `conditions`, word by word.

Each transcript is aligned with two references, without case and punctuation: the engine's own transcript of the same
clips as they are, which shows what the condition costs that engine, and the clips' texts, by which engines can be
compared. All engines are given the same features, except for GenAI, which computes its own.
"""

import itertools
import math
import re
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from common.cli import CheckError, Parser, print_table, progress_bar
from common.evaluate.blanks import Flaws, find_flaws, flaws_table, print_flaws
from common.evaluate.conditions import CLEAN, KINDS, Condition, Speech, Take, conditions_of
from common.evaluate.engines import Engine, GenAIEngine, LibraryEngine, OnnxEngine, OpenFolder, Recording
from common.evaluate.wer import NONE, WordCounts, changes_text, normalize, word_counts
from common.run.audio import Clip
from common.run.config import RuntimeConfig
from common.run.decode import Transcript
from common.run.genai import GenAI
from common.run.reference import Reference

FLOAT32, OPTIMIZED = "float32", "optimized"  # the names of their rows
MIN_SHARE_WITH_WORDS = 0.5  # of a take's speech: with words in so much of it, its transcript is expected to have a word
MAX_WORST = 10  # clips that are listed
MAX_LINE = 300  # characters of the words of one
HEADER = (
    *("condition", "engine", "clean: lost", "added", "changed", "text: lost", "added", "changed", "missed"),
    *("empty", "blank", "alone", "repeated"),
)


# ---- the flags


@dataclass(frozen=True)
class StressOptions:
    """The flags of a stress test, under their own names."""

    stress: Sequence[str] | None = None  # kinds of conditions; empty: all; None: no stress test
    max_lost_words: float | None = None  # percentage points over float32
    stress_dir: Path | None = None  # where the audio of the worst clips is written
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for flags that need --stress, an impossible limit, a seed that NumPy does not accept, and a
        folder that is not empty, in which the audio of two runs would be mixed."""
        if self.stress is None and (self.stress_dir or self.max_lost_words is not None):
            raise ValueError("--stress_dir and --max_lost_words need --stress; add it")
        if self.max_lost_words is not None and not 0 <= self.max_lost_words < math.inf:
            raise ValueError(f"--max_lost_words is a number of points, 0 or more, not {self.max_lost_words}")
        if self.seed < 0:
            raise ValueError(f"--seed is 0 or more, not {self.seed}")
        folder = self.stress_dir
        if folder and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise ValueError(f"--stress_dir needs a new or empty folder, and {folder} is none; give another")


def add_stress_flags(parser: Parser) -> None:
    """Add the fields of StressOptions as flags."""
    kinds = ", ".join(KINDS)
    parser.add_argument("--stress", nargs="*", choices=KINDS, metavar="KIND",
                        help="transcribe the clips where speech is hard, and count the words lost, added and changed; "
                             f"KIND: any of {kinds} (all of them)")  # fmt: skip
    parser.add_argument("--max_lost_words", type=float, metavar="POINTS",
                        help="with --stress: percentage points by which the words that the optimized model loses or "
                             "changes may be more than float32's, under each condition; beyond, and where it "
                             "is blank in speech in which float32 has words, exit status 1 (no limit)")  # fmt: skip
    parser.add_argument("--stress_dir", type=Path, metavar="FOLDER",
                        help="with --stress: write the audio of the worst clips there")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise of --stress (%(default)s)")


# ---- a test and its results


@dataclass(frozen=True)
class EmptyCounts:
    """How many takes should have words, and how many of them have none."""

    takes: int = 0
    empty: int = 0


Counts = TypeVar("Counts", WordCounts, EmptyCounts)


def total(counts: Iterable[Counts]) -> Counts:
    """The sums of the fields of one count or more."""
    every = list(counts)
    return type(every[0])(*map(sum, zip(*map(astuple, every), strict=True)))


@dataclass(frozen=True)
class StressResult:
    """One engine's result on one group of clips under one condition."""

    condition: Condition
    group: tuple[int, ...]
    engine: str
    transcript: str
    clean: WordCounts  # against its own transcript of the clips as they are
    text: WordCounts  # against the clips' texts
    windows: EmptyCounts
    flaws: Flaws  # in seconds of the takes one after the other

    @property
    def case(self) -> tuple[Condition, tuple[int, ...]]:
        """The key by which the results of several engines belong together."""
        return self.condition, self.group


@dataclass(frozen=True, kw_only=True)
class StressTest:
    """The clips, the engines that transcribe them, and the results."""

    clips: Sequence[Clip]
    speech: Speech  # the samples of the clips
    engines: Sequence[Engine]
    # Of the engines that encode a take in one window, however long it is: the name of the engine that cuts it instead.
    # The former are given only takes that are longer than a window.
    whole_of: Mapping[str, str]
    features_by: Reference | GenAI
    folder: OpenFolder  # whose configuration and tokens all engines share
    baseline: str  # the float32 engine; its transcript of a clip without a text stands for the text
    judged: str  # the engine that is held to a limit, and whose worst clips are listed
    kinds: Sequence[str] = ()  # of conditions; none: all
    results: list[StressResult] = field(default_factory=list)  # in the order of the table
    clean: dict[tuple[str, int], str] = field(default_factory=dict)  # transcripts as they are, by engine and clip

    @property
    def config(self) -> RuntimeConfig:
        """The numbers of decoding."""
        return self.folder.config

    @property
    def conditions(self) -> list[Condition]:
        """The conditions that can be made from the clips."""
        return [each for each in conditions_of(self.kinds) if each.possible(self.speech)]

    @property
    def cases(self) -> list[tuple[Condition, tuple[int, ...]]]:
        """Each condition with each group of clips that its audio is made from."""
        durations = self.speech.durations
        return [(condition, group) for condition in self.conditions for group in condition.groups(durations)]

    @property
    def of_baseline(self) -> dict[tuple[Condition, tuple[int, ...]], StressResult]:
        """The results of the engine that others are compared with, by their cases."""
        return {each.case: each for each in self.results if each.engine == self.baseline}

    @property
    def flaws_table(self) -> list[tuple[str, ...]]:
        """The flaws of the judged engine and of the baseline, as flaws_table gives them."""
        own = (each for each in self.results if each.engine in (self.judged, self.baseline))
        cases = ((f"{each.condition.name}, {self.name_of(each.group)}", {each.engine: each.flaws}) for each in own)
        return flaws_table(cases, self.baseline)

    def takes(self, condition: Condition, group: Sequence[int]) -> list[Take]:
        """The takes, each long enough and a whole number of hops, as engines need it (RuntimeConfig.read_clip)."""
        takes = []
        for take in condition.takes(group, self.speech):
            samples = np.pad(take.samples, (0, max(self.config.min_samples - len(take.samples), 0)))
            takes.append(Take(samples[: len(samples) // self.config.hop_length * self.config.hop_length], take.parts))
        return takes

    def name_of(self, group: Sequence[int]) -> str:
        """The name of the first clip, and how many clips follow."""
        following = f" and {len(group) - 1} more" if len(group) > 1 else ""
        return f"{self.clips[group[0]].label}{following}"

    def text_of(self, clip: int) -> str:
        """The text of a clip by which engines are compared."""
        text = self.clips[clip].text
        return self.clean[self.baseline, clip] if text is None else text

    def as_json(self) -> dict[str, Any]:
        """Every transcript and count."""
        return {
            "seed": self.speech.seed,
            "results": [
                {
                    "condition": each.condition.name,
                    "clips": [self.clips[clip].label for clip in each.group],
                    "engine": each.engine,
                    "transcript": each.transcript,
                    "against_clean": asdict(each.clean),
                    "against_text": asdict(each.text),
                    "windows": asdict(each.windows),
                    **asdict(each.flaws),
                }
                for each in self.results
            ],
        }


# ---- the run


def stress_compared(
    folders: Sequence[OpenFolder], reference: LibraryEngine | None, clips: Sequence[Clip], options: StressOptions
) -> StressTest:
    """Run a stress test on the engines of a comparison. Raises ValueError where there is a limit but no float32 folder
    to compare with, and as run_stress does."""
    optimized, *exported = folders
    if options.max_lost_words is not None and not exported:
        raise ValueError(
            f"--max_lost_words needs an optimized folder and the exported one beside it, and {optimized.path} is alone"
        )
    names = [OPTIMIZED if exported or not optimized.is_float32 else FLOAT32, FLOAT32]
    engines: list[Engine] = [] if reference is None else [reference]
    for folder, name in reversed(list(zip(folders, names, strict=False))):
        if folder.onnx_engine:
            engines.append(OnnxEngine(name, folder))
        if folder.genai_engine:
            engines.append(GenAIEngine(f"{name}, GenAI" if folder.onnx_engine else name, folder))
    return run_stress(
        engines,
        reference.reference if reference else optimized.genai,
        optimized,
        clips,
        options,
        baseline=FLOAT32 if exported else names[0] if reference is None else reference.name,
        judged=names[0],
    )


def run_stress(
    engines: Sequence[Engine],
    features_by: Reference | GenAI,
    folder: OpenFolder,
    clips: Sequence[Clip],
    options: StressOptions,
    *,
    baseline: str = FLOAT32,
    judged: str = OPTIMIZED,
) -> StressTest:
    """Let all engines transcribe the clips under all conditions, and print a table and the worst clips.

    Plain ONNX Runtime transcribes what is longer than a window a second time, in one window. All samples are read at
    once, 230 MB per hour of audio, since the clips serve as noise for each other. folder: any of the model's, for its
    configuration and tokens.
    Raises CheckError where an engine fails on a take, and as read_clip does.
    """
    variants: list[Engine] = []
    whole_of = {}
    for engine in engines:
        variants.append(engine)
        if isinstance(engine, OnnxEngine):
            whole = OnnxEngine(f"{engine.name}, one window", engine.folder, whole=True, spell=engine.spell)
            variants.append(whole)
            whole_of[whole.name] = engine.name
    test = StressTest(
        clips=clips,
        speech=Speech([folder.config.read_clip(clip) for clip in clips], folder.config.sample_rate, options.seed),
        engines=variants,
        whole_of=whole_of,
        features_by=features_by,
        folder=folder,
        baseline=baseline,
        judged=judged,
        kinds=options.stress or (),
    )
    print(_outlook(test), flush=True)
    with progress_bar(total=sum(len(group) for _, group in test.cases), task="stress", unit="clip") as bar:
        for condition, group in test.cases:
            test.results.extend(_run_case(test, condition, group))
            bar.update(len(group))
    print_stress(test)
    worst = worst_results(test)
    print_worst(test, worst)
    if options.stress_dir:
        write_worst(options.stress_dir, test, worst)
    return test


def _outlook(test: StressTest) -> str:
    """What will be done, and about how long by the second run of the first clip, since a first run is slower."""
    durations = test.speech.durations
    engines = [engine for engine in test.engines if engine.name not in test.whole_of]
    (take,) = test.takes(CLEAN, [0])
    for _ in range(2):
        start = time.perf_counter()
        recording = Recording(take.samples, test.features_by)
        for engine in engines:
            engine.transcribe([recording])
        seconds = time.perf_counter() - start
    audio = sum(durations[clip] for _, group in test.cases for clip in group)
    expected = audio * seconds / durations[0]
    left_out = [each.name for each in conditions_of(test.kinds) if not each.possible(test.speech)]
    return (
        f"{len(durations)} clips under {len(test.conditions)} conditions are {audio / 60:.1f} min of audio for each of "
        f"{len(engines)} engines, which takes about "
        + (f"{expected:.0f} s" if expected < 100 else f"{expected / 60:.0f} min")
        + (f"; these conditions need several clips and are left out: {', '.join(left_out)}" if left_out else "")
    )


def _run_case(test: StressTest, condition: Condition, group: tuple[int, ...]) -> Iterator[StressResult]:
    """The engines' results, one after the other."""
    takes = test.takes(condition, group)
    recordings = [Recording(take.samples, test.features_by) for take in takes]
    is_long = all(len(take.samples) > test.config.chunk for take in takes)
    transcripts: dict[str, list[Transcript]] = {}
    for engine in test.engines:
        if engine.name in test.whole_of and not is_long:
            continue
        try:
            transcripts[engine.name] = engine.transcribe(recordings)
        except ValueError as error:
            raise CheckError(f"{engine.name} fails on {test.name_of(group)}, {condition.name}: {error}") from error
        if condition is CLEAN:
            test.clean[engine.name, group[0]] = transcripts[engine.name][0].text
    text = " ".join(map(test.text_of, group))
    flaws = _flaws(test, takes, transcripts, text)
    for name, made in transcripts.items():
        transcript = " ".join(each.text for each in made)
        clean = " ".join(test.clean[test.whole_of.get(name, name), clip] for clip in group)
        yield StressResult(
            condition,
            group,
            name,
            transcript,
            clean=word_counts(normalize(clean), normalize(transcript)),
            text=word_counts(normalize(text), normalize(transcript)),
            windows=total(_empty_counts(test, take, each) for take, each in zip(takes, made, strict=True)),
            flaws=flaws[name],
        )


def _flaws(
    test: StressTest, takes: Sequence[Take], transcripts: Mapping[str, Sequence[Transcript]], text: str
) -> dict[str, Flaws]:
    """The flaws of each engine in takes one after the other. `text`: of them all."""
    flaws = {name: Flaws([], []) for name in transcripts}
    begin = 0.0
    for number, take in enumerate(takes):
        made = {name: own[number] for name, own in transcripts.items()}
        found = find_flaws(take.samples, made, test.folder.pieces, test.config, reference=test.baseline, text=text)
        flaws = {name: flaws[name].followed_by(found[name], begin) for name in flaws}
        begin += len(take.samples) / test.config.sample_rate
    return flaws


def _empty_counts(test: StressTest, take: Take, transcript: Transcript) -> EmptyCounts:
    """Whether a take should have words, and has none."""
    with_words = [part for part in take.parts if normalize(test.text_of(part.clip))]
    length, whole_length = (sum(part.end - part.begin for part in parts) for parts in (with_words, take.parts))
    expects_words = bool(with_words) and length >= MIN_SHARE_WITH_WORDS * whole_length
    return EmptyCounts(int(expects_words), int(expects_words and not normalize(transcript.text)))


# ---- the table


@dataclass(frozen=True)
class StressRow:
    """One engine's figures under one condition. The names of the fields are keys of the report's JSON."""

    condition: str
    engine: str
    clean: WordCounts  # against its own transcripts of the clips as they are
    text: WordCounts  # against the clips' texts
    windows: EmptyCounts
    points: float | None  # of the texts' words missed, beyond the baseline's; None for the baseline, or for no words
    blank: int | None = None  # blank stretches; None: the engine gives no times
    alone: int | None = None  # of these, those in which the baseline has words; None for the baseline as well
    repeated: int = 0  # phrases


def stress_rows(test: StressTest) -> list[StressRow]:
    """A row for each condition and engine. An engine that is given only some of the takes is compared on those."""
    baseline = test.of_baseline
    rows = []
    for condition, engine in itertools.product(test.conditions, test.engines):
        own = [each for each in test.results if each.condition is condition and each.engine == engine.name]
        if not own:
            continue
        text = total(each.text for each in own)
        expected = total(baseline[each.case].text for each in own)
        compared = engine.name != test.baseline and text.words
        flaws = [each.flaws for each in own]
        timed = all(each.blank is not None for each in flaws)
        rows.append(
            StressRow(
                condition.name,
                engine.name,
                clean=total(each.clean for each in own),
                text=text,
                windows=total(each.windows for each in own),
                points=text.percent_missed - expected.percent_missed if compared else None,
                blank=sum(len(each.blank or ()) for each in flaws) if timed else None,
                alone=sum(len(each.alone) for each in flaws) if timed and engine.name != test.baseline else None,
                repeated=sum(len(each.repeated) for each in flaws),
            )
        )
    return rows


def print_stress(test: StressTest) -> None:
    """Print what the columns mean, the table, and what seams cost."""
    no_texts = all(clip.text is None for clip in test.clips)
    against = f"{test.baseline}'s transcripts of them as they are" if no_texts else "their texts"
    print("clean: words lost, added and changed against the engine's own transcripts of the clips as they are")
    print(f"text: the same against {against}; missed: lost or changed, of all words, and points over {test.baseline}")
    print(f"empty: transcripts without a word; alone: blank stretches in which {test.baseline} has words")
    rows = stress_rows(test)
    repeated = [False, *(row.condition == before.condition for before, row in itertools.pairwise(rows))]
    print_table([HEADER, *(_cells(row, repeated=again) for row, again in zip(rows, repeated, strict=True))])
    for whole, name in test.whole_of.items():
        _print_seams(test, name, whole)
    print_flaws(test.flaws_table, {each.engine: None for each in test.results if each.flaws.blank is None})


def _cells(row: StressRow, *, repeated: bool) -> tuple[str, ...]:
    clean, text, windows = row.clean, row.text, row.windows
    points = "" if row.points is None else f" {row.points:+.2f}"
    return (
        "" if repeated else row.condition,
        row.engine,
        *map(str, (clean.lost, clean.added, clean.changed, text.lost, text.added, text.changed)),
        f"{text.percent_missed:.2f} %{points}" if text.words else NONE,
        f"{windows.empty} of {windows.takes}" if windows.takes else NONE,
        *(NONE if count is None else str(count) for count in (row.blank, row.alone, row.repeated)),
    )


def _print_seams(test: StressTest, engine: str, whole: str) -> None:
    """What cutting into windows costs: the errors on takes longer than a window, in windows and as a whole."""
    in_one = {each.case: each.text for each in test.results if each.engine == whole}
    cut = [each.text for each in test.results if each.engine == engine and each.case in in_one]
    if cut:
        words = total(cut)
        print(
            f"seams of windows of {test.config.window_seconds:g} s: {engine} has {words.errors} of "
            f"{words.words} words wrong in {len(cut)} joined clips, and {total(in_one.values()).errors} where "
            "each is one window"
        )


def worst_results(test: StressTest) -> list[StressResult]:
    """The results of the judged engine that is blank alone, and those with the most errors beyond the baseline's or,
    where it is the baseline itself, beyond its own on clean clips. Results without either are left out."""
    baseline = test.of_baseline

    def excess(result: StressResult) -> int:
        if test.judged == test.baseline:
            return result.clean.errors
        return result.text.errors - baseline[result.case].text.errors

    found = [each for each in test.results if each.engine == test.judged and (excess(each) > 0 or each.flaws.alone)]
    return sorted(found, key=lambda each: (len(each.flaws.alone), excess(each)), reverse=True)[:MAX_WORST]


def print_worst(test: StressTest, worst: Sequence[StressResult]) -> None:
    """Print a line for each result: the words of the baseline, or of the clean clips, and what replaces them. Long
    lines are cut off."""
    baseline = test.of_baseline
    for number, each in enumerate(worst, 1):
        clean = " ".join(test.clean[each.engine, clip] for clip in each.group)
        before = clean if each.engine == test.baseline else baseline[each.case].transcript
        shown = textwrap.shorten(changes_text(before, each.transcript), MAX_LINE, placeholder=" …")
        print(f"  {number}. {each.condition.name}, {test.name_of(each.group)}: {shown}")


def write_worst(folder: Path, test: StressTest, worst: Sequence[StressResult]) -> None:
    """Write the audio of the worst results as WAV, made again from the seed: a file for each take."""
    import soundfile

    folder.mkdir(exist_ok=True)
    for number, each in enumerate(worst, 1):
        takes = test.takes(each.condition, each.group)
        clip = test.clips[each.group[0]].label
        name = re.sub(r"[^\w.,-]+", "_", f"{number:02} {each.condition.name} {clip}").strip("_")
        for piece, take in enumerate(takes, 1):
            path = folder / f"{name}{f'_{piece}' if len(takes) > 1 else ''}.wav"
            soundfile.write(path, take.samples, test.config.sample_rate, subtype="FLOAT")
    print(f"wrote the audio of the {len(worst)} worst clips to {folder}")


def judge_stress(test: StressTest, limit: float | None) -> None:
    """Raise CheckError where, under any condition, the judged engine's share of missed words is more than `limit`
    percentage points above the baseline's, or it is blank where the baseline has words; None is no limit."""
    if limit is None:
        return
    rows = [row for row in stress_rows(test) if row.engine == test.judged and row.points is not None]
    if not rows:
        raise CheckError("no clip has words, so nothing was compared under stress; give clips with speech")
    beyond = [
        f"{row.condition!r} {row.points:+.2f} points ({row.text.missed} of {row.text.words} words)"
        for row in rows
        if row.points is not None and row.points > limit
    ]
    if beyond:
        raise CheckError(
            f"under stress {test.judged} misses more words than {test.baseline}: {', '.join(beyond)}; expected at "
            f"most +{limit:g} points under each condition"
        )
    alone = [(each, blank) for each in test.results if each.engine == test.judged for blank in each.flaws.alone]
    if alone:
        first, blank = alone[0]
        more = f", and {len(alone) - 1} more" if alone[1:] else ""
        raise CheckError(
            f"under stress {test.judged} is blank where {test.baseline} has words: in {first.condition.name!r}, "
            f"{test.name_of(first.group)}, {blank}{more}; expected no blank stretch of its own"
        )
