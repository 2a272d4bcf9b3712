"""Checkpoints, treated as untrusted input: `find` finds one, `nemo` and `transformers` check and read its format."""

NOT_LOADED = "not loaded; get it from its publisher"  # ends the message of every check for safety


def require_device(device: str) -> None:
    """Raise ValueError for a device that torch cannot use."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU that this torch can use, and there is none; use --device cpu")
