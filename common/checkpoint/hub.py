"""Where a checkpoint lies: in a file, in a folder, or in a repository on Hugging Face.

huggingface_hub (2.4.0) does the work for the latter: revisions, downloads, retries, progress bar, cache, token and
HF_HUB_OFFLINE. It continues a transfer that breaks off, but not in a new run, which starts the file over. It does not
compare what it has downloaded with the published SHA-256; that is done here.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from common.cli import size_text
from common.folder import require_free, sha256

DEFAULT_MODEL = "nvidia/parakeet-tdt-0.6b-v3"
DEFAULT_REVISION = "main"
MODEL_CARD = "README.md"
NOT_LOADED = "so it is not loaded; get it from its publisher"  # ends the message of every check for safety
HUB_PAGE = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)(.*)")
SHA256 = re.compile(r"[0-9a-f]{64}")
ADVICE = (
    "check --model_name, --revision, the network and HF_ENDPOINT; if the model is private or gated, accept its terms "
    "on its page, and log in with: hf auth login; or pass the path of a checkpoint"
)


@dataclass(frozen=True)
class Origin:
    """Where the files of a checkpoint lie: on this disk, or in one commit of a repository on Hugging Face."""

    folder: Path  # of a repository: the commit's folder in the local cache, whose name is the commit
    sizes: Mapping[str, int]  # name → bytes of the files in it, whether they are downloaded or not
    file: str | None = None  # the only one of them, where a path names it
    repository: str | None = None  # `owner/model`
    revision: str = DEFAULT_REVISION  # of the repository, as it was asked for

    def __str__(self) -> str:
        return f"{self.repository} on Hugging Face" if self.repository else str(self.folder)

    def get(self, *names: str) -> Path:
        """The first of these files that there is, downloaded if need be.

        Raises ValueError where there is none, or where it is damaged or a link to another place; OSError where it
        cannot be downloaded.
        """
        name = next((name for name in names if name in self.sizes), None)
        if name is None:
            raise ValueError(f"there is no {' or '.join(names)} in {self}; download the checkpoint again")
        path = self.folder / name
        if self.repository:
            _download(self.repository, path, self.sizes[name])
        else:
            require_inside(path)
        return path


def hub_name(model_name: str) -> str | None:
    """`owner/model` for such a name or its page on Hugging Face, with or without a slash at its end; None for a path.

    Raises ValueError for any other address.
    """
    page = HUB_PAGE.fullmatch(model_name)
    if page and not page[2].strip("/"):
        return page[1]
    if page or "://" in model_name:
        instead = f"give --model_name {page[1]}, and --revision" if page else "download the file, and give its path"
        raise ValueError(f"{model_name} is neither a Hugging Face name (owner/model) nor a path; {instead}")
    name = model_name.rstrip("/")
    is_path = name.endswith(".nemo") or name.count("/") != 1 or name[0] in "./~" or Path(model_name).exists()
    return None if is_path else name


def on_disk(path: Path) -> Origin:
    """A file, or a folder with the files in it. Raises FileNotFoundError where there is nothing."""
    if path.is_file():
        return Origin(path.parent, {path.name: path.stat().st_size}, path.name)
    if not path.is_dir():
        raise FileNotFoundError(
            f"there is nothing at {path}; give a Hugging Face name, a .nemo file or the folder of a checkpoint"
        )
    return Origin(path, {file.name: file.stat().st_size for file in sorted(path.iterdir()) if file.is_file()})


def on_hub(name: str, revision: str) -> Origin:
    """A repository at a revision, with its own model card in the local cache, if it has one.

    Where Hugging Face cannot be reached, this is what the local cache has of it. Raises OSError where it has nothing.
    """
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError
    from tqdm import tqdm

    print(f"looking for {name} at {revision}, on Hugging Face and in the local cache", flush=True)
    no_bar: Any = partial(tqdm, disable=True)
    with hub_errors(name):
        # This also keeps the list of the commit's files in the cache.
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=MODEL_CARD, tqdm_class=no_bar))
    try:
        files = get_cached_repo_tree(name, revision=folder.name)
    except CachedRepoTreeNotFoundError:  # not reached, and downloaded before huggingface_hub kept that list
        return replace(on_disk(folder), repository=name, revision=revision)
    return Origin(folder, {file.path: file.size for file in files}, repository=name, revision=revision)


def _download(repository: str, path: Path, size: int) -> None:
    """Download a file of a repository to its place in the local cache, unless it is there.

    size: its bytes. Raises ValueError where the cache has other content than Hugging Face has published, OSError where
    it cannot be downloaded.
    """
    from huggingface_hub import constants, hf_hub_download

    commit = path.parent.name
    with hub_errors(f"{path.name} of {repository}"):
        if path.exists():
            print(f"{path.name} is in the local cache, of commit {commit}", flush=True)
        else:
            print(f"downloading {path.name}, {size_text(size)}, of commit {commit}", flush=True)
            require_free(size, Path(constants.HF_HUB_CACHE))  # huggingface_hub would only warn
            hf_hub_download(repository, path.name, revision=commit)
    # The file is a link to its content, which is named by the published SHA-256 (small files by git's SHA-1).
    published = path.readlink().name if path.is_symlink() else ""
    if SHA256.fullmatch(published) and file_digest(path) != published:
        raise ValueError(
            f"expected SHA-256 {published} of {path}, got {file_digest(path)}: the file in the cache is damaged; "
            f"remove it with: hf cache rm hf://models/{repository}/{path.name}"
        )


@contextlib.contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn what huggingface_hub raises inside the block into a ConnectionError of one line that says what to do.

    what: the file or the repository, for the message.
    """
    import httpx2
    from huggingface_hub import constants, errors

    try:
        yield
    except (errors.LocalEntryNotFoundError, httpx2.HTTPError, httpx2.InvalidURL) as error:
        reason: BaseException = error
        if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
            reason = error.__cause__  # the request that failed
        raise ConnectionError(
            f"{what} cannot be read from Hugging Face at {constants.ENDPOINT or 'an empty HF_ENDPOINT'}: "
            f"{str(reason).rstrip('.') or type(reason).__name__}; {ADVICE}"
        ) from error


def require_inside(path: Path) -> None:
    """Raise ValueError unless a file lies in its folder after links are followed; in huggingface_hub's cache, unless it
    is a link to a blob, which may be a link into a store that several repositories share."""
    folder = path.parent.absolute()
    if folder.parent.name == "snapshots" and path.is_symlink():
        is_inside = Path(os.path.normpath(folder / path.readlink())).parent == folder.parents[1] / "blobs"
    else:
        is_inside = path.resolve().is_relative_to(folder.resolve())
    if not is_inside:
        raise ValueError(f"{path.name} in {folder} is a link to a place outside, {NOT_LOADED}")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, which is read only once in a process, since a checkpoint has gigabytes."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    """SHA-256 of a file of this size that was changed at this time."""
    return sha256(path)
