"""The folder of onnx-asr 0.12.0 (src/onnx_asr/asr.py, src/onnx_asr/models/nemo.py).

onnx-asr brings its own features. Other programs that read its folders, such as transcribe-rs and parakeet.js, take the
graph `nemo128.onnx` from the folder. `-q METHOD` makes onnx-asr look for encoder-model.METHOD.onnx.
"""

from collections.abc import Mapping
from pathlib import Path

from sentencepiece.sentencepiece_model_pb2 import ModelProto

from common.checkpoint.spec import ModelSpec
from common.checkpoint.tokenizer import tokens_text
from common.contract import DECODER, ENCODER, JOINT, Tensor, View
from common.folder import json_text
from common.layouts.layout import NO_SYMBOL_LIMIT, Features, Layout
from common.layouts.log_mel import FIXED_FEATURES, check_features, check_fixed, log_mel_graph

ONNX_ASR_CONFIG = "config.json"
# A page that transcribes in a browser with the npm package parakeet.js; to be put beside the files of the folder.
BROWSER_PAGE = Path(__file__).with_name("parakeet_js.html")
FEATURES = {**FIXED_FEATURES, "num_mels": (80.0, 128.0)}

# onnx-asr asks for tensors by these names (src/onnx_asr/models/nemo.py of 0.12.0); they and the 32-bit tokens are those
# of NeMo's own export. parakeet.js feeds 32-bit tokens only, and onnx-asr feeds whichever type the graph declares.
ONNX_ASR_GRAPHS = (
    View("encoder-model", ENCODER.inputs, ENCODER.outputs, parts=(ENCODER,)),
    View(
        "decoder_joint-model",
        (
            Tensor("encoder_outputs", ("B", "D", "S"), of="encoder_output"),
            Tensor("targets", ("B", "U"), dtype="int32"),
            Tensor("target_length", ("B",), dtype="int32", of="target_length_orig"),
            Tensor("input_states_1", ("L", "B", "H"), of="h_in"),
            Tensor("input_states_2", ("L", "B", "H"), of="c_in"),
        ),
        (
            Tensor("outputs", ("B", "S", "U", "V+K"), of="joint_output"),
            Tensor("prednet_lengths", ("B",), dtype="int64", of="target_length"),
            Tensor("output_states_1", ("L", "B", "H"), of="h_out"),
            Tensor("output_states_2", ("L", "B", "H"), of="c_out"),
        ),
        parts=(DECODER, JOINT),
    ),
)


def make_files(
    spec: ModelSpec, tokenizer: ModelProto, features: Features, window: Mapping[str, int], device: str
) -> dict[str, bytes]:
    """config.json, vocab.txt, and the graph of the features for programs that read onnx-asr's folders.

    Raises ValueError naming what onnx-asr cannot compute, CheckError as check_features does.
    """
    check_fixed(spec, "onnx-asr", FEATURES)
    graph = log_mel_graph(spec)
    feature_file = f"nemo{spec.num_mels}.onnx"  # the name in onnx-asr
    check_features(feature_file, graph, spec, features)
    config = {
        "model_type": "nemo-conformer-tdt",
        "features_size": spec.num_mels,
        "subsampling_factor": spec.subsampling_factor,
        "max_tokens_per_step": NO_SYMBOL_LIMIT if spec.max_symbols is None else spec.max_symbols,
    }
    vocabulary = tokens_text(tokenizer).encode()
    return {ONNX_ASR_CONFIG: json_text(config).encode(), feature_file: graph, "vocab.txt": vocabulary}


ONNX_ASR = Layout(
    runtime="onnx-asr",
    packages=("onnx-asr", "onnxruntime", "soundfile"),
    graphs=ONNX_ASR_GRAPHS,
    config_files=(ONNX_ASR_CONFIG,),
    optional_files=("nemo80.onnx", "nemo128.onnx"),  # which of them is by the number of mel bins
    vocabulary=("vocab.txt",),
    make_files=make_files,
    browser_page=BROWSER_PAGE,
    usage="""\
import onnx_asr
import soundfile

model = onnx_asr.load_model("nemo-conformer-tdt", "{folder}")
samples, sample_rate = soundfile.read("{audio}", dtype="float32", always_2d=True)
# The average of the channels. onnx-asr resamples from 8, 11.025, 16, 22.05, 24, 32, 44.1 and 48 kHz.
print(model.recognize(samples.mean(axis=1), sample_rate=sample_rate))
""",
)
