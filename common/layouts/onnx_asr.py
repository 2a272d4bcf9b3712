"""The folder of onnx-asr 0.12.0 (src/onnx_asr/asr.py, src/onnx_asr/models/nemo.py).

onnx-asr brings its own features. Other programs that read its folders, such as transcribe-rs and parakeet.js, take the
graph `nemo128.onnx` from the folder. `-q METHOD` makes onnx-asr look for encoder-model.METHOD.onnx.
"""

from pathlib import Path
from typing import Any

from common.checkpoint.spec import ModelSpec
from common.cli import EXPORT_COMMAND
from common.contract import DECODER, ENCODER, JOINT, Tensor, View
from common.layouts.features import FIXED_FEATURES, NO_SYMBOL_LIMIT, check_fixed
from common.layouts.layout import Layout, Window, register
from common.layouts.log_mel import log_mel_graph

ONNX_ASR_CONFIG = "config.json"
# A page that transcribes in a browser with the npm package parakeet.js; to be put beside the files of the folder.
BROWSER_PAGE = Path(__file__).with_name("parakeet_js.html")
BROWSER_PACKAGES = ("parakeet.js@1.4.4", "onnxruntime-web@1.24.1")
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


def check_onnx_asr_supports(spec: ModelSpec) -> None:
    """Raise ValueError naming what onnx-asr cannot compute of this checkpoint."""
    check_fixed(spec, "onnx-asr", FEATURES)


def onnx_asr_config(spec: ModelSpec) -> dict[str, Any]:
    """The content of onnx-asr's config.json."""
    return {
        "model_type": "nemo-conformer-tdt",
        "features_size": spec.num_mels,
        "subsampling_factor": spec.subsampling_factor,
        "max_tokens_per_step": NO_SYMBOL_LIMIT if spec.max_symbols is None else spec.max_symbols,
    }


def _configs(spec: ModelSpec, window: Window, device: str) -> dict[str, dict[str, Any]]:
    return {ONNX_ASR_CONFIG: onnx_asr_config(spec)}


ONNX_ASR = register(
    Layout(
        runtime="onnx-asr",
        packages=("onnx-asr", "onnxruntime", "soundfile"),
        graphs=ONNX_ASR_GRAPHS,
        config_files=(ONNX_ASR_CONFIG,),
        vocabulary=("vocab.txt",),
        vocabulary_command=EXPORT_COMMAND,
        check=check_onnx_asr_supports,
        configs=_configs,
        feature_graphs=lambda spec: {f"nemo{spec.num_mels}.onnx": log_mel_graph(spec)},
        feature_files=("nemo80.onnx", "nemo128.onnx"),
        named_after_method=True,
        page=BROWSER_PAGE,
        page_packages=BROWSER_PACKAGES,
        usage="""\
import onnx_asr
import soundfile

model = onnx_asr.load_model("nemo-conformer-tdt", "{folder}")
samples, sample_rate = soundfile.read("{audio}", dtype="float32", always_2d=True)
# The average of the channels. onnx-asr resamples from 8, 11.025, 16, 22.05, 24, 32, 44.1 and 48 kHz.
print(model.recognize(samples.mean(axis=1), sample_rate=sample_rate))
""",
    )
)
