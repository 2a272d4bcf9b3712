"""int8 products of weights that the file stores in 4 bits: the tensors, the graph, the runtimes, the size budget."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper, version_converter

import optimize_encoder
from common.cli import CheckError
from common.contract import ENCODER
from common.folder import MANIFEST
from common.onnx_io import load, save_model
from common.quantize import INT8
from common.quantize.fidelity import compare, sqnr_db
from common.quantize.int8 import INT4_IR_VERSION, INT4_OPSET, lift_opset, packed_tensor
from common.quantize.methods import Format, OptimizeOptions
from common.quantize.rewrite import quantizable, quantize_weights
from common.quantize.rounding import SORTED_DAMPING, InputMoments, Packed, fit_columns, quantize_columns
from common.report.card import CARD
from common.run.audio import read_clips
from common.run.genai import GenAI
from common.run.ort import OrtGraph
from tests.helpers import CLIPS, MATRICES, PROGRAMS, SAMPLES, printed_by, profiled

RNG = np.random.default_rng(5)
SAMPLE_LIST = SAMPLES / "manifest.jsonl"
NAME = "layers.0.attention.query.weight"
UNPACKED = ".unpacked"  # what the Cast of a weight is called after it
FLAGS = ("--quant_method", "int8", "--weight_bits", "4")
CALIBRATED = ("--calibration_manifest", str(SAMPLE_LIST))


def optimize(source: Path, target: Path, *flags: str) -> dict:
    assert optimize_encoder.main(["--model_dir", str(source), "--output_dir", str(target), *flags]) == 0
    return json.loads((target / MANIFEST).read_text())["optimize"]


@pytest.fixture(scope="module")
def calibrated(tiny_runtimes, optimized) -> Path:
    """Folders for every runtime, with weights fitted to the bundled clips."""
    return optimized(*FLAGS, *CALIBRATED, source=tiny_runtimes)


@pytest.fixture(scope="module")
def plain(optimized) -> Path:
    folder = optimized(*FLAGS)
    assert json.loads((folder / MANIFEST).read_text())["optimize"]["weights_by_bits"] == {"4": 61}
    return folder


def weight_of(packed: Packed) -> np.ndarray:
    """The weight [K, N] that codes and scales stand for."""
    return packed.codes * packed.scales


def fitted_columns(weight: np.ndarray, bits: int, x: np.ndarray) -> Packed:
    """The weight [K, N] fitted to inputs [R, K]."""
    fitted, became = fit_columns(weight, bits, InputMoments(x.T @ x, strongest_first=True))
    np.testing.assert_array_equal(became, weight_of(fitted))
    return fitted


# ---- tensors


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 4), (7, 3), (16,), (0,)])
def test_packed_codes_are_what_onnx_reads(shape, tmp_path):
    codes = RNG.integers(-8, 8, shape).astype(np.int8)
    tensor = packed_tensor("w", codes, ir.DataType.INT4)
    assert tensor.nbytes == -(-codes.size // 2)
    proto = ir.to_proto(tensor)
    assert proto.data_type == TensorProto.INT4
    np.testing.assert_array_equal(numpy_helper.to_array(proto).astype(np.int8), codes)


def test_every_code_is_at_its_place():
    codes = np.array([[-8, 7, 0], [-1, 1, 3]])
    assert packed_tensor("w", codes, ir.DataType.INT4).tobytes() == bytes([0x78, 0xF0, 0x31])


@pytest.mark.parametrize("name", MATRICES)
def test_codes_stay_in_four_bits_and_both_ends_are_used(name):
    weight = MATRICES[name]
    x = (RNG.standard_normal((400, 60)) @ RNG.standard_normal((60, len(weight)))).astype(np.float32)
    rounded = quantize_columns(weight, 4)
    fitted = fitted_columns(weight, 4, x)
    for packed in (rounded, fitted):
        assert packed.codes.min() == -8
        assert packed.codes.max() == 7 if name != "off-centre" else packed.codes.max() <= 7
        assert packed.error == pytest.approx(np.sum((weight_of(packed) - weight) ** 2) / np.sum(weight**2), rel=1e-3)
    errors = [np.sum((x @ (weight_of(packed) - weight)) ** 2) for packed in (rounded, fitted)]
    assert 3 * errors[1] < errors[0]
    absmax = np.abs(weight).max(axis=0) / 7
    assert rounded.error < 0.95 * np.sum((np.rint(weight / absmax) * absmax - weight) ** 2) / np.sum(weight**2)


def test_a_code_beyond_the_range_is_cut_to_its_end():
    weight = np.full((64, 1), 0.1, np.float32) * np.sign(RNG.standard_normal((64, 1))).astype(np.float32)
    weight[5] = 10  # one loud number: worth keeping
    assert np.abs(weight_of(quantize_columns(weight, 4))[5] - 10) < 0.1
    weight[:, 0] = np.linspace(-1, 1, 64)
    packed = quantize_columns(weight, 4)
    assert np.abs(weight_of(packed) - weight).max() < 1.5 * np.abs(packed.scales[0])


def test_columns_and_rows_of_zeros_stay_zeros():
    weight = MATRICES["gaussian"].copy()
    weight[:, 3] = 0
    x = RNG.standard_normal((100, len(weight)), dtype=np.float32)
    x[:, 7] = 0  # an input that is always zero
    for packed in (quantize_columns(weight, 4), fitted_columns(weight, 4, x)):
        assert not weight_of(packed)[:, 3].any()
        assert np.isfinite(weight_of(packed)).all()
    assert np.isfinite(weight_of(fitted_columns(weight, 4, np.zeros((3, len(weight)), np.float32)))).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_order_of_rows_does_not_show_in_the_result(bits):
    """Every row gets its own codes, whatever the order in which the rows were rounded."""
    weight = MATRICES["gaussian"]
    x = RNG.standard_normal((500, len(weight)), dtype=np.float32) * np.logspace(-1, 1, len(weight), dtype=np.float32)
    packed = fitted_columns(weight, bits, x)
    assert sqnr_db(x @ weight, x @ weight_of(packed)) > {4: 18, 8: 40}[bits]


def test_fitted_scales_are_those_of_least_error_in_the_product():
    weight = MATRICES["gaussian"]
    x = (RNG.standard_normal((400, 60)) @ RNG.standard_normal((60, len(weight)))).astype(np.float32)
    packed = fitted_columns(weight, 4, x)
    smaller, fitted, larger = (
        np.sum((x @ (weight - factor * weight_of(packed))) ** 2, axis=0) for factor in (0.98, 1, 1.02)
    )
    assert np.all(fitted < smaller)
    assert np.all(fitted < larger)


def test_sorted_moments_are_solved_in_the_order_of_the_product():
    x = RNG.standard_normal((300, 40)) @ RNG.standard_normal((40, 40)) * np.logspace(-1, 1, 40)
    moments, right = (x.T @ x).astype(np.float32), RNG.standard_normal((40, 5), dtype=np.float32)
    damped = x.T @ x + SORTED_DAMPING * np.mean(np.sum(x * x, axis=0)) * np.eye(40)
    solution = InputMoments(moments, strongest_first=True).solve(right)
    np.testing.assert_allclose(damped @ solution, right, atol=1e-3)


def test_what_is_missing_is_made_up_for_and_the_error_is_that_of_the_weight():
    weight = MATRICES["gaussian"]
    x = RNG.standard_normal((500, len(weight)), dtype=np.float32)
    factors = RNG.uniform(0.7, 1.4, (len(weight), 1)).astype(np.float32)
    damped = x.T @ x + SORTED_DAMPING * np.mean(np.sum(x * x, axis=0)) * np.eye(len(weight), dtype=np.float32)
    missing = factors * (damped @ (weight * factors))  # which as much again makes up for
    fitted, became = fit_columns(weight, 8, InputMoments(x.T @ x, strongest_first=True), factors, missing)
    assert sqnr_db(2 * weight, became) > 30
    np.testing.assert_allclose(weight_of(fitted), became * factors, rtol=1e-5)
    assert fitted.error == pytest.approx(1, abs=0.05)


# ---- graphs


def toy(opset: int, nodes: list, constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 6, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 6, "N"])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


OLD_OPERATORS = [
    helper.make_node("ReduceMax", ["x"], ["high"], axes=[-1], keepdims=1),
    helper.make_node("ReduceMin", ["x"], ["low"], axes=[1, 2], keepdims=1),
    helper.make_node("ReduceMean", ["x"], ["all"], keepdims=1),
    helper.make_node("Split", ["x"], ["first", "second"], axis=2),
    helper.make_node("Transpose", ["first"], ["turned"], perm=[0, 2, 1]),
    helper.make_node("MatMul", ["turned", "second"], ["square"]),
    helper.make_node("MatMul", ["second", "square"], ["product"]),
    helper.make_node("Sum", ["high", "low", "all", "product"], ["sum"]),
    helper.make_node("Split", ["sum", "parts"], ["y", "rest"], axis=2),
]


def run(proto: onnx.ModelProto, x: np.ndarray, **options) -> np.ndarray:
    session = ort.SessionOptions()
    session.log_severity_level = 3
    for name, value in options.items():
        setattr(session, name, value)
    return ort.InferenceSession(proto.SerializeToString(), session).run(None, {"x": x})[0]


def test_a_lifted_graph_computes_the_same_as_onnx_converts_it():
    x = RNG.standard_normal((3, 6, 64), dtype=np.float32)
    proto = toy(17, OLD_OPERATORS, {"parts": np.array([20, 12])})
    model = ir.from_proto(proto)
    lift_opset(model, INT4_OPSET, INT4_IR_VERSION)
    lifted = ir.to_proto(model)
    onnx.checker.check_model(lifted, full_check=True)
    assert (lifted.opset_import[0].version, lifted.ir_version) == (21, 10)
    np.testing.assert_array_equal(run(lifted, x), run(proto, x))
    converted = version_converter.convert_version(proto, INT4_OPSET)
    np.testing.assert_array_equal(run(lifted, x), run(converted, x))
    again = ir.to_proto(model).SerializeToString()
    lift_opset(model, INT4_OPSET, INT4_IR_VERSION)
    assert ir.to_proto(model).SerializeToString() == again


def test_the_exported_encoder_lifted_is_bit_equal(tiny_export, tmp_path):
    model = load(tiny_export / ENCODER.file)
    lift_opset(model, INT4_OPSET, INT4_IR_VERSION)
    save_model(model, tmp_path / ENCODER.file)
    onnx.checker.check_model(tmp_path / ENCODER.file, full_check=True)
    x = RNG.standard_normal((2, 128, 333), dtype=np.float32)
    length = np.array([333, 200])
    for one, other in zip(*(OrtGraph(folder, ENCODER)(x, length) for folder in (tiny_export, tmp_path)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("opset", [17, 18, 21])
def test_the_product_is_that_of_rounded_rows_and_four_bits(opset):
    weight = MATRICES["gaussian"][:64]
    proto = toy(opset, [helper.make_node("MatMul", ["x", NAME], ["y"])], {NAME: weight})
    model = ir.from_proto(proto)
    quantize_weights(model, dict.fromkeys(quantizable(model), Format(4)), INT8, OptimizeOptions(), {})
    lifted = ir.to_proto(model)
    assert lifted.opset_import[0].version == INT4_OPSET
    x = RNG.standard_normal((2, 6, 64), dtype=np.float32)
    scale = np.maximum(x.max(axis=-1) / 127, -x.min(axis=-1) / 128)[..., None]
    rows = np.clip(np.rint(x / scale), -128, 127) * scale
    reference = rows @ weight_of(quantize_columns(weight, 4))
    disabled = {"graph_optimization_level": ort.GraphOptimizationLevel.ORT_DISABLE_ALL}
    for options in ({}, disabled):  # folded, and not
        assert sqnr_db(reference, run(lifted, x, **options)) > 50


# ---- folders


def test_the_file_holds_half_a_byte_a_weight(tiny_export, plain):
    proto = onnx.load(plain / ENCODER.file)
    assert (proto.opset_import[0].version, proto.ir_version) == (INT4_OPSET, INT4_IR_VERSION)
    codes = [tensor for tensor in proto.graph.initializer if tensor.name.endswith(".codes")]
    assert {tensor.data_type for tensor in codes} == {TensorProto.INT4}
    weights = sum(int(np.prod(tensor.dims)) for tensor in codes)
    scales = sum(4 * tensor.dims[1] for tensor in codes)
    data = (plain / ENCODER.data_file).stat().st_size
    assert weights > 1.9e6
    assert weights / 2 < data < weights / 2 + scales + 80_000  # what stays float32, and no padding to speak of
    report = json.loads((plain / "optimization_report.json").read_text())
    sizes = report["components"]["encoder"]["optimized"]
    assert sizes["codes"] == weights // 2
    assert sum(sizes.values()) == sum((plain / file).stat().st_size for file in ENCODER.files)
    assert "two terms" not in proto.doc_string
    assert Counter(node.op_type for node in proto.graph.node)["MatMulIntegerToFloat"] == 61


def test_manifest_card_and_advice_say_it(plain, optimized):
    record = json.loads((plain / MANIFEST).read_text())["optimize"]
    assert record["flags"]["weight_bits"] == 4
    assert record["runs_as"].startswith("4 bits in the file, products of 8-bit integers")
    text = (plain / CARD).read_text()
    assert "61 at 4 bits" in text
    assert "(the graphs need ONNX Runtime 1.23 or newer)" in text
    assert "4 bits in the file, products of 8-bit integers when it runs: ONNX Runtime 1.23 or newer" in text
    assert "--weight_bits 4" in text
    assert "products of 8-bit integers" in (plain / "optimization_report.html").read_text()
    assert "without calibration 4 bits lose more" in printed_by(plain)
    assert "without calibration" not in printed_by(optimized(*FLAGS, *CALIBRATED))


def dumped(folder: Path, path: Path, level: ort.GraphOptimizationLevel) -> onnx.ModelProto:
    """The graph that this ONNX Runtime runs."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{path.name}.data")
    ort.InferenceSession(folder / ENCODER.file, options, providers=["CPUExecutionProvider"])
    return onnx.load(path)


def test_what_runs_is_folded_and_can_be_saved(plain, tmp_path):
    level = ort.GraphOptimizationLevel
    saved = dumped(plain, tmp_path / ENCODER.file, level.ORT_ENABLE_ALL)
    made_by = {output: node.op_type for node in saved.graph.node for output in node.output}
    constants = {tensor.name: tensor for tensor in saved.graph.initializer}
    products = [node for node in saved.graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(products) == 61
    for node in products:
        assert node.input[1] not in made_by
        assert constants[node.input[1]].data_type == TensorProto.INT8
    raw = dumped(plain, tmp_path / "raw.onnx", level.ORT_DISABLE_ALL)
    casts = {node.output[0] for node in raw.graph.node if node.op_type == "Cast"}
    assert sum(node.input[1] in casts for node in raw.graph.node if node.op_type == "MatMulIntegerToFloat") == 61
    x, length = RNG.standard_normal((1, 128, 300), dtype=np.float32), np.array([300])
    np.testing.assert_array_equal(*(OrtGraph(folder, ENCODER)(x, length)[0] for folder in (plain, tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("runtime", PROGRAMS)
def test_every_runtime_unpacks_the_weights_once(runtime, calibrated, tmp_path):
    """In each runtime's own ONNX Runtime no Cast of a weight runs. With optimization switched off the Casts do run, and
    the transcripts are the same."""
    texts, unpacked = {}, {}
    for level, count in ((99, len(CLIPS)), (0, 2)):  # ORT_ENABLE_ALL, ORT_DISABLE_ALL
        scratch = tmp_path / str(level)
        scratch.mkdir()
        texts[level], events = profiled(runtime, calibrated / runtime, scratch, level, CLIPS[:count])
        operators = Counter(event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time"))
        assert operators["MatMulIntegerToFloat"] >= 61 * count
        unpacked[level] = {event["name"] for event in events if UNPACKED in event["name"]}
    assert all(texts[99])
    assert texts[99][:2] == texts[0]
    assert unpacked[99] == set()
    assert len(unpacked[0]) >= 61


def encode(folder: Path, features: np.ndarray) -> np.ndarray:
    return OrtGraph(folder, ENCODER)(features, np.array([features.shape[2]]))[0]


@pytest.mark.slow
def test_calibration_and_a_budget_buy_exactness(tiny_export, tmp_path, plain):
    """The weights are fitted to all bundled clips but one, and measured on that one."""
    rows = SAMPLE_LIST.read_text().splitlines()
    manifest = tmp_path / "others.jsonl"
    clips = [json.loads(row) for row in rows[1:]]
    clips = [{**clip, "audio_filepath": str(SAMPLE_LIST.parent / clip["audio_filepath"])} for clip in clips]
    manifest.write_text("".join(json.dumps(clip) + "\n" for clip in clips))
    fit = ("--quant_method", "int8", "--calibration_manifest", str(manifest))
    budget = 1.7
    low = optimize(tiny_export, tmp_path / "low", *FLAGS, "--calibration_manifest", str(manifest))
    mixed = optimize(tiny_export, tmp_path / "mixed", *fit, "--size_budget_mb", str(budget))
    high = optimize(tiny_export, tmp_path / "high", *fit)
    assert low["weights_by_bits"] == {"4": 61}
    assert set(mixed["weights_by_bits"]) == {"4", "8"}
    assert high["weights_by_bits"] == {"8": 61}
    sizes = [record["encoder_bytes"]["optimized"] for record in (low, mixed, high)]
    assert 0.95 * budget * 1e6 < sizes[1] <= budget * 1e6
    assert sizes[0] < sizes[1] < sizes[2]
    genai = GenAI(tiny_export)
    features = genai.features(genai.config.read_audio(read_clips(SAMPLE_LIST)[0].path))[None]
    reference = encode(tiny_export, features)
    folders = (plain, *(tmp_path / name for name in ("low", "mixed", "high")))
    ratios = [sqnr_db(reference, encode(folder, features)) for folder in folders]
    assert ratios[0] + 0.7 < ratios[1] < ratios[2] - 3  # 1.2 dB measured, fitted to 27 s of other clips
    assert ratios[2] < ratios[3]


def test_a_broken_scale_is_found_on_noise(tiny_export, plain, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(plain, folder)
    assert compare(tiny_export, plain, 3) > 10
    model = load(plain / ENCODER.file)
    scales = model.graph.initializers["layers.2.feed_forward1.expand.weight.scales"]
    scales.const_value = ir.tensor(scales.const_value.numpy() * 40, name=scales.name)
    save_model(model, folder / ENCODER.file)
    with pytest.raises(CheckError, match="needs 3 dB or more"):
        compare(tiny_export, folder, 3)
