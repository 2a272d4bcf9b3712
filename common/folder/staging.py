"""XXX docstring of folder.staging"""

import contextlib
import errno
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from common.cli import size_text
from common.folder.atomic import lock, replace_folder
from common.folder.manifest import read_manifest

# A disk, or a quota, that is full; NumPy says only how much it wrote.
DISK_ERRORS, SHORT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "requested and"


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
