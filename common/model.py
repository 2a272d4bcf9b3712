"""A checkpoint: where it is, what it says of itself, and the NeMo model it holds.

NeMo is imported inside the functions that build a model; its import alone takes ten seconds.
"""

import contextlib
import os
import pickle
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.archive import CONFIG_MEMBER, WEIGHTS_MEMBER, check_weights, open_archive, parse_config, read_member
from common.files import read_manifest, relative_path, sha256

DEFAULT_MODEL = "nvidia/parakeet-tdt-0.6b-v3"

# Bytes. The configs of checkpoints with 8192 pieces are under 1 MB, SentencePiece models of 256,000 pieces under 8 MB.
MAX_CONFIG_BYTES, MAX_TOKENIZER_BYTES = 10_000_000, 100_000_000
# NeMo adds this to the standard deviation (`CONSTANT` in nemo/collections/asr/parts/preprocessing/features.py).
NEMO_NORM_EPS = 1e-5
# Tensors may share storage (tied weights); all of them twice is already more than any model does.
MAX_SHARING = 2


def find_checkpoint(model_name: str) -> Path:
    """The `.nemo` file for a path or a Hugging Face name (`owner/model`), downloaded if need be.

    Raises FileNotFoundError for a path that is not there, ConnectionError when Hugging Face cannot be reached,
    ValueError when it has no such model or the file is not a whole NeMo checkpoint.
    """
    path = Path(model_name)
    if path.suffix != ".nemo" and not path.exists() and model_name.count("/") == 1:
        path = _download(model_name)
    if not path.is_file():
        raise FileNotFoundError(f"wanted a .nemo file or a Hugging Face name, found nothing at {model_name}")
    with open_archive(path):
        return path


def _download(model_name: str) -> Path:
    """Fetch `owner/model`'s checkpoint; NVIDIA publishes it as `model.nemo` (nemo/core/classes/common.py)."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    filename = model_name.split("/")[1] + ".nemo"
    print(f"looking for {filename} of {model_name}, in the local cache and on Hugging Face", flush=True)
    try:
        return Path(hf_hub_download(model_name, filename))
    except LocalEntryNotFoundError:
        raise ConnectionError(
            f"wanted {filename} of {model_name}, but Hugging Face cannot be reached and it is not in the local cache; "
            "check the network, or pass the path of a .nemo file as --model_name"
        ) from None
    except (RepositoryNotFoundError, EntryNotFoundError):
        raise ValueError(f"Hugging Face has no {filename} in {model_name}; check --model_name") from None
    except HfHubHTTPError as error:
        raise ConnectionError(f"wanted {filename} of {model_name}, Hugging Face answered: {error}") from error


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


def source_record(checkpoint: Path, model_name: str, output_dir: Path) -> dict:
    """What a manifest says of the source: its Hugging Face `name`, or its `path` relative to the folder; checksum."""
    hub = Path(model_name) != checkpoint
    source = {"name": model_name} if hub else {"path": relative_path(checkpoint, output_dir)}
    return {**source, "sha256": sha256(checkpoint)}


def recorded_checkpoint(folder: Path) -> Path:
    """The checkpoint that a model folder's manifest names.

    Raises FileNotFoundError where the manifest or the checkpoint is missing, ValueError where it has changed since.
    """
    source = read_manifest(folder).get("export", {}).get("source")
    if source is None:
        raise FileNotFoundError(f"{folder} has no manifest that names its checkpoint; pass --model_name or --skip_nemo")
    checkpoint = find_checkpoint(source["name"]) if "name" in source else folder / source["path"]
    if not checkpoint.is_file():
        raise FileNotFoundError(f"{checkpoint}, recorded in {folder}, is gone; pass --model_name or --skip_nemo")
    if sha256(checkpoint) != source["sha256"]:
        raise ValueError(f"{checkpoint} is not the file that {folder} was exported from; pass --model_name")
    return checkpoint
