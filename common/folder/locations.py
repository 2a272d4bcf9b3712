"""Where the checkpoint and the exported folder of a model folder lie on this machine.

They are written to `.cache/huggingface/parakeet_onnx.json` in the model folder, as relative paths, since the manifest
is published but local paths must not be: huggingface_hub never uploads that subfolder (its DEFAULT_IGNORE_PATTERNS).
"""

import os
from pathlib import Path

from common.folder.outputs import read_json, write_json

LOCATIONS = Path(".cache", "huggingface", "parakeet_onnx.json")
CHECKPOINT = "checkpoint"
EXPORTED = "exported"


def write_locations(staging: Path, target: Path, **paths: Path | None) -> None:
    """Record in `staging`, which becomes `target`, where the files and folders `paths` lie, except those that are None.

    The paths are relative to `target`, so that everything may be moved together.
    """
    known = {name: _relative(path, target) for name, path in paths.items() if path is not None}
    (staging / LOCATIONS).parent.mkdir(parents=True, exist_ok=True)
    write_json(staging / LOCATIONS, known)


def read_location(folder: Path, name: str) -> Path | None:
    """Where the file or folder `name` of write_locations was when `folder` was made; None where that is not recorded.

    Raises ValueError where the record is not JSON.
    """
    path = folder / LOCATIONS
    known = read_json(path, "python export_parakeet_to_onnx.py") if path.is_file() else {}
    return folder / known[name] if name in known else None


def _relative(path: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:  # another drive on Windows: no relative path
        return path.resolve().as_posix()
