"""Downloads one file from Hugging Face over HTTP, with retries, and continues where an earlier request or run ended.

huggingface_hub's own download (2.4.0) starts over in every run and gives up when a connection is reset. Here the bytes
are appended to a file in its cache, which the next request, or the next run, continues by an HTTP Range. Files in Xet
storage are served over plain HTTP too.
"""

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from tqdm import tqdm

from common.checkpoint.digest import SHA256, file_digest
from common.checkpoint.hub import HubFile, failure_of, http_status, not_the_hub, requested_pause
from common.cli import size_text
from common.folder import DISK_ERRORS

T = TypeVar("T")
# Seconds to wait before a request is sent again; any byte that arrives starts the list again.
WAITS = (1, 2, 4, 8, 16)
LONGEST_WAIT = 60  # seconds that a server may ask for (Retry-After)
RETRIED_STATUSES = (408, 429, 500, 502, 503, 504)  # of HTTP: failures that may be temporary
LINE_SECONDS = 10  # between two lines about the progress where stderr is not a terminal
MAKE_ROOM = "make room, or set HF_HUB_CACHE to a folder on another disk, and run the command again"


def fetch(file: HubFile, blob: Path, size: int) -> None:
    """Download `file` of `size` bytes into `blob`, its place in the cache, continuing what an earlier run left there.

    Raises OSError for a network or a disk that fails, for content with another SHA-256 than its name in the cache, and
    while another run downloads the same file; and what httpx2 raises once the retries are used up.
    """
    from filelock import Timeout
    from huggingface_hub.utils._fixes import WeakFileLock

    cache = blob.parents[2]
    repository = blob.parents[1].name
    lock = cache / ".locks" / repository / f"{blob.name}.lock"  # the lock that huggingface_hub uses
    partial = blob.with_name(f"{blob.name}.incomplete")  # a name that `hf cache prune` removes
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with WeakFileLock(lock, timeout=1):
            if blob.exists():
                return
            _check_room(partial, size)
            _receive(file, partial, size)
            if SHA256.fullmatch(blob.name) and file_digest(partial) != blob.name:
                partial.unlink()
                raise ConnectionError(f"expected SHA-256 {blob.name} of {file}, got another; run the command again")
            partial.replace(blob)
    except Timeout:
        raise BlockingIOError(f"another run is downloading {file.file}; wait until it has ended") from None
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise OSError(f"the disk of {blob.parent} is full ({error.strerror}); {MAKE_ROOM}") from error


def _print_line(line: str) -> None:
    print(line, flush=True)


def retried(
    request: Callable[[], T],
    retries: int,
    *,
    position: Callable[[], int] = int,
    print_line: Callable[[str], None] = _print_line,
) -> T:
    """The result of `request()`, which is called again after a failure that may be temporary.

    retries: how often, without progress in between. position: grows with progress, such as the bytes received.
    """
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    failures = 0
    before = position()
    while True:
        try:
            return request()
        except (httpx2.TransportError, HfHubHTTPError) as error:
            if position() > before:
                failures = 0
            before = position()
            pause = requested_pause(error) or WAITS[min(failures, len(WAITS) - 1)]
            failures += 1
            if not _may_pass(error) or failures > retries or pause > LONGEST_WAIT:
                raise
            print_line(f"{failure_of(error)}; trying again in {pause:.0f} s")
            time.sleep(pause)


def _may_pass(error: Exception) -> bool:
    import httpx2

    status = http_status(error)
    return not isinstance(error, httpx2.UnsupportedProtocol) if status is None else status in RETRIED_STATUSES


def _check_room(partial: Path, size: int) -> None:
    """Raise OSError where the disk has no room for the bytes that `partial` lacks."""
    present = partial.stat().st_size if partial.exists() else 0
    if present > size:
        partial.unlink()
        present = 0
    free = shutil.disk_usage(partial.parent).free
    if free < size - present:
        raise OSError(
            f"expected {size_text(size - present)} free for the download into {partial.parent}, got {size_text(free)}; "
            f"{MAKE_ROOM}"
        )


def _receive(file: HubFile, partial: Path, size: int) -> None:
    """Append to `partial` until it has `size` bytes; a request that fails is sent again for the rest."""
    with partial.open("ab") as target, _progress(file.file, target.tell(), size) as progress:
        if target.tell():
            progress.write(f"continuing the download at {size_text(target.tell())} of {size_text(size)}")
        try:
            retried(
                lambda: _append(file, target, size, progress),
                len(WAITS),
                position=target.tell,
                print_line=progress.write,
            )
        except KeyboardInterrupt:
            kept = f"{size_text(target.tell())} of {size_text(size)} of {file.file} are kept in the local cache"
            raise KeyboardInterrupt(f"{kept}; run the command again to continue the download") from None


def _append(file: HubFile, target: BinaryIO, size: int, progress: Any) -> None:
    """Send one request for the bytes that `target` lacks of `size`, and write the answer."""
    import httpx2
    from huggingface_hub import constants, get_session, hf_raise_for_status
    from huggingface_hub.utils._headers import build_hf_headers

    start = target.tell()
    if start == size:
        return
    headers = build_hf_headers() | {"Range": f"bytes={start}-", "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", file.url, headers=headers, timeout=timeout) as response:
        hf_raise_for_status(response)
        from_start = response.status_code == 200  # a server that does not know Range
        if from_start:
            is_rest = response.headers.get("Content-Length", str(size)) == str(size)
        else:
            is_rest = response.headers.get("Content-Range") == f"bytes {start}-{size - 1}/{size}"
        if not is_rest or "text/html" in response.headers.get("Content-Type", ""):  # a login page
            raise not_the_hub()
        if from_start:
            target.seek(0)
            target.truncate()
            progress.update(-start)
        for data in response.iter_raw():
            target.write(data)
            progress.update(len(data))
    if target.tell() < size:
        raise httpx2.RemoteProtocolError(f"it ended at {size_text(target.tell())} of {size_text(size)}")


def _progress(title: str, initial: int, total: int) -> Any:
    """A progress bar on a terminal; elsewhere a line every LINE_SECONDS, since a download may take an hour."""
    if sys.stderr.isatty():
        return tqdm(desc=title, initial=initial, total=total, unit="B", unit_scale=True)
    return _ProgressLines(title, initial, total)


class _ProgressLines:
    """The part of tqdm's interface that a download uses, for output to a pipe."""

    def __init__(self, title: str, initial: int, total: int) -> None:
        self.title = title
        self.initial = initial  # bytes
        self.received = initial  # bytes
        self.total = total  # bytes
        self.since = time.monotonic()
        self.due = self.since + LINE_SECONDS

    def __enter__(self) -> "_ProgressLines":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int) -> None:
        """Count bytes, and print a line if one is due."""
        self.received += count
        now = time.monotonic()
        if now >= self.due:
            speed = max(self.received - self.initial, 0) / (now - self.since)
            _print_line(f"{self.title}: {size_text(self.received)} of {size_text(self.total)}, {size_text(speed)}/s")
            self.due = now + LINE_SECONDS

    def write(self, line: str) -> None:
        _print_line(line)
