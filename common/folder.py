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
        kind = "the working directory or above it" if Path.cwd().is_relative_to(real) else "a mount point"
        raise ValueError(f"{target} is {kind} and cannot be replaced as a whole; give a folder below it")
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
        staging = scratch / "new"
        try:
            staging.mkdir()
            yield staging
            replace_folder(target, staging, {target / path for path in removed})
        except OSError as error:
            if error.errno in DISK_ERRORS or SHORT_WRITE in str(error):
                raise OSError(f"cannot write to {target} ({error}); nothing was changed; make room") from error
            raise


@contextlib.contextmanager
def lock(target: Path) -> Iterator[Path]:
    """Keep other runs from writing to `target`, clean up after a killed one, and yield an empty folder beside it.

    That folder is scratch space, which is removed at the end. Raises BlockingIOError while another run has the lock.
    """
    path = _beside(target, "lock")
    scratch = _beside(target, "partial")
    busy = f"another run is writing to {target}; wait until it has ended"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(busy) from None
        if os.fstat(file.fileno()).st_nlink == 0:  # its last holder has removed it between our open and our lock
            raise BlockingIOError(busy)
        try:
            _recover(target)
            scratch.mkdir()
            yield scratch
        finally:
            _recover(target)
            path.unlink(missing_ok=True)


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}")


def _recover(target: Path) -> None:
    """Leave the old folder or the new one in its place, and nothing beside it except the lock."""
    aside = _beside(target, "old")
    if aside.is_dir() and not target.exists():
        aside.rename(target)
    for folder in (aside, _beside(target, "partial")):
        shutil.rmtree(folder, ignore_errors=True)


def replace_folder(target: Path, new: Path, removed: Collection[Path] = ()) -> None:
    """Put the folder `new` in the place of `target`, with every other entry of `target` except those in `removed`.

    Those entries are hard links where the file system has them, so that nothing is copied and nothing is lost with the
    old folder. All of `new` is on the disk before the renames, and the renames are on the disk before this returns.
    Between the two, `target` is missing, and the old folder has the name from which `lock` moves it back.
    """
    written = list(new.rglob("*"))
    if target.exists():
        _keep_entries(target, new, removed)
    for path in (*written, new):
        fsync(path)
    if target.exists():
        target.rename(_beside(target, "old"))
    new.rename(target)
    fsync(target.parent)


def _keep_entries(old: Path, new: Path, removed: Collection[Path]) -> None:
    """Give `new` the mode of `old` and the entries that only `old` has, except those in `removed`; do the same for the
    folders that both have."""
    for entry in old.iterdir():
        if entry in removed:
            continue
        kept = new / entry.name
        is_folder = entry.is_dir() and not entry.is_symlink()
        if os.path.lexists(kept):
            if is_folder and kept.is_dir():
                _keep_entries(entry, kept, removed)
        elif is_folder:
            shutil.copytree(entry, kept, symlinks=True, copy_function=link)
        else:
            link(entry, kept)
    shutil.copystat(old, new)


def link(source: str | Path, target: str | Path) -> str | Path:
    """Give the file `source` the second name `target`, which is returned; copy it where there are no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
        if not Path(target).is_symlink():
            fsync(Path(target))
    return target


def fsync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


# Files that a user names


def output_path(text: str) -> Path:
    """The value of a flag that names a file to write: STANDARD_OUTPUT for `-` and for other names of the standard
    output, which are /dev/stdout and the file of `> FILE`."""
    path = Path(text)
    try:
        return STANDARD_OUTPUT if sys.stdout and os.path.samestat(path.stat(), os.fstat(1)) else path
    except OSError:  # nothing there as yet, or no standard output
        return path


def require_file(path: Path, expected: str) -> None:
    """Raise FileNotFoundError where there is nothing at `path`, ValueError where it is not a regular file.

    expected: what the file should be, for the message, such as "a manifest".
    """
    if not path.exists():
        raise FileNotFoundError(f"expected {expected}, got nothing at {path}")
    if not path.is_file():
        raise ValueError(f"expected {expected}, but {path} is not a regular file")


def check_outputs(outputs: Sequence[Path], inputs: Iterable[Path], new_folders: Collection[Path] = ()) -> None:
    """Raise before the work where an output cannot be written, is one of `inputs`, or is named twice.

    A device or a named pipe can be written to. new_folders: those that are made when outputs are written to them, if
    they are not there. Raises ValueError, IsADirectoryError, FileNotFoundError or
    PermissionError.
    """
    if outputs.count(STANDARD_OUTPUT) > 1:
        raise ValueError("only one result can go to the standard output; give the others names of files")
    read = [os.path.realpath(path) for path in inputs]
    files = [path for path in outputs if path != STANDARD_OUTPUT]
    for number, path in enumerate(files):
        folder = Path(os.path.realpath(path)).parent
        if path.parent in new_folders and not folder.exists():
            folder = folder.parent
        if path.is_dir() or path in new_folders:
            raise IsADirectoryError(f"{path} is a folder, where a file is to be written; give another name")
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder} to write {path} to; make it first")
        if not os.access(folder if path.is_file() or not path.exists() else path, os.W_OK):
            raise PermissionError(f"writing to {path} is not permitted; give another name")
        for source in read:
            if _same_file(path, source):
                raise ValueError(f"{path} is read ({source}), so no result can be written there; give another name")
        for other in files[:number]:
            if _same_file(path, other):
                raise ValueError(f"each result needs a file of its own, not {other} and {path}, which are one")


@contextlib.contextmanager
def printing_beside(results: Collection[Path | None]) -> Iterator[TextIO]:
    """Redirect printing to the error output where one of `results` goes to the standard output, which a program may
    read. Yields the standard output. Raises ValueError where that is closed."""
    stdout = sys.stdout
    if STANDARD_OUTPUT in results and not stdout:
        raise ValueError("expected a standard output for a result that goes to -, got a closed one; name a file")
    with contextlib.redirect_stdout(sys.stderr if STANDARD_OUTPUT in results else stdout):
        yield stdout


def _same_file(path: Path, other: str | Path) -> bool:
    """Whether two names stand for the same regular file, or will once it is written."""
    if path.exists() and not path.is_file():
        return False
    try:
        return os.path.realpath(path) == os.path.realpath(other) or path.samefile(other)
    except OSError:
        return False


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
        write_text(Path(os.path.realpath(path)), content)


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
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return {}
    content = read_json(path, "python export_parakeet_to_onnx.py, after you have deleted it")
    if not all(isinstance(section, dict) for section in content.values()) or not all(
        isinstance(file, dict) and {"bytes", "sha256"} <= set(file) for file in content.get(FILES, {}).values()
    ):
        raise ValueError(f"{path} is not a manifest of this project; delete it, or make the folder again")
    return content


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
    wrong = [problem for name in checked if (problem := _problem(folder / name, listed))]
    if wrong:
        raise ValueError(f"{folder}: {'; '.join(wrong)}; make the folder again")
    return len(checked)


def _problem(path: Path, listed: dict[str, Any]) -> str | None:
    """What is wrong with a file according to the section `files` of its manifest, or None."""
    expected = listed[path.name]
    if not path.is_file():
        return f"{path.name} is missing, which holds weights of {path.stem}"
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
