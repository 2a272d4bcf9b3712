"""The page of test_real_speech.py --html: clips to listen to, with the engines' words one below the other.

The page is one file that loads nothing else: the audio is embedded as Opus, about 4 kB a second. Its security policy
names the hash of its one script, so that no other script runs.
"""

import base64
import hashlib
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from common.evaluate.compare import ComparedClip, Comparison, EngineFigures
from common.evaluate.stress import StressResult, StressResults
from common.evaluate.stress_table import StressRow, stress_rows, worst_results
from common.evaluate.wer import normalize, word_errors, word_runs
from common.evaluate.words import Bin, bins, calibration_error, comparable_words, words_right
from common.report.pages import page_environment
from common.run.config import RuntimeConfig
from common.run.decode import TimedWord

TEMPLATE, SCRIPT = "clips.html.j2", "clips.js"
WAVE_COLUMNS = 400  # of a waveform: about as many as a phone's screen has points
BLOCK = 2**16  # samples given to the encoder at a time
MEASURES = ("max_prob", "entropy")  # of Confidence


@dataclass(frozen=True)
class ShownWord:
    """A word of a row. `mark`: "other" where the baseline has another word or none, "lost" for a word of the baseline
    that the row lacks."""

    text: str
    start: float | None = None  # seconds
    end: float | None = None
    confidence: float | None = None  # `max_prob`
    mark: str = ""

    @property
    def shade(self) -> int:
        """From 0, for a word that is sure, up to 3."""
        return 0 if self.confidence is None else sum(self.confidence < limit for limit in (0.9, 0.7, 0.5))


@dataclass(frozen=True)
class ShownRow:
    """One engine's words."""

    engine: str
    words: list[ShownWord]
    errors: tuple[int, int] | None = None  # and the number of words of the text, both without case and punctuation


@dataclass(frozen=True)
class ShownClip:
    """One clip with its rows, the baseline's first."""

    name: str
    seconds: float
    audio: str  # data URI
    wave: str  # path of an SVG, of WAVE_COLUMNS by 2
    rows: list[ShownRow]


@dataclass(frozen=True)
class Reliability:
    """How far a measure of an engine's confidence can be trusted."""

    engine: str
    measure: str
    bins: list[Bin]
    error: float  # expected calibration error


@dataclass(frozen=True)
class ClipsPage:
    """What the page shows."""

    title: str
    about: str  # the clips, in a sentence
    clips: list[ShownClip] = field(default_factory=list)
    figures: dict[str, EngineFigures] = field(default_factory=dict)  # over all clips, by engine
    reliability: list[Reliability] = field(default_factory=list)
    stress: list[StressRow] = field(default_factory=list)
    baseline: str = ""  # of the stress test

    @property
    def has_confidence(self) -> bool:
        """Whether any word has one, so that shades need to be explained."""
        return any(word.confidence is not None for clip in self.clips for row in clip.rows for word in row.words)


def clips_page_writer() -> Callable[[ClipsPage], str]:
    """A function that gives the HTML of a page.

    Call this before the work, since it raises ModuleNotFoundError without Jinja.
    """
    template = page_environment().get_template(TEMPLATE)
    script = (Path(__file__).resolve().parent / SCRIPT).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

    def render(page: ClipsPage) -> str:
        return template.render(page=page, script=script, digest=digest, columns=WAVE_COLUMNS)

    return render


def comparison_page(title: str, comparison: Comparison, config: RuntimeConfig) -> ClipsPage:
    """The page of a comparison of engines. The clips are read again, one at a time. Raises as read_clip does."""
    seconds = sum(clip.seconds for clip in comparison.clips)
    return ClipsPage(
        title,
        f"{_count(len(comparison.clips), 'clip')}, {seconds:.0f} s of audio",
        clips=[_compared(clip, comparison, config) for clip in comparison.clips],
        figures=comparison.figures,
        reliability=list(_reliabilities(comparison)),
    )


def stress_page(title: str, results: StressResults) -> ClipsPage:
    """The page of a stress test: its table, and its worst results with their audio, made again from the seed."""
    test = results.test
    worst = worst_results(results)
    listed = _count(len(worst), "worst result")
    return ClipsPage(
        title,
        f"{_count(len(test.names), 'clip')} under {_count(len(test.conditions), 'condition')}, seed "
        f"{test.speech.seed}; {listed} of {test.judged}",
        clips=[_stressed(each, results) for each in worst],
        stress=stress_rows(results),
        baseline=test.baseline,
    )


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


# ---- rows of words


def marked_rows(baseline: str, rows: Iterable[tuple[str, list[ShownWord]]], text: str | None) -> Iterator[ShownRow]:
    """Rows whose words are compared with `baseline`, without case and punctuation.

    rows: engine and its words. text: what errors are counted against, where it is known.
    """
    for engine, words in rows:
        shown = " ".join(word.text for word in words)
        errors = None if text is None else word_errors(normalize(text), normalize(shown))
        yield ShownRow(engine, _marked(baseline.split(), words), errors)


def _marked(baseline: Sequence[str], words: Sequence[ShownWord]) -> list[ShownWord]:
    marked: list[ShownWord] = []
    runs = word_runs(comparable_words(baseline), comparable_words(word.text for word in words))
    for expected, own, is_equal in runs:
        if is_equal:
            marked += words[own.start : own.stop]
            continue
        marked += [ShownWord(baseline[i], mark="lost") for i in expected]
        marked += [replace(words[i], mark="other") for i in own]
    return marked


def _compared(clip: ComparedClip, comparison: Comparison, config: RuntimeConfig) -> ShownClip:
    """A clip of a comparison; the baseline is its text, else the transcript of the first engine, the reference's where
    there is one."""
    first = clip.transcripts[comparison.engines[0].name]
    baseline = first.text if clip.text is None else clip.text
    rows = [
        (engine, _plain(made.text) if made.words is None else _timed(made.words, comparison.frame_seconds))
        for engine, made in clip.transcripts.items()
    ]
    samples = config.read_clip(clip)
    return ShownClip(
        clip.label,
        clip.seconds,
        audio_uri(samples, config.sample_rate),
        wave_path(samples),
        [*_text_row(clip.text), *marked_rows(baseline, rows, clip.text)],
    )


def _stressed(result: StressResult, results: StressResults) -> ShownClip:
    """A result of a stress test: the takes one after the other, and all engines' transcripts of them."""
    test = results.test
    takes = [take.samples for take in test.takes(result.condition, result.group)]
    samples = np.concatenate(takes)
    rate = test.config.sample_rate
    text = " ".join(map(results.text_of, result.group))
    has_text = all(test.texts[clip] is not None for clip in result.group)
    rows = [(each.engine, _plain(each.transcript)) for each in results.results if each.case == result.case]
    name = f"{result.condition.name}: {test.name_of(result.group)}"
    pieces = f", {len(takes)} pieces" if len(takes) > 1 else ""
    return ShownClip(
        name + pieces,
        len(samples) / rate,
        audio_uri(samples, rate),
        wave_path(samples),
        [ShownRow("text" if has_text else f"{test.baseline}, as it is", _plain(text)), *marked_rows(text, rows, text)],
    )


def _text_row(text: str | None) -> list[ShownRow]:
    return [] if text is None else [ShownRow("text", _plain(text))]


def _plain(text: str) -> list[ShownWord]:
    return [ShownWord(word) for word in text.split()]


def _timed(words: Iterable[TimedWord], frame_seconds: float) -> list[ShownWord]:
    return [
        ShownWord(
            word.text,
            word.start * frame_seconds,
            word.end * frame_seconds,
            word.confidence.max_prob if word.confidence else None,
        )
        for word in words
    ]


def _reliabilities(comparison: Comparison) -> Iterator[Reliability]:
    """The reliability of each engine that gives confidences, by each measure, on the clips with a text."""
    for engine in comparison.figures:
        judged = [
            (word.confidence, right)
            for clip in comparison.clips
            if clip.text is not None and (words := clip.transcripts[engine].words)
            for word, right in zip(words, words_right(clip.text, [word.text for word in words]), strict=True)
            if word.confidence
        ]
        for measure in MEASURES if judged else ():
            made = bins((getattr(confidence, measure), right) for confidence, right in judged)
            yield Reliability(engine, measure, made, calibration_error(made))


# ---- audio


def audio_uri(samples: np.ndarray, rate: int) -> str:
    """Samples [N] as a data URI of OGG with Opus; a clip that exceeds full scale is made quieter as a whole."""
    import soundfile

    peak = float(np.abs(samples).max(initial=1.0))
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", rate, 1, "OPUS", format="OGG") as sound:
        for begin in range(0, len(samples), BLOCK):
            sound.write(samples[begin : begin + BLOCK] / peak)
    return f"data:audio/ogg;base64,{base64.b64encode(file.getvalue()).decode()}"


def wave_path(samples: np.ndarray) -> str:
    """The lowest and the highest sample of each column as the path of an SVG, scaled to the loudest sample."""
    edges = np.linspace(0, len(samples), WAVE_COLUMNS + 1).astype(int)
    columns = [samples[begin:end] for begin, end in itertools.pairwise(edges) if end > begin]
    peak = max(float(np.abs(samples).max(initial=0.0)), 1e-9)
    lines = (
        f"M{column} {1 - piece.max() / peak:.2f}V{1.01 - piece.min() / peak:.2f}"  # never without height
        for column, piece in enumerate(columns)
    )
    return "".join(lines)
