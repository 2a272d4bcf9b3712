"""The report of an optimization, for programs (optimization_report.json) and for people (optimization_report.html).

Both depend on the two folders and on what was measured, and say when, by which command and on which machine they were
made. They do not contain the paths at which a user keeps files. The verdict follows from the report alone: it sets the
measurements beside their limits.
"""

import datetime
import math
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir as ir

from common.contract import Graph
from common.evaluate.blanks import flaws_table
from common.evaluate.speed import why_slower
from common.evaluate.stress import OPTIMIZED
from common.evaluate.word_limit import EvaluatedClip, WordErrors, changed, word_table
from common.evaluate.words import CONFIDENCE, WordErrorRate, marked_changes
from common.folder import FILES, package_versions, sha256
from common.layouts.layout import REPORT_FILES
from common.onnx_io import load
from common.quantize.fidelity import MIN_FLOAT_SQNR_DB, MIN_SQNR_DB
from common.quantize.methods import Sensitivity
from common.quantize.rewrite import Stored
from common.quantize.tokens import MIN_TOKEN_SQNR_DB
from common.report import render
from common.report.card import CARD

REPORT_JSON, REPORT_HTML = REPORT_FILES
MAX_SHOWN_CLIPS = 200  # in the page; the JSON has them all
# What a file is made of. A quantized weight W is stored as W.codes, W.scales and perhaps W.zero_points.
PARTS = ("codes", "scales", "zero_points")
KINDS = ("float32", *PARTS, "graph", "padding")
_PART = re.compile(rf"(.+)\.({'|'.join(PARTS)})(\..+)?")
AXIS_MARGIN = 2  # of the 100 units of the axis on which changes of the word error rate are drawn
WORDS = "words on speech"
STRESS = "words where speech is hard"
BLANK = "speech without a word"
NO_LIMIT = "no limit was set"


# The content


def make_report(
    exported: Path,
    optimized: Path,
    graphs: tuple[Graph, ...],
    manifest: dict[str, Any],
    section: dict[str, Any],
    stored: Mapping[str, Mapping[str, Stored]],
    sensitivity: Sensitivity | None,
) -> dict[str, Any]:
    """What is known of the folder `optimized` from its files, which were made from `exported`.

    graphs: the encoder first, then the others, as the folder's runtime has them. manifest: of `exported`. section: what
    the manifest of `optimized` has under `optimize`. stored: the quantized weights by graph and name. sensitivity: what
    calibration measured of the encoder's weights. The caller adds the sections on words, stress, speed and the run.
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
    files = {name: listed["sha256"] for name, listed in manifest.get(FILES, {}).items() if name != CARD}
    return {
        **{key: section[key] for key in ("flags", "method", "runs_as", "cpus", "fused")},
        "bytes": {
            side: sum(sum(component[side].values()) for component in components.values())
            for side in ("exported", "optimized")
        },
        "encoder": encoder.name,
        "components": components,
        "sqnr_db_on_noise": {encoder.name: section["sqnr_db_on_noise"], **section["token_sqnr_db_on_noise"]},
        "tensors": tensors,
        "source": {
            "checkpoint": source.get("name") or source.get("file"),
            "sha256": source.get("sha256"),
            "files": files,
            "roles": {name: _role(name, graphs, files) for name in files},
        },
        "versions": package_versions(),
    }


def _count_bytes(
    folder: Path, graph: Graph, rows: dict[str, dict[str, Any]], key: str, stored: Mapping[str, Stored]
) -> dict[str, int]:
    """Bytes of a graph's files in `folder` by kind. Those of each tensor are added to its row, under `key`."""
    sizes = dict.fromkeys(KINDS, 0)
    outside = 0  # bytes of tensors in the data file
    for name, value in load(folder / graph.file).graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None, "an initializer has a value"
        part = _PART.fullmatch(name)
        owner, kind = (part[1], part[2]) if part and part[1] in stored else (name, "float32")
        weight = stored.get(owner)
        row = rows.setdefault(
            owner,
            {
                "graph": graph.name,
                "name": owner,
                "shape": list(tensor.shape.numpy()),
                "bits": weight.form.bits if weight else None,
                "block": (weight.form.block or None) if weight else None,
                "bytes_before": 0,
                "bytes_after": 0,
                "weight_error": _short(weight.error) if weight else None,
            },
        )
        row[key] += tensor.nbytes
        sizes[kind] += tensor.nbytes
        outside += tensor.nbytes if isinstance(tensor, ir.ExternalTensor) else 0
    size = (folder / graph.file).stat().st_size
    sizes["graph"] = size + outside - sum(sizes.values())
    sizes["padding"] = graph.bytes_in(folder) - size - outside
    return sizes


def _role(name: str, graphs: tuple[Graph, ...], files: Collection[str]) -> str:
    """What one of the `files` of the source folder is, for a reader of the report."""
    for graph in graphs:
        if name == graph.data_file:
            return f"{graph.name}, weights"
        if name == graph.file:
            return f"{graph.name}, operators" if graph.data_file in files else graph.name
    return "vocabulary" if re.search(r"token|vocab", name) else "configuration"


def make_evaluation(
    manifest: Path, clips: list[EvaluatedClip], table: list[WordErrors], limit: float | None
) -> dict[str, Any]:
    """The section on words: error rates normalised (to which the limit applies) and as written, and each clip."""

    def rate(found: WordErrorRate) -> dict[str, Any]:
        numbers = {"percent": found.percent, "low": found.low, "high": found.high}  # no interval without words
        return {"errors": found.errors, **{key: None if x is None else round(x, 3) for key, x in numbers.items()}}

    def rows(errors: list[WordErrors]) -> list[dict[str, Any]]:
        return [
            {"lang": row.lang, "clips": row.clips, "words": row.float32.words}
            | {name: rate(getattr(row, name)) for name in ("float32", "optimized", "increase")}
            for row in errors
        ]

    return {
        "manifest": manifest.name,
        "sha256": sha256(manifest),
        "seconds": round(sum(clip.seconds for clip in clips), 2),
        "max_wer_increase": limit,
        "normalised": rows(table),
        "as_written": rows(word_table(clips, str)),
        "clips": [asdict(clip) for clip in clips],
    }


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


def checks(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Each measurement beside its limit, in words. `met` is None where nothing was measured, or no limit was set."""
    found: list[tuple[str, str, str, bool | None]] = []  # name, measured, limit, met
    encoder, lost = report["encoder"], report["max_lost_words"]
    is_quantized = any(row["bits"] for row in report["tensors"] if row["graph"] == encoder)
    for graph, ratio in report["sqnr_db_on_noise"].items():
        floor = MIN_TOKEN_SQNR_DB if graph != encoder else MIN_SQNR_DB if is_quantized else MIN_FLOAT_SQNR_DB
        measured = "identical" if ratio is None else f"{ratio:.1f} dB"
        found.append((f"{graph} on noise", measured, f"at least {floor:g} dB", ratio is None or ratio >= floor))
    evaluation = report["evaluation"] or {"normalised": [], "max_wer_increase": None}
    stressed = [row for row in report["stress"] if row["engine"] == OPTIMIZED]
    rises = [row["increase"]["percent"] for row in evaluation["normalised"] if row["words"]]
    points = [row["points"] for row in stressed if row["points"] is not None]
    for name, each, limit in ((WORDS, rises, evaluation["max_wer_increase"]), (STRESS, points, lost)):
        # The largest rise in percentage points: over all clips, in a language, or under a condition.
        measured = f"{max(each):+.2f} points" if each else "not measured"
        is_met = max(each) <= limit if each and limit is not None else None
        found.append((name, measured, NO_LIMIT if limit is None else f"at most {limit:+g} points", is_met))
    if alone := [row["alone"] for row in stressed if row["alone"] is not None]:
        measured = f"{sum(alone)} stretches where float32 has words"
        found.append((BLANK, measured, *((NO_LIMIT, None) if lost is None else ("none", not sum(alone)))))
    return [dict(zip(("name", "measured", "limit", "met"), row, strict=True)) for row in found]


def verdict(report: dict[str, Any]) -> tuple[bool | None, str]:
    """Whether every limit is met, and the reason in a sentence; None where no limit on words was checked."""
    found = report["verdict"]["checks"]
    failed = ", ".join(check["name"] for check in found if check["met"] is False)
    if failed:
        return False, f"Beyond the limit: {failed}."
    if any(check["met"] for check in found if check["name"] in (WORDS, STRESS)):
        unjudged = ", ".join(check["name"] for check in found if check["met"] is None)
        return True, "Every limit that was set is met." + (f" Not judged: {unjudged}." if unjudged else "")
    return None, (
        "The graphs run and agree with float32 on noise; whether words are lost is not decided, since no limit on them "
        "was set."
    )


# The page


def write_page(path: Path, report: dict[str, Any], clips: list[EvaluatedClip]) -> None:
    """Write the page of a report and the evaluated clips."""
    differing = changed(clips)
    passed, reason = verdict(report)
    speed = report["speed"]
    encoder_bytes = sum(report["components"][report["encoder"]]["exported"].values())
    page = render(
        "report.html.j2",
        report=report,
        passed=passed,
        reason=reason,
        why_slower=speed and why_slower(speed["exported"]["rtfx"], speed["optimized"]["rtfx"], encoder_bytes),
        place_of=_axis(report["evaluation"]) if report["evaluation"] else None,
        kinds=KINDS,
        changes=[(clip, marked_changes(clip.float32, clip.optimized)) for clip in differing[:MAX_SHOWN_CLIPS]],
        changed_clips=len(differing),
        flaws=flaws_table(((clip.name, clip.flaws) for clip in clips), "float32"),
        confidence=CONFIDENCE,
        json_file=REPORT_JSON,
        decibels=_decibels,
        grade=grade,
    )
    path.write_text(page, encoding="utf-8")


def _axis(evaluation: dict[str, Any]) -> Callable[[float], float]:
    """A change of the word error rate in points → its place from 0 to 100 on the axis that all languages share.

    The axis reaches over 0, the limit and every interval.
    """
    counted = [row["increase"] for row in evaluation["normalised"] if row["words"]]
    ends = [0.0, evaluation["max_wer_increase"] or 0.0, *(row[end] for row in counted for end in ("low", "high"))]
    scale = (100 - 2 * AXIS_MARGIN) / ((max(ends) - min(ends)) or 1)
    return lambda points: round(AXIS_MARGIN + scale * (points - min(ends)), 2)


def _decibels(error: float | None) -> str:
    """A relative error as a signal to error ratio in dB; `exact` for no error, and a dash where none was measured."""
    if error is None:
        return "–"
    return f"{-10 * math.log10(error):.1f}" if error else "exact"


def grade(ratio: float | None) -> str:
    """A word for a signal to error ratio in dB of an encoder's output; None: no error."""
    if ratio is None or ratio >= 30:
        return "good"
    return "fair" if ratio >= 20 else "low"
