"""A checkpoint: where it is, what it says of itself, and the NeMo model it holds.

NeMo is imported inside the functions that build a model; its import alone takes ten seconds.
"""

import contextlib
import os
import pickle
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common.checkpoint.archive import (
    CONFIG_MEMBER,
    WEIGHTS_MEMBER,
    check_weights,
    open_archive,
    parse_config,
    read_member,
)

# Bytes. The configs of checkpoints with 8192 pieces are under 1 MB, SentencePiece models of 256,000 pieces under 8 MB.
MAX_CONFIG_BYTES, MAX_TOKENIZER_BYTES = 10_000_000, 100_000_000
# Tensors may share storage (tied weights); all of them twice is already more than any model does.
MAX_SHARING = 2


def read_config(checkpoint: Path) -> dict:
    """The checkpoint's YAML. Raises ValueError where it is not a config, or one that would do harm (common/archive)."""
    with open_archive(checkpoint) as archive:
        names = set(archive.members)
        text = read_member(archive, CONFIG_MEMBER, MAX_CONFIG_BYTES)
    try:
        return parse_config(text, names)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {CONFIG_MEMBER} cannot be used: {error}") from None


def read_tokenizer(checkpoint: Path) -> bytes:
    """The SentencePiece model in the checkpoint, without building the network.

    Raises ValueError for a checkpoint whose tokenizer is not SentencePiece (character models, aggregates).
    """
    tokenizer = read_config(checkpoint).get("tokenizer") or {}
    model_path = tokenizer.get("model_path")
    if not model_path:
        kind = tokenizer.get("type", "no tokenizer")
        raise ValueError(f"wanted a SentencePiece tokenizer, found {kind!r} in {checkpoint}; this model has no export")
    with open_archive(checkpoint) as archive:
        return read_member(archive, model_path.removeprefix("nemo:"), MAX_TOKENIZER_BYTES)


def require_tdt(checkpoint: Path) -> None:
    """Raise ValueError ("not a TDT model: …") unless the config describes a token-and-duration transducer."""
    config = read_config(checkpoint)
    joint, decoding = config.get("joint"), config.get("decoding") or {}
    if not joint or not config.get("decoder"):
        reason = "it has no prediction and joint network (a CTC model?)"
    elif not joint.get("num_extra_outputs"):
        reason = "its joint has no duration outputs (a plain RNNT)"
    elif not decoding.get("durations"):
        reason = "its decoding has no durations (a multi-blank RNNT?)"
    else:
        return
    raise ValueError(f"not a TDT model: {checkpoint.name}: {reason}; pass a Parakeet-TDT checkpoint")


def load_model(checkpoint: Path, device: str = "cpu", scratch: Path | None = None):
    """Build the NeMo model in evaluation mode. Weights are mapped from disk, not copied over random ones.

    NeMo unpacks the checkpoint into a temporary folder, in `scratch` if that is given. Raises ValueError for a
    checkpoint that is not TDT, does not fit its config or would do harm, or a device that is not there.
    """
    require_tdt(checkpoint)
    with open_archive(checkpoint) as archive:
        check_weights(archive)
    import torch
    from nemo.collections.asr.models import ASRModel
    from nemo.core.connectors.save_restore_connector import SaveRestoreConnector

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("wanted --device cuda, found no CUDA device that this torch can use; use --device cpu")

    class AssigningConnector(SaveRestoreConnector):
        """Puts the checkpoint's tensors in place of the model's own instead of copying them: half the memory."""

        @staticmethod
        def _load_state_dict_from_disk(model_weights, map_location="cpu"):
            # weights_only: a pickle that wants to run code is refused. A mapped file cannot be deleted on Windows.
            mapped = os.name == "posix"
            state_dict = torch.load(model_weights, map_location=map_location, weights_only=True, mmap=mapped)
            size = sum(tensor.nbytes for tensor in state_dict.values())
            if size > MAX_SHARING * Path(model_weights).stat().st_size:  # views that repeat a few stored numbers
                raise ValueError(f"its tensors claim {size} bytes, which its weights do not hold")
            return state_dict

        def load_instance_with_state_dict(self, instance, state_dict, strict):
            state_dict = {name: tensor.float() if tensor.is_floating_point() else tensor
                          for name, tensor in state_dict.items()}  # fmt: skip
            wrong = [name for name, tensor in state_dict.items() if not torch.isfinite(tensor).all()]
            if wrong:
                raise ValueError(f"{wrong[0]} and {len(wrong) - 1} more of its tensors hold values that are not finite")
            instance.load_state_dict(state_dict, strict=strict, assign=True)
            instance._set_model_restore_state(is_being_restored=False)

    try:
        with _no_initialization(), _temporary_files_in(scratch):
            model = ASRModel.restore_from(
                str(checkpoint), map_location=device, save_restore_connector=AssigningConnector()
            )
    except OSError:
        raise
    except pickle.UnpicklingError as error:  # whose text goes on to explain how to run the code after all
        raise ValueError(
            f"{checkpoint}: {WEIGHTS_MEMBER} holds more than tensors, which might run code; refused"
        ) from error
    except Exception as error:  # of a config that it cannot build NeMo raises whatever its constructors raise
        # After a failure NeMo tries its abstract base class; its log, shown by --verbose, has the reason.
        reason = "NeMo cannot build it from its config" if "abstract class" in str(error) else error
        raise ValueError(f"{checkpoint} does not load: {reason}") from error
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def _temporary_files_in(folder: Path | None) -> Iterator[None]:
    """Let NeMo, which has no option for it, unpack where what a killed run leaves is found and removed."""
    saved = tempfile.tempdir
    try:
        tempfile.tempdir = saved if folder is None else str(folder)
        yield
    finally:
        tempfile.tempdir = saved


@contextlib.contextmanager
def _no_initialization() -> Iterator[None]:
    """Skip torch's random initialisation, most of the time of building a large model: every value is loaded after."""
    import torch

    names = [name for name in dir(torch.nn.init) if name.endswith("_") and not name.startswith("_")]
    saved = {name: getattr(torch.nn.init, name) for name in names}
    try:
        for name in names:
            setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor)
        yield
    finally:
        for name, function in saved.items():
            setattr(torch.nn.init, name, function)
