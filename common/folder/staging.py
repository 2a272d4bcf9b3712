"""Staged output folders: a script writes into an empty folder beside its output, which replaces the output at the end.

Before the work, the output is checked, and the memory and disk that the work needs are printed. A run that fails or is
killed leaves the output as it was (common/folder/atomic.py).
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from common.cli import size_text
from common.folder.atomic import lock, replace_folder
from common.folder.manifest import read_manifest

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk or a quota is full
SHORT_WRITE = "requested and"  # NumPy's message for a full disk gives only how much it wrote


def check_output_dir(target: Path) -> None:
    """Check that the folder `target` can be written, before the work.

    Raises NotADirectoryError if it or one of its parents is a file, PermissionError if it is read-only, ValueError if
    it cannot be replaced or its manifest is not one of this project.
    """
    for path in (target, *target.parents):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"expected a folder to write to, got the file {path}; give another --output_dir")
    real = target.resolve()
    if real.is_dir() and not os.access(real, os.W_OK):
        raise PermissionError(
            f"expected a folder to write to, got {target}, which is read-only; give another --output_dir"
        )
    if os.path.ismount(real) or Path.cwd().is_relative_to(real):
        kind = "the working directory or above it" if Path.cwd().is_relative_to(real) else "a mount point"
        raise ValueError(
            f"expected a folder that can be replaced as a whole, got {target}, {kind}; give a folder below it"
        )
    read_manifest(target)


def require_free(disk: float, target: Path) -> int:
    """Bytes free on the disk where `target` will be. Raises OSError where that is less than `disk` bytes."""
    existing = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < disk:
        raise OSError(f"expected {size_text(disk)} of free disk for {target}, got {size_text(free)}; make room")
    return free


def state_needs(what: str, memory: float, disk: float, target: Path) -> None:
    """Print before long work how many bytes of memory it needs, and of disk where `target` will be.

    what: the name of the input. Raises OSError as require_free does.
    """
    free = require_free(disk, target)
    print(f"{what}: about {size_text(memory)} of memory, {size_text(disk)} of disk ({size_text(free)} free)")


@contextlib.contextmanager
def staged_folder(target: Path, removed: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty folder beside `target`, whose files are in `target` once the block has ended without an exception.

    After an exception `target` is as it was. The new folder is complete, and on the disk, before one rename puts it in
    the place of the old one. It keeps the files of `target` that the block did not write, except those at the relative
    paths `removed`. The parent of the new folder is scratch space, which is removed with it; what a killed run left of
    both is removed by the next run. Raises as check_output_dir and atomic.lock do, and OSError where the disk is full.
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
