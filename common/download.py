"""Where a checkpoint is: a `.nemo` file, or one on Hugging Face, downloaded into the cache of huggingface_hub.

huggingface_hub tells commit, size and SHA-256 of a file, keeps the cache and knows the token. The bytes are fetched
here, since its own download (2.4.0) starts over in every run and gives up when a connection is reset: they are appended
to a file in the cache, which the next request, or the next run, continues by an HTTP Range. This is plain HTTP, for
files in Xet storage too. What is in the cache is compared with the SHA-256 by which Hugging Face names it.
"""

import contextlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from tqdm import tqdm

from common.archive import open_archive
from common.console import size_text
from common.files import DISK_ERRORS, sha256

DEFAULT_MODEL, DEFAULT_REVISION = "nvidia/parakeet-tdt-0.6b-v3", "main"
REVISION_HELP = f"branch, tag or commit on Hugging Face ({DEFAULT_REVISION}); the commit used is in manifest.json"
HUB_PAGE = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)(.*)")
COMMIT, SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")

# Seconds to wait before a request is sent again; a byte that arrives starts the count anew. A first request, which may
# well be for a host that is not there, gets two of them.
WAITS, FIRST_WAITS = (1, 2, 4, 8, 16), 2
LONGEST_WAIT = 60  # seconds that a server may ask for (Retry-After)
AGAIN = (408, 429, 500, 502, 503, 504)  # statuses of HTTP that may pass
LINE_SECONDS = 10  # between two lines on the progress where there is no terminal

MAKE_ROOM = "make room, or set HF_HUB_CACHE to a folder on another disk, and run the command again"

_digests: dict[tuple[int, ...], str] = {}  # of checksum, by what tells a file and its content apart


def find_checkpoint(model_name: str, revision: str | None = None) -> Path:
    """The `.nemo` file for a path or a Hugging Face name (`owner/model`), downloaded if need be.

    `revision`: a branch, tag or commit on Hugging Face. Raises ValueError or OSError, each with what to do: for a path
    that is not there, a file that is not a whole NeMo checkpoint or not the one that was published, a model that is not
    on Hugging Face or may not be read, a network or a disk that fails.
    """
    name, path = hub_name(model_name), Path(model_name)
    if name is not None:
        path = _download(HubFile(name, revision or DEFAULT_REVISION))
    elif revision is not None:
        raise ValueError(f"--revision is for a name on Hugging Face, got the path {model_name}; leave it out")
    elif path.is_dir():
        raise IsADirectoryError(f"expected a .nemo file or a Hugging Face name, got the folder {path}; name the file")
    elif not path.is_file():
        raise FileNotFoundError(f"expected a .nemo file or a Hugging Face name, found nothing at {model_name}")
    with open_archive(path):
        return path


def hub_name(model_name: str) -> str | None:
    """`owner/model` if `model_name` is one, or its page on Hugging Face, with or without a slash at its end; None for a
    path. Raises ValueError for any other address."""
    if page := HUB_PAGE.fullmatch(model_name):
        name, rest = page[1], page[2].strip("/")
        if not rest:
            return name
        revision = re.fullmatch(r"(?:tree|blob|resolve)/([^/?#]+).*", rest)
        flags = f"{name} --revision {revision[1]}" if revision and revision[1] != DEFAULT_REVISION else name
        raise ValueError(f"expected a Hugging Face name or a path, got {model_name}; give --model_name {flags}")
    if "://" in model_name:
        raise ValueError(
            f"expected a Hugging Face name (owner/model) or a .nemo file, got the address {model_name}; download the "
            "file and give its path"
        )
    name = model_name.rstrip("/")
    is_path = name.endswith(".nemo") or name.count("/") != 1 or name[0] in "./~" or Path(model_name).exists()
    return None if is_path else name


def commit_of(checkpoint: Path) -> str | None:
    """The commit of a file in the cache, where it lies in snapshots/COMMIT/."""
    folder = checkpoint.parent
    return folder.name if folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name) else None


def checksum(path: Path) -> str:
    """SHA-256 of a file, read once in a process: a checkpoint has gigabytes."""
    found = path.stat()
    key = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
    if key not in _digests:
        _digests[key] = sha256(path)
    return _digests[key]


@dataclass(frozen=True)
class HubFile:
    """The checkpoint of a repository; NVIDIA publishes it as `model.nemo` (nemo/core/classes/common.py)."""

    name: str  # owner/model
    revision: str

    @property
    def file(self) -> str:
        return self.name.split("/")[1] + ".nemo"

    @property
    def url(self) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.name, self.file, revision=self.revision)

    def __str__(self) -> str:
        return f"{self.file} of {self.name}" + ("" if self.revision == DEFAULT_REVISION else f" at {self.revision}")

    def cached(self, revision: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.name, self.file, revision=revision)
        return Path(found) if isinstance(found, str) else None


def _download(wanted: HubFile) -> Path:
    """The file in the cache, as Hugging Face has it now; where that cannot be asked, as it is in the cache."""
    _check_endpoint()
    from huggingface_hub import get_hf_file_metadata, hf_hub_download

    cached = wanted.cached(wanted.revision)
    if cached and COMMIT.fullmatch(wanted.revision):
        return _check_cached(cached, wanted, None)
    print(f"looking for {wanted}, in the local cache and on Hugging Face", flush=True)
    try:
        with _explained(wanted):
            remote = _retried(lambda: get_hf_file_metadata(wanted.url), 0 if cached else FIRST_WAITS)
        if remote.commit_hash is None or remote.etag is None or remote.size is None:
            raise _not_the_hub()
    except (ConnectionError, PermissionError) as error:
        if cached is None:
            raise
        print(f"{error}; going on with the file in the local cache, of commit {commit_of(cached)}", flush=True)
        return _check_cached(cached, wanted, None)
    found = HubFile(wanted.name, remote.commit_hash)
    blob = _blob(found, remote.etag)
    with _explained(wanted):
        if found.cached(found.revision) is None:
            _fetch(found, blob, remote.size)
        path = Path(hf_hub_download(wanted.name, wanted.file, revision=wanted.revision))
    if not path.is_symlink():  # on a system without links the client has copied it
        blob.unlink(missing_ok=True)
    return _check_cached(path, wanted, remote.etag)


def _blob(found: HubFile, etag: str) -> Path:
    """Where the cache keeps the content of that name."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=found.name, repo_type="model") / "blobs" / etag


def _check_endpoint() -> None:
    """Raise ValueError for an HF_ENDPOINT that is no address; huggingface_hub reads it when it is imported."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    with contextlib.suppress(ValueError):
        parts = urlsplit(endpoint)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:  # port raises for "x:abc"
            return
    raise ValueError(
        f"expected HF_ENDPOINT to be an address such as https://huggingface.co, got {endpoint!r}; correct or unset it"
    )


def _check_cached(path: Path, wanted: HubFile, etag: str | None) -> Path:
    """Return `path` if it has the SHA-256 that its name in the cache, else `etag`, tells. Raises ValueError."""
    if path.is_symlink():
        etag = path.readlink().name  # one link only: that may be a link into a store with other names
    if etag is None or not SHA256.fullmatch(etag) or checksum(path) == etag:
        return path
    raise ValueError(
        f"expected SHA-256 {etag} of {path}, got {checksum(path)}: the file in the cache is damaged; remove it with: "
        f"hf cache rm hf://models/{wanted.name}/{wanted.file}"
    )


def _fetch(found: HubFile, blob: Path, size: int) -> None:
    """Download into `blob`, continuing what an earlier run left beside it. Raises OSError."""
    from filelock import Timeout
    from huggingface_hub.utils import WeakFileLock

    cache, repository = blob.parents[2], blob.parents[1].name
    lock = cache / ".locks" / repository / f"{blob.name}.lock"  # the one that the client takes
    partial = blob.with_name(f"{blob.name}.incomplete")  # a name that `hf cache prune` removes
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with WeakFileLock(lock, timeout=1):
            if blob.exists():
                return
            _check_room(partial, size)
            _receive(found, partial, size)
            if SHA256.fullmatch(blob.name) and checksum(partial) != blob.name:
                partial.unlink()
                raise ConnectionError(f"expected SHA-256 {blob.name} of {found}, got another; run the command again")
            partial.replace(blob)
    except Timeout:
        raise BlockingIOError(f"another run is downloading {found.file}; wait until it has ended") from None
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise OSError(f"the disk of {blob.parent} is full ({error.strerror}); {MAKE_ROOM}") from error


def _check_room(partial: Path, size: int) -> None:
    """Raise OSError where the disk has no room for what `partial` lacks."""
    there = partial.stat().st_size if partial.exists() else 0
    if there > size:
        partial.unlink()
        there = 0
    free = shutil.disk_usage(partial.parent).free
    if free < size - there:
        raise OSError(
            f"expected {size_text(size - there)} free for the download into {partial.parent}, got {size_text(free)}; "
            f"{MAKE_ROOM}"
        )


def _receive(found: HubFile, partial: Path, size: int) -> None:
    """Append to `partial` until it has `size` bytes; a request that fails is sent again for what is left."""
    with partial.open("ab") as file:
        start = {"desc": found.file, "initial": file.tell(), "total": size}
        on_terminal = sys.stderr.isatty()
        with tqdm(**start, unit="B", unit_scale=True) if on_terminal else _Lines(**start) as progress:
            if file.tell():
                progress.write(f"continuing the download at {size_text(file.tell())} of {size_text(size)}")
            _retried(lambda: _append(found, file, size, progress), len(WAITS), file.tell, progress.write)


def _append(found: HubFile, file: BinaryIO, size: int, progress: "tqdm | _Lines") -> None:
    """Send one request for what `file` lacks of `size` bytes, and write what is answered."""
    import httpx2
    from huggingface_hub import constants, get_session, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers

    start = file.tell()
    if start == size:
        return
    headers = build_hf_headers() | {"Range": f"bytes={start}-", "Accept-Encoding": "identity"}
    how = {"headers": headers, "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT}
    with get_session().stream("GET", found.url, **how) as response:
        hf_raise_for_status(response)
        from_start = response.status_code == 200  # a server that knows no Range
        told, expected = response.headers.get("Content-Range"), f"bytes {start}-{size - 1}/{size}"
        if from_start:
            told, expected = response.headers.get("Content-Length", str(size)), str(size)
        if told != expected or "text/html" in response.headers.get("Content-Type", ""):  # a page that wants a login
            raise _not_the_hub()
        if from_start:
            file.seek(0)
            file.truncate()
            progress.update(-start)
        for data in response.iter_raw():
            file.write(data)
            progress.update(len(data))
    if file.tell() < size:
        raise httpx2.RemoteProtocolError(f"it ended at {size_text(file.tell())} of {size_text(size)}")


class _Lines:
    """What a tqdm is on a terminal, for a pipe: a line every LINE_SECONDS."""

    def __init__(self, desc: str, initial: int, total: int):
        self.desc, self.n, self.total = desc, initial, total
        self.initial, self.since = initial, time.monotonic()
        self.due = self.since + LINE_SECONDS

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_) -> None:
        pass

    def update(self, count: int) -> None:
        self.n, now = self.n + count, time.monotonic()
        if now >= self.due:
            speed = max(self.n - self.initial, 0) / (now - self.since)
            self.write(f"{self.desc}: {size_text(self.n)} of {size_text(self.total)}, {size_text(speed)}/s")
            self.due = now + LINE_SECONDS

    @staticmethod
    def write(line: str) -> None:
        print(line, flush=True)


def _retried(ask: Callable, waits: int, progress: Callable[[], int] = int, say: Callable[[str], None] = _Lines.write):
    """What `ask()` returns; called again after a failure that may pass, up to `waits` times without `progress`."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    failures, before = 0, progress()
    while True:
        try:
            return ask()
        except (httpx2.TransportError, HfHubHTTPError) as error:
            if progress() > before:
                failures = 0
            before = progress()
            pause = _asked_pause(error) or WAITS[min(failures, len(WAITS) - 1)]
            passes = _status(error) in AGAIN if _status(error) else not isinstance(error, httpx2.UnsupportedProtocol)
            failures += 1
            if not passes or failures > waits or pause > LONGEST_WAIT:
                raise
            say(f"{_reason(error)}; trying again in {pause:.0f} s")
            time.sleep(pause)


def _status(error: Exception) -> int | None:
    """The status of HTTP that an error is about."""
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def _reason(error: Exception) -> str:
    """What failed, in a few words."""
    if _status(error):
        return f"Hugging Face answers {_status(error)} {error.response.reason_phrase}".rstrip()
    return f"the connection failed ({str(error) or type(error).__name__})"


def _asked_pause(error: Exception) -> float | None:
    """Seconds after which a server that limits its rate wants to be asked again."""
    from huggingface_hub.utils import parse_ratelimit_headers

    if not _status(error):
        return None
    with contextlib.suppress(KeyError, ValueError):
        return float(error.response.headers["Retry-After"])
    limit = parse_ratelimit_headers(error.response.headers)
    return limit.reset_in_seconds + 1 if limit and limit.remaining == 0 else None


def _not_the_hub() -> ConnectionError:
    from huggingface_hub import constants

    return ConnectionError(
        f"what answers at {constants.ENDPOINT} is not Hugging Face, but a proxy perhaps, or the page by which this "
        "network wants a login; open that address in a browser, and check HF_ENDPOINT"
    )


@contextlib.contextmanager
def _explained(wanted: HubFile) -> Iterator[None]:
    """Turn what the client raises into an error of one line that says what to do."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.LocalEntryNotFoundError as error:  # what the client makes of a request that failed
        raise _explanation(error.__cause__ or error, wanted) from error
    except (httpx2.HTTPError, httpx2.InvalidURL, errors.OfflineModeIsEnabled) as error:
        raise _explanation(error, wanted) from error


def _explanation(error: BaseException, wanted: HubFile) -> Exception:
    """The error to raise for one of the client's."""
    from huggingface_hub import constants, errors

    name, status, page = wanted.name, _status(error), f"{constants.ENDPOINT}/{wanted.name}"
    log_in = "log in with: hf auth login, or set HF_TOKEN to a token that may read it"
    if isinstance(error, errors.OfflineModeIsEnabled):
        text = (
            f"expected {wanted} in the local cache, found none; Hugging Face cannot be reached while HF_HUB_OFFLINE is "
        )
        return ConnectionError(f"{text}set: unset it, or pass the path of a .nemo file as --model_name")
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(f"{name} is gated: accept its terms at {page}, then {log_in}")
    if isinstance(error, errors.RevisionNotFoundError):
        return ValueError(f"Hugging Face has no revision {wanted.revision} of {name}; check --revision")
    if isinstance(error, errors.EntryNotFoundError):
        return ValueError(f"Hugging Face has no {wanted}; check --model_name")
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return PermissionError(
            f"Hugging Face shows no model {name}; check --model_name, and if it is private, or a token that is set has "
            f"expired, {log_in}"
        )
    if status == 403:
        return PermissionError(f"{_reason(error)} for {wanted}; {log_in}")
    if status == 404:
        return ValueError(f"{constants.ENDPOINT} has no {wanted}; check --model_name and HF_ENDPOINT")
    if status == 429:
        when = f"in {_asked_pause(error):.0f} s" if _asked_pause(error) else "later"
        return ConnectionError(f"{_reason(error)}; try again {when}, or raise the limit: log in with: hf auth login")
    if status:
        when = "try again later (https://status.huggingface.co has its state)" if status >= 500 else f"see {page}"
        return ConnectionError(f"{_reason(error)} for {wanted}; {when}")
    return ConnectionError(
        f"expected {wanted} from {constants.ENDPOINT}, but Hugging Face cannot be reached: {_reason(error)}; check the "
        "network, HF_ENDPOINT and any proxy, and run the command again (a download is continued), or pass the path of "
        "a .nemo file as --model_name"
    )
