"""Weights that are ternary in groups: found by their values, stored in 2 bits, multiplied as int8 or as they are."""

import json
import re
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
from common.checkpoint.find import find_checkpoint
from common.contract import ENCODER, EncoderWeight, Role, encoder_weight
from common.evaluate.words import word_error_rate
from common.folder import MANIFEST
from common.onnx_io import load, save_model
from common.quantize import INT8, METHODS, RTN, rewrite
from common.quantize.blocks import ternary_blocks
from common.quantize.calibration import SizeModel, spend
from common.quantize.fidelity import sqnr_db
from common.quantize.int8 import INT2_IR_VERSION, INT2_OPSET, packed_tensor
from common.quantize.methods import Format, OptimizeOptions, Plan
from common.quantize.rewrite import plan_encoder, quantizable, quantize_weights
from common.quantize.rounding import Packed, ternary_group
from common.report.card import CARD
from common.run.audio import Clip, load_clip
from common.run.ort import OrtGraph
from common.run.reference import Transformers
from tests.helpers import CLIPS, PROGRAMS, REDUX, SAMPLES, dequantize, profiled, rejected, run_python

RNG = np.random.default_rng(11)
NAME = "layers.0.attention.query.weight"
TWO_TERMS = "layers.0.convolution.expand.weight"  # whose product int8 runs a second time, on what rounding left
EVEN_ROWS = "layers.0.attention.position_sine.weight"  # whose inputs share one scale
K, N = 256, 48


def ternary_weight(group: int = 128, rows: int = K, columns: int = N) -> np.ndarray:
    """−m, 0 and m [rows, columns], with an m for each group that differs by up to a factor of 50."""
    signs = RNG.integers(-1, 2, (rows // group, group, columns))
    sizes = RNG.uniform(0.01, 0.5, (rows // group, 1, columns)).astype(np.float16)
    return (signs * sizes).reshape(rows, columns).astype(np.float32)


# ---- detection


@pytest.mark.parametrize("group", [128, 64])
def test_a_weight_is_ternary_by_its_values_and_not_with_one_that_is_off(group):
    weight = ternary_weight(group)
    assert ternary_group(weight) == group
    for row, column in ((0, 0), (group, 7), (K - 1, N - 1)):
        off = weight.copy()
        off[row, column] = np.nextafter(np.float32(0.75) * np.abs(weight).max(), np.float32(1))
        assert ternary_group(off) is None
        off[row, column] = np.nan
        assert ternary_group(off) is None
    nearly = weight.copy()
    largest = np.argmax(np.abs(weight[:, 0]))
    nearly[largest, 0] = np.nextafter(weight[largest, 0], 0)  # the last bit of one of them
    assert ternary_group(nearly) is None


def test_larger_groups_are_found_first_and_weights_without_whole_groups_are_not_ternary():
    weight = ternary_weight(128)
    assert ternary_group(np.sign(weight)) == 128  # one magnitude everywhere is ternary in any groups
    assert ternary_group(weight[:192]) == 64
    assert ternary_group(weight[:200]) is None
    assert ternary_group(RNG.standard_normal((K, N), dtype=np.float32)) is None
    weight[:, 3] = 0
    assert ternary_group(weight) == 128


# ---- tensors


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 4, 4), (7, 3), (0,)])
def test_packed_codes_are_what_onnx_reads(shape):
    codes = RNG.integers(-2, 2, shape).astype(np.int8)
    tensor = packed_tensor("w", codes, ir.DataType.INT2)
    assert tensor.nbytes == -(-codes.size // 4)
    proto = ir.to_proto(tensor)
    assert proto.data_type == TensorProto.INT2
    np.testing.assert_array_equal(numpy_helper.to_array(proto).astype(np.int8), codes)


def test_every_code_is_at_its_place():
    assert packed_tensor("w", np.array([[-1, 0, 1], [-2, 1, 1]]), ir.DataType.INT2).tobytes() == bytes([0x93, 0x05])


# ---- graphs


def toy(name: str, weight: np.ndarray, opset: int = 17) -> ir.Model:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", name], ["product"]), helper.make_node("Mul", ["product", "half"], ["y"])],
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 6, len(weight)])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 6, "N"])],
        [numpy_helper.from_array(weight, name), numpy_helper.from_array(np.array(0.5, np.float32), "half")],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8))


def quantized(
    model: ir.Model, form: Format, options: OptimizeOptions, packed: dict[str, Packed] | None = None
) -> onnx.ModelProto:
    assert options.method is not None
    quantize_weights(model, dict.fromkeys(quantizable(model), form), options.method, options, packed or {})
    return ir.to_proto(model)


def run(proto: onnx.ModelProto, x: np.ndarray, *, folded: bool = True) -> np.ndarray:
    session = ort.SessionOptions()
    session.log_severity_level = 3
    level = ort.GraphOptimizationLevel
    session.graph_optimization_level = level.ORT_ENABLE_ALL if folded else level.ORT_DISABLE_ALL
    return ort.InferenceSession(proto.SerializeToString(), session).run(None, {"x": x})[0]


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("name", [NAME, TWO_TERMS, EVEN_ROWS])
@pytest.mark.parametrize("full_range", [False, True])
def test_the_product_is_that_of_int8_bit_for_bit(name, full_range, opset):
    group = 64 if name == EVEN_ROWS else 128
    weight, x = ternary_weight(group), RNG.standard_normal((2, 6, K), dtype=np.float32)
    options = OptimizeOptions(quant_method="int8", full_range=full_range)
    form = INT8.ternary_format(group, options)
    assert form == Format(2, group, full_range)
    small = quantized(toy(name, weight, opset), form, options)
    integers = {name: INT8.pack(weight, form)}
    large = quantized(toy(name, weight, opset), Format(8, 0, full_range), options, integers)
    assert (small.opset_import[0].version, small.ir_version) == (INT2_OPSET, INT2_IR_VERSION) == (25, 13)
    assert large.opset_import[0].version == opset
    onnx.checker.check_model(small, full_check=True)
    for folded in (True, False):
        np.testing.assert_array_equal(run(small, x, folded=folded), run(large, x, folded=folded))
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in small.graph.initializer}
    codes, multipliers = constants[f"{name}.codes"], constants[f"{name}.scales.groups"]
    assert codes.shape == (K // group, group, N)
    assert multipliers.shape == (K // group, 1, N)
    assert multipliers.max() <= (127 if full_range else 64)
    became = codes.astype(np.float32) * multipliers * constants[f"{name}.scales.product"] * 2  # which include the half
    assert sqnr_db(weight, became.reshape(K, N)) > (52 if full_range else 45)


@pytest.mark.parametrize(("full_range", "largest"), [(False, 64), (True, 127)])
@pytest.mark.parametrize("group", [128, 64])
def test_no_other_multipliers_are_much_better(group, full_range, largest):
    """Those of thousands of scales, each fitted to its multipliers with all weights of the column."""
    weight = ternary_weight(group, rows=1024, columns=8)
    weight[:group, 0] /= 40  # the sizes of this column have little in common
    weight[:, 1] = 0
    packed = INT8.pack(weight, Format(2, group, full_range))
    for column, codes, scale in zip(weight.T, packed.codes.T, packed.scales, strict=True):
        least = np.inf
        for tried in np.abs(column).max() / np.linspace(1, largest, 5000):
            multiples = np.rint(column.astype(np.float64) / max(tried, 1e-30))
            fitted = column @ multiples / max(multiples @ multiples, 1)
            least = min(least, np.sum((column - fitted * multiples) ** 2))
        assert np.sum((column - scale * codes.astype(np.float64)) ** 2) <= 1.03 * least + 1e-12
        assert np.abs(codes.astype(int)).max() <= largest


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("sizes", [(3, 7), (64, 1), (0, 5), (40, 39)])
def test_whole_multiples_of_a_scale_lose_nothing(sizes, full_range):
    signs = RNG.integers(-1, 2, (len(sizes), 128, 4))
    weight = (signs * np.array(sizes)[:, None, None] * np.float32(0.0625)).reshape(-1, 4).astype(np.float32)
    packed = INT8.pack(weight, Format(2, 128, full_range))
    np.testing.assert_allclose(packed.codes * packed.scales, weight, rtol=1e-6)


def test_ternary_weights_beside_4_bits_overflow_on_no_cpu():
    options = OptimizeOptions(quant_method="int8", weight_bits=4)
    assert INT8.ternary_format(128, options) == Format(2, 128)


@pytest.mark.parametrize("group", [128, 64])
def test_blocks_of_two_bits_are_exact(group):
    weight = ternary_weight(group)
    packed = ternary_blocks(weight, group)
    assert packed.codes.shape == (N, K // group, group // 4)
    assert packed.error == 0
    np.testing.assert_array_equal(dequantize(packed, K, 2), weight)
    options = OptimizeOptions(quant_method="rtn", weight_bits=2, accuracy_level=0)
    proto = quantized(toy(NAME, weight), RTN.ternary_format(group, options), options)
    rows = np.zeros((1 + (K - 1) // 6, 6, K), np.float32)
    rows.reshape(-1, K)[:K] = np.eye(K)  # each product is one row of the weight
    np.testing.assert_array_equal(run(proto, rows).reshape(-1, N)[:K], weight / 2)


# ---- plans


@pytest.mark.parametrize("method", ["int8", "rtn"])
def test_a_matrix_of_a_layer_that_is_not_ternary_is_named(method, redux_export):
    model = load(redux_export / ENCODER.file)
    values, name = model.graph.initializers, "layers.2.attention.value.weight"
    weight = values[name].const_value.numpy().copy()
    weight[100, 5] = 0.7
    values[name].const_value = ir.tensor(weight, name=name)
    insisting = OptimizeOptions(quant_method=method, weight_bits=2)
    with pytest.raises(ValueError, match=f"--weight_bits 2 .* {re.escape(name)} .*; leave --weight_bits out"):
        plan_encoder(model, METHODS[method], insisting)
    assert plan_encoder(model, INT8, OptimizeOptions(quant_method="int8"))[name] == Format(8)


@pytest.mark.parametrize("method", ["int8", "rtn"])
def test_other_checkpoints_do_not_have_two_bits(method, tiny_export, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--quant_method", method, "--weight_bits", "2"]
    error = rejected(capsys, optimize_encoder, "--model_dir", tiny_export, "--output_dir", out, *flags)
    assert "layers.0.feed_forward1.expand.weight has more values than −m, 0 and m" in error
    assert not out.exists()


def planned(folder: Path, **flags) -> Plan:
    options = OptimizeOptions(**flags)
    assert options.method is not None
    return plan_encoder(load(folder / ENCODER.file), options.method, options)


def test_plans_by_flags(redux_export, tiny_export):
    """Ternary weights have 2 bits where the method stores them so; positions have groups of 64."""
    for flags, full_range, other in (
        ({"quant_method": "int8"}, False, Format(8)),
        ({"quant_method": "int8", "weight_bits": 2}, False, Format(8)),
        ({"quant_method": "int8", "weight_bits": 4}, False, Format(4)),
        ({"quant_method": "int8", "full_range": True}, True, Format(8, 0, True)),
        ({"quant_method": "rtn", "weight_bits": 2}, False, Format(8, 32)),
    ):
        plan = planned(redux_export, **flags)
        groups = Counter(plan.values())
        assert groups == {Format(2, 128, full_range): 50, Format(2, 64, full_range): 10, other: 1}
        assert {encoder_weight(name).role for name, form in plan.items() if form.block == 64} == {
            Role.ATTENTION_POSITION_SINE,
            Role.ATTENTION_POSITION_COSINE,
        }
        assert next(name for name, form in plan.items() if form == other) == "subsampling.out.weight"
    for flags in ({"quant_method": "rtn"}, {"quant_method": "k_quant_mixed"}, {"quant_method": "hqq"}):
        assert not any(form.bits == 2 for form in planned(redux_export, **flags).values())
    assert set(planned(tiny_export, quant_method="int8").values()) == {Format(8)}


def test_a_budget_leaves_ternary_weights_as_they_are(redux_export):
    path = redux_export / ENCODER.file
    model = load(path)
    plan = planned(redux_export, quant_method="int8")
    sizes = SizeModel(model, path.stat().st_size, INT8)
    other = "subsampling.out.weight"
    smallest = spend(sizes, {}, plan, Format(4), Format(8), 10e6)
    assert smallest == {**plan, other: Format(4)}
    assert spend(sizes, {other: {4: 0.1, 8: 0.01}}, plan, Format(4), Format(8), 10e6) == plan
    budget = sizes.total(smallest) + 1
    assert spend(sizes, {other: {4: 0.1, 8: 0.01}}, plan, Format(4), Format(8), budget) == smallest
    with pytest.raises(ValueError, match="is too small"):
        spend(sizes, {}, plan, Format(4), Format(8), 0.3e6)


# ---- folders


def record_of(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text())["optimize"]


@pytest.fixture(scope="module")
def small_runtimes(optimized, redux_runtimes) -> Path:
    """The ternary checkpoint, optimized with int8, with a subfolder for each runtime."""
    return optimized("--quant_method", "int8", source=redux_runtimes)


@pytest.fixture(scope="module")
def small(small_runtimes, tmp_path_factory) -> Path:
    """The same for GenAI, in files that no other folder shares."""
    return shutil.copytree(small_runtimes / "genai", tmp_path_factory.mktemp("small") / "genai")


def encode(folder: Path) -> list[np.ndarray]:
    features = np.random.default_rng(0).standard_normal((2, 128, 333), dtype=np.float32)
    return OrtGraph(folder, ENCODER)(features, np.array([333, 200]))


def test_the_output_is_that_of_int8_bit_for_bit(redux_export, small, tmp_path):
    """The same integers in plain int8, without a factor for any row."""
    model = load(redux_export / ENCODER.file)
    values = model.graph.initializers
    packed = {
        name: INT8.pack(values[name].const_value.numpy(), form)
        for name, form in planned(redux_export, quant_method="int8").items()
    }
    quantize_weights(model, dict.fromkeys(packed, Format(8)), INT8, OptimizeOptions(), packed)
    save_model(model, tmp_path / ENCODER.file)
    for one, other in zip(encode(small), encode(tmp_path), strict=True):
        np.testing.assert_array_equal(one, other)
    assert sqnr_db(encode(redux_export)[0], encode(small)[0]) > 30


def test_detection_turned_off_gives_8_bits(redux_export, tmp_path, monkeypatch):
    monkeypatch.setattr(rewrite, "ternary_group", lambda weight: None)
    assert set(planned(redux_export, quant_method="int8").values()) == {Format(8)}


def test_what_runs_is_folded(small, tmp_path):
    """The graph that ONNX Runtime runs multiplies by int8 constants, and has the same operators as plain int8. An
    application that saves it (docs/runtimes.md) gets the same output from it."""
    level = ort.GraphOptimizationLevel
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / ENCODER.file)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", ENCODER.data_file)

    def dumped(chosen: ort.GraphOptimizationLevel) -> onnx.GraphProto:
        options.graph_optimization_level = chosen
        ort.InferenceSession(small / ENCODER.file, options, providers=["CPUExecutionProvider"])
        return onnx.load(tmp_path / ENCODER.file, load_external_data=False).graph

    raw = dumped(level.ORT_DISABLE_ALL)
    shaped = {node.output[0] for node in raw.node if node.op_type == "Reshape"}
    assert sum(node.input[1] in shaped for node in raw.node if node.op_type == "MatMulIntegerToFloat") >= 60
    runs = dumped(level.ORT_ENABLE_ALL)
    constants = {tensor.name: tensor for tensor in runs.initializer}
    products = [node for node in runs.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(products) == 71  # with the second terms of ten
    assert {constants[node.input[1]].data_type for node in products} == {TensorProto.INT8}
    assert not any(tensor.data_type == TensorProto.INT2 for tensor in runs.initializer)
    assert not any(node.name.endswith(".unpacked") for node in runs.node)
    for one, other in zip(encode(small), encode(tmp_path), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def spoken(redux_runtimes) -> dict[str, list]:
    """What transformers makes of the bundled clips, with the network of the ternary checkpoint: tokens for GenAI, whose
    program prints tokens, and texts for onnx-asr. sherpa-onnx computes other features (docs/runtimes.md), so for it
    these are its own texts with the float32 export, which may have two word errors more."""
    reference = Transformers(find_checkpoint(str(REDUX)).load_model())
    transcripts = [reference.transcribe(reference.features(load_clip(Clip(clip), 16000, 0))) for clip in CLIPS]
    texts = [transcript.text for transcript in transcripts]
    program, _ = PROGRAMS["sherpa-onnx"]
    done = run_python(program, redux_runtimes / "sherpa-onnx", *CLIPS)
    assert done.returncode == 0, done.stderr
    own = json.loads(done.stdout)
    written = [json.loads(line)["text"] for line in (SAMPLES / "manifest.jsonl").read_text().splitlines()]
    errors, own_errors = (word_error_rate(written, each).errors for each in (texts, own))
    assert errors <= 2
    assert own_errors <= errors + 2
    return {"genai": [transcript.tokens for transcript in transcripts], "onnx-asr": texts, "sherpa-onnx": own}


@pytest.mark.parametrize("runtime", PROGRAMS)
def test_every_runtime_unpacks_the_weights_once(runtime, small_runtimes, spoken, tmp_path):
    """In each runtime's own ONNX Runtime no Cast of a weight runs, and the words are those of transformers. With
    optimization switched off the Casts do run."""
    unpacked = {}
    for level, count in ((99, len(CLIPS)), (0, 2)):  # ORT_ENABLE_ALL, ORT_DISABLE_ALL
        scratch = tmp_path / str(level)
        scratch.mkdir()
        found, events = profiled(runtime, small_runtimes / runtime, scratch, level, CLIPS[:count])
        assert found == spoken[runtime][:count]
        operators = Counter(event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time"))
        assert operators["MatMulIntegerToFloat"] >= 71 * count
        unpacked[level] = {event["name"] for event in events if ".unpacked" in event["name"]}
    assert unpacked[99] == set()
    assert len(unpacked[0]) >= 60


@pytest.mark.parametrize("runtime", PROGRAMS)
def test_every_runtime_multiplies_by_two_bits(runtime, optimized, redux_runtimes, spoken, tmp_path):
    """What runs is the kernel for 2-bit blocks, and the words are those of transformers."""
    folder = optimized("--weight_bits", "2", source=redux_runtimes)
    found, events = profiled(runtime, folder / runtime, tmp_path, 99)
    assert found == spoken[runtime]
    operators = Counter(event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time"))
    assert operators["MatMulNBits"] >= 61 * len(CLIPS)
    assert not any("MatMulInteger" in operator for operator in operators)


@pytest.mark.parametrize("runtime", ["genai", "onnx-asr"])
def test_the_words_of_the_float32_export(runtime, redux_runtimes, spoken):
    program, _ = PROGRAMS[runtime]
    done = run_python(program, redux_runtimes / runtime, *CLIPS)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == spoken[runtime]


def test_the_file_holds_a_quarter_of_a_byte_a_weight(small):
    proto = onnx.load(small / ENCODER.file)
    codes = [tensor for tensor in proto.graph.initializer if tensor.name.endswith(".codes")]
    assert Counter(tensor.data_type for tensor in codes) == {TensorProto.INT2: 60, TensorProto.INT8: 1}
    ternary = sum(int(np.prod(tensor.dims)) for tensor in codes if tensor.data_type == TensorProto.INT2)
    sizes = json.loads((small / "optimization_report.json").read_text())["components"]["encoder"]["optimized"]
    others = sum(int(np.prod(tensor.dims)) for tensor in codes if tensor.data_type == TensorProto.INT8)
    assert sizes["codes"] == ternary // 4 + others
    assert sum(sizes.values()) == sum((small / file).stat().st_size for file in ENCODER.files)


def test_manifest_report_and_card_say_it(small):
    record = record_of(small)
    words = (
        "ternary weights, 2 bits in the file, products of 8-bit integers when it runs: ONNX Runtime 1.24 or newer "
        "unpacks them once"
    )
    assert record["weights_by_bits"] == {"2": 60, "8": 1}
    assert record["runs_as"] == words
    assert record["minimum_onnxruntime"] == "1.24"
    text = (small / CARD).read_text()
    assert "60 at 2 bits, 1 at 8 bits" in text
    assert words[1:] in text
    assert "(the graphs need ONNX Runtime 1.24 or newer)" in text
    assert "- 2-bit" in text
    assert words in (small / "optimization_report.html").read_text()
    rows = json.loads((small / "optimization_report.json").read_text())["tensors"]
    row = next(row for row in rows if row["name"] == "layers.0.feed_forward1.project.weight")
    assert (row["bits"], row["block"], row["shape"]) == (2, 128, [512, 128])
    assert 0 < row["weight_error"] < 1e-4
    assert row["bytes_after"] == 512 * 128 // 4 + 512 // 128 * 128 + 4 * 128  # codes, multipliers, scales


def test_two_bits_in_blocks_lose_nothing_but_in_the_other_matrix(optimized, redux_export):
    folder = optimized("--weight_bits", "2", "--accuracy_level", "0", source=redux_export)
    record = record_of(folder)
    assert record["method"] == "rtn, ternary"
    assert record["weights_by_bits"] == {"2": 60, "8": 1}
    assert record["runs_as"].startswith("ternary weights, exact in 2 bits")
    assert record["minimum_onnxruntime"] == "1.24"
    products = [node for node in load(folder / ENCODER.file).graph if node.op_type == "MatMulNBits"]
    widths = Counter((node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()) for node in products)
    assert widths == {(2, 128): 50, (2, 64): 10, (8, 32): 1}
    assert sqnr_db(encode(redux_export)[0], encode(folder)[0]) > 50
    errors = [
        row["weight_error"]
        for row in json.loads((folder / "optimization_report.json").read_text())["tensors"]
        if row["bits"] == 2
    ]
    assert errors == [0] * 60
    assert (folder / "optimization_report.html").read_text().count("<td>exact</td>") == 60


def test_calibration_fits_only_what_is_not_ternary(optimized, redux_export, small):
    """Ternary weights, and the normalizations before them, are what they are without calibration."""
    fitted = optimized(
        "--quant_method", "int8", "--calibration_manifest", SAMPLES / "manifest.jsonl", source=redux_export
    )
    assert record_of(fitted)["weights_by_bits"] == {"2": 60, "8": 1}
    models = [load(folder / ENCODER.file) for folder in (small, fitted, redux_export)]
    plain, calibrated, exported = (
        {name: value.const_value.numpy() for name, value in model.graph.initializers.items()} for model in models
    )
    different = {name for name in plain if not np.array_equal(plain[name], calibrated[name])}
    assert {name.removesuffix(".codes").removesuffix(".scales") for name in different} == {"subsampling.out.weight"}
    norms = [name for name in exported if "norm" in name]
    assert len(norms) >= 50
    for name in norms:
        np.testing.assert_array_equal(calibrated[name], exported[name])


def test_every_matrix_of_the_layers_is_ternary_in_the_export(redux_export):
    """What the export does to the checkpoint keeps the groups, so detection needs no flag."""
    model = load(redux_export / ENCODER.file)
    for name in quantizable(model):
        group = ternary_group(model.graph.initializers[name].const_value.numpy())
        assert (group is None) == (encoder_weight(name) == EncoderWeight(Role.SUBSAMPLING_OUT))
