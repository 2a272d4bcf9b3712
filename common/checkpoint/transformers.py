"""The format of Hugging Face transformers: a folder with config.json of `ParakeetForTDT` and model.safetensors.

Nothing of the folder is executed (docs/safety.md), and transformers' own loaders, which may download and run code, are
not used: the network is built from numbers of the config, and the tensors are mapped. NeMo is not imported, and torch
and transformers only for the model (transformers_model.py).

A checkpoint may come without a feature extractor (moondream/parakeet-ultra): then its numbers are transformers' own
defaults for the mel bins of its encoder.
"""

import json
import math
from pathlib import Path
from typing import Any

from common.checkpoint import Checkpoint, ternary
from common.checkpoint.hub import NOT_LOADED, Origin
from common.checkpoint.tokenizer import sentencepiece_model

NAME = "transformers"  # as --checkpoint_format takes it
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # names the shards of a model that is saved in several files
# transformers 5 writes processor_config.json, which holds both configs.
FEATURE_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
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


def read(origin: Origin) -> Checkpoint | None:
    """The checkpoint of this format at a place; None where there is none.

    The small files come first, so that what rules a checkpoint out shows before gigabytes are downloaded. Raises
    ValueError where a file is missing, damaged or of another model, and as Origin.get.
    """
    if CONFIG not in origin.sizes:
        return None
    files = [origin.get(CONFIG)]
    config = _read_config(files[0])
    mels = config["encoder_config"].get("num_mel_bins")
    features = {"feature_size": mels}
    notes = [f"no feature extractor: transformers' own numbers for {mels} mel bins are used"]
    if any(name in origin.sizes for name in FEATURE_FILES):
        files.append(origin.get(*FEATURE_FILES))
        features = _read_features(files[-1])
        notes = []
    tokenizer = origin.get(*TOKENIZER_FILES)
    files.append(tokenizer)
    if tokenizer.suffix == ".json":
        sentencepiece = sentencepiece_model(_read_json(tokenizer), config.get("blank_token_id", 0))
    else:
        sentencepiece = tokenizer.read_bytes()
    modules = []
    if ternary.MODULES_KEY in config:
        files.append(origin.get(ternary.DESCRIPTION))
        modules = ternary.read_modules(files[-1], _read_json(files[-1]), config)
    first = origin.get(WEIGHTS, INDEX)
    weights = [first]
    if first.name == INDEX:  # which gives the file of each tensor
        places = _read_json(first).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ValueError(f"{first} has no weight_map, which gives the file of each tensor; download it again")
        weights = [origin.get(name) for name in sorted(set(map(str, places.values())))]
        files.append(first)
    stored = {path: _read_header(path) for path in weights}
    packed = {name: kind for names in stored.values() for name, kind in names.items()}
    header = ternary.without_packing(packed, modules, first)
    left_out = _left_out(header, first)
    if heads := sorted(name for name in left_out if not name.endswith(COUNTER)):
        notes.append(f"left out, since they are no part of {ARCHITECTURE}: {', '.join(heads)}")
    if modules:
        notes.append(ternary.note_of(modules))
    tensors = {path: [name for name in names if name not in left_out] for path, names in stored.items()}

    def load_model(device: str = "cpu", scratch: Path | None = None) -> Any:
        from common.checkpoint.transformers_model import load

        return load((config, features), (tokenizer, sentencepiece), tensors, modules, device)

    return Checkpoint(
        origin=origin,
        format=NAME,
        path=origin.folder,
        files=[*files, *weights],
        loaded_bytes=sum(FLOAT32_BYTES * math.prod(shape) for name, (_, shape) in header.items() if name not in heads),
        sentencepiece=sentencepiece,
        load_model=load_model,
        notes=notes,
    )


def _read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file. Raises ValueError where it is damaged, not a mapping, or names code."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{path} is damaged or not JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds JSON of type {type(content).__name__}, not a mapping; download it again")
    if any("auto_map" in part for part in (content, *content.values()) if isinstance(part, dict)):
        raise ValueError(f"{path} asks for code of its own (auto_map), {NOT_LOADED}")
    return content


def _read_config(path: Path) -> dict[str, Any]:
    """config.json. Raises ValueError unless it describes a ParakeetForTDT for whole clips."""
    config = _read_json(path)
    architectures = config.get("architectures")
    is_tdt = architectures == [ARCHITECTURE] or (architectures is None and config.get("model_type") == MODEL_TYPE)
    encoder = config.get("encoder_config")
    if not is_tdt or not isinstance(encoder, dict):
        raise ValueError(
            f"this is not a TDT model: {path} has architectures {architectures} of model_type "
            f"{config.get('model_type')!r}, not [{ARCHITECTURE!r}] with an encoder_config; pass a Parakeet-TDT one"
        )
    for key, supported in STREAMING.items():
        if encoder.get(key) not in supported:
            raise ValueError(f"{key} in {path} is {encoder[key]!r}, and only encoders of whole clips are supported")
    return config


def _read_features(path: Path) -> dict[str, Any]:
    """The config of the feature extractor. Raises ValueError where it is not a ParakeetFeatureExtractor."""
    content = _read_json(path)
    features = content if path.name == FEATURE_FILES[0] else content.get("feature_extractor")
    kind = "ParakeetFeatureExtractor"
    if not isinstance(features, dict) or features.get("feature_extractor_type", kind) != kind:
        raise ValueError(f"{path} has {features!r} instead of a {kind}, {NOT_LOADED}")
    return features


def _read_header(path: Path) -> ternary.Header:
    """Name → type and shape of the tensors in a file. Raises ValueError where the library does not accept it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            return {name: (str(one.get_dtype()), tuple(one.get_shape())) for name, one in slices.items()}
    except (SafetensorError, OSError, OverflowError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); download it again") from None


def _left_out(header: ternary.Header, path: Path) -> set[str]:
    """The tensors that are not used: heads and counters. Raises ValueError for one of a type that is not known."""
    left_out = {name for name in header if name.startswith(HEADS) or name.endswith(COUNTER)}
    for name, (dtype, _) in header.items():
        if dtype not in FLOATS and name not in left_out:
            raise ValueError(
                f"{name} in {path} has the type {dtype}, a packing that is not known; only {', '.join(FLOATS)} and the "
                f"ternary weights of {ternary.DESCRIPTION} can be read: get the model's float16 weights"
            )
    return left_out
