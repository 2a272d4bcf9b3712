"""The results of a stress test for a person: a table, the worst clips with their audio, the limit on missed words."""

import itertools
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.cli import CheckError
from common.evaluate.stress import StressResult, StressResults, StressTest, Windows
from common.evaluate.tables import NONE, print_table
from common.evaluate.wer import NO_WORDS, WordCounts, marked_changes

MAX_WORST = 10  # clips that are listed
MAX_LINE = 300  # characters of the words of one
HEADER = (
    *("condition", "engine", "clean: lost", "added", "changed", "text: lost", "added", "changed", "missed"),
    *("empty", "silent"),
)


@dataclass(frozen=True)
class StressRow:
    """One engine's figures under one condition."""

    condition: str
    engine: str
    clean: WordCounts  # against its own transcripts of the clips as they are
    text: WordCounts  # against the clips' texts
    windows: Windows
    points: float | None  # of the texts' words missed, beyond the baseline's; None for the baseline, or for no words


def stress_rows(results: StressResults) -> list[StressRow]:
    """A row for each condition and engine. An engine that is given only some of the takes is compared on those."""
    baseline = {each.case: each.text for each in results.of_baseline}
    rows = []
    for condition, engine in itertools.product(results.test.conditions, results.test.engines):
        own = [each for each in results.results if each.condition is condition and each.engine == engine.name]
        if not own:
            continue
        text = _sum_counts(each.text for each in own)
        expected = _sum_counts(baseline[each.case] for each in own)
        compared = engine.name != results.test.baseline and text.words
        rows.append(
            StressRow(
                condition.name,
                engine.name,
                _sum_counts(each.clean for each in own),
                text,
                sum((each.windows for each in own), Windows()),
                text.percent_missed - expected.percent_missed if compared else None,
            )
        )
    return rows


def _sum_counts(counts: Iterable[WordCounts]) -> WordCounts:
    return sum(counts, NO_WORDS)


def print_stress(results: StressResults) -> None:
    """Print what the columns mean, the table, and what seams cost."""
    baseline = results.test.baseline
    no_texts = all(text is None for text in results.test.texts)
    against = f"{baseline}'s transcripts of them as they are" if no_texts else "their texts"
    print("clean: words lost, added and changed against the engine's own transcripts of the clips as they are")
    print(f"text: the same against {against}; missed: lost or changed, of all words, and points over {baseline}")
    print("empty: transcripts without a word; silent: joined clips within whose time no word was emitted")
    rows = stress_rows(results)
    repeated = [False, *(row.condition == before.condition for before, row in itertools.pairwise(rows))]
    print_table([HEADER, *(_cells(row, repeated=again) for row, again in zip(rows, repeated, strict=True))])
    for line in _seams(results):
        print(line)


def _cells(row: StressRow, *, repeated: bool) -> tuple[str, ...]:
    clean, text, windows = row.clean, row.text, row.windows
    points = "" if row.points is None else f" {row.points:+.2f}"
    return (
        "" if repeated else row.condition,
        row.engine,
        *map(str, (clean.lost, clean.added, clean.changed, text.lost, text.added, text.changed)),
        f"{text.percent_missed:.2f} %{points}" if text.words else NONE,
        f"{windows.empty} of {windows.takes}" if windows.takes else NONE,
        f"{windows.silent} of {windows.clips}" if windows.clips else NONE,
    )


def _seams(results: StressResults) -> Iterator[str]:
    """What cutting into windows costs: the errors on takes longer than a window, in windows and as a whole."""
    config = results.test.config
    for engine in results.test.engines:
        whole = {each.case: each.text for each in results.results if each.engine == engine.name}
        cut = [each.text for each in results.results if each.engine == engine.whole_of and each.case in whole]
        if cut:
            in_windows, in_one = _sum_counts(cut), _sum_counts(whole.values())
            yield (
                f"seams of windows of {config.chunk / config.sample_rate:g} s: {engine.whole_of} has "
                f"{in_windows.errors} of {in_windows.words} words wrong in {len(cut)} joined clips, and "
                f"{in_one.errors} where each is one window"
            )


def worst_results(results: StressResults) -> list[StressResult]:
    """The results of the judged engine with the most errors beyond the baseline's, or, where it is the baseline itself,
    beyond its own on clean clips. Results without such errors are left out."""
    baseline = {each.case: each for each in results.of_baseline}
    judged = results.test.judged

    def excess(result: StressResult) -> int:
        if judged == results.test.baseline:
            return result.clean.errors
        return result.text.errors - baseline[result.case].text.errors

    found = [each for each in results.results if each.engine == judged and excess(each) > 0]
    return sorted(found, key=excess, reverse=True)[:MAX_WORST]


def print_worst(results: StressResults, worst: Sequence[StressResult]) -> None:
    """Print a line for each result: the words of the baseline, or of the clean clips, and what replaces them. Long
    lines are cut off."""
    test = results.test
    baseline = {each.case: each.transcript for each in results.of_baseline}
    for number, each in enumerate(worst, 1):
        clean = " ".join(results.clean[each.engine, clip] for clip in each.group)
        before = clean if each.engine == test.baseline else baseline[each.case]
        changes = " ".join(
            one if one == other else f"[{one or '–'} → {other or '–'}]"
            for one, other in marked_changes(before, each.transcript)
        )
        shown = textwrap.shorten(changes, MAX_LINE, placeholder=" …")
        print(f"  {number}. {each.condition.name}, {test.name_of(each.group)}: {shown}")


def write_worst(folder: Path, test: StressTest, worst: Sequence[StressResult]) -> list[Path]:
    """The audio of the worst results as WAV, made again from the seed: a file for each take. Returns the paths."""
    import soundfile

    folder.mkdir(exist_ok=True)
    paths = []
    for number, each in enumerate(worst, 1):
        takes = test.takes(each.condition, each.group)
        name = re.sub(r"[^\w.,-]+", "_", f"{number:02} {each.condition.name} {test.names[each.group[0]]}").strip("_")
        for piece, take in enumerate(takes, 1):
            path = folder / f"{name}{f'_{piece}' if len(takes) > 1 else ''}.wav"
            soundfile.write(path, take.samples, test.config.sample_rate, subtype="FLOAT")
            paths.append(path)
    return paths


def judge_stress(results: StressResults, limit: float | None) -> None:
    """Raise CheckError where, under any condition, the judged engine's share of missed words is more than `limit`
    percentage points above the baseline's; None is no limit."""
    if limit is None:
        return
    judged = results.test.judged
    rows = [row for row in stress_rows(results) if row.engine == judged and row.points is not None]
    if not rows:
        raise CheckError("expected clips with words to judge by, got none, so nothing was compared")
    beyond = [
        f"{row.condition!r} {row.points:+.2f} points ({row.text.missed} of {row.text.words} words)"
        for row in rows
        if row.points is not None and row.points > limit
    ]
    if beyond:
        raise CheckError(
            f"under stress {judged} misses more words than {results.test.baseline}: {', '.join(beyond)}; expected at "
            f"most +{limit:g} points under each condition"
        )
