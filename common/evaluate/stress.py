"""What engines lose where speech is hard: the clips under the conditions of `conditions`, word by word.

Each transcript is aligned with two references, without case and punctuation: the engine's own transcript of the same
clips as they are, which shows what the condition costs that engine, and the clips' texts, by which engines can be
compared. All engines are given the same features, except for GenAI, which computes its own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from common.cli import CheckError, progress_bar
from common.evaluate.conditions import CLEAN, Condition, Speech, Take, conditions_of
from common.evaluate.engines import timed
from common.evaluate.wer import WordCounts, normalize, word_counts
from common.run.config import RuntimeConfig
from common.run.genai import GenAI
from common.run.ort import OnnxRuntime
from common.run.reference import Reference

MIN_SHARE_WITH_WORDS = 0.5  # of a take's speech: with words in so much of it, its transcript is expected to have a word

Case = tuple[Condition, tuple[int, ...]]  # a condition, and a group of clips that its audio is made of


@dataclass(frozen=True)
class Output:
    """The result of an engine on one take."""

    text: str
    frames: Sequence[int] | None  # encoder frames at which tokens were emitted, of engines that give them


@dataclass(frozen=True)
class StressedEngine:
    """An engine, and the name of its rows in the table."""

    name: str
    transcribe: Callable[[np.ndarray, np.ndarray], Output]  # samples [N] and their features [M, T]
    # The name of the engine of which this is a variant that encodes a take in one window, however long it is. The
    # variant is given only takes that are longer than a window.
    whole_of: str | None = None


@dataclass(frozen=True, kw_only=True)
class StressTest:
    """The clips, and the engines that transcribe them."""

    speech: Speech
    names: Sequence[str]  # of the clips
    texts: Sequence[str | None]  # of the clips
    engines: Sequence[StressedEngine]
    baseline: str  # the float32 engine; its transcript of a clip without a text stands for the text
    judged: str  # the engine that is held to a limit, and whose worst clips are listed
    features: Callable[[np.ndarray], np.ndarray]  # samples [N] → [M, T]
    config: RuntimeConfig
    kinds: Sequence[str] = ()  # of conditions; none: all

    @property
    def conditions(self) -> list[Condition]:
        """The conditions that can be made from the clips."""
        return [each for each in conditions_of(self.kinds) if each.possible(self.speech)]

    @property
    def cases(self) -> list[Case]:
        """Each condition with each group of clips that its audio is made from."""
        durations = self.speech.durations
        return [(condition, group) for condition in self.conditions for group in condition.groups(durations)]

    def takes(self, condition: Condition, group: Sequence[int]) -> list[Take]:
        """The takes, each long enough and a whole number of hops, as engines need it (RuntimeConfig.read_clip)."""
        least, hop = self.config.min_samples, self.config.hop_length
        takes = condition.takes(group, self.speech)
        whole = [np.pad(take.samples, (0, max(least - len(take.samples), 0))) for take in takes]
        return [
            Take(samples[: len(samples) // hop * hop], take.parts) for samples, take in zip(whole, takes, strict=True)
        ]

    def name_of(self, group: Sequence[int]) -> str:
        """The name of the first clip, and how many clips follow."""
        following = f" and {len(group) - 1} more" if len(group) > 1 else ""
        return f"{self.names[group[0]]}{following}"


@dataclass(frozen=True)
class Windows:
    """How many stretches of audio should have words, and for how many of them no word was emitted."""

    takes: int = 0
    empty: int = 0  # takes whose transcript has no word
    clips: int = 0  # whole clips within takes of several
    silent: int = 0  # clips of these during which no token was emitted

    def __add__(self, other: "Windows") -> "Windows":
        return Windows(
            self.takes + other.takes, self.empty + other.empty, self.clips + other.clips, self.silent + other.silent
        )


@dataclass(frozen=True)
class StressResult:
    """One engine's result on one group of clips under one condition."""

    condition: Condition
    group: tuple[int, ...]
    engine: str
    transcript: str
    clean: WordCounts  # against its own transcript of the clips as they are
    text: WordCounts  # against the clips' texts
    windows: Windows

    @property
    def case(self) -> Case:
        """The key by which the results of several engines belong together."""
        return self.condition, self.group


@dataclass
class StressResults:
    """All results, in the order of the table."""

    test: StressTest
    results: list[StressResult] = field(default_factory=list)
    clean: dict[tuple[str, int], str] = field(default_factory=dict)  # transcripts as they are, by engine and clip

    def text_of(self, clip: int) -> str:
        """The text of a clip by which engines are compared."""
        text = self.test.texts[clip]
        return self.clean[self.test.baseline, clip] if text is None else text

    @property
    def of_baseline(self) -> list[StressResult]:
        """The results of the engine that others are compared with."""
        return [each for each in self.results if each.engine == self.test.baseline]

    def as_json(self) -> dict[str, Any]:
        """Every transcript and count."""
        return {
            "seed": self.test.speech.seed,
            "results": [
                {
                    "condition": each.condition.name,
                    "clips": [self.test.names[clip] for clip in each.group],
                    "engine": each.engine,
                    "transcript": each.transcript,
                    "against_clean": asdict(each.clean),
                    "against_text": asdict(each.text),
                    "windows": asdict(each.windows),
                }
                for each in self.results
            ],
        }


# ---- the run


def run_stress(test: StressTest) -> StressResults:
    """Let all engines transcribe the clips under all conditions, after printing about how long that takes.

    Raises CheckError where an engine fails on a take.
    """
    cases = test.cases
    print(_outlook(test), flush=True)
    results = StressResults(test)
    with progress_bar(total=sum(len(group) for _, group in cases), task="stress", unit="clip") as bar:
        for condition, group in cases:
            for result in _run_case(results, condition, group):
                results.results.append(result)
            bar.update(len(group))
    return results


def _outlook(test: StressTest) -> str:
    """What will be done, and about how long by the second run of the first clip, since a first run is slower."""
    durations = test.speech.durations
    (take,) = test.takes(CLEAN, [0])
    for _ in range(2):
        features, seconds = timed(test.features, take.samples)
        for engine in test.engines:
            if engine.whole_of is None:
                seconds += timed(engine.transcribe, take.samples, features)[1]
    audio = sum(durations[clip] for _, group in test.cases for clip in group)
    expected = audio * seconds / durations[0]
    left_out = [each.name for each in conditions_of(test.kinds) if not each.possible(test.speech)]
    return (
        f"stress: {len(test.conditions)} conditions of {len(durations)} clips, {audio / 60:.1f} min of audio for each "
        f"of {sum(engine.whole_of is None for engine in test.engines)} engines, about {_duration(expected)}"
        + (f"; left out, since they need several clips: {', '.join(left_out)}" if left_out else "")
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _run_case(results: StressResults, condition: Condition, group: tuple[int, ...]) -> Iterator[StressResult]:
    """The engines' results, one after the other."""
    test = results.test
    takes = test.takes(condition, group)
    features = [test.features(take.samples) for take in takes]
    is_long = all(not test.config.fits_one_window(len(take.samples) / test.config.sample_rate) for take in takes)
    transcripts: dict[str, list[Output]] = {}
    for engine in test.engines:
        if engine.whole_of is not None and not is_long:
            continue
        try:
            transcripts[engine.name] = [
                engine.transcribe(take.samples, one) for take, one in zip(takes, features, strict=True)
            ]
        except ValueError as error:
            raise CheckError(f"{engine.name} fails on {test.name_of(group)}, {condition.name}: {error}") from error
        if condition is CLEAN:
            results.clean[engine.name, group[0]] = transcripts[engine.name][0].text
    text = " ".join(map(results.text_of, group))
    for engine in test.engines:
        if outputs := transcripts.get(engine.name):
            transcript = " ".join(output.text for output in outputs)
            clean = " ".join(results.clean[engine.whole_of or engine.name, clip] for clip in group)
            yield StressResult(
                condition,
                group,
                engine.name,
                transcript,
                word_counts(normalize(clean), normalize(transcript)),
                word_counts(normalize(text), normalize(transcript)),
                sum((_windows(results, take, out) for take, out in zip(takes, outputs, strict=True)), Windows()),
            )


def _windows(results: StressResults, take: Take, output: Output) -> Windows:
    """Whether a take that should have words has none, and how many whole clips in it have none."""
    with_words = [part for part in take.parts if normalize(results.text_of(part.clip))]
    length, whole_length = (sum(part.end - part.begin for part in parts) for parts in (with_words, take.parts))
    expects_words = bool(with_words) and length >= MIN_SHARE_WITH_WORDS * whole_length
    if output.frames is None or len(take.parts) == 1:
        return Windows(int(expects_words), int(expects_words and not normalize(output.text)))
    clips = [part for part in with_words if part.whole]
    config = results.test.config
    times = np.array(output.frames) * config.hop_length * config.subsampling_factor  # samples
    silent = sum(not ((times >= part.begin) & (times < part.end)).any() for part in clips)
    return Windows(int(expects_words), int(expects_words and not normalize(output.text)), len(clips), silent)


# ---- what a test is made of


def folder_engines(name: str, raw: OnnxRuntime, spell: Callable[[list[int]], str]) -> list[StressedEngine]:
    """A model folder in plain ONNX Runtime, by GenAI's rule: in windows, and long takes in one window as well.

    spell: a function that gives the text of tokens.
    """

    def transcribe(samples: np.ndarray, features: np.ndarray, *, whole: bool) -> Output:
        hypothesis = raw.transcribe(features, whole=whole)
        return Output(spell(hypothesis.tokens), hypothesis.frames)

    return [
        StressedEngine(name, partial(transcribe, whole=False)),
        StressedEngine(f"{name}, one window", partial(transcribe, whole=True), whole_of=name),
    ]


def genai_engine(name: str, genai: GenAI) -> StressedEngine:
    """A model folder in GenAI, which computes its own features and text."""

    def transcribe(samples: np.ndarray, features: np.ndarray) -> Output:
        return Output(genai.text(genai.transcribe(samples)), None)

    return StressedEngine(name, transcribe)


def reference_engine(reference: Reference) -> StressedEngine:
    """NeMo or transformers, which encode every take in one window."""

    def transcribe(samples: np.ndarray, features: np.ndarray) -> Output:
        transcript = reference.transcribe(features)
        return Output(transcript.text, transcript.frames)

    return StressedEngine(reference.name, transcribe)
