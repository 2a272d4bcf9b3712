"""The page of test_real_speech.py --html: clips to listen to, with the engines' words one below the other.

The page is one file that loads nothing else: the audio is embedded as Opus, about 4 kB a second. Its security policy
names the hash of its one script, so that no other script runs.
"""

import base64
import hashlib
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.evaluate.blanks import Flaws, flaws_table
from common.evaluate.compare import Comparison
from common.evaluate.stress import StressTest
from common.evaluate.verdict import corpus_table
from common.evaluate.words import comparable_words, normalize, word_errors, word_runs
from common.report import render
from common.run.decode import TimedWord

SCRIPT = Path(__file__).resolve().parent / "clips.js"
LINE_CHARACTERS = 38  # of a line of words, on a phone 390 pixels wide
WAVE_COLUMNS = 400  # of a waveform: about as many as a phone's screen has points
BLOCK = 2**16  # samples given to the encoder at a time


@dataclass(frozen=True)
class ShownWord:
    """A word of a row. `mark`: "other" where the first row has another word or none, "lost" for a word of the first row
    that this one lacks."""

    text: str
    timed: TimedWord | None = None  # with its times, if they are known
    mark: str = ""


@dataclass(frozen=True)
class ShownRow:
    """The words of one text or engine, in a cell for each word of the first row, so that the rows of a clip line up."""

    engine: str
    text: str
    cells: list[list[ShownWord]]
    errors: tuple[int, int] | None  # and the number of words of the text, both without case and punctuation

    @property
    def differences(self) -> int:
        """Words that are marked."""
        return sum(bool(word.mark) for cell in self.cells for word in cell)


def comparison_page(title: str, comparison: Comparison) -> str:
    """The page of a comparison of engines; clips whose transcripts differ most come first. Without a text the first row
    of a clip is the first engine's, the reference's where there is one. The clips are read again, one at a time. Raises
    as read_clip does."""
    config = comparison.config
    clips = []
    for clip in comparison.clips:
        made = clip.transcripts
        texts = {} if clip.text is None else {"text": clip.text}
        texts |= {engine: transcript.text for engine, transcript in made.items()}
        words = {engine: transcript.words for engine, transcript in made.items() if transcript.words}
        rows = rows_of(texts, words, with_errors=clip.text is not None)
        clips.append(shown_clip(clip.label, config.read_clip(clip), config.sample_rate, rows, clip.flaws))
    figures, notes = corpus_table(comparison)
    return clips_page(
        title,
        f"Clips: {len(clips)}; audio: {sum(clip.seconds for clip in comparison.clips):.0f} s",
        sorted(clips, key=lambda clip: (bool(clip["flaws"]), clip["differences"]), reverse=True),
        frame_seconds=config.frame_seconds,
        figures=figures,
        notes=notes,
        flaws=comparison.flaws_table,
    )


def stress_page(title: str, test: StressTest) -> str:
    """The page of a stress test: its table, and its worst cases with their audio, made again from the seed: the takes
    one after the other, and all engines' transcripts of them."""
    clips = []
    for case in test.worst():
        condition, group = case
        samples = np.concatenate(condition.takes(group, test.speech))
        has_text = all(test.clips[clip].text is not None for clip in group)
        texts = {"text" if has_text else f"{test.baseline}, as it is": test.text_of(group)}
        texts |= {engine: result.transcript for engine, result in test.results[case].items()}
        rows = rows_of(texts, {}, with_errors=True)
        clips.append(shown_clip(test.name_of(case), samples, test.speech.sample_rate, rows, test.results[case]))
    return clips_page(
        title,
        f"Clips: {len(test.clips)}; conditions: {len(test.conditions)}; seed: {test.options.seed}; worst results of "
        f"{test.judged}: {len(clips)}",
        clips,
        stress=test.rows(),
        baseline=test.baseline,
        flaws=test.flaws_table(),
    )


def clips_page(title: str, about: str, clips: Sequence[dict[str, Any]], **tables: Any) -> str:
    """The HTML of a page. about: the clips, in a sentence. clips: as shown_clip gives each.

    tables: `figures` over all clips and their `notes`, as corpus_table gives them; `flaws`, as
    flaws_table gives them; `stress`, the rows of a stress test, and the name of its `baseline`; `frame_seconds`, the
    unit of the words' times.
    """
    script = SCRIPT.read_text(encoding="utf-8")
    return render(
        "clips.html.j2",
        title=title,
        about=about,
        clips=clips,
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        columns=WAVE_COLUMNS,
        **{"figures": (), "flaws": (), "stress": (), "frame_seconds": None, **tables},
    )


# ---- rows of words


def rows_of(texts: Mapping[str, str], words: Mapping[str, Sequence[TimedWord]], *, with_errors: bool) -> list[ShownRow]:
    """The rows of a clip from its texts by their names. The words of the others are compared with the first one's
    without case and punctuation, and lie in its columns.

    words: of the texts whose words have times; a pause may divide a word of the text. with_errors: whether the first
    text is the one that word errors are counted against.
    """
    first, *_ = texts.values()
    expected = first.split()
    rows: list[ShownRow] = []
    for name, text in texts.items():
        own = [ShownWord(word.text, word) for word in words.get(name, ())] or [ShownWord(word) for word in text.split()]
        cells: list[list[ShownWord]] = [[] for _ in expected or [""]]
        runs = word_runs(comparable_words(expected), comparable_words(word.text for word in own))
        for places, numbers, is_equal in runs:
            for place, i in itertools.zip_longest(places, numbers):
                if i is None:
                    cells[place].append(ShownWord(expected[place], mark="lost"))
                else:  # an inserted word stands behind the word before it
                    cell = cells[max(places.start - 1, 0) if place is None else place]
                    cell.append(own[i] if is_equal else replace(own[i], mark="other"))
        errors = word_errors(normalize(first), normalize(text)) if with_errors and rows else None
        rows.append(ShownRow(name, text, cells, errors))
    return rows


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


def shown_clip(
    name: str, samples: np.ndarray, rate: int, rows: list[ShownRow], flaws: Mapping[str, Flaws]
) -> dict[str, Any]:
    """What the page shows of a clip of mono samples [N] at `rate` in Hz."""
    seconds = len(samples) / rate
    blank = {(each.start, each.end) for own in flaws.values() for each in own.blank or ()}
    return {
        "name": name,
        "seconds": seconds,
        "audio": audio_uri(samples, rate),
        "wave": wave_path(samples),
        "rows": rows,
        "lines": lines_of(rows),
        "differences": max(row.differences for row in rows),
        "flaws": flaws_table([(name, flaws)], None)[1:],
        "blank": [(WAVE_COLUMNS * start / seconds, WAVE_COLUMNS * (end - start) / seconds) for start, end in blank],
    }


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
