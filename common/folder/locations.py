"""XXX docstring of folder.locations"""

import os
from pathlib import Path

from common.folder.outputs import read_json, write_json

# What only this machine needs to know: where the checkpoint and the exported folder lie, as seen from this one. In a
# folder that huggingface_hub never uploads (its DEFAULT_IGNORE_PATTERNS), so that no folder name is published.
LOCATIONS = Path(".cache", "huggingface", "parakeet_onnx.json")
CHECKPOINT, EXPORTED = "checkpoint", "exported"


def write_locations(stage: Path, target: Path, **paths: Path | None) -> None:
    """Write into `stage`, which becomes `target`, where the files and folders `paths` lie: relative, so that all of
    them may move together."""
    known = {name: _relative(path, target) for name, path in paths.items() if path is not None}
    (stage / LOCATIONS).parent.mkdir(parents=True, exist_ok=True)
    write_json(stage / LOCATIONS, known)


def read_location(folder: Path, name: str) -> Path | None:
    """Where the file or folder `name` of write_locations lay when `folder` was made."""
    path = folder / LOCATIONS
    known = read_json(path, "python export_parakeet_to_onnx.py") if path.is_file() else {}
    return folder / known[name] if name in known else None


def _relative(path: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:  # another drive on Windows: no relative path
        return path.resolve().as_posix()
