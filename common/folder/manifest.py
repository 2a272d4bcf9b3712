"""Outputs appear whole or not at all; `manifest.json` says what a model folder holds and where it came from."""

import hashlib
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common.folder.outputs import read_json, write_json

MANIFEST = "manifest.json"
FILES = "files"  # section of the manifest: name → bytes and sha256
# Packages whose version decides what an exported folder contains.
RECORDED_PACKAGES = ("nemo_toolkit", "torch", "onnx", "onnxruntime", "onnxruntime-genai", "sentencepiece", "tokenizers")
# The types of what is read of a manifest, where it is there at all; "*": of every entry, each of which has all keys.
NUMBER = int | float | None
_SOURCE = {"name": str, "revision": str, "commit": str | None, "file": str, "sha256": str}
_PARITY = {"*": {"max_abs": NUMBER, "max_rel": NUMBER, "cases": int}}
_SECTION = {
    "source": _SOURCE,
    "flags": {"precision": str, "device": str, "decoder_joint_precision": str},
    "versions": {"*": str},
    "wer": {"*": {"errors": int, "words": int, "low": NUMBER, "high": NUMBER}},
}
MANIFEST_TYPES = {
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


def read_manifest(folder: Path) -> dict:
    """The folder's manifest, or an empty one where there is none yet. Raises ValueError where it is another's."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return {}
    content = read_json(path, "python export_parakeet_to_onnx.py, after you have deleted it")
    if wrong := next(_wrong_types({"*": dict, **MANIFEST_TYPES}, content, ""), None):
        raise ValueError(f"{path} is not a manifest of this project: {wrong}; delete it, or make the folder again")
    return content


def _wrong_types(types: dict, content: object, name: str) -> Iterator[str]:
    """What of `content` has other types than these."""
    if not isinstance(content, dict):
        yield f"expected an object as {name}, got {content!r}"
        return
    for key, value in content.items():
        wanted, place = types.get(key, types.get("*", object)), f"{name}.{key}".lstrip(".")
        if isinstance(wanted, dict):
            yield from _wrong_types(wanted, value, place)
            if key not in types and isinstance(value, dict):
                yield from (f"{place} has no {missing}" for missing in wanted if missing not in value)
        elif not isinstance(value, wanted):
            yield f"expected another kind of value as {place}, got {value!r}"


def is_float16(manifest: dict) -> bool:
    """Whether the folder was exported with --precision fp16."""
    return manifest.get("export", {}).get("flags", {}).get("precision") == "fp16"


def write_manifest(stage: Path, manifest: dict, section: str, content: dict) -> None:
    """Write `manifest` into `stage`, `section` of it replaced by `content` and the versions of today, and the size and
    SHA-256 of each file of `stage` beside those that it lists already. Call it last."""
    written = {
        path.name: fingerprint(path) for path in sorted(stage.iterdir()) if path.is_file() and path.name != MANIFEST
    }
    found = {**manifest, section: {**content, "versions": package_versions()}}
    found[FILES] = dict(sorted({**manifest.get(FILES, {}), **written}.items()))
    write_json(stage / MANIFEST, found)


def fingerprint(path: Path) -> dict:
    """Size in bytes and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_files(folder: Path, names: Iterable[str]) -> int:
    """Compare the files `names` of a folder with its manifest; return how many were (an old manifest lists none).

    A configuration may be edited by hand; a graph and its data belong together byte for byte, and a runtime that loads
    one with another's notices nothing. A file that is missing is its reader's to report. Raises ValueError naming each
    file and what is wrong with it.
    """
    listed = read_manifest(folder).get(FILES, {})
    checked = [name for name in names if name in listed and (folder / name).is_file()]
    wrong = [problem for name in checked if (problem := _problem(folder / name, listed))]
    if wrong:
        raise ValueError(f"{folder}: {'; '.join(wrong)}; make the folder again")
    return len(checked)


def _problem(path: Path, listed: dict) -> str | None:
    """What is wrong with a file by its manifest, or None."""
    wanted, size = listed[path.name], path.stat().st_size
    found = sha256(path)
    if found == wanted["sha256"]:
        return None
    same = next((name for name, other in listed.items() if other["sha256"] == found), None)
    if same:
        return f"{path.name} is {same} under another name"
    if size < wanted["bytes"]:
        return f"{path.name} is truncated: {size} bytes of {wanted['bytes']}"
    return f"{path.name} is another file than the one {MANIFEST} lists: it was changed, or comes from another folder"


def package_versions() -> dict[str, str]:
    """Version of each recorded package that is installed."""
    found = {}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
