"""What each runtime reads beside the graphs, as dicts made from a ModelSpec, and what checkpoints it cannot compute.

Keys and their meaning: src/config.cpp, src/models/parakeet.cpp and parakeet_processor.cpp of onnxruntime-genai 0.18.0.
An unknown key is refused there, so provenance goes into manifest.json. Those of the other runtimes: src/onnx_asr/asr.py
of onnx-asr 0.12.0, sherpa-onnx/csrc/offline-transducer-nemo-model.cc of sherpa-onnx.
"""

import math
from dataclasses import dataclass

from common.graphs import DECODER, ENCODER, GRAPHS
from common.model import ModelSpec

GENAI_CONFIG = "genai_config.json"
AUDIO_PROCESSOR_CONFIG = "audio_processor_config.json"
ONNX_ASR_CONFIG = "config.json"

# The runtime stops there. One token a frame of 80 ms would fill it in 2.9 hours of audio.
CONTEXT_LENGTH = 131072  # tokens
# What GenAI is told of threads. Its own default is half of what the system counts (CreateSessionOptionsFromConfig in
# src/models/model.cpp), right where two hardware threads share a core and wrong elsewhere; 0 is ONNX Runtime's, one for
# each core. A token is one row, read in a few hundred microseconds: threads that spin between two of them are in the
# encoder's way, and in each other's. Measured by benchmarks/decoding.py on 2 cores: 60 s of audio in 8 s for 15 s.
ENCODER_SESSION = {"intra_op_num_threads": 0}
TOKEN_SESSION = {"intra_op_num_threads": 2, "session.intra_op.allow_spinning": "0"}
# GenAI takes 0 as "force a step after every token"; the largest int is its "no limit", and onnx-asr's.
NO_SYMBOL_LIMIT = 2**31 - 1
# The features that onnx-asr (preprocessors/nemo.py) and sherpa-onnx (csrc/features.h) compute, whatever a config says.
# sherpa-onnx's differ a little from every NeMo model's: see the README.
FIXED_FEATURES = {
    "sample_rate": (16000,),
    "fft_size": (512,),
    "win_length": (400,),
    "hop_length": (160,),
    "preemphasis": (0.97,),
    "log_guard": (2.0**-24,),
}
FIXED_MELS = {"onnx-asr": {"num_mels": (80, 128)}, "sherpa-onnx": {}}
# cuDNN's default tries every algorithm on each new shape, and nearly each clip has one; sherpa-onnx's choice as well.
CUDA_ENCODER_OPTIONS = {"cudnn_conv_algo_search": "HEURISTIC"}


@dataclass(frozen=True)
class Window:
    """How a clip is cut for the encoder: `chunk` samples are decoded, with `left` and `right` samples of context."""

    chunk: int
    left: int
    right: int

    @classmethod
    def of_seconds(cls, spec: ModelSpec, chunk: float, left: float, right: float) -> "Window":
        """Raises ValueError unless each is a whole number of encoder frames: the runtime divides by integers, and a
        remainder would shift every later seam."""
        samples = {}
        for name, seconds in (("chunk", chunk), ("left_context", left), ("right_context", right)):
            exact = seconds * spec.sample_rate
            frame = spec.frame_samples
            if exact < (frame if name == "chunk" else 0) or abs(exact / frame - round(exact / frame)) > 1e-6:
                raise ValueError(
                    f"wanted --{name}_seconds as a whole number of encoder frames of {frame / spec.sample_rate:g} s, "
                    f"found {seconds:g}; the nearest is {max(round(exact / frame), 1) * frame / spec.sample_rate:g}"
                )
            samples[name] = round(exact)
        return cls(samples["chunk"], samples["left_context"], samples["right_context"])


def check_genai_supports(spec: ModelSpec) -> None:
    """Raise ValueError naming what ONNX Runtime GenAI's parakeet_tdt cannot compute of this checkpoint."""
    if spec.durations[0] != 0 or min(spec.durations[1:], default=0) < 1:
        raise ValueError(
            f"durations {list(spec.durations)}: ONNX Runtime GenAI forbids index 0 after a blank and takes every other "
            "index to advance, so the first must be 0 and the rest positive"
        )
    _refuse_features("ONNX Runtime GenAI", spec.unsupported_features)


def check_fixed_supports(spec: ModelSpec, runtime: str) -> None:
    """Raise ValueError naming what onnx-asr, or sherpa-onnx, cannot compute of this checkpoint."""
    if spec.durations != tuple(range(len(spec.durations))):
        raise ValueError(
            f"durations {list(spec.durations)}: {runtime} takes a duration's index for its frames, so they must be "
            f"{list(range(len(spec.durations)))}"
        )
    wanted = {**FIXED_FEATURES, **FIXED_MELS[runtime]}
    found = {name: getattr(spec, name) for name in wanted}
    different = [
        f"{name} is {found[name]:g}, not {' or '.join(f'{value:g}' for value in values)}"
        for name, values in wanted.items()
        if not any(math.isclose(found[name], value, rel_tol=1e-6) for value in values)
    ]
    _refuse_features(runtime, (*spec.unsupported_features, *different))


def _refuse_features(runtime: str, different: tuple[str, ...]) -> None:
    if different:
        raise ValueError(
            f"{runtime} computes log-mel features one way only, and this checkpoint's differ: " + "; ".join(different)
        )


def genai_config(spec: ModelSpec, window: Window, device: str = "cpu") -> dict:
    """The content of genai_config.json.

    The joint has the decoder's session options: providers that a section of its own names are not registered
    (Config::Config in src/config.cpp fills in those of encoder and decoder alone), and it would run on the CPU.
    """
    sections = {graph.genai_section: {"filename": graph.file, **graph.name_maps()} for graph in GRAPHS}
    for graph, options in ((ENCODER, ENCODER_SESSION), (DECODER, TOKEN_SESSION)):
        sections[graph.genai_section]["session_options"] = dict(options)
    sections[ENCODER.genai_section] |= {"hidden_size": spec.encoder_dim, "num_hidden_layers": spec.encoder_layers}
    sections[DECODER.genai_section] |= {"hidden_size": spec.decoder_dim, "num_hidden_layers": spec.decoder_layers}
    if device == "cuda":
        for graph, options in ((ENCODER, CUDA_ENCODER_OPTIONS), (DECODER, {})):
            sections[graph.genai_section]["session_options"]["provider_options"] = [{"cuda": options}]
    return {
        "model": {
            "type": "parakeet_tdt",
            "vocab_size": spec.vocab_size,
            "context_length": CONTEXT_LENGTH,
            "decoder_start_token_id": spec.blank_id,
            "eos_token_id": spec.blank_id,  # what the runtime returns when the audio ends
            "blank_id": spec.blank_id,
            "tdt_durations": list(spec.durations),
            "max_symbols_per_step": NO_SYMBOL_LIMIT if spec.max_symbols is None else spec.max_symbols,
            "sample_rate": spec.sample_rate,
            "num_mels": spec.num_mels,
            "fft_size": spec.fft_size,
            "win_length": spec.win_length,
            "hop_length": spec.hop_length,
            "preemph": spec.preemphasis,
            "log_eps": spec.log_guard,
            "norm_eps": spec.norm_eps,
            "subsampling_factor": spec.subsampling_factor,
            "chunk_samples": window.chunk,
            "left_context_samples": window.left,
            "right_context_samples": window.right,
            "speech": {"config_filename": AUDIO_PROCESSOR_CONFIG},
            **sections,
        },
        "search": {"max_length": CONTEXT_LENGTH, "min_length": 0},
    }


def audio_processor_config(spec: ModelSpec) -> dict:
    """The content of audio_processor_config.json: the features in full, for consumers other than GenAI, which reads
    them from genai_config.json."""
    return {
        "model_type": "speech_features",
        "audio_params": {
            "sample_rate": spec.sample_rate,
            "n_fft": spec.fft_size,
            "hop_length": spec.hop_length,
            "n_mels": spec.num_mels,
            "window_length": spec.win_length,
            "window_type": "hann",
            "window_periodic": False,
            "fmin": 0,
            "fmax": spec.sample_rate // 2,
            "mel_scale": "slaney",
            "mel_norm": "slaney",
            "center": True,
            "mag_power": 2.0,
            "preemphasis": spec.preemphasis,
            "dither": 0.0,  # NeMo dithers in training only
            "log_zero_guard_type": "add",
            "log_zero_guard_value": spec.log_guard,
            "normalize": "per_feature",
            "normalize_eps": spec.norm_eps,
        },
    }


def onnx_asr_config(spec: ModelSpec) -> dict:
    """The content of onnx-asr's config.json."""
    return {
        "model_type": "nemo-conformer-tdt",
        "features_size": spec.num_mels,
        "subsampling_factor": spec.subsampling_factor,
        "max_tokens_per_step": NO_SYMBOL_LIMIT if spec.max_symbols is None else spec.max_symbols,
    }


def sherpa_onnx_metadata(spec: ModelSpec) -> dict[str, str]:
    """The metadata that sherpa-onnx reads from the encoder; without a number it ends the process."""
    content = {
        "model_type": "EncDecRNNTBPEModel",
        "url": "tdt",  # it takes a model for a TDT where this has "tdt" in it, and looks nowhere else
        "vocab_size": spec.vocab_size - 1,  # NeMo's count, without the blank
        "normalize_type": "per_feature",
        "feat_dim": spec.num_mels,
        "subsampling_factor": spec.subsampling_factor,
        "pred_rnn_layers": spec.decoder_layers,
        "pred_hidden": spec.decoder_dim,
    }
    return {key: str(value) for key, value in content.items()}
