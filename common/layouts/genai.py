"""The folder of ONNX Runtime GenAI: genai_config.json, audio_processor_config.json, and what GenAI cannot compute.

Keys and their meaning: src/config.cpp, src/models/parakeet.cpp and parakeet_processor.cpp of onnxruntime-genai 0.18.0.
GenAI does not accept unknown keys, so provenance goes into manifest.json.
"""

from collections.abc import Mapping
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto

from common.checkpoint.spec import ModelSpec
from common.contract import AUDIO_PROCESSOR_CONFIG, DECODER, ENCODER, GENAI_CONFIG, GRAPHS
from common.folder import json_text
from common.layouts.layout import NO_SYMBOL_LIMIT, Features, Layout
from common.layouts.log_mel import check_log_mel

# The runtime stops at this number. One token for each frame of 80 ms would reach it after 2.9 hours of audio.
CONTEXT_LENGTH = 131072  # tokens
# The threads that GenAI is told to use. Its own default is half of those that the system counts (see
# CreateSessionOptionsFromConfig in src/models/model.cpp), which is right where two hardware threads share a core and
# wrong elsewhere; 0 is ONNX Runtime's default, one for each core. A token is a single row and takes a few hundred
# microseconds: threads that spin between two tokens get in the way of the encoder and of each other. Measured by
# benchmarks/decoding.py on 2 cores: 60 s of audio take 8 s instead of 15 s.
ENCODER_SESSION = {"intra_op_num_threads": 0}
TOKEN_SESSION = {"intra_op_num_threads": 2, "session.intra_op.allow_spinning": "0"}
# By default cuDNN tries every algorithm on each new shape, and nearly every clip has a new shape. sherpa-onnx chooses
# HEURISTIC as well.
CUDA_ENCODER_OPTIONS = {"cudnn_conv_algo_search": "HEURISTIC"}


def genai_config(spec: ModelSpec, window: Mapping[str, int], device: str = "cpu") -> dict[str, Any]:
    """The content of genai_config.json. window: chunk_samples, left_context_samples and right_context_samples.

    The joint uses the decoder's session options. Providers named in a section of its own would not be registered
    (Config::Config in src/config.cpp fills them in for the encoder and decoder only), and it would run on the CPU.
    """
    sections: dict[str, dict[str, Any]] = {
        graph.genai_section: {
            "filename": graph.file,
            "inputs": {tensor.genai_key: tensor.name for tensor in graph.inputs},
            "outputs": {tensor.genai_key: tensor.name for tensor in graph.outputs},
        }
        for graph in GRAPHS
    }
    for graph, options in ((ENCODER, ENCODER_SESSION), (DECODER, TOKEN_SESSION)):
        sections[graph.genai_section]["session_options"] = dict(options)
    sections[ENCODER.genai_section] |= {"hidden_size": spec.encoder_dim, "num_hidden_layers": spec.encoder_layers}
    sections[DECODER.genai_section] |= {"hidden_size": spec.decoder_dim, "num_hidden_layers": spec.decoder_layers}
    if device == "cuda":
        for graph, cuda_options in ((ENCODER, CUDA_ENCODER_OPTIONS), (DECODER, {})):
            sections[graph.genai_section]["session_options"]["provider_options"] = [{"cuda": cuda_options}]
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
            **window,
            "speech": {"config_filename": AUDIO_PROCESSOR_CONFIG},
            **sections,
        },
        "search": {"max_length": CONTEXT_LENGTH, "min_length": 0},
    }


def audio_processor_config(spec: ModelSpec) -> dict[str, Any]:
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


def make_files(
    spec: ModelSpec, tokenizer: ModelProto, features: Features, window: Mapping[str, int], device: str
) -> dict[str, bytes]:
    """genai_config.json and audio_processor_config.json.

    Raises ValueError naming what ONNX Runtime GenAI's parakeet_tdt cannot compute of this checkpoint.
    """
    if spec.durations[0] != 0 or min(spec.durations[1:], default=0) < 1:
        raise ValueError(
            f"durations {list(spec.durations)}: ONNX Runtime GenAI forbids index 0 after a blank and takes every "
            "other index to advance, so the first must be 0 and the rest positive"
        )
    # GenAI pads half an FFT before the audio and takes windows as long as they are whole. Of a whole number of hops
    # it makes a frame for each, as NeMo does, only within these limits. Another number changes every feature.
    if not spec.win_length - spec.hop_length <= spec.fft_size // 2 < spec.win_length:
        raise ValueError(
            f"an FFT of {spec.fft_size}, a window of {spec.win_length}, a hop of {spec.hop_length} samples: ONNX "
            "Runtime GenAI computes another number of frames than NeMo unless half the FFT is less than the window "
            "by a hop at most"
        )
    check_log_mel("ONNX Runtime GenAI", spec.unsupported_features)
    contents = {
        GENAI_CONFIG: genai_config(spec, window, device),
        AUDIO_PROCESSOR_CONFIG: audio_processor_config(spec),
    }
    return {name: json_text(content).encode() for name, content in contents.items()}


# export_tokenizer.py writes the vocabulary.
GENAI = Layout(
    runtime="genai",
    packages=("onnxruntime-genai", "soundfile", "soxr"),
    cuda_package="onnxruntime-genai-cuda",
    graphs=GRAPHS,
    config_files=(GENAI_CONFIG, AUDIO_PROCESSOR_CONFIG),
    vocabulary=("vocab.txt", "tokenizer.json", "tokenizer_config.json"),
    make_files=make_files,
    usage="""\
import io
import onnxruntime_genai as og
import soundfile
import soxr

samples, sample_rate = soundfile.read("{audio}", dtype="float32", always_2d=True)
mono = soxr.resample(samples.mean(axis=1), sample_rate, {sample_rate})
wav = io.BytesIO()  # a file in memory, cut to whole hops, as NeMo cuts audio
soundfile.write(wav, mono[: len(mono) // {hop_length} * {hop_length}], {sample_rate}, "FLOAT", format="WAV")
model = og.Model("{folder}")
processor, tokenizer = model.create_multimodal_processor(), og.Tokenizer(model)
generator = og.Generator(model, og.GeneratorParams(model))
generator.set_inputs(processor("", audios=og.Audios.open_bytes(wav.getvalue())))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
""",
)
