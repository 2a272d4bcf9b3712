"""The page of test_real_speech.py --html: clips to listen to, with the engines' words one below the other.

The page is one file that loads nothing else: the audio is embedded as Opus, about 4 kB a second. Its security policy
names the hash of its one script, so that no other script runs.
"""

import base64
import hashlib
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.evaluate.blanks import Flaws, flaw_rows
from common.evaluate.compare import ComparedClip, Comparison
from common.evaluate.stress import StressResult, StressTest, stress_rows, worst_results
from common.evaluate.verdict import corpus_notes, corpus_table
from common.evaluate.wer import normalize, word_errors, word_runs
from common.evaluate.words import Bin, bins, calibration_error, comparable_words, words_right
from common.report import render
from common.run.decode import Transcript

SCRIPT = Path(__file__).resolve().parent / "clips.js"
LINE_CHARACTERS = 38  # of a line of words, on a phone 390 pixels wide
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
    """One engine's words, in a cell for each word of the baseline, so that the rows of a clip line up."""

    engine: str
    cells: list[list[ShownWord]]
    errors: tuple[int, int] | None = None  # and the number of words of the text, both without case and punctuation

    @property
    def words(self) -> list[ShownWord]:
        """The words from the first cell to the last."""
        return [word for cell in self.cells for word in cell]

    @property
    def text(self) -> str:
        """The engine's own words."""
        return " ".join(word.text for word in self.words if word.mark != "lost")

    @property
    def differences(self) -> int:
        """Words that are marked."""
        return sum(bool(word.mark) for word in self.words)


def comparison_page(title: str, comparison: Comparison) -> str:
    """The page of a comparison of engines; clips whose transcripts differ most come first. The clips are read again,
    one at a time. Raises as read_clip does."""
    seconds = sum(clip.seconds for clip in comparison.clips)
    clips = [_compared(clip, comparison) for clip in comparison.clips]
    return clips_page(
        title,
        f"{_count(len(comparison.clips), 'clip')}, {seconds:.0f} s of audio",
        sorted(clips, key=lambda clip: (bool(clip["flaws"]), clip["differences"]), reverse=True),
        figures=corpus_table(comparison),
        notes=corpus_notes(comparison),
        flaws=comparison.flaws_table,
        reliability=dict(_reliability(comparison)),
    )


def stress_page(title: str, test: StressTest) -> str:
    """The page of a stress test: its table, and its worst results with their audio, made again from the seed."""
    worst = worst_results(test)
    listed = _count(len(worst), "worst result")
    return clips_page(
        title,
        f"{_count(len(test.clips), 'clip')} under {_count(len(test.conditions), 'condition')}, seed "
        f"{test.speech.seed}; {listed} of {test.judged}",
        [_stressed(each, test) for each in worst],
        stress=stress_rows(test),
        baseline=test.baseline,
        flaws=test.flaws_table,
    )


def clips_page(
    title: str,
    about: str,
    clips: Sequence[dict[str, Any]],
    *,
    flaws: Sequence[tuple[str, ...]] = (),
    reliability: Mapping[tuple[str, str], list[Bin]] | None = None,
    baseline: str = "",
    **tables: Any,
) -> str:
    """The HTML of a page. about: the clips, in a sentence. clips: as shown_clip gives each.

    flaws: the table of flaws_table. reliability: by engine and measure of confidence. baseline: of the stress test.
    tables: `figures` over all clips and their `notes`, as corpus_table and corpus_notes give them; `stress`, the rows
    of a stress test.
    """
    script = SCRIPT.read_text(encoding="utf-8")
    return render(
        "clips.html.j2",
        title=title,
        about=about,
        clips=clips,
        has_confidence=any(word.confidence is not None for clip in clips for row in clip["rows"] for word in row.words),
        flaws=flaws,
        reliability=reliability,
        baseline=baseline,
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        columns=WAVE_COLUMNS,
        calibration_error=calibration_error,
        **{"figures": None, "notes": (), "stress": (), **tables},
    )


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


# ---- rows of words


def marked_row(engine: str, words: Sequence[ShownWord], baseline: str, text: str | None, transcript: str) -> ShownRow:
    """An engine's words, compared with those of `baseline` without case and punctuation.

    text: what the errors of `transcript` are counted against, where it is known; a pause may divide one of its words.
    """
    expected_words = baseline.split()
    cells: list[list[ShownWord]] = [[] for _ in expected_words or [""]]
    for expected, own, is_equal in word_runs(
        comparable_words(expected_words), comparable_words(word.text for word in words)
    ):
        for place, i in itertools.zip_longest(expected, own):
            if i is None:
                cells[place].append(ShownWord(expected_words[place], mark="lost"))
            else:  # an inserted word stands behind the word before it
                cell = cells[max(expected.start - 1, 0) if place is None else place]
                cell.append(words[i] if is_equal else replace(words[i], mark="other"))
    if text is None:
        return ShownRow(engine, cells)
    return ShownRow(engine, cells, word_errors(normalize(text), normalize(transcript)))


def _plain(text: str) -> list[ShownWord]:
    return [ShownWord(word) for word in text.split()]


def plain_row(name: str, text: str) -> ShownRow:
    """The row of the baseline, a word in each cell."""
    return ShownRow(name, [[word] for word in _plain(text)] or [[]])


def lines_of(rows: Sequence[ShownRow]) -> list[slice]:
    """The cells of all rows in lines that fit a phone."""
    widths = [
        1 + max(len(" ".join(word.text for word in cell)) for cell in column)
        for column in zip(*(row.cells for row in rows), strict=True)
    ]
    lines = []
    first = 0
    for place in range(1, len(widths) + 1):
        if place == len(widths) or sum(widths[first : place + 1]) > LINE_CHARACTERS:
            lines.append(slice(first, place))
            first = place
    return lines


def _words(transcript: Transcript, frame_seconds: float) -> list[ShownWord]:
    """The words of a transcript, with their times and confidences where it has them."""
    if transcript.words is None:
        return _plain(transcript.text)
    return [
        ShownWord(
            word.text,
            word.start * frame_seconds,
            word.end * frame_seconds,
            word.confidence.max_prob if word.confidence else None,
        )
        for word in transcript.words
    ]


def shown_clip(
    name: str, samples: np.ndarray, rate: int, rows: list[ShownRow], flaws: Mapping[str, Flaws] | None = None
) -> dict[str, Any]:
    """What the page shows of a clip of mono samples [N] at `rate` in Hz. rows: the baseline's first."""
    seconds = len(samples) / rate
    blank = {(each.start, each.end) for own in (flaws or {}).values() for each in own.blank or ()}
    return {
        "name": name,
        "seconds": seconds,
        "audio": audio_uri(samples, rate),
        "wave": wave_path(samples),
        "rows": rows,
        "lines": lines_of(rows),
        "differences": max(row.differences for row in rows),
        "flaws": list(flaw_rows(name, flaws or {})),
        "blank": [(WAVE_COLUMNS * start / seconds, WAVE_COLUMNS * (end - start) / seconds) for start, end in blank],
    }


def _compared(clip: ComparedClip, comparison: Comparison) -> dict[str, Any]:
    """A clip of a comparison; the baseline is its text, else the transcript of the first engine, the reference's where
    there is one."""
    config = comparison.config
    baseline = clip.transcripts[comparison.engines[0].name].text if clip.text is None else clip.text
    rows = [] if clip.text is None else [plain_row("text", clip.text)]
    for engine, transcript in clip.transcripts.items():
        words = _words(transcript, config.frame_seconds)
        rows.append(marked_row(engine, words, baseline, clip.text, transcript.text))
    return shown_clip(clip.label, config.read_clip(clip), config.sample_rate, rows, clip.flaws)


def _stressed(result: StressResult, test: StressTest) -> dict[str, Any]:
    """A result of a stress test: the takes one after the other, and all engines' transcripts of them."""
    takes = [take.samples for take in test.takes(result.condition, result.group)]
    name = f"{result.condition.name}: {test.name_of(result.group)}"
    if len(takes) > 1:
        name += f", {len(takes)} pieces"
    text = " ".join(map(test.text_of, result.group))
    has_text = all(test.clips[clip].text is not None for clip in result.group)
    own = [each for each in test.results if each.case == result.case]
    rows = [
        plain_row("text" if has_text else f"{test.baseline}, as it is", text),
        *(marked_row(each.engine, _plain(each.transcript), text, text, each.transcript) for each in own),
    ]
    flaws = {each.engine: each.flaws for each in own}
    return shown_clip(name, np.concatenate(takes), test.config.sample_rate, rows, flaws)


def _reliability(comparison: Comparison) -> Iterator[tuple[tuple[str, str], list[Bin]]]:
    """The bins of each engine that gives confidences, by each measure, on the clips with a text."""
    for engine in comparison.figures:
        judged = [
            (word.confidence, right)
            for clip in comparison.clips
            if clip.text is not None and (words := clip.transcripts[engine].words)
            for word, right in zip(words, words_right(clip.text, [word.text for word in words]), strict=True)
            if word.confidence
        ]
        for measure in MEASURES if judged else ():
            yield (engine, measure), bins((getattr(confidence, measure), right) for confidence, right in judged)


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
