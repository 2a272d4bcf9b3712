"""The report of an optimization, for programs (optimization_report.json) and for people (optimization_report.html).

Both depend on the two folders and on what was measured, and say when, by which command and on which machine they were
made. They do not contain the paths at which a user keeps files. The verdict follows from the report alone: it sets the
measurements beside their limits.
"""

import datetime
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from common.cli import size_text
from common.contract import Graph
from common.evaluate.wer import CONFIDENCE, WordErrorRate
from common.evaluate.word_limit import EvaluatedClip, WordErrors, changed, marked, word_table
from common.folder import FILES, package_versions, sha256
from common.layouts.layout import REPORT_FILES
from common.onnx_io import load
from common.quantize.fidelity import MIN_FLOAT_SQNR_DB, MIN_SQNR_DB
from common.quantize.methods import Sensitivity
from common.quantize.rewrite import Stored
from common.quantize.tokens import MIN_TOKEN_SQNR_DB
from common.report import page_environment
from common.report.card import CARD

REPORT_JSON, REPORT_HTML = REPORT_FILES
TEMPLATE = "report.html.j2"
MAX_SHOWN_CLIPS = 200  # in the page; the JSON has them all
# What a file is made of. A quantized weight W is stored as W.codes, W.scales and perhaps W.zero_points.
PARTS = ("codes", "scales", "zero_points")
KINDS = ("float32", *PARTS, "graph", "padding")
_PART = re.compile(rf"(.+)\.({'|'.join(PARTS)})(\..+)?")
AXIS_MARGIN = 2  # of the 100 units of the axis on which changes of the word error rate are drawn
NOT_MEASURED = "not measured"
NO_LIMIT = "no limit was set"
WORDS, STRESS = "words on speech", "words where speech is hard"
SMALL_ENCODER = 100e6  # bytes in float32; the smallest published one has 400 MB


# The content


def make_report(
    exported: Path,
    optimized: Path,
    graphs: tuple[Graph, ...],
    manifest: dict[str, Any],
    section: dict[str, Any],
    stored: Mapping[str, Mapping[str, Stored]],
    sensitivity: Sensitivity | None = None,
) -> dict[str, Any]:
    """What is known of the folder `optimized` from its files, which were made from those of `exported`.

    graphs: the encoder first, then the others, as the folder's runtime has them. manifest: of `exported`. section: what
    the manifest of `optimized` has under `optimize`. stored: the quantized weights by graph and name. sensitivity: what
    calibration measured of those of the encoder. The measurements of words, stress and speed are added by the caller.
    """
    encoder = graphs[0]
    tensors: list[dict[str, Any]] = []
    components: dict[str, dict[str, dict[str, int]]] = {}
    for graph in graphs:
        rows: dict[str, dict[str, Any]] = {}
        weights = stored.get(graph.name, {})
        components[graph.name] = {
            "exported": _count_bytes(exported, graph, rows, "bytes_before", weights),
            "optimized": _count_bytes(optimized, graph, rows, "bytes_after", weights),
        }
        tensors += rows.values()
    for row in tensors:
        by_bits = (sensitivity or {}).get(row["name"]) if row["graph"] == encoder.name else None
        row["output_sensitivity"] = {str(bits): _short(by_bits[bits]) for bits in sorted(by_bits)} if by_bits else None
    source = manifest.get("export", {}).get("source", {})
    return {
        "flags": section["flags"],
        "method": section["method"],
        "runs_as": section["runs_as"],
        "fused": section["fused"],
        "bytes": {
            side: sum(sum(component[side].values()) for component in components.values())
            for side in ("exported", "optimized")
        },
        "encoder": encoder.name,
        "components": components,
        "sqnr_db_on_noise": {encoder.name: section["sqnr_db_on_noise"], **section["token_sqnr_db_on_noise"]},
        "evaluation": None,  # as make_evaluation gives it
        "stress": [],  # rows of a stress test
        "max_lost_words": None,
        "speed": None,  # of both encoders
        "run": None,  # when, by which command
        "tensors": tensors,
        "source": {
            "checkpoint": source.get("name") or source.get("file"),
            "sha256": source.get("sha256"),
            "files": {name: listed["sha256"] for name, listed in manifest.get(FILES, {}).items() if name != CARD},
            "roles": {name: _role(name, graphs) for name in manifest.get(FILES, {}) if name != CARD},
        },
        "versions": package_versions(),
    }


def _count_bytes(
    folder: Path, graph: Graph, rows: dict[str, dict[str, Any]], key: str, stored: Mapping[str, Stored]
) -> dict[str, int]:
    """Bytes of a graph's files in `folder` by kind. Those of each tensor are added to its row, under `key`."""
    sizes = dict.fromkeys(KINDS, 0)
    inline = 0  # bytes in the .onnx file
    mapped = 0  # bytes in the data file
    for name, value in load(folder / graph.file).graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None, "an initializer has a value"
        part = _PART.fullmatch(name)
        owner, kind = (part[1], part[2]) if part and part[1] in stored else (name, "float32")
        row = rows.setdefault(owner, _row(graph, owner, list(tensor.shape.numpy()), stored.get(owner)))
        row[key] += tensor.nbytes
        sizes[kind] += tensor.nbytes
        if isinstance(tensor, ir.ExternalTensor):
            mapped += tensor.nbytes
        else:
            inline += tensor.nbytes
    sizes["graph"] = (folder / graph.file).stat().st_size - inline
    sizes["padding"] = (folder / graph.data_file).stat().st_size - mapped
    return sizes


def _row(graph: Graph, name: str, shape: list[int], stored: Stored | None) -> dict[str, Any]:
    return {
        "graph": graph.name,
        "name": name,
        "shape": shape,
        "bits": stored.form.bits if stored else None,
        "block": stored.form.block if stored else None,
        "bytes_before": 0,
        "bytes_after": 0,
        "weight_error": _short(stored.error) if stored else None,
    }


def _role(name: str, graphs: tuple[Graph, ...]) -> str:
    """What a file of the source folder is, for a reader of the report."""
    for graph in graphs:
        if name in (graph.file, graph.data_file):
            return f"{graph.name}, {'operators' if name == graph.file else 'weights'}"
    return "vocabulary" if re.search(r"token|vocab", name) else "configuration"


def make_evaluation(
    manifest: Path, clips: list[EvaluatedClip], table: list[WordErrors], limit: float | None
) -> dict[str, Any]:
    """The section on words: error rates normalised (to which the limit applies) and as written, and each clip."""
    return {
        "manifest": manifest.name,
        "sha256": sha256(manifest),
        "seconds": round(sum(clip.seconds for clip in clips), 2),
        "max_wer_increase": limit,
        "normalised": [_word_errors(row) for row in table],
        "as_written": [_word_errors(row) for row in word_table(clips, str)],
        "clips": [
            {
                **asdict(clip),
                "seconds": round(clip.seconds, 3),
                "sqnr_db": round(clip.sqnr_db, 2) if math.isfinite(clip.sqnr_db) else None,
                "errors": clip.errors,
            }
            for clip in clips
        ],
    }


def _word_errors(row: WordErrors) -> dict[str, Any]:
    return {
        "lang": row.lang,
        "clips": row.clips,
        "words": row.float32.words,
        "float32": _rate(row.float32),
        "optimized": _rate(row.optimized),
        "increase": _rate(row.increase),
    }


def _rate(rate: WordErrorRate) -> dict[str, Any]:
    """Errors, and percentages to three digits; there is no interval where the texts have no words."""
    percentages = {"percent": rate.percent, "low": rate.low, "high": rate.high}
    return {"errors": rate.errors, **{key: None if x is None else round(x, 3) for key, x in percentages.items()}}


def run_record(command: Sequence[str]) -> dict[str, str]:
    """The time, and the command as a shell takes it. Absolute paths are cut to their last part, since a report is
    published with its folder."""
    shown = [f"…/{Path(part).name}" if Path(part).is_absolute() else part for part in command]
    now = datetime.datetime.now().astimezone()
    return {"date": now.isoformat(" ", "minutes"), "command": shlex.join(shown)}


def _short(number: float) -> float:
    """Rounded to four digits, which do not depend on the order of sums."""
    return float(f"{number:.4g}")


# The verdict


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


def verdict(report: dict[str, Any]) -> Verdict:
    """The verdict on a complete report."""
    evaluation = report["evaluation"]
    rises = [row["increase"]["percent"] for row in evaluation["normalised"] if row["words"]] if evaluation else []
    points = [row["points"] for row in report["stress"] if row["engine"] == "optimized" and row["points"] is not None]
    return Verdict(
        [
            *_noise_checks(report),
            _points_check(WORDS, rises, evaluation["max_wer_increase"] if evaluation else None),
            _points_check(STRESS, points, report["max_lost_words"]),
        ]
    )


def _noise_checks(report: dict[str, Any]) -> Iterator[Check]:
    """A check of each graph that was compared on noise."""
    encoder = report["encoder"]
    is_quantized = any(row["bits"] for row in report["tensors"] if row["graph"] == encoder)
    for graph, ratio in report["sqnr_db_on_noise"].items():
        floor = MIN_TOKEN_SQNR_DB if graph != encoder else MIN_SQNR_DB if is_quantized else MIN_FLOAT_SQNR_DB
        measured = "identical" if ratio is None else f"{ratio:.1f} dB"
        yield Check(f"{graph} on noise", measured, f"at least {floor:g} dB", ratio is None or ratio >= floor)


def _points_check(name: str, rises: list[float], limit: float | None) -> Check:
    """A check of the largest of `rises`, in percentage points: over all clips, in a language, or under a condition."""
    limit_text = NO_LIMIT if limit is None else f"at most {limit:+g} points"
    if not rises:
        return Check(name, NOT_MEASURED, limit_text, None)
    is_met = None if limit is None else max(rises) <= limit
    return Check(name, f"{max(rises):+.2f} points", limit_text, is_met)


def why_slower(speed: dict[str, Any] | None, encoder_bytes: int) -> str | None:
    """Why the optimized encoder is slower than float32, in a sentence; None where it is not, or was not measured.

    speed: as the report has it. encoder_bytes: size of the exported encoder.
    """
    if not speed or speed["optimized"]["rtfx"] >= speed["exported"]["rtfx"]:
        return None
    if encoder_bytes < SMALL_ENCODER:
        return (
            "The optimized encoder is slower than float32, since the matrices of this small model are so small that "
            "preparing a quantized product takes longer than the product saves."
        )
    return "The optimized encoder is slower than float32 on this CPU; docs/benchmarks.md compares the methods."


# The page


PageWriter = Callable[[Path, dict[str, Any], list[EvaluatedClip]], None]


def page_writer() -> PageWriter:
    """A function that writes the page of a report and the evaluated clips.

    Call this before the work, since it raises ModuleNotFoundError where packages are missing.
    """
    environment = page_environment()
    environment.filters |= {"size": size_text, "ratio": _ratio, "chosen": _chosen_sensitivity}
    template = environment.get_template(TEMPLATE)

    def write(path: Path, report: dict[str, Any], clips: list[EvaluatedClip]) -> None:
        differing = changed(clips)
        sides = [side for component in report["components"].values() for side in component.values()]
        page = template.render(
            report=report,
            verdict=verdict(report),
            why_slower=why_slower(report["speed"], sum(report["components"][report["encoder"]]["exported"].values())),
            place_of=_axis(report["evaluation"]) if report["evaluation"] else None,
            kinds=[kind for kind in KINDS if any(side[kind] for side in sides)],
            changes=[(clip, marked(clip)) for clip in differing[:MAX_SHOWN_CLIPS]],
            changed_clips=len(differing),
            confidence=CONFIDENCE,
            json_file=REPORT_JSON,
        )
        path.write_text(page, encoding="utf-8")

    return write


def _axis(evaluation: dict[str, Any]) -> Callable[[float], float]:
    """A change of the word error rate in points → its place from 0 to 100 on the axis that all languages share.

    The axis reaches over 0, the limit and every interval.
    """
    counted = [row["increase"] for row in evaluation["normalised"] if row["words"]]
    ends = [0.0, evaluation["max_wer_increase"] or 0.0, *(row[end] for row in counted for end in ("low", "high"))]
    scale = (100 - 2 * AXIS_MARGIN) / ((max(ends) - min(ends)) or 1)
    return lambda points: round(AXIS_MARGIN + scale * (points - min(ends)), 2)


def _chosen_sensitivity(row: dict[str, Any]) -> float | None:
    """The error of the encoder's output that a weight causes at its number of bits; None where it was not measured."""
    by_bits: dict[str, float] = row["output_sensitivity"] or {}
    return by_bits.get(str(row["bits"]))


def _ratio(error: float | None) -> str:
    """A relative error as a signal to error ratio in dB; a dash where there is no error."""
    return f"{-10 * math.log10(error):.1f}" if error else "–"
