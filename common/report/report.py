"""The report of an optimization, for programs (optimization_report.json) and for people (optimization_report.html).

Both depend on the two folders and on what was measured, and say when, by which command and on which machine they were
made. They do not contain the paths at which a user keeps files.
"""

import datetime
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx_ir as ir

from common.cli import size_text
from common.contract import Graph, encoder_weight
from common.evaluate.wer import CONFIDENCE, WordErrorRate
from common.evaluate.word_limit import EvaluatedClip, WordErrors, changed, marked, word_table
from common.folder import FILES, package_versions, sha256, write_json
from common.layouts.layout import REPORT_FILES
from common.onnx_io import load
from common.quantize.methods import Sensitivity
from common.quantize.rewrite import Stored
from common.report.card import CARD
from common.report.decision import verdict
from common.report.pages import page_environment

REPORT_JSON, REPORT_HTML = REPORT_FILES
TEMPLATE = "report.html.j2"
MAX_SHOWN_CLIPS = 200  # in the page; the JSON has them all
PageWriter = Callable[[Path, dict[str, Any], list[EvaluatedClip]], None]
# What a file is made of. A quantized weight W is stored as W.codes, W.scales and perhaps W.zero_points.
PARTS = ("codes", "scales", "zero_points")
KINDS = ("float32", *PARTS, "graph", "padding")
_PART = re.compile(rf"(.+)\.({'|'.join(PARTS)})(\..+)?")


@dataclass(frozen=True)
class QuantizedWeights:
    """The quantized weights of a folder, and what calibration measured of those of its encoder."""

    stored: Mapping[str, Mapping[str, Stored]]  # by graph and name
    sensitivity: Sensitivity | None


def page_writer() -> PageWriter:
    """A function that writes the page.

    Call this before the work, since it raises ModuleNotFoundError where packages are missing.
    """
    from common.report import plots

    environment = page_environment()
    environment.filters |= {"size": size_text, "ratio": _ratio, "chosen": chosen_sensitivity}
    template = environment.get_template(TEMPLATE)

    def write(path: Path, report: dict[str, Any], clips: list[EvaluatedClip]) -> None:
        differing = changed(clips)
        page = template.render(
            report=report,
            verdict=verdict(report),
            plots=_plots(report, plots),
            kinds=[kind for kind in KINDS if any(_kind_bytes(report, kind))],
            changes=[(clip, marked(clip)) for clip in differing[:MAX_SHOWN_CLIPS]],
            changed_clips=len(differing),
            confidence=CONFIDENCE,
            json_file=REPORT_JSON,
        )
        path.write_text(page, encoding="utf-8")

    return write


def make_report(
    exported: Path,
    optimized: Path,
    graphs: tuple[Graph, ...],
    manifest: dict[str, Any],
    section: dict[str, Any],
    weights: QuantizedWeights,
    evaluation: dict[str, Any] | None,
) -> dict[str, Any]:
    """Everything that is known of the folder `optimized`, made from `exported`.

    `graphs`: the encoder first, then the others, as the folder's runtime has them. `section`: what its manifest has
    under `optimize`. `evaluation`: as make_evaluation gives it.
    """
    tensors: list[dict[str, Any]] = []
    components: dict[str, dict[str, dict[str, int]]] = {}
    encoder = graphs[0]
    for graph in graphs:
        rows, before, after = _account(exported, optimized, graph, weights.stored.get(graph.name, {}))
        sensitive = weights.sensitivity or {} if graph is encoder else {}
        for row in rows:
            by_bits = sensitive.get(row["name"])
            shares = {str(bits): _short(by_bits[bits]) for bits in sorted(by_bits)} if by_bits else None
            row["output_sensitivity"] = shares
        tensors += rows
        components[graph.name] = {"exported": before, "optimized": after}
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
        "evaluation": evaluation,
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


def _role(name: str, graphs: tuple[Graph, ...]) -> str:
    """What a file of the source folder is, for a reader of the report."""
    for graph in graphs:
        if name in (graph.file, graph.data_file):
            return f"{graph.name}, {'operators' if name == graph.file else 'weights'}"
    return "vocabulary" if re.search(r"token|vocab", name) else "configuration"


def run_record(command: Sequence[str]) -> dict[str, str]:
    """The time, and the command as a shell takes it. Absolute paths are cut to their last part, since a report is
    published with its folder."""
    shown = [f"…/{Path(part).name}" if Path(part).is_absolute() else part for part in command]
    now = datetime.datetime.now().astimezone()
    return {"date": now.isoformat(" ", "minutes"), "command": shlex.join(shown)}


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
                "sqnr_db": _rounded(clip.sqnr_db),
                "errors": clip.errors,
            }
            for clip in clips
        ],
    }


def write_report(folder: Path, report: dict[str, Any], clips: list[EvaluatedClip], write_page: PageWriter) -> None:
    write_json(folder / REPORT_JSON, report)
    write_page(folder / REPORT_HTML, report, clips)


def _account(
    exported: Path, optimized: Path, graph: Graph, stored: Mapping[str, Stored]
) -> tuple[list[dict[str, Any]], dict[str, int], dict[str, int]]:
    """A row for each tensor that a graph has in either folder, and the bytes of its files in both, by kind."""
    rows: dict[str, dict[str, Any]] = {}
    before = _count_bytes(exported, graph, rows, "bytes_before", {}, stored)
    after = _count_bytes(optimized, graph, rows, "bytes_after", stored, stored)
    return list(rows.values()), before, after


def _count_bytes(
    folder: Path,
    graph: Graph,
    rows: dict[str, dict[str, Any]],
    key: str,
    split: Mapping[str, Stored],
    stored: Mapping[str, Stored],
) -> dict[str, int]:
    """Bytes of a graph in `folder` by kind; those of each tensor are added to its row, under `key`.

    split: the weights that this graph stores in parts.
    """
    sizes = dict.fromkeys(KINDS, 0)
    inline = 0  # bytes in the .onnx file
    mapped = 0  # bytes in the data file
    for name, value in load(folder / graph.file).graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None, "an initializer has a value"
        owner, kind = _owner(name, split)
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


def _owner(name: str, stored: Mapping[str, Stored]) -> tuple[str, str]:
    """The weight that a tensor is a part of, and which part; a float32 tensor (or an index) is a weight by itself."""
    part = _PART.fullmatch(name)
    return (part[1], part[2]) if part and part[1] in stored else (name, "float32")


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


def _plots(report: dict[str, Any], plots: ModuleType) -> dict[str, str]:
    """The pictures that there are data for, by name."""
    pictures = {"size": plots.sizes(report["components"], KINDS)}
    rows = [row for row in report["tensors"] if row["graph"] == report["encoder"] and row["bits"]]
    maps = (
        ("weights", _weight_error, "Signal to error of the weight, dB", plots.OF_WEIGHTS),
        ("outputs", chosen_sensitivity, "Signal to error of the encoder’s output, dB", plots.OF_OUTPUTS),
    )
    for name, error_of, title, scale in maps:
        if cells := _cells(rows, error_of):
            pictures[name] = plots.by_layer(name, cells, title, scale)
    evaluation = report["evaluation"] or {"clips": [], "normalised": []}
    increases = [
        (
            "all" if row["lang"] is None else row["lang"],
            row["increase"]["percent"],
            row["increase"]["low"],
            row["increase"]["high"],
        )
        for row in evaluation["normalised"]
        if row["words"]
    ]
    if len(increases) > 1:
        pictures["increases"] = plots.increases(increases, evaluation["max_wer_increase"])
    points = [(clip["seconds"], clip["sqnr_db"]) for clip in evaluation["clips"] if clip["sqnr_db"] is not None]
    if points:
        pictures["length"] = plots.by_length(points)
    return pictures


def _cells(
    rows: list[dict[str, Any]], error_of: Callable[[dict[str, Any]], float | None]
) -> dict[tuple[str, int], tuple[float, int]]:
    """(role, layer) → dB and bits, of the weights that have an error."""
    cells = {}
    for row in rows:
        weight = encoder_weight(row["name"])
        ratio = decibels(error_of(row))
        if weight.layer is not None and ratio is not None:
            cells[weight.role.value, weight.layer] = (ratio, row["bits"])
    return cells


def _weight_error(row: dict[str, Any]) -> float | None:
    error: float | None = row["weight_error"]
    return error


def chosen_sensitivity(row: dict[str, Any]) -> float | None:
    """The error of the encoder's output that a weight causes at its number of bits; None where it was not measured."""
    by_bits: dict[str, float] = row["output_sensitivity"] or {}
    return by_bits.get(str(row["bits"]))


def decibels(error: float | None) -> float | None:
    """A relative error as a signal to error ratio in dB; None where there is no error."""
    return -10 * math.log10(error) if error else None


def _kind_bytes(report: dict[str, Any], kind: str) -> list[int]:
    return [side[kind] for component in report["components"].values() for side in component.values()]


def _ratio(error: float | None) -> str:
    ratio = decibels(error)
    return "–" if ratio is None else f"{ratio:.1f}"


def _short(number: float) -> float:
    """Rounded to four digits, which do not depend on the order of sums."""
    return float(f"{number:.4g}")


def _rounded(ratio: float) -> float | None:
    return round(ratio, 2) if math.isfinite(ratio) else None
