"""Quantizers against ONNX Runtime's kernels, fusion against the graph it fuses, optimize_encoder.py as users run it."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import optimize_encoder
from common.contract import MICROSOFT, encoder_weight
from common.folder import LOCATIONS, MANIFEST
from common.onnx_io import load, save_model
from common.quantize import HQQ, K_QUANT_MIXED, METHODS, RTN, blocks
from common.quantize.blocks import BLOCK_SIZES, BlockMethod, k_quant, quantize_blocks
from common.quantize.fidelity import sqnr_db
from common.quantize.methods import Format, OptimizeOptions
from common.quantize.rewrite import fuse, plan_encoder, quantizable, quantize_weights
from common.quantize.rounding import Packed
from common.report.report import REPORT_HTML, REPORT_JSON
from tests.helpers import MATRICES, dequantize, printed_by

RNG = np.random.default_rng(7)
FITTERS = {name: method.fit_block for name, method in METHODS.items() if isinstance(method, BlockMethod)}


def model_of(nodes: list, constants: list, inputs: dict, outputs: dict) -> onnx.ModelProto:
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in side.items()]
        for side in (inputs, outputs)
    ]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(helper.make_graph(nodes, "test", *ends, constants), opset_imports=opsets, ir_version=9)


def multiply(packed: Packed, x: np.ndarray, bits: int, block: int, accuracy_level: int) -> np.ndarray:
    """x [M, K] times the packed matrix, by one MatMulNBits."""
    constants = [numpy_helper.from_array(array, name) for name, array in packed.tensors()]
    K, N = x.shape[1], len(packed.codes)
    numbers = {"K": K, "N": N, "bits": bits, "block_size": block, "accuracy_level": accuracy_level}
    names = ["x", *(constant.name for constant in constants)]
    node = helper.make_node("MatMulNBits", names, ["y"], domain=MICROSOFT, **numbers)
    model = model_of([node], constants, {"x": ["M", K]}, {"y": ["M", N]})
    return ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]


def errors(weight: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """Squared error, plain and under llama.cpp's weights (rms + |w|), relative."""
    importance = np.abs(weight) + np.sqrt(np.mean(weight**2))
    squared = (found - weight) ** 2
    return tuple(float(np.sum(w * squared) / np.sum(w * weight**2)) for w in (1, importance))


@pytest.mark.parametrize("block", BLOCK_SIZES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", FITTERS)
def test_codes_mean_to_onnxruntime_what_they_mean_here(method, bits, block):
    weight = np.ascontiguousarray(MATRICES["off-centre"][:200, :33])
    packed = quantize_blocks(weight, bits, block, FITTERS[method])
    assert (packed.zero_points is None) == (method == "rtn")
    assert packed.error == pytest.approx(errors(weight, dequantize(packed, len(weight), bits))[0], rel=1e-3)
    x = RNG.standard_normal((5, len(weight)), dtype=np.float32)
    expected = x @ dequantize(packed, len(weight), bits)
    scale = np.sqrt(np.mean(expected**2))
    np.testing.assert_allclose(multiply(packed, x, bits, block, 0), expected, atol=1e-4 * scale)
    int8_activations = multiply(packed, x, bits, block, 4) - expected
    assert np.sqrt(np.mean(int8_activations**2)) < 0.02 * scale


@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("name", MATRICES)
def test_methods_keep_their_order(name, block):
    weight = MATRICES[name]
    plain, weighted = {}, {}
    for method, fit in FITTERS.items():
        found = dequantize(quantize_blocks(weight, 4, block, fit), len(weight), 4)
        plain[method], weighted[method] = errors(weight, found)
    assert weighted["k_quant_mixed"] <= weighted["rtn"]
    assert plain["hqq"] <= plain["rtn"]
    eight = dequantize(quantize_blocks(weight, 8, block, k_quant), len(weight), 8)
    assert errors(weight, eight)[0] < plain["k_quant_mixed"] / 100  # four bits are 24 dB


@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("name", MATRICES)
def test_error_is_at_most_that_of_onnxruntimes_own_quantizers(name, block):
    from onnxruntime.quantization.matmul_nbits_quantizer import quantize_matmul_4bits
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    weight = MATRICES[name][:384]
    K, N = weight.shape
    codes, scales = np.zeros((N, K // block, block // 2), np.uint8), np.zeros((N, K // block), np.float32)
    quantize_matmul_4bits(codes, weight, scales, np.zeros((N, K // block), np.uint8), block, N, K, True)
    theirs = dequantize(Packed(codes, scales, None), K, 4)
    ours = dequantize(quantize_blocks(weight, 4, block, blocks.rtn), K, 4)
    assert errors(weight, ours)[0] < errors(weight, theirs)[0]

    codes, scales, zeros = quant_tensor_k_quant_cpu(np.ascontiguousarray(weight.T), 4, block)
    theirs = ((codes - zeros) * scales).reshape(N, K).T
    ours = dequantize(quantize_blocks(weight, 4, block, k_quant), K, 4)
    # The quantizer there weights each block by its own rms; over the whole matrix that is nearly the same.
    assert errors(weight, ours)[1] < 1.01 * errors(weight, theirs)[1]


@pytest.mark.parametrize("method", FITTERS)
def test_odd_blocks(method):
    weight = np.zeros((64, 4), np.float32)
    weight[:, 1] = 0.5  # constant
    weight[3, 2] = -7  # one outlier
    weight[:, 3] = 1e-30  # next to nothing
    found = dequantize(quantize_blocks(weight, 4, 32, FITTERS[method]), 64, 4)
    np.testing.assert_allclose(found, weight, atol=0.04)


def test_mixed_plan_gives_8_bits_to_both_ends_and_to_sensitive_roles():
    roles = (
        "feed_forward1.expand",
        "attention.query",
        "attention.value",
        "convolution.expand",
        "feed_forward2.project",
    )
    names = ["subsampling.out.weight", *(f"layers.{i}.{role}.weight" for i in range(3) for role in roles)]
    weights, options = {name: encoder_weight(name) for name in names}, OptimizeOptions(block_size=64)
    plan = K_QUANT_MIXED.plan(weights, options)
    assert list(plan) == names
    assert {form.block for form in plan.values()} == {64}
    assert [name for name in names if plan[name].bits == 8] == [
        "subsampling.out.weight",
        *(f"layers.{i}.{role}.weight" for i in range(3) for role in ("attention.value", "convolution.expand")),
        "layers.2.feed_forward2.project.weight",
    ]
    assert {form.bits for form in HQQ.plan(weights, options).values()} == {4}
    empty = ir.Model(ir.Graph([], [], nodes=[]), ir_version=9)
    with pytest.raises(ValueError, match="optimized already"):
        plan_encoder(empty, RTN, options)


@pytest.fixture
def block_model(tmp_path) -> Path:
    """Two residual Adds of width 512, each before a LayerNormalization, around a MatMul with a bias; a weight used
    twice, a small one and a product of activations. Vectors are large enough to lie in the data file."""
    width = 512
    constants = {
        "weight": RNG.standard_normal((width, width)) * 0.05,
        "small": RNG.standard_normal((width, 4)),
        **{name: RNG.standard_normal(width) for name in ("bias", "gain1", "shift1", "gain2", "shift2")},
    }
    nodes = [
        helper.make_node("Add", ["x", "x2"], ["sum1"]),
        helper.make_node("LayerNormalization", ["sum1", "gain1", "shift1"], ["norm1"], axis=-1, epsilon=1e-5),
        helper.make_node("MatMul", ["norm1", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["biased"]),
        helper.make_node("Add", ["biased", "sum1"], ["sum2"]),
        helper.make_node("LayerNormalization", ["sum2", "gain2", "shift2"], ["norm2"], axis=-1, epsilon=1e-3),
        helper.make_node("MatMul", ["norm2", "weight"], ["again"]),
        helper.make_node("MatMul", ["again", "small"], ["y"]),
        helper.make_node("Transpose", ["again"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["sum2", "turned"], ["z"]),
    ]
    tensors = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in constants.items()]
    sides = {"x": ["B", "S", width], "x2": ["B", "S", width]}, {"y": ["B", "S", 4], "z": ["B", "S", "S"]}
    save_model(ir.from_proto(model_of(nodes, tensors, *sides)), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def run_file(path: Path) -> list[np.ndarray]:
    x, x2 = np.random.default_rng(1).standard_normal((2, 2, 9, 512), dtype=np.float32)
    return ort.InferenceSession(path).run(None, {"x": x, "x2": x2})


def test_fusion_reads_biases_from_the_data_file(block_model, tmp_path):
    model, fused = fuse(block_model)
    assert fused == {"SkipLayerNormalization": 2}
    assert Counter(node.op_type for node in model.graph) == {"SkipLayerNormalization": 2, "MatMul": 4, "Transpose": 1}
    save_model(model, tmp_path / "fused.onnx")
    for expected, found in zip(run_file(block_model), run_file(tmp_path / "fused.onnx"), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_only_constant_matrices_of_some_size_are_quantized_and_shared_ones_once(block_model, tmp_path):
    model = load(block_model)
    found = quantizable(model)
    assert {name: len(weight.products) for name, weight in found.items()} == {"weight": 2}
    quantize_weights(model, {"weight": Format(8, 32)}, HQQ, OptimizeOptions(accuracy_level=0), {})
    assert [node.op_type for node in model.graph].count("MatMulNBits") == 2
    assert "weight" not in model.graph.initializers
    save_model(model, tmp_path / "eight.onnx")
    for expected, found in zip(run_file(block_model), run_file(tmp_path / "eight.onnx"), strict=True):
        assert sqnr_db(expected, found) > 35


def test_sqnr():
    expected = np.ones(10, np.float32)
    assert sqnr_db(expected, expected * 1.1) == pytest.approx(20, abs=1e-3)
    assert sqnr_db(expected, expected) == np.inf
    assert sqnr_db(expected, 0 * expected) == 0
    assert np.isnan(sqnr_db(expected, expected * np.nan))


def graph_and_record(folder: Path) -> tuple[onnx.ModelProto, dict]:
    """The encoder of an optimized folder, and the manifest section."""
    proto = onnx.load(folder / "encoder.onnx", load_external_data=False)
    return proto, json.loads((folder / MANIFEST).read_text())["optimize"]


def test_optimized_folder_is_complete(tiny_export, optimized):
    target = optimized()
    proto, record = graph_and_record(target)
    exported = onnx.load(tiny_export / "encoder.onnx", load_external_data=False)
    before, after = (Counter(node.op_type for node in graph.graph.node) for graph in (exported, proto))

    names = {path.name for path in target.iterdir()}
    assert names == {path.name for path in tiny_export.iterdir()} | {REPORT_JSON, REPORT_HTML}
    assert all(path.stat().st_nlink == 1 for path in target.iterdir() if path.is_file())
    source_sections = json.loads((tiny_export / MANIFEST).read_text())
    written_sections = json.loads((target / MANIFEST).read_text())
    for name in ("export", "tokenizer"):
        assert written_sections[name] == source_sections[name]
    assert written_sections["files"].keys() == names - {MANIFEST, LOCATIONS.parts[0]}

    quantized = 61  # 12 matrices in 5 layers and the subsampling's
    assert record["weights_by_bits"] == {"4": quantized}
    assert after["MatMulNBits"] == quantized
    replaced, new = Counter(MatMul=quantized), Counter(MatMulNBits=quantized)
    fused = 20  # 4 residual Adds in each of 5 layers
    assert record["fused"] == {"SkipLayerNormalization": fused}
    assert after + replaced + Counter(Add=fused, LayerNormalization=fused) == before + new + Counter(record["fused"])
    places = {
        entry.value for tensor in proto.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    assert places == {"encoder.onnx.data"}
    assert str(target.parent).encode() not in (target / "encoder.onnx").read_bytes()

    printed = printed_by(target).splitlines()
    advice = "6 to 10 % faster without fusion; add --skip_fusion"
    begun = [line for line in printed if line.startswith("[")]
    assert [line.split()[0] for line in begun] == [f"[{i}/6]" for i in range(1, 7)]
    results = ("20 SkipLayerNormalization", "61 weights at 4 bits", "5.5 times", "SQNR", "not measured", REPORT_HTML)
    others = [line for line in printed if line not in begun]
    for line, expected in zip(others, ("about", *results, advice, "wrote"), strict=True):
        assert expected in line


@pytest.mark.slow
def test_every_method_agrees_with_the_export(optimized):
    sqnr = {method: graph_and_record(optimized("--quant_method", method))[1]["sqnr_db_on_noise"] for method in FITTERS}
    # On noise 16.5 dB for rtn and 16.2 dB for hqq, on the sample clips 20.9 and 20.8: neither is better here.
    assert min(sqnr["rtn"], sqnr["hqq"]) > 15
    assert max(sqnr["rtn"], sqnr["hqq"]) + 5 < sqnr["k_quant_mixed"]


def test_mixed_widths_are_printed_and_both_occur(optimized):
    folder = optimized("--quant_method", "k_quant_mixed", "--block_size", "128")
    proto, record = graph_and_record(folder)
    widths = Counter(
        str(helper.get_node_attr_value(node, "bits")) for node in proto.graph.node if node.op_type == "MatMulNBits"
    )
    assert widths == record["weights_by_bits"] == {"4": 39, "8": 22}
    assert "39 weights at 4 bits  22 weights at 8 bits" in printed_by(folder)


def test_stages_can_be_skipped(optimized):
    proto, record = graph_and_record(optimized("--skip_quantization"))
    assert record["sqnr_db_on_noise"] > 100
    assert record["fused"] == {"SkipLayerNormalization": 20}  # 4 residual Adds in each of 5 layers
    assert Counter(node.op_type for node in proto.graph.node)["LayerNormalization"] == 5
    copy = optimized("--skip_quantization", "--skip_fusion")
    assert graph_and_record(copy)[1]["sqnr_db_on_noise"] is None  # no noise at all
    assert "identical" in printed_by(copy)


@pytest.fixture(scope="session")
def cuda_export(tiny_export, made_once) -> Path:
    def copy(folder: Path) -> None:
        shutil.copytree(tiny_export, folder)
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["export"]["flags"]["device"] = "cuda"
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return made_once("cuda", copy)


@pytest.mark.parametrize(
    ("method", "device"), [*((method, "cpu") for method in METHODS), ("rtn", "cuda"), ("int8", "cuda")]
)
def test_every_method_is_fused_by_default_but_int8_on_a_cpu(method, device, tiny_export, cuda_export, optimized):
    source = {"cpu": tiny_export, "cuda": cuda_export}[device]
    folder = optimized("--quant_method", method, source=source)
    proto, record = graph_and_record(folder)
    printed = printed_by(folder)
    fused = {} if (method, device) == ("int8", "cpu") else {"SkipLayerNormalization": 20}
    assert record["fused"] == fused
    assert Counter(node.op_type for node in proto.graph.node)["SkipLayerNormalization"] == sum(fused.values())
    assert ("--skip_fusion" in printed) == (bool(fused) and device == "cpu")
    assert ("none: on a CPU, int8 is faster without it" in printed) == (not fused)


def test_nobody_is_advised_to_skip_what_was_skipped(optimized):
    folder = optimized("--skip_fusion")
    assert graph_and_record(folder)[1]["fused"] == {}
    assert "--skip_fusion" not in printed_by(folder)


def test_help_says_which_method_is_not_fused(capsys):
    with pytest.raises(SystemExit):
        optimize_encoder.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "its graph is not fused for a CPU" in printed
    assert "6 to 10 % faster without it, and int8 is not fused" in printed
    for method in METHODS.values():
        assert f"{method.name}: {method.help}" in printed


def without(*files: str):
    return lambda folder: [(folder / file).unlink() for file in files]


UNUSABLE = {
    "no folder": (shutil.rmtree, "export_parakeet_to_onnx.py --output_dir"),
    "no encoder": (without("encoder.onnx"), "has no encoder.onnx; first run: python export_parakeet_to_onnx.py"),
    "no encoder data": (
        without("encoder.onnx.data"),
        "encoder.onnx.data is not the file that manifest.json lists (no bytes",
    ),
    "no encoder data, unlisted": (without("encoder.onnx.data", "manifest.json"), "encoder.onnx.data"),
    "no config": (
        without("genai_config.json"),
        "has no genai_config.json; first run: python export_parakeet_to_onnx.py",
    ),
    "no tokenizer": (without("tokenizer.json", "vocab.txt"), "export_tokenizer.py --output_dir"),
    "no onnx": (
        lambda folder: (folder / "encoder.onnx").write_text("no graph"),
        "encoder.onnx is not the file that manifest.json lists (8 bytes",
    ),
    "no onnx, unlisted": (
        lambda folder: (without("manifest.json")(folder), (folder / "encoder.onnx").write_text("no graph")),
        "not an ONNX model",
    ),
    "short data": (lambda folder: (folder / "encoder.onnx.data").write_bytes(b"short"), "encoder.onnx.data"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_input_is_one_line_and_leaves_nothing(case, tiny_export, tmp_path, capsys):
    spoil, message = UNUSABLE[case]
    source, target = tmp_path / "in", tmp_path / "out"
    shutil.copytree(tiny_export, source)
    spoil(source)
    assert optimize_encoder.main(["--model_dir", str(source), "--output_dir", str(target)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert [path.name for path in tmp_path.iterdir() if path != source] == []


def test_output_must_be_another_folder(tiny_export, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for target, message in ((tiny_export, "are both"), (tmp_path / "file", "is a file")):
        before = sorted((path.name, path.stat().st_mtime_ns) for path in tiny_export.iterdir())
        assert optimize_encoder.main(["--model_dir", str(tiny_export), "--output_dir", str(target)]) == 2
        assert message in capsys.readouterr().err
        assert sorted((path.name, path.stat().st_mtime_ns) for path in tiny_export.iterdir()) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_a_second_optimization_is_rejected(tiny_optimized, tmp_path, capsys):
    assert optimize_encoder.main(["--model_dir", str(tiny_optimized), "--output_dir", str(tmp_path / "are both")]) == 2
    assert "optimized already" in capsys.readouterr().err
    assert not (tmp_path / "are both").exists()


@pytest.mark.parametrize("flag", ["--block_size=48", "--accuracy_level=5", "--quant_method=magic"])
def test_unknown_choices_end_with_status_2(flag):
    with pytest.raises(SystemExit) as exit_:
        optimize_encoder.main([flag])
    assert exit_.value.code == 2


@pytest.mark.parametrize("factor", [-1, np.nan], ids=["wrong sign", "not a number"])
def test_a_broken_encoder_is_never_written(factor, tiny_export, tmp_path, monkeypatch, capsys):
    real = quantize_blocks

    def corrupted(weight, bits, block, method):
        packed = real(weight, bits, block, method)
        packed.scales[:] *= factor
        return packed

    monkeypatch.setattr(blocks, "quantize_blocks", corrupted)
    assert optimize_encoder.main(["--model_dir", str(tiny_export), "--output_dir", str(tmp_path / "out")]) == 1
    assert "SQNR" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
