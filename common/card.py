"""The model card of a folder, `README.md` with Hugging Face's front matter, from nothing but the folder's manifest.

The same manifest gives the same bytes. What the manifest does not know is left open, the licence above all.
"""

import itertools
import shlex
from dataclasses import dataclass
from pathlib import Path

import yaml

from common.console import size_text
from common.files import FILES, MANIFEST, fingerprint, is_float16, read_manifest, sha256, write_json
from common.layouts import GENAI, Layout, usage
from common.transcripts import WordErrorRate

CARD = "README.md"


@dataclass(frozen=True)
class Published:
    """What the card of a published checkpoint says of it, as Hugging Face writes it."""

    license: str
    languages: str  # ISO 639-1, by spaces


V3_LANGUAGES = "bg hr cs da nl en et fi fr de el hu it lv lt mt pl pt ro sk sl es sv ru uk"
# By the name that --model_name took. Add one with its own card open; every other checkpoint's licence is left open.
PUBLISHED = {
    "nvidia/parakeet-tdt-0.6b-v3": Published("cc-by-4.0", V3_LANGUAGES),
    "nvidia/parakeet-tdt-0.6b-v2": Published("cc-by-4.0", "en"),
    "nvidia/parakeet-tdt-1.1b": Published("cc-by-4.0", "en"),
}
LICENSE_TEXT = {
    "cc-by-4.0": "These files are an adaptation of it under the same licence, [CC-BY-4.0]"
    "(https://creativecommons.org/licenses/by/4.0/): give credit to its authors, and say what was changed.",
    None: "**The licence is not known.** Before you publish this folder, look up the terms of the checkpoint, and fill "
    "in `license` and `language` at the top of this file.",
}  # fmt: skip

SCRIPTS = {
    "export": "export_parakeet_to_onnx.py",
    "tokenizer": "export_tokenizer.py",
    "optimize": "optimize_encoder.py",
}  # sections of the manifest, in the order in which they are made


def write_card(stage: Path, target: Path, layout: Layout) -> None:
    """Write the card into `stage`, which will become `target`, and list it in its manifest; the last file of all.

    A card that a person wrote or changed, one that the manifest of `target` does not list, is left as it is.
    """
    manifest = read_manifest(stage)
    manifest[FILES].pop(CARD, None)
    found = target / CARD
    if found.is_file() and sha256(found) != read_manifest(target).get(FILES, {}).get(CARD, {}).get("sha256"):
        print(f"{found} was written or changed by hand and stays as it is; delete it to have a new one")
    else:
        (stage / CARD).write_text(model_card(manifest, layout), encoding="utf-8", newline="\n")
        manifest[FILES][CARD] = fingerprint(stage / CARD)
        manifest[FILES] = dict(sorted(manifest[FILES].items()))
    write_json(stage / MANIFEST, manifest)


def model_card(manifest: dict, layout: Layout) -> str:
    """The whole text."""
    name = _source_name(manifest)
    sections = (
        f"---\n{yaml.safe_dump(front_matter(manifest, layout), sort_keys=False)}---",
        f"# {name.split('/')[-1].removesuffix('.nemo')}, ONNX",
        _origin(manifest),
        "## Use",
        _usage(manifest, layout),
        "## Files",
        _files(manifest[FILES]),
        "## How it was made",
        _commands(manifest),
        "## Measured",
        *_measured(manifest),
    )
    return "\n\n".join(sections) + "\n"


def front_matter(manifest: dict, layout: Layout) -> dict:
    """The keys that Hugging Face reads (huggingface.co/docs/hub/model-cards)."""
    name = _source_name(manifest)
    published = PUBLISHED.get(name)
    found = {"license": published.license if published else "other"}
    if published is None:
        found["license_name"] = "unknown"
    else:
        found["language"] = published.languages.split()
    found |= {"library_name": layout.package, "pipeline_tag": "automatic-speech-recognition"}
    if "name" in _source(manifest):
        found["base_model"] = name
        if is_float16(manifest) or _weights_by_bits(manifest):
            found["base_model_relation"] = "quantized"
    tags = ["onnx", "onnxruntime", layout.package, "parakeet", "fastconformer", "tdt", "transducer", "speech"]
    return {**found, "tags": tags + (["float16"] if is_float16(manifest) else [])}


def wer_table(rows: dict[str, dict]) -> str:
    """Engine → `errors`, `words` and the interval `low`, `high` in per cent (common.transcripts.WordErrorRate)."""
    lines = ["| | WER | 95 % interval | words |", "|---|---|---|---|"]
    for engine, row in rows.items():
        rate = WordErrorRate(row["errors"], row["words"], row["low"], row["high"])
        interval = f"{rate.low:.2f} – {rate.high:.2f} %" if rate.words else "–"
        percent = f"{rate.percent:.2f} %" if rate.words else str(rate)
        lines.append(f"| {engine} | {percent} | {interval} | {rate.words} |")
    return "\n".join(lines)


def _source(manifest: dict) -> dict:
    return next((manifest[section]["source"] for section in SCRIPTS if "source" in manifest.get(section, {})), {})


def _source_name(manifest: dict) -> str:
    """The Hugging Face name, or the name of the file."""
    source = _source(manifest)
    return source.get("name") or source.get("file", "unknown")


def _weights_by_bits(manifest: dict) -> dict[str, int]:
    return manifest.get("optimize", {}).get("weights_by_bits", {})


def _origin(manifest: dict) -> str:
    name, source = _source_name(manifest), _source(manifest)
    link = f"[{name}](https://huggingface.co/{name})" if "name" in source else f"the checkpoint `{name}`"
    published = PUBLISHED.get(name)
    return (
        f"{link}, a FastConformer-TDT model for speech recognition made with NVIDIA NeMo, as ONNX graphs: encoder, "
        f"prediction network and joint, with tokenizer and configuration. The checkpoint's SHA-256 is "
        f"`{source.get('sha256', 'not recorded')}`.\n\n{LICENSE_TEXT[published.license if published else None]}"
    )


def _usage(manifest: dict, layout: Layout) -> str:
    section, (package, *others) = manifest.get("export", {}), layout.packages
    version = section.get("versions", {}).get(package)
    if layout is GENAI and section.get("flags", {}).get("device") == "cuda":
        package += "-cuda"
    pinned = f"{package}=={version}" if version else package
    packages = " ".join((pinned, *others))
    return f"In this folder, with `pip install {packages}`:\n\n```python\n{usage(layout.runtime, '.')}```"


def _files(listed: dict) -> str:
    rows = (f"| `{name}` | {size_text(file['bytes'])} |" for name, file in listed.items() if name != CARD)
    return "\n".join(("| file | size |", "|---|---|", *rows, f"| `{MANIFEST}` | checksums, versions, measurements |"))


def _commands(manifest: dict) -> str:
    """The scripts as they were called, folders aside, and the versions that they ran with."""
    lines, versions = [], {}
    for section, script in SCRIPTS.items():
        if section not in manifest:
            continue
        flags = dict(manifest[section].get("flags", {}))
        if section != "optimize":
            flags = {"model_name": _source_name(manifest), "revision": _source(manifest).get("commit"), **flags}
        given = {name: value for name, value in flags.items() if value is not None and value is not False}
        flags = ([f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in given.items())
        lines.append(shlex.join(("python", script, *itertools.chain(*flags))))
        versions |= manifest[section].get("versions", {})
    used = ", ".join(f"{package} {version}" for package, version in sorted(versions.items()))
    return "\n".join(("```bash", *lines, "```", "", f"With {used}."))


def _measured(manifest: dict) -> list[str]:
    parts = [_parity(manifest), _float16(manifest), _quantization(manifest.get("optimize", {}))]
    parts += [wer_table(section["wer"]) for section in manifest.values() if "wer" in section]
    return [part for part in parts if part]


def _parity(manifest: dict) -> str:
    measured = manifest.get("export", {}).get("parity", {})
    if not measured:
        return "The graphs were not verified against NeMo."
    lines = [
        "Largest difference from NeMo's own modules, over short and long inputs and ragged batches, as exported:",
        "",
    ]
    lines += ["| graph | largest difference | of the largest value | comparisons |", "|---|---|---|---|"]
    for name, row in measured.items():
        lines.append(f"| `{name}` | {row['max_abs']:.1e} | {row['max_rel']:.1e} | {row['cases']} |")
    return "\n".join(lines)


def _float16(manifest: dict) -> str:
    section = manifest.get("export", {}).get("float16")
    if not section:
        return ""
    graphs = section.values()
    kept = sum(len(graph["kept_float32"]) for graph in graphs)
    exact = sum(len(graph["kept_exact"]) for graph in graphs)
    limit = max(graph["limit"] for graph in graphs)
    rounded = [graph["rounded_parity"]["max_rel"] for graph in graphs if "rounded_parity" in graph]
    text = (
        f"Weights and compute are float16, inputs and outputs float32. {kept} operators came to {limit:.0f} or more "
        f"on speech and stay float32, as do {exact} that count positions; `{MANIFEST}` names them."
    )
    if rounded:
        text += (
            f" With the result of each operator rounded to float16, as a GPU does, outputs differ from NeMo's by up to "
            f"{max(rounded):.1e} of the largest value."
        )
    return text


def _quantization(section: dict) -> str:
    if "encoder_bytes" not in section:
        return ""
    before, after = (section["encoder_bytes"].get(side, 0) for side in ("exported", "optimized"))
    widths = ", ".join(f"{count} at {bits} bits" for bits, count in section.get("weights_by_bits", {}).items())
    text = f"Weights of the encoder: {widths or 'not quantized'}; {size_text(before)} became {size_text(after)}."
    ratios = {"encoder": section.get("sqnr_db_on_noise"), **section.get("token_sqnr_db_on_noise", {})}
    found = ", ".join(f"{name} {ratio} dB" for name, ratio in ratios.items() if ratio is not None)
    return text + (f" Signal to quantization noise ratio on noise: {found}." if found else "")
