"""int8 encoder products, 8-bit decoder and joint: the graphs against NumPy, then the tiny checkpoint on speech."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import optimize_encoder
from common.contract import DECODER, ENCODER, JOINT
from common.folder import MANIFEST
from common.onnx_io import save_model
from common.quantize import INT8, int8
from common.quantize.fidelity import sqnr_db
from common.quantize.methods import Format, OptimizeOptions
from common.quantize.rewrite import Stored, quantizable, quantize_weights
from common.quantize.rounding import quantize_columns
from common.run.genai import GenAI
from common.run.ort import OnnxRuntime, OrtGraph
from tests.helpers import SAMPLES

RNG = np.random.default_rng(0)
K, N = 96, 64
NAME, OTHER = "layers.0.attention.query.weight", "layers.0.attention.key.weight"  # which have no special treatment


def make_model(nodes: list, constants: dict[str, np.ndarray], opset: int = 17) -> ir.Model:
    """x [B, S, K] → y, of float32 constants."""
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "S", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in constants.items()],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8))


def int8_weights(model: ir.Model, bits: int = 8) -> dict[str, Stored]:
    """Quantize the weights of `model` in place."""
    return quantize_weights(model, dict.fromkeys(quantizable(model), Format(bits)), INT8, OptimizeOptions(), {})


def int8_model(model: ir.Model, bits: int = 8) -> ir.Model:
    int8_weights(model, bits)
    return model


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options).run(None, {"x": x})[0]


def rounded_rows(x: np.ndarray, zero: int) -> np.ndarray:
    """x [..., K] rounded to uint8 and back, with a scale for each row."""
    high, low = x.max(axis=-1, keepdims=True), x.min(axis=-1, keepdims=True)
    scale = np.maximum(high / (255 - zero), -low / zero if zero else 0)
    scale = np.where(scale == 0, 1, scale)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale


def rounded_columns(weight: np.ndarray, bits: int = 8) -> np.ndarray:
    packed = quantize_columns(weight, bits)
    return packed.codes * packed.scales


WEIGHT = RNG.standard_normal((K, N), dtype=np.float32) * np.logspace(-2, 1, N, dtype=np.float32)
LOUD_AND_QUIET = RNG.standard_normal((2, 5, K), dtype=np.float32) * np.logspace(-6, 6, 10, dtype=np.float32).reshape(
    2, 5, 1
)

# The operators that make x before the product, the code of 0 that follows from them, and the same in NumPy.
SOURCES = {
    "anything": ([helper.make_node("Identity", ["x"], ["a"])], 128, lambda x: x),
    "SiLU": (
        [helper.make_node("Sigmoid", ["x"], ["s"]), helper.make_node("Mul", ["x", "s"], ["a"])],
        int8.SILU_ZERO,
        lambda x: x / (1 + np.exp(-np.clip(x, -80, 80))),
    ),
    "ReLU": ([helper.make_node("Relu", ["x"], ["a"])], 0, lambda x: np.maximum(x, 0)),
}


@pytest.mark.parametrize("opset", [17, 18, 21])
@pytest.mark.parametrize("source", SOURCES)
def test_every_row_and_every_column_has_its_scale(source, opset):
    nodes, zero, function = SOURCES[source]
    product = helper.make_node("MatMul", ["a", NAME], ["y"])
    found = run(int8_model(make_model([*nodes, product], {NAME: WEIGHT}, opset)), LOUD_AND_QUIET)
    x = function(LOUD_AND_QUIET.astype(np.float64))
    expected = rounded_rows(x, zero) @ rounded_columns(WEIGHT)
    # One code in a thousand falls on the other side of a rounding boundary; each row and column is judged by itself.
    assert all(sqnr_db(*pair) > 45 for pair in zip(expected.reshape(10, N), found.reshape(10, N), strict=True))
    exact = x @ WEIGHT
    # Where SiLU is nearly linear, in quiet rows, it is as negative as it is positive and its codes are few.
    floor = 22 if source == "SiLU" else 33
    assert all(sqnr_db(*pair) > floor for pair in zip(exact.reshape(10, N), found.reshape(10, N), strict=True))
    rows = np.abs(exact).max(axis=-1, keepdims=True)
    assert all(
        sqnr_db(*pair) > floor - 4 for pair in zip((exact / rows).T, (found / rows).T, strict=True)
    )  # of 10 numbers


def test_the_error_of_a_weight_is_that_of_its_rounded_columns():
    model = make_model([helper.make_node("MatMul", ["x", NAME], ["y"])], {NAME: WEIGHT})
    stored = int8_weights(model, 8)[NAME]
    expected = np.sum((rounded_columns(WEIGHT, 8) - WEIGHT) ** 2) / np.sum(WEIGHT**2)
    assert stored.error == pytest.approx(expected, rel=1e-3)
    assert 1e-6 < stored.error < 1e-4


def test_rows_of_zeros_stay_zeros_and_change_no_other():
    model = int8_model(make_model([helper.make_node("MatMul", ["x", NAME], ["y"])], {NAME: WEIGHT}))
    x = RNG.standard_normal((1, 6, K), dtype=np.float32)
    x[0, 2:4] = 0
    found = run(model, x)
    assert not found[0, 2:4].any()
    np.testing.assert_array_equal(found[:, :2], run(model, x[:, :2]))
    assert not run(model, 0 * x).any()


def test_columns_of_zeros_stay_zeros():
    weight = WEIGHT.copy()
    weight[:, 3] = 0
    packed = quantize_columns(weight, 8)
    codes, scales = packed.codes, packed.scales
    assert codes.dtype == np.int8
    assert scales[3] == 0
    assert (np.abs(codes).max(axis=0)[np.arange(N) != 3] >= 63).all()
    assert np.abs(codes * scales - weight).max(axis=0) == pytest.approx(0, abs=float(scales.max()) / 2 + 1e-6)


def test_what_shares_an_input_shares_its_codes_and_factors_fold():
    nodes = [
        helper.make_node("MatMul", ["x", NAME], ["p"]),
        helper.make_node("MatMul", ["x", OTHER], ["q"]),
        helper.make_node("Mul", ["p", "half"], ["h"]),
        helper.make_node("Add", ["h", "q"], ["y"]),
    ]
    other = RNG.standard_normal((K, N), dtype=np.float32)
    model = int8_model(make_model(nodes, {NAME: WEIGHT, OTHER: other, "half": np.array(0.5)}))
    counts = Counter(node.op_type for node in model.graph)
    assert (counts["QuantizeLinear"], counts["MatMulIntegerToFloat"], counts["MatMul"]) == (1, 2, 0)
    assert counts["Mul"] == 2 + 2  # two bounds of the row scale, and it, twice; not the half
    x = RNG.standard_normal((2, 5, K), dtype=np.float32)
    assert sqnr_db(x @ (WEIGHT / 2 + other), run(model, x)) > 35


@pytest.mark.parametrize(("role", "floor"), [("attention.out", 35), ("convolution.expand", 39)])
def test_two_terms_leave_the_error_of_weights_alone(role, floor):
    name = f"layers.0.{role}.weight"
    model = int8_model(make_model([helper.make_node("MatMul", ["x", name], ["y"])], {name: WEIGHT}))
    x = RNG.standard_normal((2, 50, K), dtype=np.float32)
    exact_rows = sqnr_db(x @ rounded_columns(WEIGHT), run(model, x))
    assert (exact_rows > 70) == (role == "convolution.expand")
    assert sqnr_db(x @ WEIGHT, run(model, x)) > floor


def test_even_rows_have_one_scale():
    name = "layers.0.attention.position_sine.weight"
    model = int8_model(make_model([helper.make_node("MatMul", ["x", name], ["y"])], {name: WEIGHT}))
    assert [node.op_type for node in model.graph] == ["DynamicQuantizeLinear", "MatMulIntegerToFloat"]
    angles = RNG.standard_normal((1, 40, K // 2)) * 3
    x = np.concatenate((np.sin(angles), np.cos(angles)), axis=-1).astype(np.float32)
    assert sqnr_db(x @ WEIGHT, run(model, x)) > 38


def record_of(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text())["optimize"]


@pytest.fixture(scope="module")
def int8_folder(optimized) -> Path:
    folder = optimized("--quant_method", "int8", "--decoder_joint_precision", "int8")
    record = record_of(folder)
    assert record["weights_by_bits"] == {"8": 61}
    assert min(record["token_sqnr_db_on_noise"].values()) > 35
    return folder


def clips() -> list[np.ndarray]:
    lines = (SAMPLES / "manifest.jsonl").read_text().splitlines()
    return [SAMPLES / json.loads(line)["audio_filepath"] for line in lines]


def test_only_stock_operators_and_no_float_matrices(tiny_export, int8_folder):
    counts = Counter(node.op_type for node in onnx.load(int8_folder / ENCODER.file).graph.node)
    exported = Counter(node.op_type for node in onnx.load(tiny_export / ENCODER.file).graph.node)
    two_terms, layers = 2, 5
    assert counts["MatMulIntegerToFloat"] == 61 + two_terms * layers
    assert exported["MatMul"] - counts["MatMul"] == 61
    assert counts["SkipLayerNormalization"] == 0  # slower than what it stands for
    assert counts["LayerNormalization"] == exported["LayerNormalization"]
    decoder = Counter(node.op_type for node in onnx.load(int8_folder / DECODER.file).graph.node)
    assert decoder["DynamicQuantizeLSTM"] == 2
    assert decoder["LSTM"] == 0
    joint = onnx.load(int8_folder / JOINT.file)
    assert "MatMulNBits" in {node.op_type for node in joint.graph.node}
    embedding = 8193 * (64 + 4)  # bytes: codes, and a scale for each row
    assert DECODER.bytes_in(int8_folder) < embedding + 130_000
    for graph in (ENCODER, DECODER, JOINT):
        before, after = (graph.bytes_in(folder) for folder in (tiny_export, int8_folder))
        assert after < 0.6 * before


def test_error_does_not_grow_with_length_or_batch(tiny_export, int8_folder):
    genai = GenAI(tiny_export)
    samples = np.concatenate([genai.config.read_audio(path) for path in clips()])
    reference, found = OrtGraph(tiny_export, ENCODER), OrtGraph(int8_folder, ENCODER)
    ratios = []
    for seconds in (5, 20, 60):
        features = genai.features(np.resize(samples, seconds * genai.config.sample_rate))[None]
        length = np.array([features.shape[2]])
        ratios.append(sqnr_db(reference(features, length)[0], found(features, length)[0]))
    assert min(ratios) > 35
    assert ratios[-1] > ratios[0] - 1

    short = features[:, :, :500]
    batch = np.concatenate((features[:, :, :1000], np.pad(short, ((0, 0), (0, 0), (0, 500)), constant_values=50)))
    (outputs, lengths), (alone, _) = found(batch, np.array([1000, 500])), found(short, np.array([500]))
    valid = outputs[1:, :, : lengths[1]]
    # Frames beyond a clip's end do not affect it; but the scale of positions is that of the longest clip.
    assert sqnr_db(alone, valid) > 40


def test_the_embedding_is_looked_up_in_codes_times_the_scale_of_a_row(tiny_export, int8_folder):
    exported = numpy_helper.to_array(
        next(tensor for tensor in onnx.load(tiny_export / DECODER.file).graph.initializer if "embedding" in tensor.name)
    )
    proto = onnx.load(int8_folder / DECODER.file)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    codes, scales = constants["embedding.weight.codes"], constants["embedding.weight.scales"]
    assert (codes.dtype, codes.shape, scales.shape) == (np.int8, exported.shape, (len(exported), 1))
    assert not codes[-1].any()  # of the blank
    largest = np.abs(exported).max(axis=1, keepdims=True)
    assert (np.abs(codes * scales - exported) <= largest / 253).all()
    looked_up = [node.input[0] for node in proto.graph.node if node.op_type == "Gather"]
    assert looked_up == ["embedding.weight.codes", "embedding.weight.scales"]
    report = json.loads((int8_folder / "optimization_report.json").read_text())
    row = next(row for row in report["tensors"] if row["name"] == "embedding.weight")
    assert (row["bits"], row["bytes_before"], row["bytes_after"]) == (8, exported.nbytes, codes.nbytes + scales.nbytes)


def test_transcripts_and_genai(tiny_export, int8_folder):
    reference, raw, genai = OnnxRuntime(tiny_export), OnnxRuntime(int8_folder), GenAI(int8_folder)
    for path in clips():
        samples = genai.config.read_audio(path)
        features = genai.features(samples)
        tokens = raw.transcribe(features).tokens
        assert tokens == reference.transcribe(features).tokens
        assert tokens == genai.transcribe(samples)


def test_the_full_range_wants_int8(tiny_export, tmp_path, capsys):
    flags = ["--model_dir", str(tiny_export), "--output_dir", str(tmp_path / "out"), "--full_range"]
    assert optimize_encoder.main(flags) == 2
    assert (
        "--full_range needs --quant_method int8 or --decoder_joint_precision int8; --weight_bits 4 is exact"
        in capsys.readouterr().err
    )


def test_the_decoder_alone(optimized):
    record = record_of(optimized("--skip_quantization", "--decoder_joint_precision", "int8"))
    assert record["flags"]["decoder_joint_precision"] == "int8"
    assert record["sqnr_db_on_noise"] > 100
    assert set(record["token_sqnr_db_on_noise"]) == {"decoder", "joint"}


def test_external_data_is_written_whole(tmp_path):
    """A round trip through files, as optimize_encoder.py writes them."""
    model = int8_model(make_model([helper.make_node("MatMul", ["x", NAME], ["y"])], {NAME: WEIGHT}))
    x = RNG.standard_normal((1, 4, K), dtype=np.float32)
    expected = run(model, x)
    save_model(model, tmp_path / "model.onnx")
    np.testing.assert_array_equal(ort.InferenceSession(tmp_path / "model.onnx").run(None, {"x": x})[0], expected)
