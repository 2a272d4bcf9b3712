"""A checkpoint on Hugging Face: its name, its addresses, its place in the local cache, and the errors of the hub.

Every error of the hub, of the network or of a proxy becomes one line that says what to do.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

DEFAULT_MODEL = "nvidia/parakeet-tdt-0.6b-v3"
DEFAULT_REVISION = "main"
REVISION_HELP = f"branch, tag or commit on Hugging Face ({DEFAULT_REVISION}); the commit used is in manifest.json"
HUB_PAGE = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)(.*)")
COMMIT = re.compile(r"[0-9a-f]{40}")
LOG_IN = "log in with: hf auth login, or set HF_TOKEN to a token that may read it"


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


class NotInRepositoryError(ValueError):
    """A repository on Hugging Face lacks a file."""


def commit_of(checkpoint: Path) -> str | None:
    """The commit of a checkpoint in the cache, which is snapshots/COMMIT/ or a file there; None for others."""
    for folder in (checkpoint, checkpoint.parent):
        if folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name):
            return folder.name
    return None


@dataclass(frozen=True)
class HubFile:
    """A file of a repository."""

    name: str  # owner/model
    revision: str  # branch, tag or commit
    file: str

    @property
    def url(self) -> str:
        """Where the file is downloaded from."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.name, self.file, revision=self.revision)

    def __str__(self) -> str:
        return f"{self.file} of {self.name}" + ("" if self.revision == DEFAULT_REVISION else f" at {self.revision}")

    def cached(self) -> Path | None:
        """The file in the local cache, or None."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.name, self.file, revision=self.revision)
        return Path(path) if isinstance(path, str) else None

    def blob(self, etag: str) -> Path:
        """Where the cache keeps the content that the hub names by `etag`."""
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        repository = repo_folder_name(repo_id=self.name, repo_type="model")
        return Path(constants.HF_HUB_CACHE) / repository / "blobs" / etag


def check_endpoint() -> None:
    """Raise ValueError for an HF_ENDPOINT that is not an address; huggingface_hub reads it when it is imported."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    with contextlib.suppress(ValueError):
        parts = urlsplit(endpoint)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:  # port raises for "x:abc"
            return
    raise ValueError(
        f"expected HF_ENDPOINT to be an address such as https://huggingface.co, got {endpoint!r}; correct or unset it"
    )


def http_status(error: BaseException) -> int | None:
    """The HTTP status that caused an error of the client, or None."""
    response: Any = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def failure_of(error: BaseException) -> str:
    """What failed, in a few words."""
    response: Any = getattr(error, "response", None)
    if response is not None:
        return f"Hugging Face answers {response.status_code} {response.reason_phrase}".rstrip()
    return f"the connection failed ({str(error) or type(error).__name__})"


def requested_pause(error: BaseException) -> float | None:
    """Seconds after which a server that limits its rate allows the next request, or None."""
    from huggingface_hub.utils._http import parse_ratelimit_headers

    response: Any = getattr(error, "response", None)
    if response is None:
        return None
    with contextlib.suppress(KeyError, ValueError):
        return float(response.headers["Retry-After"])
    limit = parse_ratelimit_headers(response.headers)
    return limit.reset_in_seconds + 1 if limit and limit.remaining == 0 else None


def not_the_hub() -> ConnectionError:
    """The error for an answer that cannot come from Hugging Face."""
    from huggingface_hub import constants

    return ConnectionError(
        f"expected Hugging Face at {constants.ENDPOINT}, but what answers is not Hugging Face: it may be a proxy, or "
        "the login page of this network; open that address in a browser, and check HF_ENDPOINT"
    )


@contextlib.contextmanager
def errors_explained(file: HubFile) -> Iterator[None]:
    """Turn what the client raises inside the block into an error of one line that says what to do."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.LocalEntryNotFoundError as error:  # raised by the client for a request that failed
        raise _explanation(error.__cause__ or error, file) from error
    except (httpx2.HTTPError, httpx2.InvalidURL, errors.OfflineModeIsEnabled) as error:
        raise _explanation(error, file) from error


def _explanation(error: BaseException, file: HubFile) -> Exception:
    """The error to raise in place of an error of the client."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return ConnectionError(
            f"expected {file} in the local cache, got none; Hugging Face cannot be reached while HF_HUB_OFFLINE is "
            "set: unset it, or pass the path of a checkpoint as --model_name"
        )
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(
            f"{file.name} is gated: accept its terms at {constants.ENDPOINT}/{file.name}, then {LOG_IN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ValueError(f"Hugging Face has no revision {file.revision} of {file.name}; check --revision")
    if isinstance(error, errors.EntryNotFoundError):
        return NotInRepositoryError(f"Hugging Face has no {file}; check --model_name")
    status = http_status(error)
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return PermissionError(
            f"Hugging Face shows no model {file.name}; check --model_name, and if it is private, or a token that is "
            f"set has expired, {LOG_IN}"
        )
    if status is not None:
        return _status_explanation(error, status, file)
    return ConnectionError(
        f"expected {file} from {constants.ENDPOINT}, but Hugging Face cannot be reached: {failure_of(error)}; check "
        "the network, HF_ENDPOINT and any proxy, and run the command again (a download is continued), or pass the path "
        "of a checkpoint as --model_name"
    )


def _status_explanation(error: BaseException, status: int, file: HubFile) -> Exception:
    """The error to raise for an HTTP status that the client has no type for."""
    from huggingface_hub import constants

    if status == 403:
        return PermissionError(f"{failure_of(error)} for {file}; {LOG_IN}")
    if status == 404:
        return ValueError(f"{constants.ENDPOINT} has no {file}; check --model_name and HF_ENDPOINT")
    if status == 429:
        pause = requested_pause(error)
        when = f"in {pause:.0f} s" if pause else "later"
        return ConnectionError(f"{failure_of(error)}; try again {when}, or raise the limit: log in with: hf auth login")
    if status >= 500:
        return ConnectionError(
            f"{failure_of(error)} for {file}; try again later (https://status.huggingface.co has its state)"
        )
    return ConnectionError(f"{failure_of(error)} for {file}; see {constants.ENDPOINT}/{file.name}")
