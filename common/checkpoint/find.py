"""Which checkpoint a name or a path stands for, in which format it is, and how a manifest records it."""

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from common.checkpoint import Contents, hub, nemo, transformers
from common.checkpoint.hub import (
    DEFAULT_MODEL,
    DEFAULT_REVISION,
    MODEL_CARD,
    NotInRepositoryError,
    commit_of,
    file_digest,
    hub_name,
)
from common.checkpoint.terms import read_terms
from common.folder import CHECKPOINT, read_location, read_manifest

MODEL_NAME_HELP = (
    "Hugging Face name, .nemo file, or folder: of a transformers checkpoint or an unpacked .nemo (%(default)s)"
)
REVISION_HELP = f"branch, tag or commit on Hugging Face ({DEFAULT_REVISION}); the commit used is in manifest.json"
FORMAT_HELP = "the format to use where a repository or a folder has both (nemo, if it is there)"


class CheckpointFormat(Protocol):
    """What a module of a format has. To all of these functions the files are untrusted input."""

    NAME: str  # as --checkpoint_format takes it

    def locate(self, path: Path) -> Path | None:
        """The checkpoint of this format that a path names: itself, or what a folder holds. Opens no file."""

    def download(self, name: str, revision: str, *, cached_only: bool) -> Path:
        """The checkpoint of `owner/model` on Hugging Face, all files of one commit, in the local cache.

        Raises NotInRepositoryError where the repository has no checkpoint of this format, and as hub.download does.
        """

    def inspect(self, checkpoint: Path) -> Contents:
        """What the checkpoint holds. Raises ValueError unless it is complete and safe to unpack."""

    def read_tokenizer(self, checkpoint: Path) -> bytes:
        """Its SentencePiece model, without building the network. Raises ValueError where it has none."""

    def load_model(self, checkpoint: Path, device: str = "cpu", scratch: Path | None = None) -> Any:
        """A model in evaluation mode, with NeMo's `preprocessor`, `encoder`, `decoder`, `joint` and `decoding`.

        scratch: a folder for temporary files. Raises ValueError for a checkpoint that cannot be built or is unsafe.
        """


MOST_NAMED = 8  # files of a repository, in a message
FORMATS: tuple[CheckpointFormat, ...] = (nemo, transformers)  # the preferred one first
FORMAT_NAMES = tuple(known.NAME for known in FORMATS)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been found and checked."""

    path: Path  # a .nemo file, or the folder of an unpacked one or of a checkpoint of transformers
    format: CheckpointFormat
    contents: Contents
    name: str | None = None  # on Hugging Face
    revision: str = DEFAULT_REVISION  # of `name`, as it was asked for

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(path.stat().st_size for path in self.contents.files)

    @property
    def digest(self) -> str:
        """SHA-256 of its only file, or of the list that `sha256sum` prints of its files."""
        files = self.contents.files
        if len(files) == 1:
            return file_digest(files[0])
        lines = "".join(f"{file_digest(path)}  {path.name}\n" for path in files)
        return hashlib.sha256(lines.encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """What a manifest has of it as `source`.

        This is its Hugging Face `name`, the `revision` asked for and the `commit` used, or the name of its `file`; its
        `sha256`; its `format`; its `notes`, and the `terms` that its own model card states, if it has any. The path is
        not published (write_locations in common/folder.py).
        """
        if self.name is None:
            place: dict[str, Any] = {"file": self.path.name}
        else:
            place = {"name": self.name, "revision": self.revision, "commit": commit_of(self.path)}
        card = (self.path if self.path.is_dir() else self.path.parent) / MODEL_CARD
        more = {"notes": list(self.contents.notes), "terms": read_terms(card)}
        given = {key: value for key, value in more.items() if value}
        return {**place, "sha256": self.digest, "format": self.format.NAME, **given}

    def read_tokenizer(self) -> bytes:
        """Its SentencePiece model, without building the network. Raises ValueError where it has none."""
        return self.format.read_tokenizer(self.path)

    def load_model(self, device: str = "cpu", scratch: Path | None = None) -> Any:
        """The model, as `load_model` of its format gives it."""
        return self.format.load_model(self.path, device, scratch)


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags whose values `find_checkpoint` takes."""
    parser.add_argument("--model_name", default=DEFAULT_MODEL, help=MODEL_NAME_HELP)
    parser.add_argument("--revision", help=REVISION_HELP)
    parser.add_argument("--checkpoint_format", choices=FORMAT_NAMES, help=FORMAT_HELP)


def find_checkpoint(model_name: str, revision: str | None = None, checkpoint_format: str | None = None) -> Checkpoint:
    """The checkpoint for a path or a Hugging Face name (`owner/model`), downloaded if need be, and checked.

    revision: a branch, tag or commit on Hugging Face. checkpoint_format: the name of the only format to take; without
    it, where a folder or a repository has both, the preferred one. Raises ValueError or OSError that says what to do:
    for a path that does not exist, a file that is not a complete checkpoint or not the published one, a model that is
    not on Hugging Face or may not be read, a network or a disk that fails.
    """
    name = hub_name(model_name)
    if name is not None:
        return _on_hub(name, revision or DEFAULT_REVISION, checkpoint_format)
    if revision is not None:
        raise ValueError(f"--revision is for a name on Hugging Face, got the path {model_name}; leave it out")
    path = Path(model_name)
    checkpoint = _at(path, checkpoint_format)
    if checkpoint is None:
        raise _nothing_at(path, checkpoint_format)
    return checkpoint


def _formats(name: str | None) -> list[CheckpointFormat]:
    """The format of that name; for None all of them."""
    return [known for known in FORMATS if name in (None, known.NAME)]


def _at(path: Path, checkpoint_format: str | None) -> Checkpoint | None:
    """The checkpoint at a path in the preferred format that it has; None where nothing is there."""
    for known in _formats(checkpoint_format):
        if found := known.locate(path):
            return Checkpoint(found, known, known.inspect(found))
    return None


def _nothing_at(path: Path, checkpoint_format: str | None) -> OSError:
    if checkpoint_format:
        return FileNotFoundError(
            f"there is no checkpoint of --checkpoint_format {checkpoint_format} at {path}; leave the flag out, or name "
            "another path"
        )
    if path.is_dir():
        return IsADirectoryError(
            f"expected a .nemo file, a folder with config.json and model.safetensors, or a Hugging Face name, got the "
            f"folder {path}, which has neither, or several; name the file"
        )
    return FileNotFoundError(
        f"expected a .nemo file, a folder of a checkpoint or a Hugging Face name, got nothing at {path}"
    )


def _on_hub(name: str, revision: str, checkpoint_format: str | None) -> Checkpoint:
    """The checkpoint of a repository in the preferred format that it has.

    Where Hugging Face cannot be reached, in the preferred one that is complete in the local cache.
    """
    missing: list[str] = []
    unreachable: ConnectionError | None = None
    for known in _formats(checkpoint_format):
        try:
            path = known.download(name, revision, cached_only=unreachable is not None)
        except NotInRepositoryError as error:
            missing.append(str(error))
        except ConnectionError as error:
            unreachable = unreachable or error
        else:
            if commit := commit_of(path):
                hub.model_card(name, commit, cached_only=unreachable is not None)  # beside the checkpoint
            return Checkpoint(path, known, known.inspect(path), name, revision)
    if unreachable:
        raise unreachable
    found = ", ".join(hub.file_names(name, revision)[:MOST_NAMED]) or "no other file"
    raise ValueError(
        f"Hugging Face has {' and '.join(missing)}, but {found}; check --model_name, or ask the publisher for a .nemo "
        "file or the form of transformers"
    )


def recorded_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint that a model folder's manifest names.

    Raises FileNotFoundError where the manifest or the checkpoint is missing, ValueError where it has changed since.
    """
    source = read_manifest(folder).get("export", {}).get("source")
    if source is None:
        raise FileNotFoundError(
            f"the manifest of {folder} does not name a checkpoint to compare with; pass --model_name or --skip_nemo"
        )
    # Folders made by earlier versions, which had one format only, record no format.
    recorded_format = source.get("format", nemo.NAME)
    if "name" in source:
        checkpoint = find_checkpoint(source["name"], source.get("commit"), recorded_format)
    else:
        path = read_location(folder, CHECKPOINT) or folder / source.get("file", "its checkpoint")
        try:
            located = _at(path, recorded_format)
        except ValueError:  # when it was exported, it was whole
            raise _changed(folder, path) from None
        if located is None:
            raise FileNotFoundError(
                f"expected the checkpoint that {folder} records, got nothing at {path}; pass --model_name or "
                "--skip_nemo"
            )
        checkpoint = located
    if checkpoint.digest != source["sha256"]:
        raise _changed(folder, checkpoint.path)
    return checkpoint


def _changed(folder: Path, path: Path) -> ValueError:
    return ValueError(
        f"expected the checkpoint that {folder} was exported from, got another file at {path}; pass --model_name"
    )
