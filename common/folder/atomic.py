"""Atomic output folders: a folder is replaced by one rename, so that the old or the new one is complete at any moment.

While a run writes the folder NAME, these are beside it:
    .NAME.lock      held by the run (the kernel releases it when the run ends, however it ends)
    .NAME.partial   its scratch space, in which the new folder is built
    .NAME.old       the old folder, about to be removed: for a moment, where the system cannot exchange two folders

So whatever the holder of the lock finds there was left by a run that was killed. `lock` removes it; where the old
folder had been moved away and the new one was not yet in its place, `lock` moves the old one back.
"""

import contextlib
import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

AT_FDCWD = -100  # <fcntl.h>
RENAME_EXCHANGE = 2  # <linux/fs.h>
# The errors of renameat2 where the kernel, or the file system (NFS, some overlays), cannot exchange two folders.
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.ENOTSUP)


@contextlib.contextmanager
def lock(target: Path) -> Iterator[Path]:
    """Keep other runs from writing to `target`, clean up after a killed one, and yield an empty folder beside it.

    That folder is scratch space, which is removed at the end. Raises BlockingIOError while another run has the lock.
    """
    path = _beside(target, "lock")
    scratch = _beside(target, "partial")
    aside = _beside(target, "old")
    file = _acquire(path, target)
    try:
        _recover(target, scratch, aside)
        scratch.mkdir()
        try:
            yield scratch
        finally:
            with contextlib.suppress(OSError):  # the next run removes what cannot be removed now
                _remove(scratch)
    finally:
        if os.name == "posix":  # unlinked while the lock is held: a run that opened the file notices it in _acquire
            path.unlink(missing_ok=True)
            os.close(file)
        else:  # Windows does not delete an open file, nor one that the next run has opened meanwhile
            os.close(file)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}")


def _acquire(path: Path, target: Path) -> int:
    """A descriptor of the lock file `path`, locked. Raises BlockingIOError while another run has it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock_file(file)
        except (BlockingIOError, PermissionError):
            os.close(file)
            raise BlockingIOError(f"another run is writing to {target}; wait until it has ended") from None
        except OSError:
            os.close(file)
            raise
        try:
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        except FileNotFoundError:
            pass
        os.close(file)  # its last holder has unlinked it between our open and our lock


def _lock_file(file: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _recover(target: Path, scratch: Path, aside: Path) -> None:
    """Restore the state from before or after a run that was killed."""
    if aside.is_dir():
        if target.exists():
            _remove(aside)
        else:
            aside.rename(target)
    if scratch.is_dir():
        _remove(scratch)


def replace_folder(target: Path, new: Path, removed: Collection[Path] = ()) -> None:
    """Put the folder `new` in the place of `target`, with every other entry of `target` except those in `removed`.

    Those entries are hard links where the file system has them, so that nothing is copied and nothing is lost with the
    old folder. All of `new` is on the disk before the rename, and the rename is on the disk before this returns.
    """
    written = list(new.rglob("*"))
    if target.exists():
        _keep_entries(target, new, removed)
    else:
        new.chmod(0o777 & ~_umask())
    for path in (*written, new):
        fsync(path)
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        aside = _beside(target, "old")
        target.rename(aside)
        new.rename(target)
        fsync(target.parent)
        with contextlib.suppress(OSError):
            _remove(aside)
    fsync(target.parent)
    fsync(new.parent)


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
    if os.name == "posix" and os.geteuid() == 0:
        os.chown(new, old.stat().st_uid, old.stat().st_gid)


def link(source: str | Path, target: str | Path) -> str | Path:
    """Give the file `source` the second name `target`, which is returned; copy it where there are no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)
        if not Path(target).is_symlink():
            fsync(Path(target))
    return target


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step. Returns False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


def fsync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    if os.name != "posix" and path.is_dir():
        return  # Windows cannot open folders, and writes changes of names at once
    file = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _remove(path: Path) -> None:
    shutil.rmtree(path, onerror=_open_folder_and_retry)


def _open_folder_and_retry(function: Callable[[str], object], path: str, _: object) -> None:
    """Make the folder of `path` writable, so that its entries can be removed.

    The mode of a file is never changed: the file may have a second name in the folder that stays.
    """
    Path(path).parent.chmod(0o700)
    function(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
