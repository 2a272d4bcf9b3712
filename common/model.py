"""A checkpoint: what it says of itself, the NeMo model it holds, and what a manifest says of it.

NeMo is imported inside the functions that build a model; its import alone takes ten seconds.
"""

import contextlib
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.archive import (
    CONFIG_MEMBER,
    WEIGHTS_MEMBER,
    check_weights,
    open_archive,
    parse_config,
    read_member,
    unpacked_bytes,
)
from common.console import size_text
from common.download import DEFAULT_REVISION, checksum, commit_of, find_checkpoint, hub_name
from common.files import CHECKPOINT, read_location, read_manifest

# Bytes. The configs of checkpoints with 8192 pieces are under 1 MB, SentencePiece models of 256,000 pieces under 8 MB.
MAX_CONFIG_BYTES, MAX_TOKENIZER_BYTES = 10_000_000, 100_000_000
# NeMo adds this to the standard deviation (`CONSTANT` in nemo/collections/asr/parts/preprocessing/features.py).
NEMO_NORM_EPS = 1e-5
# What a preprocessor computes with, and a checkpoint stores though its config says it all.
FEATURE_BUFFERS = ("preprocessor.featurizer.window", "preprocessor.featurizer.fb")
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


def require_device(device: str) -> None:
    """Raise ValueError for a device that is not there."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "expected a CUDA device for --device cuda, found none that this torch can use; use --device cpu"
        )


def load_model(checkpoint: Path, device: str = "cpu", scratch: Path | None = None):
    """Build the NeMo model in evaluation mode. Weights are mapped from disk, not copied over random ones.

    NeMo unpacks the checkpoint into a temporary folder, in `scratch` if that is given, else where there is room. Raises
    ValueError for a checkpoint that is not TDT, does not fit its config or would do harm, or a device that is not
    there; OSError where there is no room.
    """
    require_device(device)
    require_tdt(checkpoint)
    with open_archive(checkpoint) as archive:
        check_weights(archive)
        scratch = scratch or _folder_with_room(unpacked_bytes(archive))
    import torch
    from nemo.collections.asr.models import ASRModel
    from nemo.core.connectors.save_restore_connector import SaveRestoreConnector

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
            state_dict |= _exact_features(checkpoint, instance, state_dict)
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


def _exact_features(checkpoint: Path, instance, state_dict: dict) -> dict:
    """The window and filter bank that NeMo has made from the config, where those stored are these, rounded to half
    precision (`model.half()` rounds them like weights): runtimes compute theirs from the config as well. What rounding
    does not explain stays, and ModelSpec says how it differs."""
    import torch

    exact = {}
    for name in FEATURE_BUFFERS:
        own, stored = instance.state_dict().get(name), state_dict.get(name)
        if own is None or stored is None or own.shape != stored.shape or torch.equal(own.cpu(), stored.cpu()):
            continue
        own, stored = own.float().cpu(), stored.cpu()
        for dtype in (torch.float16, torch.bfloat16):
            # Half a unit in the last place, and what versions of librosa and torch differ by before the rounding.
            bound = (torch.finfo(dtype).eps / 2 + 1e-5) * own.abs() + torch.finfo(dtype).smallest_normal * 2**-10
            if torch.equal(stored, stored.to(dtype).float()) and bool(((stored - own).abs() <= bound).all()):
                print(f"{checkpoint.name}: {name} is rounded to {str(dtype).removeprefix('torch.')}; the exact one of "
                      "its config is used instead", flush=True)  # fmt: skip
                exact[name] = own.to(state_dict[name].device)
                break
    return exact


def _folder_with_room(size: int) -> Path:
    """The folder for temporary files, or the working directory where that one's disk has no `size` bytes free."""
    folders = [Path(tempfile.gettempdir()), Path.cwd()]
    free = {folder: shutil.disk_usage(folder).free for folder in folders if os.access(folder, os.W_OK)}
    roomy = [folder for folder in free if free[folder] >= size]
    if not roomy:
        found = " and ".join(f"{size_text(count)} in {folder}" for folder, count in free.items())
        raise OSError(f"expected {size_text(size)} of disk to unpack the checkpoint, found {found}; make room, or set "
                      "TMPDIR to a folder that has it")  # fmt: skip
    return roomy[0]


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


@dataclass(frozen=True)
class ModelSpec:
    """Every number of a checkpoint that a graph or a config needs, as the model NeMo built has it.

    A key absent from the checkpoint's YAML has its effective value in the built module, so the module is asked.
    """

    num_mels: int  # M
    encoder_dim: int  # D
    encoder_layers: int
    subsampling_factor: int  # mel frames to an encoder frame
    decoder_dim: int  # H
    decoder_layers: int  # L
    vocab_size: int  # V, blank included
    durations: tuple[int, ...]  # frames, by index
    max_symbols: int | None  # tokens on one frame before a forced step; None: no limit
    sample_rate: int  # Hz
    fft_size: int  # samples
    win_length: int  # samples
    hop_length: int  # samples
    preemphasis: float
    log_guard: float  # added to the mel energies before the logarithm
    unsupported_features: tuple[str, ...]  # how the features differ from log-mel, Hann, power 2, per-feature
    norm_eps: float = NEMO_NORM_EPS

    @property
    def blank_id(self) -> int:
        return self.vocab_size - 1

    @property
    def frame_samples(self) -> int:
        """Samples to one encoder frame."""
        return self.hop_length * self.subsampling_factor

    @classmethod
    def of(cls, model) -> "ModelSpec":
        """Read a loaded NeMo model. Raises ValueError where its parts contradict each other."""
        features, encoder, decoder, joint = model.preprocessor.featurizer, model.encoder, model.decoder, model.joint
        greedy = model.decoding.decoding
        durations = tuple(int(duration) for duration in model.cfg.decoding.durations)
        vocab_size = decoder.blank_idx + 1
        joint_durations = joint.num_extra_outputs
        joint_tokens = joint.num_classes_with_blank - joint_durations  # NeMo counts both
        if (joint_tokens, joint_durations) != (vocab_size, len(durations)):
            raise ValueError(
                f"the joint has {joint_tokens} tokens and {joint_durations} durations, the decoder {vocab_size} and "
                f"the decoding {len(durations)}: the checkpoint contradicts itself"
            )
        import torch

        return cls(
            num_mels=features.nfilt,
            encoder_dim=encoder._feat_out,
            encoder_layers=len(encoder.layers),
            subsampling_factor=encoder.subsampling_factor,
            decoder_dim=decoder.pred_hidden,
            decoder_layers=decoder.pred_rnn_layers,
            vocab_size=vocab_size,
            durations=durations,
            max_symbols=greedy.max_symbols,
            sample_rate=features.sample_rate,
            fft_size=features.n_fft,
            win_length=features.win_length,
            hop_length=features.hop_length,
            preemphasis=features.preemph or 0.0,
            log_guard=float(features.log_zero_guard_value_fn(torch.zeros(1))),
            unsupported_features=tuple(_feature_differences(features)),
        )


def _feature_differences(features) -> Iterator[str]:
    """What sets a NeMo FilterbankFeatures apart from the log-mel features that runtimes compute
    (nemo_mel_spectrogram.cc of onnxruntime-extensions: Slaney mels over the whole band, symmetric Hann window)."""
    import torch
    from librosa.filters import mel

    wanted = {
        "normalize": "per_feature",
        "mag_power": 2.0,
        "log": True,
        "log_zero_guard_type": "add",
        "frame_splicing": 1,
        "exact_pad": False,
    }
    for name, value in wanted.items():
        found = getattr(features, name)
        if found != value:
            yield f"{name} is {found!r}, not {value!r}"
    hann = torch.hann_window(features.win_length, periodic=False)
    if features.window is None or not torch.allclose(features.window.float().cpu(), hann, atol=1e-4):
        yield "window is not the symmetric Hann window"
    slaney = torch.tensor(mel(sr=features.sample_rate, n_fft=features.n_fft, n_mels=features.nfilt))
    if not torch.allclose(features.fb[0].float().cpu(), slaney, rtol=1e-2, atol=1e-5):
        yield "the mel filterbank is not Slaney's over the whole band"


def source_record(checkpoint: Path, model_name: str, *, revision: str | None = None) -> dict:
    """What a manifest says of the source: its Hugging Face `name`, the `revision` asked for and the `commit` used, or
    the name of its `file`; and its `sha256`. Where the file lies is not published (files.write_locations)."""
    name = hub_name(model_name)
    source = {"file": checkpoint.name}
    if name is not None:
        source = {"name": name, "revision": revision or DEFAULT_REVISION, "commit": commit_of(checkpoint)}
    return {**source, "sha256": checksum(checkpoint)}


def recorded_checkpoint(folder: Path) -> Path:
    """The checkpoint that a model folder's manifest names.

    Raises FileNotFoundError where the manifest or the checkpoint is missing, ValueError where it has changed since.
    """
    source = read_manifest(folder).get("export", {}).get("source")
    if source is None:
        raise FileNotFoundError(f"{folder} has no manifest that names its checkpoint; pass --model_name or --skip_nemo")
    if "name" in source:
        checkpoint = find_checkpoint(source["name"], source.get("commit"))
    else:
        checkpoint = read_location(folder, CHECKPOINT) or folder / source.get("file", "its checkpoint")
    if not checkpoint.is_file():
        raise FileNotFoundError(f"{checkpoint}, recorded in {folder}, is gone; pass --model_name or --skip_nemo")
    if checksum(checkpoint) != source["sha256"]:
        raise ValueError(f"{checkpoint} is not the file that {folder} was exported from; pass --model_name")
    return checkpoint
