"""Output folders and files: checked before the work, written beside their place, and put there by a rename.

A script writes into an empty folder beside its output, which takes the output's place at the end. While a run writes
the folder NAME, these are beside it:
    .NAME.lock      held by the run (the kernel releases it when the run ends, however it ends)
    .NAME.partial   its scratch space, in which the new folder is built
    .NAME.old       the old folder, between the two renames that put the new one in its place

So whatever the holder of the lock finds there was left by a run that was killed. `lock` removes it; where the old
folder had been moved away and the new one was not yet in its place, `lock` moves the old one back.

`manifest.json` says where a model folder came from, the flags and versions it was made with, and what was measured. It
has a section for each script that writes into the folder (`export`, `tokenizer`, `optimize`), and `files`, the size and
SHA-256 of every file. It is written last, into the new folder.

Where the checkpoint and the exported folder of a model folder lie on this machine is written to
`.cache/huggingface/parakeet_onnx.json` in the model folder, as relative paths, since the manifest is published but
local paths must not be: huggingface_hub never uploads that subfolder (its DEFAULT_IGNORE_PATTERNS).

An output file is checked before the work that leads to it, so that a mistyped path does not cost an hour. `-` is the
standard output.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from common.cli import size_text

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk or a quota is full
SHORT_WRITE = "requested and"  # NumPy's message for a full disk gives only how much it wrote
STANDARD_OUTPUT = Path("-")
MANIFEST = "manifest.json"
FILES = "files"  # section of the manifest: name → bytes and sha256
# Packages whose version decides what an exported folder contains.
RECORDED_PACKAGES = (
    "nemo_toolkit", "transformers", "torch", "onnx", "onnxruntime", "onnxruntime-genai", "sentencepiece", "tokenizers",
)  # fmt: skip
LOCATIONS = Path(".cache", "huggingface", "parakeet_onnx.json")
CHECKPOINT = "checkpoint"
EXPORTED = "exported"


# Folders


def check_output_dir(target: Path) -> None:
    """Check that the folder `target` can be written, before the work.

    Raises NotADirectoryError if it or one of its parents is a file, PermissionError if it is read-only, ValueError if
    it cannot be replaced or its manifest is not one of this project.
    """
    for path in (target, *target.parents):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"{path} is a file, where a folder is to be written; give another --output_dir")
    real = target.resolve()
    if real.is_dir() and not os.access(real, os.W_OK):
        raise PermissionError(f"{target} is read-only; give another --output_dir")
    if os.path.ismount(real) or Path.cwd().is_relative_to(real):
        raise ValueError(
            f"{target} is a mount point, the working directory or above it, and cannot be replaced as a whole; give a "
            "folder below it"
        )
    read_manifest(target)


def require_free(disk: float, target: Path) -> int:
    """Bytes free on the disk where `target` will be. Raises OSError where that is less than `disk` bytes."""
    existing = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < disk:
        raise OSError(f"{target} needs {size_text(disk)} of free disk, and {size_text(free)} are free; make room")
    return free


def state_needs(what: str, memory: float, disk: float, target: Path) -> None:
    """Print before long work how many bytes of memory it needs, and of disk where `target` will be.

    what: the name of the input. Raises OSError as require_free does.
    """
    free = require_free(disk, target)
    needed = f"about {size_text(memory)} of memory and {size_text(disk)} of disk"
    print(f"{what} needs {needed}, where {size_text(free)} are free")


@contextlib.contextmanager
def staged_folder(target: Path, removed: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty folder beside `target`, whose files are in `target` once the block has ended without an exception.

    After an exception `target` is as it was. The new folder is complete, and on the disk, before it is put in the place
    of the old one. It keeps the files of `target` that the block did not write, except those at the relative paths
    `removed`. The parent of the new folder is scratch space, which is removed with it; what a killed run left of both
    is removed by the next run. Raises as check_output_dir and lock do, and OSError where the disk is full.
    """
    check_output_dir(target)
    target = target.resolve()  # a link to the folder stays a link
    target.parent.mkdir(parents=True, exist_ok=True)
    with lock(target) as scratch:
        new = scratch / "new"
        try:
            new.mkdir()
            yield new
            _replace(target, new, {target / path for path in removed})
        except OSError as error:
            if error.errno in DISK_ERRORS or SHORT_WRITE in str(error):
                raise OSError(f"cannot write to {target} ({error}); nothing was changed; make room") from error
            raise


@contextlib.contextmanager
def lock(target: Path) -> Iterator[Path]:
    """Keep other runs from writing to `target`, clean up after a killed one, and yield an empty folder beside it.

    That folder is scratch space, which is removed at the end. Raises BlockingIOError while another run has the lock.
    """
    path, scratch, aside = (target.with_name(f".{target.name}.{kind}") for kind in ("lock", "partial", "old"))

    def recover() -> None:
        """Leave the old folder or the new one in its place, and nothing beside it except the lock."""
        if aside.exists() and not target.exists():
            aside.rename(target)
        for folder in (aside, scratch):
            shutil.rmtree(folder, ignore_errors=True)

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another run is writing to {target}; wait until it has ended") from None
        try:
            recover()
            scratch.mkdir()
            yield scratch
        finally:
            recover()
            path.unlink(missing_ok=True)


def _replace(target: Path, new: Path, removed: Collection[Path]) -> None:
    """Put the folder `new` in the place of `target`, with every other entry of `target` except those in `removed`.

    Those entries are hard links where the file system has them, so that nothing is copied and nothing is lost with the
    old folder. All of `new` is on the disk before the renames, and the renames are on the disk before this returns.
    Between the two, `target` is missing, and the old folder has the name from which `lock` moves it back.
    """
    written = [*new.rglob("*"), new]
    for entry in (target, *sorted(target.rglob("*"))) if target.exists() else ():
        kept = new / entry.relative_to(target)
        if entry.is_dir() and not entry.is_symlink():
            kept.mkdir(exist_ok=True)
            shutil.copymode(entry, kept)
        elif entry not in removed and not os.path.lexists(kept):
            link(entry, kept)
    for path in written:
        fsync(path)
    if target.exists():
        target.rename(target.with_name(f".{target.name}.old"))
    new.rename(target)
    fsync(target.parent)


def link(source: Path, target: Path) -> None:
    """Give the file `source` the second name `target`; copy it where there are no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
        if not target.is_symlink():
            fsync(target)


def fsync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


# Files that a user names


def output_path(text: str) -> Path:
    """The value of a flag that names a file to write: STANDARD_OUTPUT for `-` and for /dev/stdout."""
    return STANDARD_OUTPUT if text == "/dev/stdout" else Path(text)


def require_file(path: Path, expected: str) -> None:
    """Raise FileNotFoundError where there is nothing at `path`, ValueError where it is not a regular file.

    expected: what the file should be, for the message, such as "a manifest".
    """
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {path}; give the path of {expected}")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file; give the path of {expected}")


def check_outputs(outputs: Sequence[Path], inputs: Iterable[Path], new_folders: Collection[Path] = ()) -> None:
    """Raise before the work where an output cannot be written, is one of `inputs`, or is named twice.

    A device or a named pipe can be written to. new_folders: those that are made when outputs are written to them, if
    they are not there. Raises ValueError, IsADirectoryError, FileNotFoundError or PermissionError.
    """
    read = set(map(os.path.realpath, inputs))
    written = set()
    for path in outputs:
        real = Path(os.path.realpath(path))
        folder = real.parent.parent if path.parent in new_folders and not real.parent.exists() else real.parent
        if path.is_dir() or path in new_folders:
            raise IsADirectoryError(f"{path} is a folder, where a file is to be written; give another name")
        if path.exists() and not path.is_file():
            continue
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder} to write {path} to; make it first")
        if path != STANDARD_OUTPUT and not os.access(folder, os.W_OK):
            raise PermissionError(f"writing to {path} is not permitted; give another name")
        if str(real) in read:
            raise ValueError(f"{path} is read, so no result can be written there; give another name")
        if real in written:
            raise ValueError(f"each result needs a file of its own, and two go to {path}")
        written.add(real)


@contextlib.contextmanager
def printing_beside(results: Collection[Path | None]) -> Iterator[TextIO]:
    """Redirect printing to the error output where one of `results` goes to the standard output, which a program may
    read. Yields the standard output."""
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr if STANDARD_OUTPUT in results else stdout):
        yield stdout


def write_output(path: Path, content: str, stdout: TextIO) -> None:
    """Write UTF-8 to `stdout`, to a device or a named pipe, or atomically to a regular file.

    A symbolic link is kept, and the file that it points to is replaced.
    """
    if path == STANDARD_OUTPUT:
        stdout.flush()
        stdout.buffer.write(content.encode())
        stdout.buffer.flush()
    elif path.exists() and not path.is_file():
        path.write_text(content, encoding="utf-8")
    else:
        write_text(path.resolve(), content)


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 atomically: to a file beside `path`, which is then renamed."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(content, encoding="utf-8")
        fsync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    fsync(path.parent)


def json_text(content: dict[str, Any]) -> str:
    """Readable JSON that ends in a newline."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write readable UTF-8 JSON atomically."""
    write_text(path, json_text(content))


def read_json(path: Path, made_by: str) -> dict[str, Any]:
    """Read a JSON file of a model folder.

    Raises FileNotFoundError naming the command `made_by` that writes it, ValueError if it is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; first run: {made_by}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no object")
        return content
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); make it again with: {made_by}") from None


# The manifest and the locations of a model folder


def read_manifest(folder: Path) -> dict[str, Any]:
    """The folder's manifest, or an empty one where there is none yet.

    Raises ValueError where the file is not a manifest of this project.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    content = read_json(path, "python export_parakeet_to_onnx.py, after you have deleted it")
    if not all(isinstance(section, dict) for section in content.values()):
        raise ValueError(f"{path} is not a manifest of this project; delete it, or make the folder again")
    return content


def is_float16(manifest: dict[str, Any]) -> bool:
    """Whether the folder was exported with --precision fp16."""
    return bool(manifest.get("export", {}).get("flags", {}).get("precision") == "fp16")


def package_versions() -> dict[str, str]:
    """Version of each recorded package that is installed."""
    versions = {}
    for package in RECORDED_PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


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
    a graph with the data of another does not notice. Except for data, a missing file is reported by the code that reads
    it, not here. Raises ValueError naming each file and what is wrong with it.
    """
    listed = read_manifest(folder).get(FILES, {})
    checked = [name for name in names if name in listed and (name.endswith(".data") or (folder / name).is_file())]
    wrong = []
    for name in checked:
        found = fingerprint(folder / name) if (folder / name).is_file() else {"bytes": "no"}
        if found != listed[name]:
            sizes = f"{found['bytes']} bytes, not {listed[name]['bytes']}"
            wrong.append(f"{name} is not the file that {MANIFEST} lists ({sizes})")
    if wrong:
        raise ValueError(f"{folder}: {'; '.join(wrong)}; make the folder again")
    return len(checked)


def write_locations(staging: Path, target: Path, **paths: Path | None) -> None:
    """Record in `staging`, which becomes `target`, where the files and folders `paths` lie, except those that are None.

    The paths are relative to `target`, so that everything may be moved together.
    """
    folder = target.resolve()
    known = {name: os.path.relpath(path.resolve(), folder) for name, path in paths.items() if path is not None}
    (staging / LOCATIONS).parent.mkdir(parents=True, exist_ok=True)
    write_json(staging / LOCATIONS, known)


def read_location(folder: Path, name: str) -> Path | None:
    """Where the file or folder `name` of write_locations was when `folder` was made; None where that is not recorded.

    Raises ValueError where the record is not JSON.
    """
    path = folder / LOCATIONS
    known = read_json(path, "python export_parakeet_to_onnx.py") if path.is_file() else {}
    return folder.resolve() / known[name] if name in known else None
