"""The format `.nemo`, packed or unpacked: its config, its SentencePiece model, and the model that NeMo builds from it.

Every function checks the archive first (archive.py). NeMo and torch are imported inside the functions that build a
model, since their import takes ten seconds.
"""

import contextlib
import copy
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from common.checkpoint import NOT_LOADED, Contents, hub
from common.checkpoint.archive import (
    CONFIG_MEMBER,
    WEIGHTS_MEMBER,
    check_weights,
    open_archive,
    parse_config,
    read_member,
)
from common.cli import size_text

NAME = "nemo"  # as --checkpoint_format takes it
GREEDY = ("greedy_batch", "greedy")  # strategies of decoding that have NeMo's limit of symbols on a frame
# Tensors of a preprocessor that a checkpoint stores, although they follow from its config.
FEATURE_BUFFERS = ("preprocessor.featurizer.window", "preprocessor.featurizer.fb")


def locate(path: Path) -> Path | None:
    """The checkpoint that a path names: a file, the folder of an unpacked one, or the only `.nemo` file of a folder."""
    if path.is_file() or (path / CONFIG_MEMBER).is_file():
        return path
    found = sorted(path.glob("*.nemo"))
    return found[0] if len(found) == 1 else None


def download(name: str, revision: str, *, cached_only: bool) -> Path:
    """The `.nemo` file of a repository on Hugging Face, in the local cache. Raises as hub.download does, and ValueError
    where the repository has several, none of them with its name."""
    # NVIDIA publishes `owner/model` as `model.nemo` (nemo/core/classes/common.py). Others give the file another name.
    try:
        return hub.download(name, f"{name.split('/')[1]}.nemo", revision, cached_only=cached_only)
    except (hub.NotInRepositoryError, ConnectionError) as error:
        cached_only = cached_only or isinstance(error, ConnectionError)
        files = hub.file_names(name, revision, cached_only=cached_only)
        found = [file for file in files if file.endswith(".nemo")]
        if not found:
            raise
        if len(found) > 1:
            raise ValueError(f"{name} has {', '.join(found)}; download one of them, and pass its path") from None
    return hub.download(name, found[0], revision, cached_only=cached_only)


def inspect(checkpoint: Path) -> Contents:
    """What the checkpoint holds. Raises ValueError unless it is complete and safe to unpack."""
    with open_archive(checkpoint) as archive:
        size = archive.sizes[WEIGHTS_MEMBER]
        text = read_member(archive, CONFIG_MEMBER) if checkpoint.is_dir() else b""
    if not checkpoint.is_dir():
        return Contents(files=[checkpoint], loaded_bytes=size, notes=[])
    # Of a folder, which may hold other files as well, those that the config names belong to the checkpoint.
    named = [name for name in archive.sizes if f"nemo:{name}".encode() in text]
    files = [checkpoint / name for name in (CONFIG_MEMBER, WEIGHTS_MEMBER, *named)]
    return Contents(files=files, loaded_bytes=size, notes=[])


def read_config(checkpoint: Path) -> dict[str, Any]:
    """The content of the checkpoint's YAML. Raises ValueError where it is not a config or is unsafe (archive.py)."""
    with open_archive(checkpoint) as archive:
        names = frozenset(archive.sizes)
        text = read_member(archive, CONFIG_MEMBER)
    try:
        return copy.deepcopy(_parsed(text, names))
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {CONFIG_MEMBER} cannot be used: {error}") from None


@lru_cache(maxsize=1)
def _parsed(text: bytes, members: frozenset[str]) -> dict[str, Any]:
    """A config, which is cached: the reader takes seconds for 8192 labels, and several steps read the same config."""
    return parse_config(text, members)


def read_tokenizer(checkpoint: Path) -> bytes:
    """The SentencePiece model in the checkpoint, without building the network.

    Raises ValueError for a checkpoint whose tokenizer is not SentencePiece (character models, aggregates).
    """
    tokenizer = read_config(checkpoint).get("tokenizer") or {}
    model_path = tokenizer.get("model_path")
    if not model_path:
        kind = tokenizer.get("type", "no tokenizer")
        raise ValueError(f"expected a SentencePiece tokenizer in {checkpoint}, got {kind!r}; this model has no export")
    with open_archive(checkpoint) as archive:
        return read_member(archive, model_path.removeprefix("nemo:"))


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


def load_model(checkpoint: Path, device: str = "cpu", scratch: Path | None = None) -> Any:
    """Build the NeMo model in evaluation mode. Weights are mapped from disk, not copied over random ones.

    NeMo unpacks a file into a temporary folder, in `scratch` if that is given, else where there is room. Raises
    ValueError for a checkpoint that is not TDT, does not fit its config or is unsafe; OSError where there is no room.
    """
    require_tdt(checkpoint)
    with open_archive(checkpoint) as archive:
        check_weights(archive)
        scratch = scratch or _folder_with_room(0 if checkpoint.is_dir() else sum(archive.sizes.values()))
    return _restore(checkpoint, device, scratch)


def _restore(checkpoint: Path, device: str, scratch: Path) -> Any:
    """The model of a checkpoint whose archive and config have been checked, as load_model returns it."""
    from nemo.collections.asr.models import ASRModel
    from omegaconf import OmegaConf

    config = OmegaConf.create(_decoded_greedily(_without_labels(read_config(checkpoint))))
    connector = _assigning_connector(checkpoint)
    connector.model_extracted_dir = str(checkpoint.resolve()) if checkpoint.is_dir() else None
    try:
        with _no_initialization(), _temporary_files_in(scratch):
            model = ASRModel.restore_from(
                str(checkpoint), config, map_location=device, save_restore_connector=connector
            )
    except OSError:
        raise
    except pickle.UnpicklingError as error:  # its own text would explain how to run the code nevertheless
        raise ValueError(
            f"{checkpoint}: {WEIGHTS_MEMBER} holds more than tensors, which might run code; {NOT_LOADED}"
        ) from error
    except Exception as error:  # NeMo raises whatever the constructors that it calls raise
        # After a failure NeMo tries its abstract base class; its log, shown by --verbose, has the reason.
        reason = "NeMo cannot build it from its config" if "abstract class" in str(error) else error
        raise ValueError(f"{checkpoint} does not load: {reason}") from error
    return model.eval().requires_grad_(requires_grad=False)


def _decoded_greedily(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with greedy decoding, which the runtimes use, where the checkpoint was saved with a beam search."""
    decoding = config.get("decoding")
    if isinstance(decoding, dict) and decoding.get("strategy") not in GREEDY:
        decoding["strategy"] = GREEDY[0]
    return config


def _without_labels(config: dict[str, Any]) -> dict[str, Any]:
    """`config` without two lists of pieces, which NeMo takes seconds to copy around. While NeMo's BPE models are built,
    they replace these lists by those of their tokenizer (rnnt_bpe_models.py, hybrid_rnnt_ctc_bpe_models.py)."""
    if str(config.get("target")).endswith("BPEModel"):
        config.pop("labels", None)
        if isinstance(joint := config.get("joint"), dict):
            joint.pop("vocabulary", None)
    return config


def _assigning_connector(checkpoint: Path) -> Any:
    """NeMo's SaveRestoreConnector, but it uses the checkpoint's tensors instead of copying them: half the memory."""
    import torch
    from nemo.core.connectors.save_restore_connector import SaveRestoreConnector

    class AssigningConnector(SaveRestoreConnector):  # type: ignore[misc]
        @staticmethod
        def _load_state_dict_from_disk(model_weights: str, map_location: Any = "cpu") -> dict[str, Any]:
            # weights_only does not run code in a pickle.
            state_dict: dict[str, Any] = torch.load(
                model_weights, map_location=map_location, weights_only=True, mmap=True
            )
            return state_dict

        def load_instance_with_state_dict(self, instance: Any, state_dict: dict[str, Any], strict: bool) -> None:  # noqa: FBT001  NeMo's signature
            state_dict = {
                name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state_dict.items()
            }
            state_dict |= _exact_features(checkpoint, instance, state_dict)
            wrong = [name for name, tensor in state_dict.items() if not torch.isfinite(tensor).all()]
            if wrong:
                raise ValueError(f"{wrong[0]} and {len(wrong) - 1} more of its tensors hold values that are not finite")
            instance.load_state_dict(state_dict, strict=strict, assign=True)
            instance._set_model_restore_state(is_being_restored=False)

    return AssigningConnector()


def _exact_features(checkpoint: Path, instance: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The window and the filter bank that NeMo has computed from the config, where the stored ones are rounded copies.

    `model.half()` rounds them like weights, but runtimes compute their own from the config. Stored values that rounding
    does not explain are kept, and ModelSpec reports how they differ.
    """
    import torch

    exact = {}
    for name in FEATURE_BUFFERS:
        own = instance.state_dict().get(name)
        stored = state_dict.get(name)
        if own is None or stored is None or own.shape != stored.shape or torch.equal(own.cpu(), stored.cpu()):
            continue
        own = own.float().cpu()
        stored = stored.cpu()
        for dtype in (torch.float16, torch.bfloat16):
            # Half a unit in the last place, and the difference between versions of librosa and torch before rounding.
            bound = (torch.finfo(dtype).eps / 2 + 1e-5) * own.abs() + torch.finfo(dtype).smallest_normal * 2**-10
            if torch.equal(stored, stored.to(dtype).float()) and bool(((stored - own).abs() <= bound).all()):
                rounded = str(dtype).removeprefix("torch.")
                print(
                    f"{checkpoint.name}: {name} is rounded to {rounded}; the exact one of its config is used instead",
                    flush=True,
                )
                exact[name] = own.to(state_dict[name].device)
                break
    return exact


def _folder_with_room(size: int) -> Path:
    """The folder for temporary files, or the working directory if the disk of the first has no `size` bytes free."""
    folders = [Path(tempfile.gettempdir()), Path.cwd()]
    free = {folder: shutil.disk_usage(folder).free for folder in folders if os.access(folder, os.W_OK)}
    roomy = [folder for folder in free if free[folder] >= size]
    if not roomy:
        found = " and ".join(f"{size_text(count)} in {folder}" for folder, count in free.items())
        raise OSError(
            f"expected {size_text(size)} of disk to unpack the checkpoint, got {found}; make room, or set TMPDIR to a "
            "folder that has it"
        )
    return roomy[0]


@contextlib.contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Let NeMo, which has no option for it, unpack into `folder`; the next run removes what a killed run leaves."""
    saved = tempfile.tempdir
    try:
        tempfile.tempdir = str(folder)
        yield
    finally:
        tempfile.tempdir = saved


@contextlib.contextmanager
def _no_initialization() -> Iterator[None]:
    """Skip torch's random initialisation, most of the time of building a large model: every value is loaded later."""
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
