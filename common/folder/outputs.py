"""Files that a user names: checks before the work, atomic writing of text and JSON, reading of JSON.

An output is checked before the work that leads to it, so that a mistyped path does not cost an hour. `-` is the
standard output. A regular file is replaced by one rename once its whole content is on the disk.
"""

import contextlib
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from common.folder.atomic import fsync

STANDARD_OUTPUT = Path("-")
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}


def kind_of_file(mode: int) -> str:
    """The kind of a file that is not a regular file, in words, from its st_mode."""
    return KINDS.get(stat.S_IFMT(mode), "a device")


def require_file(path: Path, expected: str) -> None:
    """Raise FileNotFoundError where there is nothing at `path`, ValueError where it is not a regular file.

    expected: what the file should be, for the message, such as "a manifest".
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for a name that holds a null byte
        raise FileNotFoundError(f"expected {expected}, got nothing at {path}") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"expected {expected}, got {kind_of_file(mode)}, {path}; name a regular file")


def check_outputs(outputs: Sequence[Path], inputs: Iterable[Path]) -> None:
    """Raise before the work where an output cannot be written, is one of `inputs`, or is named twice.

    Raises ValueError, or what check_output_file raises.
    """
    read = [os.path.realpath(path) for path in inputs]
    for number, path in enumerate(outputs):
        if any(is_standard_output(path) and is_standard_output(other) for other in outputs[:number]):
            raise ValueError(f"expected one result on the standard output, got {outputs[0]} and {path}")
        if is_standard_output(path):
            continue
        check_output_file(path)
        for source in read:
            if _same_file(path, source):
                raise ValueError(f"expected a file to write, got {path}, which is read ({source}); give another name")
        for other in outputs[:number]:
            if _same_file(path, other):
                raise ValueError(f"expected a file for each result, got {other} and {path}, which are one")


def check_output_file(path: Path) -> None:
    """Raise IsADirectoryError, FileNotFoundError, PermissionError or ValueError if `path` cannot be written to.

    A character device or a named pipe can be written to.
    """
    folder = Path(os.path.realpath(path)).parent
    if path.is_dir():
        raise IsADirectoryError(f"expected a file to write, got the folder {path}")
    if path.is_block_device() or path.is_socket():
        raise ValueError(f"expected a file to write, got {kind_of_file(path.stat().st_mode)}, {path}")
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder for {path}, found no {folder}; make it first")
    if not os.access(folder if path.is_file() or not path.exists() else path, os.W_OK):
        raise PermissionError(f"expected a file to write, got {path}, where writing is not permitted")


def is_standard_output(path: Path) -> bool:
    """Whether `path` is `-`, or another name of the standard output: /dev/stdout, or the file of `> FILE`."""
    try:
        return path == STANDARD_OUTPUT or os.path.samestat(path.stat(), os.fstat(1))
    except OSError:  # nothing there as yet, or no standard output
        return False


@contextlib.contextmanager
def printing_beside(results: Iterable[Path]) -> Iterator[TextIO]:
    """Redirect printing to the error output where one of `results` goes to the standard output, which a program may
    read. Yields the standard output."""
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr if any(map(is_standard_output, results)) else stdout):
        yield stdout


def _same_file(path: Path, other: str | Path) -> bool:
    """Whether two names stand for the same regular file, or will once it is written."""
    if path.exists() and not path.is_file():
        return False
    try:
        return os.path.realpath(path) == os.path.realpath(other) or path.samefile(other)
    except OSError:
        return False


def json_text(content: dict[str, Any]) -> str:
    """Readable JSON that ends in a newline."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write readable UTF-8 JSON atomically."""
    write_text(path, json_text(content))


def write_output(path: Path, content: str, stdout: TextIO) -> None:
    """Write UTF-8 to `stdout`, to a device or a named pipe, or atomically to a regular file.

    A symbolic link is kept, and the file that it points to is replaced.
    """
    if is_standard_output(path):
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


def read_json(path: Path, made_by: str) -> dict[str, Any]:
    """Read a JSON file of a model folder.

    Raises FileNotFoundError naming the command `made_by` that writes it, ValueError if it is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected {path}, got no such file; first run: {made_by}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no object")
        return content
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); make it again with: {made_by}") from None
