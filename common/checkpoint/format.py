"""A checkpoint format: how its files are recognized and checked, and what can be read from them.

Each format is a module of this room that calls `register` once. The scripts find it by `format_of` and know nothing
else about it. `docs/architecture.md` shows how to add a format.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from common.checkpoint.digest import digest_of


class LoadModel(Protocol):
    """Builds the network of a checkpoint."""

    def __call__(self, checkpoint: Path, device: str = "cpu", scratch: Path | None = None) -> Any:
        """A model in evaluation mode, with NeMo's `preprocessor`, `encoder`, `decoder`, `joint` and `decoding`.

        scratch: a folder for temporary files. Raises ValueError for a checkpoint that cannot be built or is unsafe.
        """


@dataclass(frozen=True, kw_only=True)
class CheckpointFormat:
    """One way in which checkpoints are stored. The files are untrusted input to all of these functions."""

    name: str  # as --checkpoint_format takes it
    matches: Callable[[Path], bool]  # whether a path, which may not exist, is of this format; opens no file
    within: Callable[[Path], Path | None] = lambda folder: None  # the checkpoint of this format that a folder holds
    # The files of `owner/model` on Hugging Face that make a checkpoint: of each group, the first file that exists.
    hub_files: Callable[[str], Sequence[Sequence[str]]] = lambda name: ()
    files: Callable[[Path], Sequence[Path]]  # the files of a checkpoint, in a fixed order
    loaded_bytes: Callable[[Path], int]  # of the weights in float32, in which they are used; to estimate memory
    # Raises ValueError for a downloaded file that rules the checkpoint out, before the next one is downloaded.
    check_file: Callable[[Path], None] = lambda path: None
    referred_files: Callable[[Path], Sequence[str]] = lambda path: ()  # the names that a downloaded file refers to
    check: Callable[[Path], None]  # raises ValueError unless it is complete and safe to unpack
    read_tokenizer: Callable[[Path], bytes]  # its SentencePiece model, without building the network; raises ValueError
    load_model: LoadModel

    def size(self, checkpoint: Path) -> int:
        """Bytes of the checkpoint."""
        return sum(path.stat().st_size for path in self.files(checkpoint))

    def digest(self, checkpoint: Path) -> str:
        """SHA-256 by which a manifest identifies the checkpoint."""
        return digest_of(self.files(checkpoint))


FORMATS: list[CheckpointFormat] = []


def register(checkpoint_format: CheckpointFormat) -> CheckpointFormat:
    """Make a format known to `format_of`. Raises ValueError for a name that another format has."""
    if any(known.name == checkpoint_format.name for known in FORMATS):
        raise ValueError(f"expected a new name for a checkpoint format, got {checkpoint_format.name} again")
    FORMATS.append(checkpoint_format)
    return checkpoint_format


def format_of(checkpoint: Path) -> CheckpointFormat:
    """The format of a path. The format registered last is tried first, since `.nemo`, the first, matches any file.

    Raises FileNotFoundError where there is nothing, IsADirectoryError for a folder that is of no format.
    """
    for checkpoint_format in reversed(FORMATS):
        if checkpoint_format.matches(checkpoint):
            return checkpoint_format
    if checkpoint.is_dir():
        raise IsADirectoryError(
            f"expected a .nemo file, a folder with config.json and model.safetensors, or a Hugging Face name, got the "
            f"folder {checkpoint}, which has neither; name the file"
        )
    raise FileNotFoundError(
        f"expected a .nemo file, a folder of a checkpoint or a Hugging Face name, got nothing at {checkpoint}"
    )


def formats_named(name: str | None) -> Sequence[CheckpointFormat]:
    """The format of that name; for None all formats, the preferred one first."""
    return [known for known in FORMATS if name in (None, known.name)]


def checkpoint_at(path: Path, name: str | None = None) -> Path:
    """The checkpoint at a path that a user gave: the path itself, or what the folder there holds.

    name: of the only format to accept. Raises FileNotFoundError where there is no checkpoint of that format.
    """
    if name is None and not path.is_dir():
        return path
    for known in formats_named(name):
        inside = known.within(path) if path.is_dir() else path if known.matches(path) else None
        if inside is not None:
            return inside
    if name is None:
        return path
    raise FileNotFoundError(f"expected a checkpoint of --checkpoint_format {name}, found none at {path}")
