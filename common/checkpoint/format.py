"""A checkpoint format: how its files are recognized and checked, and what can be read from them.

Each format is a module of this room that calls `register` once. The scripts find it by `format_of` and know nothing
else of it. `docs/architecture.md` shows how to add one.
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
    """One way in which checkpoints are stored. Its files are untrusted input to all of these functions."""

    name: str
    matches: Callable[[Path], bool]  # whether a path, which may not exist, is of this format; opens no file
    files: Callable[[Path], Sequence[Path]]  # the files of a checkpoint, in a fixed order
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
    """Make a format known to `format_of`. Raises ValueError for a name that is taken."""
    if any(known.name == checkpoint_format.name for known in FORMATS):
        raise ValueError(f"expected a new name for a checkpoint format, got {checkpoint_format.name} again")
    FORMATS.append(checkpoint_format)
    return checkpoint_format


def format_of(checkpoint: Path) -> CheckpointFormat:
    """The format of a path; the one registered last is asked first, since `.nemo`, the first, takes any file.

    Raises FileNotFoundError where there is nothing, IsADirectoryError for a folder of no format.
    """
    for checkpoint_format in reversed(FORMATS):
        if checkpoint_format.matches(checkpoint):
            return checkpoint_format
    if checkpoint.is_dir():
        raise IsADirectoryError(
            f"expected a .nemo file or a Hugging Face name, got the folder {checkpoint}; name the file"
        )
    raise FileNotFoundError(f"expected a .nemo file or a Hugging Face name, got nothing at {checkpoint}")
