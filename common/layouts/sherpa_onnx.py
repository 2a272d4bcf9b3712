"""The folder of sherpa-onnx 2.0.1 (sherpa-onnx/csrc/offline-transducer-nemo-model.cc)."""

from collections.abc import Mapping

from sentencepiece.sentencepiece_model_pb2 import ModelProto

from common.checkpoint.spec import ModelSpec
from common.checkpoint.tokenizer import bpe_text, tokens_text
from common.contract import DECODER, ENCODER, JOINT, Tensor, View
from common.layouts.layout import Features, Layout
from common.layouts.log_mel import check_fixed

# sherpa-onnx passes tensors by position, whatever their names (sherpa-onnx/csrc/offline-transducer-nemo-model.cc). It
# feeds 32-bit tokens and puts time last everywhere (offline-transducer-greedy-search-nemo-decoder.cc).
SHERPA_ONNX_GRAPHS = (
    View("encoder", ENCODER.inputs, ENCODER.outputs, parts=(ENCODER,)),
    View(
        "decoder",
        (
            Tensor("targets", ("B", "U"), dtype="int32"),
            Tensor("target_length", ("B",), dtype="int32", of="target_length_orig"),
            Tensor("h_in", ("L", "B", "H")),
            Tensor("c_in", ("L", "B", "H")),
        ),
        (
            Tensor("outputs", ("B", "H", "U"), of="decoder_output"),
            Tensor("prednet_lengths", ("B",), dtype="int32", of="target_length"),
            Tensor("h_out", ("L", "B", "H")),
            Tensor("c_out", ("L", "B", "H")),
        ),
        parts=(DECODER,),
    ),
    View(
        "joiner",
        (
            Tensor("encoder_outputs", ("B", "D", "S"), of="encoder_output"),
            Tensor("decoder_outputs", ("B", "H", "U"), of="decoder_output"),
        ),
        (Tensor("outputs", ("B", "S", "U", "V+K"), of="joint_output"),),
        parts=(JOINT,),
    ),
)


def make_files(
    spec: ModelSpec, tokenizer: ModelProto, features: Features, window: Mapping[str, int], device: str
) -> dict[str, bytes]:
    """tokens.txt, and bpe.vocab for hotwords. Raises ValueError naming what sherpa-onnx cannot compute."""
    check_fixed(spec, "sherpa-onnx")
    return {"tokens.txt": tokens_text(tokenizer).encode(), "bpe.vocab": bpe_text(tokenizer).encode()}


def metadata(spec: ModelSpec) -> dict[str, str]:
    """The configuration, which sherpa-onnx reads from the encoder; it ends the process where a number is missing."""
    content = {
        "model_type": "EncDecRNNTBPEModel",
        "url": "tdt",  # sherpa-onnx recognizes a TDT model by "tdt" in this value, and by nothing else
        "vocab_size": spec.vocab_size - 1,  # NeMo's count, without the blank
        "normalize_type": "per_feature",
        "feat_dim": spec.num_mels,
        "subsampling_factor": spec.subsampling_factor,
        "pred_rnn_layers": spec.decoder_layers,
        "pred_hidden": spec.decoder_dim,
    }
    return {key: str(value) for key, value in content.items()}


SHERPA_ONNX = Layout(
    runtime="sherpa-onnx",
    packages=("sherpa-onnx", "soundfile"),
    graphs=SHERPA_ONNX_GRAPHS,
    vocabulary=("tokens.txt", "bpe.vocab"),
    make_files=make_files,
    metadata=metadata,
    usage="""\
import sherpa_onnx
import soundfile

files = {{name: f"{folder}/{{name}}.onnx" for name in ("encoder", "decoder", "joiner")}}
recognizer = sherpa_onnx.OfflineRecognizer.from_transducer(
    **files, tokens="{folder}/tokens.txt", model_type="nemo_transducer", num_threads=4
)
stream = recognizer.create_stream()
samples, sample_rate = soundfile.read("{audio}", dtype="float32", always_2d=True)
stream.accept_waveform(sample_rate, samples.mean(axis=1))  # the average of the channels, at any sample rate
recognizer.decode_stream(stream)
print(stream.result.text)
""",
)
