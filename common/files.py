"""Outputs appear whole or not at all; `manifest.json` says what a model folder holds and where it came from."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TextIO

from common.console import size_text
from common.swap import fsync, link, lock, replace_folder

STANDARD_OUTPUT = Path("-")
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
    ValueError if it cannot be replaced, or has a manifest that is none."""
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
    read_manifest(target)


KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}


def _kind(mode: int) -> str:
    return KINDS.get(stat.S_IFMT(mode), "a device")


def require_file(path: Path, wanted: str) -> None:
    """Raise FileNotFoundError where there is nothing at `path`, ValueError where it is not a regular file."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for a name that holds a null byte
        raise FileNotFoundError(f"expected {wanted}, found nothing at {path}") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"expected {wanted}, got {_kind(mode)}, {path}; name a regular file")


def check_outputs(outputs: Sequence[Path], inputs: Iterable[Path]) -> None:
    """Raise before the work where a file of a user's cannot be written, is one of `inputs`, or another output."""
    read = [os.path.realpath(path) for path in inputs]
    for number, path in enumerate(outputs):
        if any(is_standard_output(path) and is_standard_output(other) for other in outputs[:number]):
            raise ValueError(f"expected one result on the standard output, got {outputs[0]} and {path}")
        if is_standard_output(path):
            continue
        check_output_file(path)
        for other in read:
            if _same_file(path, other):
                raise ValueError(f"expected a file to write, got {path}, which is read ({other}); give another name")
        for other in outputs[:number]:
            if _same_file(path, other):
                raise ValueError(f"expected a file for each result, got {other} and {path}, which are one")


def check_output_file(path: Path) -> None:
    """Raise IsADirectoryError, FileNotFoundError, PermissionError or ValueError if `path` cannot be written as a file;
    a device of characters and a named pipe can."""
    folder = Path(os.path.realpath(path)).parent
    if path.is_dir():
        raise IsADirectoryError(f"expected a file to write, got the folder {path}")
    if path.is_block_device() or path.is_socket():
        raise ValueError(f"expected a file to write, got {_kind(path.stat().st_mode)}, {path}")
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder for {path}, found no {folder}; make it first")
    if not os.access(folder if path.is_file() or not path.exists() else path, os.W_OK):
        raise PermissionError(f"expected a file to write, got {path}, where writing is not permitted")


def is_standard_output(path: Path) -> bool:
    """Whether `path` is `-`, or another name of what this process prints to: /dev/stdout, or the file of `> FILE`."""
    try:
        return path == STANDARD_OUTPUT or os.path.samestat(path.stat(), os.fstat(1))
    except OSError:  # nothing there as yet, or no standard output
        return False


def _same_file(path: Path, other: str | Path) -> bool:
    """Whether two names are one regular file, or will be."""
    if path.exists() and not path.is_file():
        return False
    try:
        return os.path.realpath(path) == os.path.realpath(other) or path.samefile(other)
    except OSError:
        return False


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
def staged_folder(target: Path, removed: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty folder beside `target`; when the block ends well `target` has its files too, else it is as it was.

    The new folder is complete, and on the disk, before one rename puts it in the place of the old one (common/swap.py);
    files of `target` that the block did not write are in both, but for the relative paths `removed`, which belong to
    what is replaced. `stage.parent` is scratch space that vanishes with the stage; what a killed run left of both is
    removed by the next one. Raises as check_output_dir and swap.lock do.
    """
    check_output_dir(target)
    target = target.resolve()  # a link to the folder stays one
    target.parent.mkdir(parents=True, exist_ok=True)
    with lock(target) as scratch:
        stage = scratch / "new"
        try:
            stage.mkdir()
            yield stage
            replace_folder(target, stage, {target / path for path in removed})
        except OSError as error:
            if error.errno in DISK_ERRORS or SHORT_WRITE in str(error):
                raise OSError(f"cannot write to {target} ({error}); nothing was changed; make room") from error
            raise


def json_text(content: dict) -> str:
    """Readable JSON that ends in a newline."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, content: dict) -> None:
    """Write readable UTF-8 JSON, whole or not at all."""
    write_text(path, json_text(content))


def write_output(path: Path, content: str, stdout: TextIO) -> None:
    """Write UTF-8 where a user asked for it: to `stdout`, into a device or a pipe as it is, and a file whole or not at
    all; a link stays a link, and the file that it leads to is replaced."""
    if is_standard_output(path):
        stdout.flush()
        stdout.buffer.write(content.encode())
        stdout.buffer.flush()
    elif path.exists() and not path.is_file():
        path.write_text(content, encoding="utf-8")
    else:
        write_text(Path(os.path.realpath(path)), content)


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
    """The optimized folder, or the exported one where that is missing or empty."""
    optimized = Path("onnx_models_optimized")
    return optimized if optimized.is_dir() and any(optimized.iterdir()) else Path("onnx_models")


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
