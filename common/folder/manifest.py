"""`manifest.json` of a model folder: where it came from, the flags and versions it was made with, what was measured.

It has a section for each script that writes into the folder (`export`, `tokenizer`, `optimize`), and `files`, the size
and SHA-256 of every file. It is written last, into the staged folder, and its types are checked when it is read.
"""

import hashlib
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common.folder.outputs import read_json, write_json

MANIFEST = "manifest.json"
FILES = "files"  # section of the manifest: name → bytes and sha256
# Packages whose version decides what an exported folder contains.
RECORDED_PACKAGES = (
    "nemo_toolkit", "transformers", "torch", "onnx", "onnxruntime", "onnxruntime-genai", "sentencepiece", "tokenizers",
)  # fmt: skip
# The types of the values that are read from a manifest. A key may be absent; "*" stands for every entry of a mapping,
# and such an entry has all of its keys.
NUMBER = int | float | None
_SOURCE = {"name": str, "revision": str, "commit": str | None, "file": str, "sha256": str}
_PARITY = {"*": {"max_abs": NUMBER, "max_rel": NUMBER, "cases": int}}
_SECTION: dict[str, Any] = {
    "source": _SOURCE,
    "flags": {"precision": str, "device": str, "decoder_joint_precision": str},
    "versions": {"*": str},
    "minimum_onnxruntime": str,
    "wer": {"*": {"errors": int, "words": int, "low": NUMBER, "high": NUMBER}},
}
MANIFEST_TYPES: dict[str, Any] = {
    "export": {
        **_SECTION,
        "parity": _PARITY,
        "float16": {"*": {"limit": NUMBER, "kept_float32": list | dict, "kept_exact": list | dict}},
    },
    "tokenizer": _SECTION,
    "optimize": {
        **_SECTION,
        "encoder_bytes": {"exported": int, "optimized": int},
        "weights_by_bits": {"*": int},
        "sqnr_db_on_noise": NUMBER,
        "token_sqnr_db_on_noise": {"*": NUMBER},
    },
    FILES: {"*": {"bytes": int, "sha256": str}},
}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The folder's manifest, or an empty one where there is none yet.

    Raises ValueError where the file is not a manifest of this project.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return {}
    content = read_json(path, "python export_parakeet_to_onnx.py, after you have deleted it")
    if wrong := next(_wrong_types({"*": dict, **MANIFEST_TYPES}, content, ""), None):
        raise ValueError(f"{path} is not a manifest of this project: {wrong}; delete it, or make the folder again")
    return content


def _wrong_types(types: dict[str, Any], content: object, name: str) -> Iterator[str]:
    """A message for each value of `content`, called `name`, that has another type than `types` gives it."""
    if not isinstance(content, dict):
        yield f"expected an object as {name}, got {content!r}"
        return
    for key, value in content.items():
        expected = types.get(key, types.get("*", object))
        place = f"{name}.{key}".lstrip(".")
        if isinstance(expected, dict):
            yield from _wrong_types(expected, value, place)
            if key not in types and isinstance(value, dict):
                yield from (f"{place} has no {missing}" for missing in expected if missing not in value)
        elif not isinstance(value, expected):
            yield f"expected another kind of value as {place}, got {value!r}"


def is_float16(manifest: dict[str, Any]) -> bool:
    """Whether the folder was exported with --precision fp16."""
    return bool(manifest.get("export", {}).get("flags", {}).get("precision") == "fp16")


def write_manifest(staging: Path, manifest: dict[str, Any], section: str, content: dict[str, Any]) -> None:
    """Write `manifest` into `staging` with `section` replaced by `content` and the versions of the installed packages.

    The size and SHA-256 of each file of `staging` are added to those already in `manifest`, so call this last.
    """
    written = {
        path.name: fingerprint(path) for path in sorted(staging.iterdir()) if path.is_file() and path.name != MANIFEST
    }
    files = dict(sorted({**manifest.get(FILES, {}), **written}.items()))
    write_json(staging / MANIFEST, {**manifest, section: {**content, "versions": package_versions()}, FILES: files})


def fingerprint(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_files(folder: Path, names: Iterable[str]) -> int:
    """Compare the files `names` of a folder with its manifest; return how many it lists (an old manifest lists none).

    A configuration may be edited by hand. A graph and its data belong together byte for byte, and a runtime that loads
    a graph with the data of another does not notice. A missing file is reported by the code that reads it, not here.
    Raises ValueError naming each file and what is wrong with it.
    """
    listed = read_manifest(folder).get(FILES, {})
    checked = [name for name in names if name in listed and (folder / name).is_file()]
    wrong = [problem for name in checked if (problem := _problem(folder / name, listed))]
    if wrong:
        raise ValueError(f"{folder}: {'; '.join(wrong)}; make the folder again")
    return len(checked)


def _problem(path: Path, listed: dict[str, Any]) -> str | None:
    """What is wrong with a file according to the section `files` of its manifest, or None."""
    expected = listed[path.name]
    size = path.stat().st_size
    digest = sha256(path)
    if digest == expected["sha256"]:
        return None
    same = next((name for name, other in listed.items() if other["sha256"] == digest), None)
    if same:
        return f"{path.name} is {same} under another name"
    if size < expected["bytes"]:
        return f"{path.name} is truncated: {size} bytes of {expected['bytes']}"
    return f"{path.name} is another file than the one {MANIFEST} lists: it was changed, or comes from another folder"


def package_versions() -> dict[str, str]:
    """Version of each recorded package that is installed."""
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
