"""Outputs appear whole or not at all; `manifest.json` says where a model folder came from."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common.console import size_text

MANIFEST = "manifest.json"
# Smaller tensors stay inside the .onnx, where graph optimizers look for constants.
EXTERNAL_DATA_THRESHOLD = 1024  # bytes
EXTERNAL_DATA_ALIGNMENT = 65536  # bytes; the allocation granularity of Windows, the coarsest
# Packages whose version decides what an exported folder contains.
RECORDED_PACKAGES = ("nemo_toolkit", "torch", "onnx", "onnxruntime", "onnxruntime-genai", "sentencepiece", "tokenizers")


def check_output_dir(target: Path) -> None:
    """Raise NotADirectoryError if `target`, or what it would lie in, is a file."""
    for path in (target, *target.parents):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"wanted a folder to write to, found the file {path}; give another --output_dir")


def state_needs(what: str, memory: float, disk: float, target: Path) -> None:
    """Say before long work what it takes, in bytes of memory and of disk where `target` will be."""
    existing = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    print(f"{what}: about {size_text(memory)} of memory, {size_text(disk)} of disk ({size_text(free)} free)")


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`; when the block ends well its files move into `target`, else they vanish.

    Files of `target` that the block did not write stay. The manifest moves last, so a folder whose manifest is new is
    complete. Raises NotADirectoryError as check_output_dir does.
    """
    check_output_dir(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield stage
        stage.chmod(0o777 & ~_umask())  # mkdtemp made it private
        if not target.exists():
            stage.rename(target)
            return
        for path in sorted(stage.iterdir(), key=lambda path: path.name == MANIFEST):
            path.replace(target / path.name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, content: dict) -> None:
    """Write readable UTF-8 JSON that ends in a newline, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def read_json(path: Path, made_by: str) -> dict:
    """Read a JSON file of a model folder.

    Raises FileNotFoundError naming the command `made_by` that writes it, ValueError if it is not JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(f"wanted {path}, found no such file; first run: {made_by}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); make it again with: {made_by}") from None


def save_model(model, path: Path) -> None:
    """Write an onnx_ir model as `path` and `path`.data, large tensors on boundaries that every system can map."""
    import onnx_ir as ir

    external = {"size_threshold_bytes": EXTERNAL_DATA_THRESHOLD, "alignment": EXTERNAL_DATA_ALIGNMENT}
    ir.save(model, path, external_data=f"{path.name}.data", **external)


MODEL_DIR_HELP = "model folder (./onnx_models_optimized, or ./onnx_models where that is missing)"


def default_model_dir() -> Path:
    """The optimized folder, or the exported one where that is missing."""
    optimized = Path("onnx_models_optimized")
    return optimized if optimized.is_dir() else Path("onnx_models")


def read_manifest(folder: Path) -> dict:
    """The folder's manifest, or an empty one where there is none yet."""
    path = Path(folder) / MANIFEST
    return read_json(path, "python export_parakeet_to_onnx.py") if path.is_file() else {}


def write_manifest(stage: Path, manifest: dict, section: str, content: dict) -> None:
    """Write `manifest` into `stage`, `section` of it replaced by `content` and the versions of today."""
    write_json(stage / MANIFEST, {**manifest, section: {**content, "versions": package_versions()}})


def moved_manifest(source: Path, target: Path) -> dict:
    """The manifest of folder `source` as it reads in folder `target`: relative paths lead to the same files."""
    manifest = read_manifest(source)
    for section in manifest.values():
        origin = section.get("source", {})
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
