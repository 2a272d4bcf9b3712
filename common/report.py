"""What an optimization did, for programs (optimization_report.json) and for people (optimization_report.html).

Both are a function of the two folders and of what was measured: no times of day, so the same run gives the same bytes.
"""

import math
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import onnx_ir as ir

from common.card import CARD
from common.console import size_text
from common.files import FILES, package_versions, sha256, write_json
from common.gate import Heard, Words, changed, marked, word_table
from common.graphs import Graph
from common.optimize import Sensitivity, Stored, load
from common.transcripts import CONFIDENCE, WordErrorRate

REPORT_JSON, REPORT_HTML = "optimization_report.json", "optimization_report.html"
TEMPLATE = "report.html.j2"
MAX_SHOWN_CLIPS = 200  # in the page; the JSON has them all

PageWriter = Callable[[Path, dict, list[Heard]], None]

# What a file is made of. A quantized weight W is stored as W.codes, W.scales and perhaps W.zero_points.
PARTS = ("codes", "scales", "zero_points")
KINDS = ("float32", *PARTS, "graph", "padding")
_PART = re.compile(rf"(.+)\.({'|'.join(PARTS)})(\..+)?")
_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.weight")


def page_writer() -> PageWriter:
    """What writes the page. To be called before the work: raises ModuleNotFoundError where a package is missing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from common import plots

    folder = Path(__file__).resolve().parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": size_text, "ratio": _ratio, "chosen": chosen_sensitivity}
    template = environment.get_template(TEMPLATE)

    def write(path: Path, report: dict, heard: list[Heard]) -> None:
        unlike = changed(heard)
        page = template.render(
            report=report,
            plots=_plots(report, plots),
            kinds=[kind for kind in KINDS if any(_kind_bytes(report, kind))],
            changes=[(clip, marked(clip)) for clip in unlike[:MAX_SHOWN_CLIPS]],
            changed_clips=len(unlike),
            confidence=CONFIDENCE,
            json_file=REPORT_JSON,
        )
        path.write_text(page, encoding="utf-8")

    return write


def make_report(
    exported: Path,
    stage: Path,
    graphs: tuple[Graph, ...],
    manifest: dict,
    record: dict,
    stored: dict[str, dict[str, Stored]],
    sensitivity: Sensitivity | None,
    evaluation: dict | None,
) -> dict:
    """Everything that is known of the folder `stage`, made from `exported`.

    `graphs`: the encoder and the others, as the folder's runtime has them. `record` is the optimize section of its
    manifest and `stored` its quantized weights, by graph and name.
    """
    tensors, components, encoder = [], {}, graphs[0]
    for graph in graphs:
        rows, before, after = _account(exported, stage, graph, stored.get(graph.name, {}))
        sensitive = sensitivity or {} if graph is encoder else {}
        for row in rows:
            by_bits = sensitive.get(row["name"])
            shares = {str(bits): _short(by_bits[bits]) for bits in sorted(by_bits)} if by_bits else None
            row["output_sensitivity"] = shares
        tensors += rows
        components[graph.name] = {"exported": before, "optimized": after}
    source = manifest.get("export", {}).get("source", {})
    return {
        "flags": record["flags"],
        "fused": record["fused"],
        "bytes": {
            side: sum(sum(component[side].values()) for component in components.values())
            for side in ("exported", "optimized")
        },
        "encoder": encoder.name,
        "components": components,
        "sqnr_db_on_noise": {encoder.name: record["sqnr_db_on_noise"], **record["token_sqnr_db_on_noise"]},
        "evaluation": evaluation,
        "tensors": tensors,
        "source": {
            "checkpoint": source.get("name") or source.get("file"),
            "sha256": source.get("sha256"),
            "files": {name: listed["sha256"] for name, listed in manifest.get(FILES, {}).items() if name != CARD},
        },
        "versions": package_versions(),
    }


def make_evaluation(manifest: Path, heard: list[Heard], table: list[Words], limit: float | None) -> dict:
    """The section on words: error rates normalised (those that the limit is for) and as written, and each clip."""
    return {
        "manifest": manifest.name,
        "sha256": sha256(manifest),
        "seconds": round(sum(clip.seconds for clip in heard), 2),
        "max_wer_increase": limit,
        "normalised": [_words(row) for row in table],
        "as_written": [_words(row) for row in word_table(heard, str)],
        "clips": [
            {
                **asdict(clip),
                "seconds": round(clip.seconds, 3),
                "sqnr_db": _rounded(clip.sqnr_db),
                "errors": clip.errors,
            }
            for clip in heard
        ],
    }


def write_report(stage: Path, report: dict, heard: list[Heard], write_page: PageWriter) -> None:
    write_json(stage / REPORT_JSON, report)
    write_page(stage / REPORT_HTML, report, heard)


def _account(
    exported: Path, stage: Path, graph: Graph, stored: dict[str, Stored]
) -> tuple[list[dict], dict[str, int], dict[str, int]]:
    """A row for each tensor of either file of a graph, and the bytes of both by kind: they add up to its files."""
    sides, rows = [], {}
    for side, folder in (("bytes_before", exported), ("bytes_after", stage)):
        model = load(folder / graph.file)
        sizes, inline, mapped = dict.fromkeys(KINDS, 0), 0, 0
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            owner, kind = _owner(name, stored if folder is stage else {})
            row = rows.setdefault(owner, _row(graph, owner, list(tensor.shape.numpy()), stored.get(owner)))
            row[side] += tensor.nbytes
            sizes[kind] += tensor.nbytes
            if isinstance(tensor, ir.ExternalTensor):
                mapped += tensor.nbytes
            else:
                inline += tensor.nbytes
        sizes["graph"] = (folder / graph.file).stat().st_size - inline
        sizes["padding"] = (folder / graph.data_file).stat().st_size - mapped
        sides.append(sizes)
    return list(rows.values()), *sides


def _owner(name: str, stored: dict[str, Stored]) -> tuple[str, str]:
    """The weight that a tensor is a part of, and which; float32 (or an index) is its own."""
    part = _PART.fullmatch(name)
    return (part[1], part[2]) if part and part[1] in stored else (name, "float32")


def _row(graph: Graph, name: str, shape: list[int], stored: Stored | None) -> dict:
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


def _words(words: Words) -> dict:
    def rate(found: WordErrorRate) -> dict:
        return {"errors": found.errors, **{key: round(getattr(found, key), 3) for key in ("percent", "low", "high")}}

    rates = {side: rate(getattr(words, side)) for side in ("float32", "optimized", "increase")}
    return {"lang": words.lang, "clips": words.clips, "words": words.float32.words, **rates}


def _plots(report: dict, plots) -> dict[str, str]:
    """The pictures that there are data for, by name."""
    found = {"size": plots.sizes(report["components"], KINDS)}
    weights = [row for row in report["tensors"] if row["graph"] == report["encoder"] and row["bits"]]
    for name, value, title in (
        ("weights", lambda row: row["weight_error"], "Signal to error of the weight, dB"),
        ("outputs", chosen_sensitivity, "Signal to error of the encoder’s output, dB"),
    ):
        cells = {
            (part[2], int(part[1])): (decibels(value(row)), row["bits"])
            for row in weights
            if (part := _LAYER.fullmatch(row["name"])) and decibels(value(row)) is not None
        }
        if cells:
            found[name] = plots.by_layer(name, cells, title)
    evaluation = report["evaluation"] or {"clips": [], "normalised": []}
    if len(evaluation["normalised"]) > 1:
        rows = [
            (
                "all" if row["lang"] is None else row["lang"],
                *(row["increase"][key] for key in ("percent", "low", "high")),
            )
            for row in evaluation["normalised"]
        ]
        found["increases"] = plots.increases(rows, evaluation["max_wer_increase"])
    points = [(clip["seconds"], clip["sqnr_db"]) for clip in evaluation["clips"] if clip["sqnr_db"] is not None]
    if points:
        found["length"] = plots.by_length(points)
    return found


def chosen_sensitivity(row: dict) -> float | None:
    """What a tensor, in the bits that it has, does to the output."""
    return (row["output_sensitivity"] or {}).get(str(row["bits"]))


def decibels(error: float | None) -> float | None:
    """A relative error as a signal to error ratio; None where there is none."""
    return -10 * math.log10(error) if error else None


def _kind_bytes(report: dict, kind: str) -> list[int]:
    return [side[kind] for component in report["components"].values() for side in component.values()]


def _ratio(error: float | None) -> str:
    found = decibels(error)
    return "–" if found is None else f"{found:.1f}"


def _short(number: float) -> float:
    """Four digits: what sums in another order leave alone."""
    return float(f"{number:.4g}")


def _rounded(ratio: float) -> float | None:
    return round(ratio, 2) if math.isfinite(ratio) else None
