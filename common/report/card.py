"""The model card of a folder, `README.md` with Hugging Face's front matter, made from the folder's manifest alone.

The same manifest gives the same bytes. What the manifest does not hold is left open, above all the licence: it is that
of the checkpoint's own card, or of a checkpoint that is known here.
"""

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from common.cli import size_text
from common.evaluate.words import WordErrorRate
from common.folder import FILES, MANIFEST, fingerprint, is_float16, read_manifest, sha256, write_json
from common.layouts.layout import Layout
from common.onnx_io import MINIMUM_RUNTIME
from common.run.reference import Nemo, Transformers

CARD = "README.md"
NEMO, TRANSFORMERS = Nemo.name, Transformers.name

V3_LANGUAGES = "bg hr cs da nl en et fi fr de el hu it lv lt mt pl pt ro sk sl es sv ru uk"
# Languages (ISO 639-1) of checkpoints that are published under CC-BY-4.0, by the name given as --model_name, for where
# their own cards could not be read. Add a checkpoint only from its own card.
PUBLISHED = {
    "nvidia/parakeet-tdt-0.6b-v3": V3_LANGUAGES,
    "nvidia/parakeet-tdt-0.6b-v2": "en",
    "nvidia/parakeet-tdt-1.1b": "en",
    "moondream/parakeet-ultra": V3_LANGUAGES,
    "moondream/parakeet-redux": V3_LANGUAGES,
}
# Licences of Creative Commons that allow adaptations, as Hugging Face spells them.
ADAPTABLE = re.compile(r"cc-(by|by-sa|by-nc|by-nc-sa)-(4\.0)")
LICENSE_ADAPTABLE = (
    "These files are an adaptation of it under the same licence, [{name}]"
    "(https://creativecommons.org/licenses/{kind}/{version}/): give credit to its authors, and say what was changed."
)
LICENSE_OTHER = (
    "Its own card gives its licence as {name}. These files are made from it, so read these terms before you publish "
    "them."
)
LICENSE_UNKNOWN = (
    "**The licence is not known.** Before you publish this folder, look up the terms of the checkpoint, and fill in "
    "`license` and `language` at the top of this file."
)
# Numbers of the features that the snippet needs, with those of folders made by earlier versions, which record none.
FEATURES = {"sample_rate": 16_000, "hop_length": 160}
SCRIPTS = {
    "export": "export_parakeet_to_onnx.py",
    "tokenizer": "export_tokenizer.py",
    "optimize": "optimize_encoder.py",
}  # sections of the manifest, in the order in which they are made


def write_card(staging: Path, target: Path, layout: Layout) -> None:
    """Write the card into `staging`, which will become `target`, and list it in its manifest. To be called last.

    A card that a person wrote or changed, which the manifest of `target` therefore does not list, is left as it is.
    """
    manifest = read_manifest(staging)
    manifest[FILES].pop(CARD, None)
    existing = target / CARD
    if existing.is_file() and sha256(existing) != read_manifest(target).get(FILES, {}).get(CARD, {}).get("sha256"):
        print(f"{existing} was written or changed by hand and stays as it is; delete it to have a new one")
    else:
        (staging / CARD).write_text(model_card(manifest, layout), encoding="utf-8", newline="\n")
        manifest[FILES][CARD] = fingerprint(staging / CARD)
        manifest[FILES] = dict(sorted(manifest[FILES].items()))
    write_json(staging / MANIFEST, manifest)


def model_card(manifest: dict[str, Any], layout: Layout) -> str:
    """The whole text of the card."""
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


def front_matter(manifest: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """The keys that Hugging Face reads (huggingface.co/docs/hub/model-cards)."""
    name = _source_name(manifest)
    header: dict[str, Any] = _terms(manifest) or {"license": "other", "license_name": "unknown"}
    header |= {"library_name": layout.package, "pipeline_tag": "automatic-speech-recognition"}
    bits_of_weights = manifest.get("optimize", {}).get("weights_by_bits", {})
    precisions = ["float16"] if is_float16(manifest) else [f"{bits}-bit" for bits in bits_of_weights]
    if "name" in _source(manifest):
        header["base_model"] = name
        if precisions:
            header["base_model_relation"] = "quantized"
    tags = ["onnx", "onnxruntime", layout.package, "parakeet", "fastconformer", "tdt", "transducer", "speech"]
    return {**header, "tags": tags + precisions}


def wer_table(rows: dict[str, dict[str, Any]]) -> str:
    """A table of engine → the fields of its WordErrorRate."""
    lines = ["| | WER | 95 % interval | words |", "|---|---|---|---|"]
    for engine, row in rows.items():
        rate = WordErrorRate(**row)
        interval = f"{rate.low:.2f} – {rate.high:.2f} %" if rate.words else "–"
        percent = f"{rate.percent:.2f} %" if rate.words else str(rate)
        lines.append(f"| {engine} | {percent} | {interval} | {rate.words} |")
    return "\n".join(lines)


def _source(manifest: dict[str, Any]) -> dict[str, Any]:
    """Name or file, and SHA-256, of the checkpoint, from the first section of the manifest that records them."""
    return next((manifest[section]["source"] for section in SCRIPTS if "source" in manifest.get(section, {})), {})


def _source_name(manifest: dict[str, Any]) -> str:
    """The Hugging Face name, or the name of the file."""
    source = _source(manifest)
    return str(source.get("name") or source.get("file", "unknown"))


def _terms(manifest: dict[str, Any]) -> dict[str, Any]:
    """Licence and languages of the checkpoint, by its own card or by its name; empty where they are not known."""
    source, name = _source(manifest), _source_name(manifest)
    known = {"license": "cc-by-4.0", "language": PUBLISHED[name].split()} if name in PUBLISHED else {}
    terms = {**known, **source.get("terms", {})}
    link = terms.get("license_link")
    if link and "://" not in link:  # a file of the repository
        terms["license_link"] = f"https://huggingface.co/{name}/blob/{source.get('commit') or 'main'}/{link}"
        if "name" not in source:
            del terms["license_link"]
    return terms


def _licence(terms: dict[str, Any]) -> str:
    """What the card says of the licence."""
    if not terms:
        return LICENSE_UNKNOWN
    licence = terms["license"]
    if match := ADAPTABLE.fullmatch(licence):
        return LICENSE_ADAPTABLE.format(name=licence.upper(), kind=match[1], version=match[2])
    name = terms.get("license_name", licence)
    link = terms.get("license_link")
    return LICENSE_OTHER.format(name=f"[{name}]({link})" if link else f"`{name}`")


def _origin(manifest: dict[str, Any]) -> str:
    name = _source_name(manifest)
    source = _source(manifest)
    link = f"[{name}](https://huggingface.co/{name})" if "name" in source else f"the checkpoint `{name}`"
    library = _library(manifest)
    made = f"made with {NEMO}" if library == NEMO else f"in the format of Hugging Face {library}"
    text = (
        f"{link}, a FastConformer-TDT model for speech recognition {made}, as ONNX graphs: encoder, "
        f"prediction network and joint, with tokenizer and configuration. The checkpoint's SHA-256 is "
        f"`{source.get('sha256', 'not recorded')}`."
    )
    export = manifest.get("export", {})
    if scripts := export.get("flags", {}).get("scripts"):
        text += (
            f" The text is in these scripts alone: {scripts}. The {export.get('suppressed_tokens', 0)} tokens with "
            "letters of others have a bias of −10,000 and are never emitted."
        )
    return f"{text}\n\n{_licence(_terms(manifest))}"


def _library(manifest: dict[str, Any]) -> str:
    """The library of the checkpoint; folders made by earlier versions, which knew only NeMo, record none."""
    return TRANSFORMERS if _source(manifest).get("format") == TRANSFORMERS else NEMO


def _usage(manifest: dict[str, Any], layout: Layout) -> str:
    section = manifest.get("export", {})
    on_cuda = section.get("flags", {}).get("device") == "cuda"
    package, *others = layout.packages
    package = layout.cuda_package if on_cuda and layout.cuda_package else package
    version = section.get("versions", {}).get(layout.package)
    pinned = f"{package}=={version}" if version else package
    packages = " ".join((pinned, *others))
    oldest = (manifest.get("optimize") or section).get(MINIMUM_RUNTIME)  # not recorded by earlier versions
    needed = f" (the graphs need ONNX Runtime {oldest} or newer)" if oldest else ""
    features = {name: section.get(name, value) for name, value in FEATURES.items()}
    usage = layout.usage.format(folder=".", audio="audio.wav", **features)
    text = f"In this folder, with `pip install {packages}`{needed}:\n\n```python\n{usage}```"
    return "\n\n".join(filter(None, (text, layout.browser_usage())))


def _files(listed: dict[str, Any]) -> str:
    rows = []
    first: dict[str, str] = {}  # SHA-256 → the first file that has it
    for name, file in listed.items():
        if name != CARD:
            same = first.setdefault(file["sha256"], name)
            size = size_text(file["bytes"])
            rows.append(
                f"| `{name}` | {size if same == name else f'the same file as `{same}`: one of them is enough'} |"
            )
    return "\n".join(("| file | size |", "|---|---|", *rows, f"| `{MANIFEST}` | checksums, versions, measurements |"))


def _commands(manifest: dict[str, Any]) -> str:
    """The scripts as they were called, without the folders, and the versions that they ran with."""
    lines: list[str] = []
    versions: dict[str, str] = {}
    for section, script in SCRIPTS.items():
        if section not in manifest:
            continue
        flags = dict(manifest[section].get("flags", {}))
        if section != "optimize":
            source = _source(manifest)
            form = source.get("format") if "name" in source and _library(manifest) != NEMO else None
            named = {"model_name": _source_name(manifest), "revision": source.get("commit"), "checkpoint_format": form}
            flags = {**named, **flags}
        given = {name: value for name, value in flags.items() if value is not None and value is not False}
        words = ([f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in given.items())
        lines.append(shlex.join(("python", script, *itertools.chain(*words))))
        versions |= manifest[section].get("versions", {})
    used = ", ".join(f"{package} {version}" for package, version in sorted(versions.items()))
    return "\n".join(("```bash", *lines, "```", "", f"With {used}."))


def _measured(manifest: dict[str, Any]) -> list[str]:
    parts = [_parity(manifest), _float16(manifest), _quantization(manifest.get("optimize", {}))]
    parts += [wer_table(section["wer"]) for section in manifest.values() if "wer" in section]
    return [part for part in parts if part]


def _parity(manifest: dict[str, Any]) -> str:
    measured = manifest.get("export", {}).get("parity", {})
    library = _library(manifest)
    if not measured:
        return f"The graphs were not verified against {library}."
    lines = [
        f"Largest difference from the modules of {library}, over short and long inputs and batches of unequal lengths,"
        " as exported:",
        "",
        "| graph | largest difference | of the largest value | comparisons |",
        "|---|---|---|---|",
    ]
    for name, row in measured.items():
        lines.append(f"| `{name}` | {row['max_abs']:.1e} | {row['max_rel']:.1e} | {row['cases']} |")
    return "\n".join(lines)


def _float16(manifest: dict[str, Any]) -> str:
    section = manifest.get("export", {}).get("float16")
    if not section:
        return ""
    graphs = section.values()
    kept = sum(len(graph["kept_float32"]) for graph in graphs)
    exact = sum(len(graph["kept_exact"]) for graph in graphs)
    limit = max(graph["limit"] for graph in graphs)
    rounded = [graph["rounded_parity"]["max_rel"] for graph in graphs if "rounded_parity" in graph]
    text = (
        f"Weights and compute are float16, inputs and outputs float32. {kept} operators reached {limit:.0f} or more "
        f"on speech and stay float32, as do {exact} that count positions; `{MANIFEST}` names them."
    )
    if rounded:
        text += (
            f" With the result of each operator rounded to float16, as a GPU does, outputs differ from "
            f"{_library(manifest)} by up to {max(rounded):.1e} of the largest value."
        )
    return text


def _quantization(section: dict[str, Any]) -> str:
    if "encoder_bytes" not in section:
        return ""
    before = section["encoder_bytes"].get("exported", 0)
    after = section["encoder_bytes"].get("optimized", 0)
    widths = ", ".join(f"{count} at {bits} bits" for bits, count in section.get("weights_by_bits", {}).items())
    text = f"Weights of the encoder: {widths or 'not quantized'}; {size_text(before)} became {size_text(after)}."
    if section.get("token_sqnr_db_on_noise"):
        text += " The embedding and the LSTM of the decoder and the matrices of the joint have 8 bits."
    if runs_as := section.get("runs_as"):
        text += f" {runs_as[0].upper()}{runs_as[1:]}."
    if cpus := section.get("cpus"):  # not recorded by earlier versions
        text += f" For {cpus}."
    ratios = {"encoder": section.get("sqnr_db_on_noise"), **section.get("token_sqnr_db_on_noise", {})}
    measured = ", ".join(f"{name} {ratio} dB" for name, ratio in ratios.items() if ratio is not None)
    return text + (f" Signal to quantization noise ratio on noise: {measured}." if measured else "")
