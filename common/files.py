"""Outputs appear whole or not at all; `manifest.json` says what a model folder holds and where it came from."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common.console import size_text
from common.swap import fsync, link, lock, replace_folder

MANIFEST = "manifest.json"
# What only this machine needs to know: where the checkpoint and the exported folder lie, as seen from this one. In a
# folder that huggingface_hub never uploads (its DEFAULT_IGNORE_PATTERNS), so that no folder name is published.
LOCATIONS = Path(".cache", "huggingface", "parakeet_onnx.json")
CHECKPOINT, EXPORTED = "checkpoint", "exported"
FILES = "files"  # section of the manifest: name → bytes and sha256
# A disk, or a quota, that is full; NumPy says only how much it wrote.
DISK_ERRORS, SHORT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "requested and"
# Smaller tensors stay inside the .onnx, where graph optimizers look for constants.
EXTERNAL_DATA_THRESHOLD = 1024  # bytes
EXTERNAL_DATA_ALIGNMENT = 65536  # bytes; the allocation granularity of Windows, the coarsest
EXTERNAL_DATA_ALIGNED_FROM = 2**20  # bytes; onnx_ir's default
# Packages whose version decides what an exported folder contains.
RECORDED_PACKAGES = ("nemo_toolkit", "torch", "onnx", "onnxruntime", "onnxruntime-genai", "sentencepiece", "tokenizers")


def check_output_dir(target: Path) -> None:
    """Raise NotADirectoryError if `target`, or what it would lie in, is a file; PermissionError if it is read-only,
    ValueError if it cannot be replaced."""
    for path in (target, *target.parents):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"wanted a folder to write to, found the file {path}; give another --output_dir")
    real = target.resolve()
    if real.is_dir() and not os.access(real, os.W_OK):
        raise PermissionError(
            f"wanted a folder to write to, found {target}, which is read-only; give another --output_dir"
        )
    if os.path.ismount(real) or Path.cwd().is_relative_to(real):
        kind = "the working directory or above it" if Path.cwd().is_relative_to(real) else "a mount point"
        raise ValueError(
            f"wanted a folder that can be replaced as a whole, found {target}, {kind}; give a folder below it"
        )


def check_output_file(path: Path) -> None:
    """Raise IsADirectoryError or FileNotFoundError if `path` cannot become a file."""
    if path.is_dir():
        raise IsADirectoryError(f"wanted a file to write, found the folder {path}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"wanted a folder for {path}, found no {path.absolute().parent}; make it first")


def require_free(disk: float, target: Path) -> int:
    """Bytes free where `target` will be. Raises OSError where that is less than `disk`."""
    existing = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < disk:
        raise OSError(f"wanted {size_text(disk)} of disk for {target}, found {size_text(free)} free; make room")
    return free


def state_needs(what: str, memory: float, disk: float, target: Path) -> None:
    """Say before long work what it takes, in bytes of memory and of disk where `target` will be.

    Raises OSError as require_free does.
    """
    free = require_free(disk, target)
    print(f"{what}: about {size_text(memory)} of memory, {size_text(disk)} of disk ({size_text(free)} free)")


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`; when the block ends well `target` has its files too, else it is as it was.

    The new folder is complete, and on the disk, before one rename puts it in the place of the old one (common/swap.py);
    files of `target` that the block did not write are in both. `stage.parent` is scratch space that vanishes with the
    stage; what a killed run left of both is removed by the next one. Raises as check_output_dir and swap.lock do.
    """
    check_output_dir(target)
    target = target.resolve()  # a link to the folder stays one
    target.parent.mkdir(parents=True, exist_ok=True)
    with lock(target) as scratch:
        stage = scratch / "new"
        try:
            stage.mkdir()
            yield stage
            replace_folder(target, stage)
        except OSError as error:
            if error.errno in DISK_ERRORS or SHORT_WRITE in str(error):
                raise OSError(f"cannot write to {target} ({error}); nothing was changed; make room") from error
            raise


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


def save_model(model, path: Path) -> None:
    """Write an onnx_ir model as `path` and `path`.data, large tensors on boundaries that every system can map."""
    import onnx_ir as ir

    external = {"size_threshold_bytes": EXTERNAL_DATA_THRESHOLD, "alignment": EXTERNAL_DATA_ALIGNMENT}
    ir.save(model, path, external_data=f"{path.name}.data", **external)


def data_bytes(sizes: Iterable[int]) -> int:
    """Bytes of the data file that save_model writes for tensors of these sizes, in this order."""
    offset = 0
    for size in sizes:
        if size > EXTERNAL_DATA_ALIGNED_FROM:
            offset = -(-offset // EXTERNAL_DATA_ALIGNMENT) * EXTERNAL_DATA_ALIGNMENT
        offset += size
    return offset


def of_one_name(source: Path, names: Iterable[str], scratch: Path) -> Path:
    """The folder `source`, or, where one of its files `names` is shared with another folder by hard link, the new
    folder `scratch` with copies of them: onnx and onnx_ir take such a file for an attack, and read none."""
    names = list(names)
    if all((source / name).stat().st_nlink == 1 for name in names):
        return source
    scratch.mkdir()
    for name in names:
        shutil.copyfile(source / name, scratch / name)
    return scratch


def share_equal_data(folders: Iterable[Path]) -> None:
    """Make the weights of several folders that are equal by their manifests one file under several names, where hard
    links are to be had."""
    first: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.data")):
            same = first.setdefault(read_manifest(folder)[FILES][path.name]["sha256"], path)
            if same is not path:
                path.unlink()
                link(same, path)


MODEL_DIR_HELP = "model folder (./onnx_models_optimized, or ./onnx_models where that is missing)"


def default_model_dir() -> Path:
    """The optimized folder, or the exported one where that is missing."""
    optimized = Path("onnx_models_optimized")
    return optimized if optimized.is_dir() else Path("onnx_models")


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


def package_versions() -> dict[str, str]:
    """Version of each recorded package that is installed."""
    found = {}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
