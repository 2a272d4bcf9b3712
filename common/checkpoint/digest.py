"""SHA-256 of checkpoints. Each file is read only once in a process, since a checkpoint has gigabytes."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from common.folder import sha256

SHA256 = re.compile(r"[0-9a-f]{64}")
_digests: dict[tuple[int, ...], str] = {}  # by numbers that identify a file and its content


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    status = path.stat()
    key = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    if key not in _digests:
        _digests[key] = sha256(path)
    return _digests[key]


def digest_of(files: Sequence[Path]) -> str:
    """SHA-256 of a checkpoint: that of its only file, or that of the list that `sha256sum` prints of its files."""
    if len(files) == 1:
        return file_digest(files[0])
    lines = "".join(f"{file_digest(path)}  {path.name}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()
