"""The format of Hugging Face transformers: a folder with config.json of `ParakeetForTDT` and model.safetensors.

Its files are untrusted input. Before a tensor is read, it is checked that
    the folder    holds the files themselves, or links that stay inside it (or inside the cache of huggingface_hub)
    the configs   are JSON, name `ParakeetForTDT`, and name no code of their own (`auto_map`)
    the weights   are one file, or shards beside an index, that the safetensors library accepts (no offset overlaps, no
                  byte is left over), with exactly the tensors that the index gives to each shard, and in all of them
                  exactly the tensors and shapes of the network that the config describes, in a float type of at most
                  32 bits or packed as ternary.py reads them; beside them only known heads (HEADS), which are left out

A checkpoint may come without a feature extractor (moondream/parakeet-ultra): then its numbers are transformers' own
defaults for the mel bins of its encoder.

Nothing of the folder is executed, and transformers' own loaders, which may download and run code, are not used: the
network is built from the numbers of the config, and the tensors are mapped. NeMo is not imported.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.checkpoint import NOT_LOADED, Contents, hub, ternary
from common.checkpoint.tokenizer_json import sentencepiece_model

NAME = "transformers"  # as --checkpoint_format takes it
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # names the shards of a model that is saved in several files
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# Of each group the first file that exists. transformers 5 writes processor_config.json, which holds both configs.
FEATURE_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
WEIGHT_FILES = (WEIGHTS, INDEX)
ARCHITECTURE = "ParakeetForTDT"
MODEL_TYPE = "parakeet_tdt"  # the same in a config that names no architecture
# Tensors that are no part of ParakeetForTDT and are left out: moondream's voice activity detector.
HEADS = ("vad_head.",)

FLOATS = ("F32", "F16", "BF16")
FLOAT32_BYTES = 4
COUNTER = "num_batches_tracked"  # of a batch normalisation; not used by inference, and not every writer keeps it
# Models trained for streaming set these keys to other values, and compute something else with the same tensors.
STREAMING = {
    "att_context_size": (None, [-1, -1], [[-1, -1]]),
    "att_context_style": (None, "regular"),
    "causal_downsampling": (None, False),
    "conv_context_size": (None,),
    "conv_norm_type": (None, "batch_norm"),
}
ACTIVATIONS = ("relu", "silu", "swish", "gelu", "tanh", "sigmoid")
ENCODER_KEYS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "attention_bias",
    "convolution_bias", "conv_kernel_size", "subsampling_factor", "subsampling_conv_channels", "num_mel_bins",
    "subsampling_conv_kernel_size", "subsampling_conv_stride", "max_position_embeddings", "scale_input",
)  # fmt: skip
MODEL_KEYS = (
    "vocab_size", "decoder_hidden_size", "num_decoder_layers", "hidden_act", "max_symbols_per_step", "durations",
    "pad_token_id", "blank_token_id",
)  # fmt: skip
FEATURE_KEYS = (
    "feature_size", "sampling_rate", "hop_length", "n_fft", "win_length", "preemphasis", "padding_value",
)  # fmt: skip


def locate(path: Path) -> Path | None:
    """The checkpoint that a path names: a folder with config.json."""
    return path if (path / CONFIG).is_file() else None


def download(name: str, revision: str, *, cached_only: bool) -> Path:
    """The folder of a repository's checkpoint in the local cache: its files and no others, all of one commit.

    Raises NotInRepositoryError where the repository has no config.json, ValueError where it lacks another file or its
    config is not that of a ParakeetForTDT, and as hub.download does.
    """
    config = hub.download(name, CONFIG, revision, cached_only=cached_only)
    content = _read_config(config)  # before gigabytes are downloaded
    commit = config.parent.name
    _download_first(name, FEATURE_FILES, commit, cached_only=cached_only)
    _download_one_of(name, TOKENIZER_FILES, commit, cached_only=cached_only)
    if ternary.MODULES_KEY in content:
        _download_one_of(name, (ternary.DESCRIPTION,), commit, cached_only=cached_only)
    for shard in shards(_download_one_of(name, WEIGHT_FILES, commit, cached_only=cached_only)):
        _download_one_of(name, (shard,), commit, cached_only=cached_only)
    return config.parent


def _download_one_of(name: str, group: Sequence[str], commit: str, *, cached_only: bool) -> Path:
    """Like _download_first. Raises ValueError where the repository has none of the files."""
    path = _download_first(name, group, commit, cached_only=cached_only)
    if path is None:
        raise ValueError(
            f"expected {' or '.join(group)} beside {CONFIG} of {name} on Hugging Face, found none: it is not a whole "
            f"checkpoint of the format {NAME}"
        )
    return path


def _download_first(name: str, group: Sequence[str], commit: str, *, cached_only: bool) -> Path | None:
    """The first of these files that the repository has at a commit, or None.

    There is no request where the cache has one, or where it is known of all that the repository lacks them.
    """
    known = {file: hub.is_cached(name, file, commit) for file in group}
    for file in [file for file in group if known[file]] or [file for file in group if known[file] is None]:
        try:
            return hub.download(name, file, commit, cached_only=cached_only)
        except hub.NotInRepositoryError:
            continue
    return None


Header = Mapping[str, tuple[str, tuple[int, ...]]]  # name → type as safetensors spells it, shape


@dataclass(frozen=True)
class FolderContents(Contents):
    """What the files of a checkpoint say, apart from the values of its tensors."""

    config: dict[str, Any]
    features: dict[str, Any]  # arguments of the feature extractor
    tokenizer: Path
    weights: list[Path]  # model.safetensors, or the index and its shards
    modules: list[ternary.TernaryModule]  # matrices that are stored packed
    header: Header  # the tensors of the network that the weights stand for


def inspect(checkpoint: Path) -> FolderContents:
    """Read the folder of a checkpoint, except the values of its tensors, and check that it is whole and safe.

    Raises ValueError where a file is missing, damaged, of another model, or a link to somewhere else.
    """
    config_file = _first_file(checkpoint, (CONFIG,))
    config = _read_config(config_file)
    found = [config_file]
    notes = []
    if any((checkpoint / name).exists() for name in FEATURE_FILES):
        found.append(_first_file(checkpoint, FEATURE_FILES))
        features = _read_features(found[-1])
    else:
        features = {"feature_size": _whole_number(config["encoder_config"], "num_mel_bins", config_file)}
        notes.append(
            f"no feature extractor: transformers' own numbers for {features['feature_size']} mel bins are used"
        )
    tokenizer = _first_file(checkpoint, TOKENIZER_FILES)
    found.append(tokenizer)
    modules = []
    if ternary.MODULES_KEY in config:
        found.append(_first_file(checkpoint, (ternary.DESCRIPTION,)))
        modules = ternary.read_modules(found[-1], _read_json(found[-1]), config)
    first = _first_file(checkpoint, WEIGHT_FILES)
    parts = [_first_file(checkpoint, (name,)) for name in shards(first)]
    header = ternary.without_packing(_read_header(first, parts), modules, first)
    _check_types(header, first)
    if heads := sorted(name for name in header if name.startswith(HEADS)):
        notes.append(f"left out, since they are no part of {ARCHITECTURE}: {', '.join(heads)}")
    if modules:
        notes.append(ternary.note_of(modules))
    header = {name: tensor for name, tensor in header.items() if name not in heads}
    return FolderContents(
        files=[*found, first, *parts],
        loaded_bytes=sum(FLOAT32_BYTES * math.prod(shape) for _, shape in header.values()),
        notes=notes,
        config=config,
        features=features,
        tokenizer=tokenizer,
        weights=[first, *parts],
        modules=modules,
        header=header,
    )


def _first_file(checkpoint: Path, names: Sequence[str]) -> Path:
    path = next((checkpoint / name for name in names if (checkpoint / name).is_file()), None)
    if path is None:
        found = "found none; download the checkpoint again"
        if WEIGHTS in names and (checkpoint / "pytorch_model.bin").exists():
            found = "got a pickle, which may run code; save the model again with safe_serialization"
        raise ValueError(f"expected {' or '.join(names)} in {checkpoint}, {found}")
    hub.require_inside(path, checkpoint)
    return path


def shards(path: Path) -> list[str]:
    """The names of the files that `path` refers to: the shards, if it is their index, else none.

    Raises ValueError for an index that is damaged, or that names anything but shards beside it.
    """
    return sorted(set(_weight_map(path).values())) if path.name == INDEX else []


def _weight_map(index: Path) -> dict[str, str]:
    """Name of a tensor → name of its shard."""
    content = _read_json(index).get("weight_map")
    if not isinstance(content, dict) or not content:
        raise ValueError(f"expected the shards of the tensors as weight_map in {index}, got none; download it again")
    for name, file in content.items():
        if not (isinstance(file, str) and SHARD.fullmatch(file)):
            raise ValueError(
                f"expected a file such as model-00001-of-00002.safetensors for {name} in {index}, got {file!r}; "
                f"{NOT_LOADED}"
            )
    return content


def _read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file. Raises ValueError where it is damaged or not a mapping."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{path} is damaged or not JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"expected a mapping in {path}, got {type(content).__name__}; download it again")
    return content


def _whole_number(config: Mapping[str, Any], key: str, path: Path) -> int:
    """The value of a key of the config at `path`. Raises ValueError where it is not a whole number."""
    value = config.get(key)
    if not isinstance(value, int):
        raise ValueError(f"expected a whole number as {key} in {path}, got {value!r}; download it again")
    return value


def _read_config(path: Path) -> dict[str, Any]:
    """config.json. Raises ValueError unless it describes a ParakeetForTDT that can be built."""
    config = _read_json(path)
    architectures = config.get("architectures")
    is_tdt = architectures == [ARCHITECTURE] or (architectures is None and config.get("model_type") == MODEL_TYPE)
    if not is_tdt:
        kind = f"model_type {config.get('model_type')!r}" if architectures is None else repr(architectures)
        raise ValueError(
            f"not a TDT model: expected architectures [{ARCHITECTURE!r}] in {path}, got {kind}; pass a Parakeet-TDT "
            "checkpoint"
        )
    if config.get("quantization_config") is not None:
        raise ValueError(
            f"expected the weights of {path.parent} as they were trained, got quantized ones; {NOT_LOADED}"
        )
    _check_no_code(config, path)
    encoder = config.get("encoder_config")
    if not isinstance(encoder, dict):
        raise ValueError(f"expected a mapping as encoder_config in {path}, got {encoder!r}; download it again")
    for key, supported in STREAMING.items():
        if encoder.get(key) not in supported:
            raise ValueError(f"expected an encoder of whole clips in {path}, got {key} {encoder[key]!r}: not supported")
    for content in (config, encoder):
        if content.get("hidden_act", "relu") not in ACTIVATIONS:
            raise ValueError(
                f"expected hidden_act {', '.join(ACTIVATIONS)} in {path}, got {content['hidden_act']!r}: not supported"
            )
    return config


def _read_features(path: Path) -> dict[str, Any]:
    """The numbers of the feature extractor. Raises ValueError where it is not a ParakeetFeatureExtractor."""
    content = _read_json(path)
    _check_no_code(content, path)
    features = content if path.name == FEATURE_FILES[0] else content.get("feature_extractor")
    kind = features.get("feature_extractor_type") if isinstance(features, dict) else None
    if not isinstance(features, dict) or kind not in (None, "ParakeetFeatureExtractor"):
        raise ValueError(f"expected a ParakeetFeatureExtractor in {path}, got {kind or features!r}; {NOT_LOADED}")
    if features.get("do_normalize", True) is not True:  # which transformers 5.23 itself ignores
        raise ValueError(f"expected features normalised over the clip in {path}, got do_normalize false: not supported")
    return {key: features[key] for key in FEATURE_KEYS if key in features}


def _check_no_code(content: object, path: Path) -> None:
    """Raise ValueError where a config names code."""
    if isinstance(content, dict) and "auto_map" in content:
        raise ValueError(
            f"expected a model of transformers' own in {path}, got code of its own (auto_map); {NOT_LOADED}"
        )
    if isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            _check_no_code(value, path)


def _check_types(header: Header, path: Path) -> None:
    """Raise ValueError for a tensor of a type that is not known. header: the tensors of `path`, unpacked."""
    for name, (dtype, _) in header.items():
        if dtype not in FLOATS and not name.endswith(COUNTER):
            raise ValueError(
                f"{name} in {path} has the type {dtype}, a packing that is not known; only {', '.join(FLOATS)} and the "
                f"ternary weights of {ternary.DESCRIPTION} can be read: get the model's float16 weights"
            )


def _read_header(first: Path, parts: Sequence[Path]) -> Header:
    """What model.safetensors holds, or the shards `parts` of the index `first`; no tensor is read.

    Raises ValueError where the library does not accept a file, or a shard holds other tensors than the index says.
    """
    if not parts:
        return _read_file_header(first)
    listed = _weight_map(first)
    header: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in parts:
        part = _read_file_header(path)
        names = {name for name, file in listed.items() if file == path.name}
        if wrong := sorted(part.keys() ^ names):
            raise ValueError(
                f"expected {path} to hold the tensors that {first.name} lists for it, but {wrong[0]} is in one of the "
                "two alone; download it again"
            )
        header |= part
    return header


def _read_file_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118  not a mapping
            return {name: (str(one.get_dtype()), tuple(one.get_shape())) for name, one in slices.items()}
    except (SafetensorError, OSError, OverflowError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); download it again") from None


def _check_tensors(header: Header, expected: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError unless the file holds the network's tensors, in its shapes. expected: the network's state."""
    missing = [name for name in expected if name not in header and not name.endswith(COUNTER)]
    extra = [name for name in header if name not in expected]
    for problem, names in (("lacks", missing), ("also has", extra)):
        if names:
            more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
            raise ValueError(f"{path} {problem} {names[0]}{more}, so it does not fit {CONFIG}; download it again")
    for name, (_, shape) in header.items():
        if shape != tuple(expected[name].shape):
            raise ValueError(
                f"expected {name} of shape {tuple(expected[name].shape)} by {CONFIG}, got {shape} in {path}; download "
                "it again"
            )


def read_tokenizer(checkpoint: Path) -> bytes:
    """The SentencePiece model of the checkpoint: its own, or the one that its tokenizer.json was converted from.

    Raises ValueError where the tokenizer is of another kind, or has another number of pieces than the network.
    """
    tokenizer = _first_file(checkpoint, TOKENIZER_FILES)
    if tokenizer.suffix != ".json":
        return tokenizer.read_bytes()
    config_file = _first_file(checkpoint, (CONFIG,))
    blank = _whole_number(_read_config(config_file), "blank_token_id", config_file)
    content = _read_json(tokenizer)
    try:
        return sentencepiece_model(content, blank)
    except ValueError as error:
        raise ValueError(f"{tokenizer} cannot be used: {error}") from None


def load_model(checkpoint: Path, device: str = "cpu", scratch: Path | None = None) -> Any:
    """transformers' ParakeetForTDT in float32, in evaluation mode, with the parts that NeMo's models have.

    Weights are mapped from disk where they are float32. `scratch` is not needed. Raises ValueError for a checkpoint
    that does not fit its config or is unsafe.
    """
    contents = inspect(checkpoint)
    import torch

    from common.checkpoint.transformers_model import ParakeetModel, build

    config = contents.config
    try:
        network, extractor = build(
            {key: config[key] for key in MODEL_KEYS if key in config},
            {key: config["encoder_config"][key] for key in ENCODER_KEYS if key in config["encoder_config"]},
            contents.features,
        )
    except Exception as error:  # transformers raises whatever its checks and torch's constructors raise
        raise ValueError(f"{checkpoint / CONFIG} cannot be built: {error}") from error
    expected = network.state_dict()
    _check_tensors(contents.header, expected, contents.weights[0])
    state = _read_tensors(contents.weights, device)
    for module in contents.modules:
        qweight, scales = (state.pop(f"{module.name}{part}") for part in (ternary.QWEIGHT, ternary.SCALES))
        state[f"{module.name}.weight"] = ternary.unpack(module, qweight, scales)
    wrong = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise ValueError(
            f"{contents.weights[0]}: {wrong[0]} and {len(wrong) - 1} more of its tensors hold values that are not "
            "finite"
        )
    counters = {name: torch.zeros((), dtype=torch.int64, device=device) for name in expected if name.endswith(COUNTER)}
    network.load_state_dict(counters | state, assign=True)
    model = ParakeetModel(network, extractor, contents.tokenizer).to(device)
    return model.eval().requires_grad_(requires_grad=False)


def _read_tensors(weights: Sequence[Path], device: str) -> dict[str, Any]:
    """The tensors of model.safetensors or of the shards, in float32, mapped from disk if they are stored so.

    The bytes of packed ones stay as they are. Heads, and the counters of batch normalisations, which nothing uses, are
    left out.
    """
    from safetensors import safe_open

    state = {}
    for path in weights:
        if path.name != INDEX:
            with safe_open(path, framework="pt", device=device) as file:
                for name in file.keys():  # noqa: SIM118  not a mapping
                    if not name.startswith(HEADS) and not name.endswith(COUNTER):
                        tensor = file.get_tensor(name)
                        state[name] = tensor.float() if tensor.is_floating_point() else tensor
    return state
