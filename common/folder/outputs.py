"""XXX docstring of folder.outputs"""

import json
from pathlib import Path

from common.folder.atomic import fsync


def check_output_file(path: Path) -> None:
    """Raise IsADirectoryError or FileNotFoundError if `path` cannot become a file."""
    if path.is_dir():
        raise IsADirectoryError(f"wanted a file to write, found the folder {path}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"wanted a folder for {path}, found no {path.absolute().parent}; make it first")


def write_json(path: Path, content: dict) -> None:
    """Write readable UTF-8 JSON that ends in a newline, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write UTF-8, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(content, encoding="utf-8")
        fsync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    fsync(path.parent)


def read_json(path: Path, made_by: str) -> dict:
    """Read a JSON file of a model folder.

    Raises FileNotFoundError naming the command `made_by` that writes it, ValueError if it is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"wanted {path}, found no such file; first run: {made_by}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no object")
        return content
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); make it again with: {made_by}") from None
