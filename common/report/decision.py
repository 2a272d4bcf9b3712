"""Whether an optimized folder is fit for use, by its report alone: the measurements beside their limits."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from common.quantize.fidelity import MIN_FLOAT_SQNR_DB, MIN_SQNR_DB
from common.quantize.tokens import MIN_TOKEN_SQNR_DB

NOT_MEASURED = "not measured"
NO_LIMIT = "no limit was set"


@dataclass(frozen=True)
class Check:
    """One measurement beside its limit, in words."""

    name: str
    measured: str
    limit: str
    met: bool | None  # None where nothing was measured, or no limit was set


@dataclass(frozen=True)
class Verdict:
    """The checks, and what follows from them."""

    checks: list[Check]

    @property
    def passed(self) -> bool | None:
        """False where a limit is not met; None where no limit on words was checked."""
        if any(check.met is False for check in self.checks):
            return False
        return True if any(check.met for check in self.checks if check.name in (WORDS, STRESS)) else None

    @property
    def title(self) -> str:
        """The verdict in one word or a few."""
        return {True: "Passed", False: "Not passed", None: "Not judged on words"}[self.passed]

    @property
    def reason(self) -> str:
        """The reason for the verdict, in a sentence."""
        if self.passed is False:
            names = ", ".join(check.name for check in self.checks if check.met is False)
            return f"Beyond the limit: {names}."
        if self.passed:
            unjudged = ", ".join(check.name for check in self.checks if check.met is None)
            return "Every limit that was set is met." + (f" Not judged: {unjudged}." if unjudged else "")
        return (
            "The graphs run and agree with float32 on noise; whether words are lost is not decided, since no limit on "
            "them was set."
        )


WORDS, STRESS = "words on speech", "words where speech is hard"


def verdict(report: dict[str, Any]) -> Verdict:
    """The verdict on a report that make_report has made and finish_folder has completed."""
    return Verdict([*_noise(report), _words(report), _stress(report)])


def _noise(report: dict[str, Any]) -> Iterator[Check]:
    """A row for each graph that was compared on noise."""
    encoder = report["encoder"]
    quantized = any(row["bits"] for row in report["tensors"] if row["graph"] == encoder)
    for graph, ratio in report["sqnr_db_on_noise"].items():
        floor = MIN_TOKEN_SQNR_DB if graph != encoder else MIN_SQNR_DB if quantized else MIN_FLOAT_SQNR_DB
        measured = "identical" if ratio is None else f"{ratio:.1f} dB"
        yield Check(f"{graph} on noise", measured, f"at least {floor:g} dB", ratio is None or ratio >= floor)


def _words(report: dict[str, Any]) -> Check:
    """The largest rise of the word error rate, over all clips or in a language."""
    evaluation = report["evaluation"]
    rises = [row["increase"]["percent"] for row in evaluation["normalised"] if row["words"]] if evaluation else []
    return _points(WORDS, rises, evaluation["max_wer_increase"] if evaluation else None)


def _stress(report: dict[str, Any]) -> Check:
    """The largest share of words missed beyond float32's under one condition."""
    points = [row["points"] for row in report["stress"] if row["engine"] == "optimized" and row["points"] is not None]
    return _points(STRESS, points, report["max_lost_words"])


def _points(name: str, rises: list[float], limit: float | None) -> Check:
    if not rises:
        return Check(name, NOT_MEASURED, NO_LIMIT if limit is None else f"at most {limit:+g} points", None)
    measured = f"{max(rises):+.2f} points"
    if limit is None:
        return Check(name, measured, NO_LIMIT, None)
    return Check(name, measured, f"at most {limit:+g} points", max(rises) <= limit)
