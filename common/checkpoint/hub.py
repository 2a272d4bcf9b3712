"""Checkpoints on Hugging Face: their names, and their files in the local cache of huggingface_hub.

huggingface_hub (2.4.0) does the work: downloads, retries, progress bar, cache, token, revisions and HF_HUB_OFFLINE. It
continues a transfer that breaks off, but not in a new run, which starts the file over. What it raises becomes an error
of one line that says what to do. It does not compare what it has downloaded with the published SHA-256; that is done
here.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from common.checkpoint import NOT_LOADED
from common.cli import size_text
from common.folder import DISK_ERRORS, require_free, sha256

DEFAULT_MODEL = "nvidia/parakeet-tdt-0.6b-v3"
DEFAULT_REVISION = "main"
MODEL_CARD = "README.md"
HUB_PAGE = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)(.*)")
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
LOG_IN = "log in with: hf auth login, or set HF_TOKEN to a token that may read it"
ANOTHER_DISK = "or set HF_HUB_CACHE to a folder on another disk"
NOT_THE_HUB = (
    "is not Hugging Face: it may be a proxy, or the login page of this network; open that address in a browser, and "
    "check HF_ENDPOINT"
)


class NotInRepositoryError(ValueError):
    """A repository on Hugging Face lacks a file; the message is `no FILE of owner/model`."""


def hub_name(model_name: str) -> str | None:
    """`owner/model` for such a name or its page on Hugging Face, with or without a slash at its end; None for a path.

    Raises ValueError for any other address.
    """
    if page := HUB_PAGE.fullmatch(model_name):
        name = page[1]
        rest = page[2].strip("/")
        if not rest:
            return name
        revision = re.fullmatch(r"(?:tree|blob|resolve)/([^/?#]+).*", rest)
        flags = f"{name} --revision {revision[1]}" if revision and revision[1] != DEFAULT_REVISION else name
        raise ValueError(f"expected a Hugging Face name or a path, got {model_name}; give --model_name {flags}")
    if "://" in model_name:
        raise ValueError(
            f"expected a Hugging Face name (owner/model) or a path, got the address {model_name}; download the file "
            "and give its path"
        )
    name = model_name.rstrip("/")
    is_path = name.endswith(".nemo") or name.count("/") != 1 or name[0] in "./~" or Path(model_name).exists()
    return None if is_path else name


def commit_of(checkpoint: Path) -> str | None:
    """The commit of a checkpoint in the cache, which is snapshots/COMMIT/ or a file there; None for others."""
    for folder in (checkpoint, checkpoint.parent):
        if folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name):
            return folder.name
    return None


def require_inside(path: Path, folder: Path) -> None:
    """Raise ValueError unless a file lies in the folder of a checkpoint after links are followed; in huggingface_hub's
    cache, unless it is a blob."""
    if commit_of(folder) and path.is_symlink():
        # Follow one link only: the blob may be a link into a store that several caches share.
        target = Path(os.path.normpath(path.parent.absolute() / path.readlink()))
        is_inside = target.parent == folder.absolute().parents[1] / "blobs"
    else:
        is_inside = path.resolve().is_relative_to(folder.resolve())
    if not is_inside:
        raise ValueError(f"expected {path.name} itself in {folder}, got a link to a place outside; {NOT_LOADED}")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, which is read only once in a process, since a checkpoint has gigabytes."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@lru_cache
def _digest(path: Path, size: int, changed: int) -> str:
    """SHA-256 of a file of this size that was changed at this time."""
    return sha256(path)


def is_cached(name: str, file: str, commit: str) -> bool | None:
    """Whether the local cache has the file of a repository at a commit; None where it may have to be downloaded.

    The cache also remembers which files Hugging Face has not found at that commit: for these it is False.
    """
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file, revision=commit)
    return None if found is None else isinstance(found, str)


def download(name: str, file: str, revision: str, *, cached_only: bool = False) -> Path:
    """A file of the repository `name` in the local cache, downloaded if need be.

    Where Hugging Face cannot be reached, the file is taken from the cache as it is. cached_only: do not ask Hugging
    Face at all. Raises NotInRepositoryError where the repository lacks the file, ValueError for a revision that does
    not exist or a file in the cache that is damaged, PermissionError for a repository that may not be read,
    ConnectionError for a network that fails, OSError for a disk that fails or is full.
    """
    from huggingface_hub import constants, hf_hub_download

    title = f"{file} of {name}" + ("" if revision == DEFAULT_REVISION else f" at {revision}")
    if not COMMIT.fullmatch(revision):
        print(f"looking for {title}, in the local cache and on Hugging Face", flush=True)
    with errors_explained(name, revision, title):
        planned = hf_hub_download(name, file, revision=revision, local_files_only=cached_only, dry_run=True)
        if planned.will_download:
            size = planned.file_size or 0  # bytes
            print(f"downloading {file}, {size_text(size)}, of commit {planned.commit_hash}", flush=True)
            try:
                require_free(size, Path(constants.HF_HUB_CACHE))  # huggingface_hub would only warn
            except OSError as error:
                raise OSError(f"{error}, {ANOTHER_DISK}") from None
        elif not COMMIT.fullmatch(revision):
            print(f"{file} is in the local cache, of commit {planned.commit_hash}", flush=True)
        path = Path(hf_hub_download(name, file, revision=revision, local_files_only=cached_only))
    _check_content(name, path)
    return path


def file_names(name: str, revision: str, *, cached_only: bool = False) -> list[str]:
    """The files at the top of a repository; where Hugging Face cannot be asked, those of them in the local cache."""
    from huggingface_hub import HfApi, constants, snapshot_download

    try:
        with errors_explained(name, revision, f"the list of files of {name}"):
            if cached_only:
                folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
                return sorted(path.name for path in folder.iterdir())
            files = HfApi(endpoint=constants.ENDPOINT).model_info(name, revision=revision).siblings or []
            return sorted(file.rfilename for file in files if "/" not in file.rfilename)
    except (ConnectionError, PermissionError, ValueError):
        return [] if cached_only else file_names(name, revision, cached_only=True)


def model_card(name: str, commit: str, *, cached_only: bool = False) -> Path | None:
    """The repository's own README.md at a commit; None where it has none, or Hugging Face cannot be asked."""
    if is_cached(name, MODEL_CARD, commit) is False:
        return None
    with contextlib.suppress(ConnectionError, PermissionError, NotInRepositoryError):
        return download(name, MODEL_CARD, commit, cached_only=cached_only)
    return None


def _check_content(name: str, path: Path) -> None:
    """Raise ValueError where a file in the cache is not what Hugging Face has published.

    A file in the cache is a link to its content, which is named by the published SHA-256 (small files by git's SHA-1).
    """
    published = path.readlink().name if path.is_symlink() else ""
    if SHA256.fullmatch(published) and file_digest(path) != published:
        raise ValueError(
            f"expected SHA-256 {published} of {path}, got {file_digest(path)}: the file in the cache is damaged; "
            f"remove it with: hf cache rm hf://models/{name}/{path.name}"
        )


@contextlib.contextmanager
def errors_explained(name: str, revision: str, title: str) -> Iterator[None]:
    """Turn what huggingface_hub raises inside the block into an error of one line that says what to do.

    title: the file of the repository `name`, for messages.
    """
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.LocalEntryNotFoundError as error:  # raised for a request that failed
        raise _explanation(error.__cause__ or error, name, revision, title) from error
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise _explanation(error, name, revision, title) from error
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise OSError(
                f"the disk of the local cache is full ({error.strerror}); make room, {ANOTHER_DISK}, and run the "
                "command again"
            ) from error
        if "Consistency check failed" in str(error):  # another size than the published one
            raise ConnectionError(f"what was sent as {title} {NOT_THE_HUB}, and run the command again") from error
        raise


def _explanation(error: BaseException, name: str, revision: str, title: str) -> Exception:
    """The error to raise in place of an error of huggingface_hub."""
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    response: Any = getattr(error, "response", None)
    status = None if response is None else response.status_code
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return ConnectionError(
            f"{title} is not in the local cache, and Hugging Face is not asked while HF_HUB_OFFLINE is set: unset it, "
            "or pass the path of a checkpoint as --model_name"
        )
    if isinstance(error, errors.FileMetadataError):
        return ConnectionError(f"expected Hugging Face at {endpoint}, but what answers {NOT_THE_HUB}")
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(f"{name} is gated: accept its terms at {endpoint}/{name}, then {LOG_IN}")
    if isinstance(error, errors.RevisionNotFoundError):
        return ValueError(f"Hugging Face has no revision {revision} of {name}; check --revision")
    if isinstance(error, errors.EntryNotFoundError):
        return NotInRepositoryError(f"no {title}")
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return PermissionError(
            f"Hugging Face shows no model {name}; check --model_name, and if it is private, or a token that is set has "
            f"expired, {LOG_IN}"
        )
    if status is None:
        return ConnectionError(
            f"expected {title} from {endpoint}, but Hugging Face cannot be reached "
            f"({str(error) or type(error).__name__}); check the network, HF_ENDPOINT and any proxy, and run the "
            "command again, or pass the path of a checkpoint as --model_name"
        )
    answer = f"Hugging Face answers {status} {response.reason_phrase} for {title}"
    if status == 403:
        return PermissionError(f"{answer}; {LOG_IN}")
    if status == 429:
        return ConnectionError(f"{answer}; try again later, or raise the limit: log in with: hf auth login")
    if status >= 500:
        return ConnectionError(f"{answer}; try again later (https://status.huggingface.co has its state)")
    return ConnectionError(f"{answer}; check --model_name and HF_ENDPOINT ({endpoint})")
