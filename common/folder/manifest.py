"""Outputs appear whole or not at all; `manifest.json` says what a model folder holds and where it came from."""

import hashlib
import os
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common.folder.outputs import read_json, write_json

MANIFEST = "manifest.json"
FILES = "files"  # section of the manifest: name → bytes and sha256
# Packages whose version decides what an exported folder contains.
RECORDED_PACKAGES = ("nemo_toolkit", "torch", "onnx", "onnxruntime", "onnxruntime-genai", "sentencepiece", "tokenizers")


def read_manifest(folder: Path) -> dict:
    """The folder's manifest, or an empty one where there is none yet."""
    path = Path(folder) / MANIFEST
    return read_json(path, "python export_parakeet_to_onnx.py") if path.is_file() else {}


def is_float16(manifest: dict) -> bool:
    """Whether the folder was exported with --precision fp16."""
    return manifest.get("export", {}).get("flags", {}).get("precision") == "fp16"


def write_manifest(stage: Path, manifest: dict, section: str, content: dict) -> None:
    """Write `manifest` into `stage`, `section` of it replaced by `content` and the versions of today, and the size and
    SHA-256 of each file of `stage` beside those that it lists already. Call it last."""
    written = {path.name: fingerprint(path) for path in sorted(stage.iterdir()) if path.name != MANIFEST}
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


def moved_manifest(source: Path, target: Path) -> dict:
    """The manifest of folder `source` as it reads in folder `target`: relative paths lead to the same files."""
    manifest = read_manifest(source)
    for name, section in manifest.items():
        origin = {} if name == FILES else section.get("source", {})
        if "path" in origin:
            origin["path"] = relative_path(source / origin["path"], target)
    return manifest


def relative_path(path: Path, folder: Path) -> str:
    """How to find `path` from inside `folder`, so that both may move together and no home directory is published."""
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:  # another drive on Windows: no relative path
        return path.resolve().as_posix()


def package_versions() -> dict[str, str]:
    """Version of each recorded package that is installed."""
    found = {}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
