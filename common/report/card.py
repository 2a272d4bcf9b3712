"""The model card of a folder, `README.md` with Hugging Face's front matter, made from the folder's manifest alone.

The same manifest gives the same bytes. What the manifest does not hold is left open, above all the licence: it is that
of the checkpoint's own card, or of a checkpoint that is known here. The text is in card.md.j2.
"""

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from common.evaluate.words import WordErrorRate
from common.folder import FILES, MANIFEST, fingerprint, is_float16, package_versions, read_manifest, sha256, write_json
from common.layouts.layout import Layout
from common.onnx_io import MINIMUM_RUNTIME
from common.report import render
from common.run.reference import Nemo, Transformers

CARD = "README.md"
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
# Numbers of the features that the snippet needs, with the values for folders of earlier versions, which record none.
FEATURES = {"sample_rate": 16_000, "hop_length": 160}
SCRIPTS = {
    "export": "export_parakeet_to_onnx.py",
    "tokenizer": "export_tokenizer.py",
    "optimize": "optimize_encoder.py",
}  # sections of the manifest, in the order in which they are made


def finish_folder(
    staging: Path, target: Path, layout: Layout, former: dict[str, Any], section: str, content: dict[str, Any]
) -> None:
    """Write the card and the manifest into `staging`, which will become `target`. To be called last.

    former: the manifest that stays, but for `section`, which becomes `content` with the versions of the installed
    packages, and `files`, to which the files of `staging` are added. A card that a person wrote or changed,
    which the manifest of `target` therefore does not list, is left as it is.
    """
    written = {path.name: fingerprint(path) for path in staging.iterdir() if path.is_file()}
    files = {**former.get(FILES, {}), **written}
    files.pop(CARD, None)
    content = {**content, "versions": package_versions()}
    manifest = {**former, section: content, FILES: dict(sorted(files.items()))}
    existing = target / CARD
    if existing.is_file() and sha256(existing) != read_manifest(target).get(FILES, {}).get(CARD, {}).get("sha256"):
        print(f"{existing} was written or changed by hand and stays as it is; delete it to have a new one")
    else:
        (staging / CARD).write_text(model_card(manifest, layout), encoding="utf-8", newline="\n")
        files[CARD] = fingerprint(staging / CARD)
    write_json(staging / MANIFEST, {**manifest, FILES: dict(sorted(files.items()))})


def model_card(manifest: dict[str, Any], layout: Layout) -> str:
    """The whole text of the card. Sections of folders that earlier versions made may lack keys."""
    export = {"flags": {}, **manifest.get("export", {})}
    optimize = manifest.get("optimize", {})
    on_cuda = export["flags"].get("device") == "cuda"
    package, *others = layout.packages
    package = layout.cuda_package if on_cuda and layout.cuda_package else package
    version = export.get("versions", {}).get(layout.packages[0])
    features = {name: export.get(name, value) for name, value in FEATURES.items()}
    files = {name: file for name, file in manifest[FILES].items() if name != CARD}
    origin = _origin(manifest)
    ratios = {"encoder": optimize.get("sqnr_db_on_noise"), **optimize.get("token_sqnr_db_on_noise", {})}
    sections = {name: manifest[name] for name in SCRIPTS if name in manifest}
    header = yaml.safe_dump(front_matter(manifest, layout), sort_keys=False)
    commands = _commands(sections, origin)
    text = render(
        "card.md.j2",
        front_matter=header,
        **origin,
        adaptable=ADAPTABLE.fullmatch(origin["terms"].get("license", "")),
        packages=" ".join((f"{package}=={version}" if version else package, *others)),
        oldest=(optimize or export).get(MINIMUM_RUNTIME),
        usage=layout.usage.format(folder=".", audio="audio.wav", **features),
        browser_page=layout.browser_page and layout.browser_page.read_text(encoding="utf-8"),
        files=files,
        same={file["sha256"]: name for name, file in reversed(files.items())},  # the first file of that content
        commands=commands,
        versions=dict(pair for section in sections.values() for pair in section.get("versions", {}).items()),
        export=export,
        optimize=optimize,
        ratios={name: ratio for name, ratio in ratios.items() if ratio is not None},
        wer=[
            {engine: WordErrorRate(**row) for engine, row in section["wer"].items()}
            for section in manifest.values()
            if "wer" in section
        ],
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"  # what is left out leaves blank lines


def front_matter(manifest: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """The keys that Hugging Face reads (huggingface.co/docs/hub/model-cards)."""
    origin = _origin(manifest)
    header: dict[str, Any] = origin["terms"] or {"license": "other", "license_name": "unknown"}
    header |= {"library_name": layout.packages[0], "pipeline_tag": "automatic-speech-recognition"}
    bits_of_weights = manifest.get("optimize", {}).get("weights_by_bits", {})
    precisions = ["float16"] if is_float16(manifest) else [f"{bits}-bit" for bits in bits_of_weights]
    if "name" in origin["source"]:
        header["base_model"] = origin["name"]
        if precisions:
            header["base_model_relation"] = "quantized"
    tags = ["onnx", "onnxruntime", layout.packages[0], "parakeet", "fastconformer", "tdt", "transducer", "speech"]
    return {**header, "tags": tags + precisions}


def _origin(manifest: dict[str, Any]) -> dict[str, Any]:
    """What is known of the checkpoint: `source`, from the first section of the manifest that records one; `name`, on
    Hugging Face or of the file; `library`; and `terms`, its licence and languages by its own card or by its
    name, empty where they are not known. Folders made by earlier versions, which knew only NeMo, record no format."""
    recorded = (manifest[section]["source"] for section in SCRIPTS if "source" in manifest.get(section, {}))
    source: dict[str, Any] = next(recorded, {})
    name = str(source.get("name") or source.get("file", "unknown"))
    known = {"license": "cc-by-4.0", "language": PUBLISHED[name].split()} if name in PUBLISHED else {}
    terms = {**known, **source.get("terms", {})}
    link = terms.get("license_link")
    if link and "://" not in link:  # a file of the repository
        terms["license_link"] = f"https://huggingface.co/{name}/blob/{source.get('commit') or 'main'}/{link}"
        if "name" not in source:
            del terms["license_link"]
    library = Transformers.name if source.get("format") == Transformers.name else Nemo.name
    return {"source": source, "name": name, "library": library, "terms": terms}


def _commands(sections: dict[str, Any], origin: dict[str, Any]) -> list[str]:
    """The scripts of the sections as they were called, without the folders."""
    source = origin["source"]
    form = source.get("format") if "name" in source and origin["library"] != Nemo.name else None
    named = {"model_name": origin["name"], "revision": source.get("commit"), "checkpoint_format": form}
    lines = []
    for name, section in sections.items():
        flags = {**(named if name != "optimize" else {}), **section.get("flags", {})}
        given = {flag: value for flag, value in flags.items() if value is not None and value is not False}
        words = ([f"--{flag}"] if value is True else [f"--{flag}", str(value)] for flag, value in given.items())
        lines.append(shlex.join(("python", SCRIPTS[name], *itertools.chain(*words))))
    return lines
