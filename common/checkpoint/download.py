"""Where a checkpoint is: a path, or a name on Hugging Face, downloaded into the cache of huggingface_hub.

huggingface_hub gives the commit, the size and the SHA-256 of a file, and keeps the cache and the token; the transfer is
the project's own (transfer.py). A file in the cache is compared with the SHA-256 by which Hugging Face names it.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from common.checkpoint.digest import SHA256, file_digest
from common.checkpoint.format import CheckpointFormat, checkpoint_at, format_of, formats_named
from common.checkpoint.hub import (
    COMMIT,
    DEFAULT_REVISION,
    HubFile,
    NotInRepositoryError,
    check_endpoint,
    commit_of,
    errors_explained,
    hub_name,
    not_the_hub,
)
from common.checkpoint.transfer import fetch, retried

# Retries of the first request; fewer than later ones get, since the host may not exist.
FIRST_RETRIES = 2


def find_checkpoint(model_name: str, revision: str | None = None, checkpoint_format: str | None = None) -> Path:
    """The checkpoint for a path or a Hugging Face name (`owner/model`), downloaded if need be, and checked.

    revision: a branch, tag or commit on Hugging Face. checkpoint_format: the name of the only format to take; without
    it, where a folder or a repository has several, the first one registered. Raises ValueError or OSError that says
    what to do: for a path that does not exist, a file that is not a complete checkpoint or not the published one, a
    model that is not on Hugging Face or may not be read, a network or a disk that fails.
    """
    name = hub_name(model_name)
    if name is not None:
        checkpoint = _from_hub(name, revision or DEFAULT_REVISION, formats_named(checkpoint_format))
    elif revision is not None:
        raise ValueError(f"--revision is for a name on Hugging Face, got the path {model_name}; leave it out")
    else:
        checkpoint = checkpoint_at(Path(model_name), checkpoint_format)
    format_of(checkpoint).check(checkpoint)
    return checkpoint


def _from_hub(name: str, revision: str, formats: Sequence[CheckpointFormat]) -> Path:
    """The checkpoint of a repository, in the first of `formats` that it has.

    Where Hugging Face cannot be reached, in the first one that is complete in the local cache.
    """
    for place, known in enumerate(formats, 1):
        try:
            return _fetch_format(name, revision, known)
        except NotInRepositoryError as error:
            if place == len(formats):
                files = " and no ".join(each.hub_files(name)[0][0] for each in formats)
                raise ValueError(f"Hugging Face has no {files} of {name}; check --model_name") from error
        except ConnectionError:
            if not any(_is_cached(name, revision, later) for later in formats[place:]):
                raise
    raise ValueError(f"expected the name of a checkpoint format for {name}, got none that is published")


def _fetch_format(name: str, revision: str, known: CheckpointFormat) -> Path:
    """The checkpoint of a repository in one format: its files and no others, all of one commit.

    Raises NotInRepositoryError where the repository lacks the first of these files, ValueError where it lacks another.
    """
    first: Path | None = None
    for group in known.hub_files(name):
        try:
            path = _first_of(HubFile(name, revision, file) for file in group)
        except NotInRepositoryError as error:
            if first is None:
                raise
            raise ValueError(
                f"expected {' or '.join(group)} beside {first.name} of {name} on Hugging Face, found none: it is not a "
                f"whole checkpoint of the format {known.name}"
            ) from error
        known.check_file(path)
        first = first or path
        revision = commit_of(path) or revision
        for file in known.referred_files(path):
            _download(HubFile(name, revision, file))
    assert first is not None
    return first if known.matches(first) else first.parent


def _first_of(files: Iterable[HubFile]) -> Path:
    """The first of these files that the repository has. Raises NotInRepositoryError where it has none.

    Where Hugging Face cannot be reached, the one that is in the local cache.
    """
    *others, last = files
    for file in others:
        try:
            return _download(file)
        except NotInRepositoryError:
            continue
        except ConnectionError:
            if last.cached() is None:
                raise
    return _download(last)


def _is_cached(name: str, revision: str, known: CheckpointFormat) -> bool:
    groups = known.hub_files(name)
    return all(any(HubFile(name, revision, file).cached() for file in group) for group in groups)


def _download(file: HubFile) -> Path:
    """The file in the cache, updated from Hugging Face where that can be reached."""
    check_endpoint()
    from huggingface_hub import get_hf_file_metadata, hf_hub_download

    cached = file.cached()
    if cached and COMMIT.fullmatch(file.revision):
        return _checked(cached, file, None)
    print(f"looking for {file}, in the local cache and on Hugging Face", flush=True)
    try:
        with errors_explained(file):
            remote = retried(lambda: get_hf_file_metadata(file.url), 0 if cached else FIRST_RETRIES)
        if remote.commit_hash is None or remote.etag is None or remote.size is None:
            raise not_the_hub()
    except (ConnectionError, PermissionError) as error:
        if cached is None:
            raise
        print(f"{error}; going on with the file in the local cache, of commit {commit_of(cached)}", flush=True)
        return _checked(cached, file, None)
    published = HubFile(file.name, remote.commit_hash, file.file)
    blob = published.blob(remote.etag)
    with errors_explained(file):
        if published.cached() is None:
            fetch(published, blob, remote.size)
        path = Path(hf_hub_download(file.name, file.file, revision=file.revision))
    if not path.is_symlink():  # on a system without links the client has copied it
        blob.unlink(missing_ok=True)
    return _checked(path, file, remote.etag)


def _checked(path: Path, file: HubFile, etag: str | None) -> Path:
    """`path`, if its SHA-256 is the name of its content in the cache, or else `etag`. Raises ValueError if not."""
    if path.is_symlink():
        etag = path.readlink().name  # follow one link only: its target may be a link into a store with other names
    if etag is None or not SHA256.fullmatch(etag) or file_digest(path) == etag:
        return path
    raise ValueError(
        f"expected SHA-256 {etag} of {path}, got {file_digest(path)}: the file in the cache is damaged; remove it "
        f"with: hf cache rm hf://models/{file.name}/{file.file}"
    )
