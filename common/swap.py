"""A folder replaced by one rename: at every moment there is the whole old one or the whole new one.

Beside a folder NAME lie, while a run writes it:
    .NAME.lock      held by the run (the kernel lets go of it when the run dies, however it dies)
    .NAME.partial   its scratch space; the new folder grows in it
    .NAME.old       for a moment, where the system has no exchanging rename: the old folder, about to be removed

Whoever has the lock may therefore take every leftover for a dead run's, and does: `lock` removes it, or, where the old
folder had been moved aside and the new one had not come yet, moves the old one back.
"""

import contextlib
import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # <fcntl.h>, <linux/fs.h>
# What renameat2 says where the kernel, or the file system (NFS, some overlays), cannot exchange two folders.
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.ENOTSUP)


@contextlib.contextmanager
def lock(target: Path) -> Iterator[Path]:
    """Keep other runs from writing to `target`, tidy up after a dead one, and yield empty scratch space beside it.

    Raises BlockingIOError while another run has the lock.
    """
    path, scratch, aside = (target.with_name(f".{target.name}.{kind}") for kind in ("lock", "partial", "old"))
    file = _acquire(path, target)
    try:
        _recover(target, scratch, aside)
        scratch.mkdir()
        try:
            yield scratch
        finally:
            with contextlib.suppress(OSError):  # what cannot be removed now is the next run's leftover
                _remove(scratch)
    finally:
        if os.name == "posix":  # unlinked while it is held: whoever waits for it notices, in _acquire
            path.unlink(missing_ok=True)
            os.close(file)
        else:  # Windows does not delete an open file, nor one that the next run has opened meanwhile
            os.close(file)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _acquire(path: Path, target: Path) -> int:
    """A descriptor of the lock file `path`, locked."""
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
    """Bring the place to what it was before, or after, a run that was killed."""
    if aside.is_dir():
        if target.exists():
            _remove(aside)
        else:
            aside.rename(target)
    if scratch.is_dir():
        _remove(scratch)


def replace_folder(target: Path, new: Path, removed: Collection[Path] = ()) -> None:
    """Put the folder `new` in the place of `target`, with every entry of `target` that it lacks except `removed`.

    Entries are hard links where the file system has them, so nothing is copied and nothing can be lost with the old
    folder. All of `new` is on the disk before the rename, and the rename before this returns.
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
        aside = target.with_name(f".{target.name}.old")
        target.rename(aside)
        new.rename(target)
        fsync(target.parent)
        with contextlib.suppress(OSError):
            _remove(aside)
    fsync(target.parent)
    fsync(new.parent)


def _keep_entries(old: Path, new: Path, removed: Collection[Path]) -> None:
    """Give `new` the mode of `old` and the entries that only `old` has, in the folders that both have as well, except
    those in `removed`."""
    for entry in old.iterdir():
        if entry in removed:
            continue
        kept, folder = new / entry.name, entry.is_dir() and not entry.is_symlink()
        if os.path.lexists(kept):
            if folder and kept.is_dir():
                _keep_entries(entry, kept, removed)
        elif folder:
            shutil.copytree(entry, kept, symlinks=True, copy_function=link)
        else:
            link(entry, kept)
    shutil.copystat(old, new)
    if os.name == "posix" and os.geteuid() == 0:
        os.chown(new, old.stat().st_uid, old.stat().st_gid)


def link(source: str | Path, kept: str | Path) -> str | Path:
    """One file under a second name; a copy of it where the file system has no hard links."""
    try:
        os.link(source, kept, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, kept, follow_symlinks=False)
        if not Path(kept).is_symlink():
            fsync(Path(kept))
    return kept


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system cannot."""
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
        return  # Windows opens no folders, and writes their names through
    file = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _remove(path: Path) -> None:
    shutil.rmtree(path, onerror=_open_folder_and_retry)


def _open_folder_and_retry(function, path: str, _) -> None:
    """Entries of a read-only folder can be removed once it is writable. Never the mode of a file: it may be shared
    with its second name in the folder that stays."""
    Path(path).parent.chmod(0o700)
    function(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
