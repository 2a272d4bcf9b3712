"""Checkpoints, treated as untrusted input: `find` finds one, `nemo` and `transformers` check and read its format."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NOT_LOADED = "not loaded; get it from its publisher"  # ends the message of every check for safety


@dataclass(frozen=True)
class Contents:
    """What a checkpoint has been found to hold when it was checked."""

    files: Sequence[Path]  # in a fixed order
    loaded_bytes: int  # of the weights in float32, in which they are used; to estimate memory
    notes: Sequence[str]  # what a user should know of how it is read: what it lacks, what of it is left out


def require_device(device: str) -> None:
    """Raise ValueError for a device that torch cannot use."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU that this torch can use, and there is none; use --device cpu")
