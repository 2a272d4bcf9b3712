"""Channel scaling without speech: the same function until weights are rounded, and a checkpoint with loud channels."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import export_parakeet_to_onnx
import export_tokenizer
import optimize_encoder
from benchmarks.loud_channels import write_loud
from benchmarks.random_checkpoint import write_checkpoint
from common.contract import ENCODER
from common.folder import MANIFEST
from common.onnx_io import load, save_model
from common.quantize.fidelity import sqnr_db
from common.quantize.rewrite import factors_without_speech, fold, fuse, normalized_inputs, quantizable, row_factors
from common.run.genai import GenAI
from common.run.ort import OrtGraph
from tests.helpers import CLIPS, SMALL, printed_by

LOUD = 30.0
READERS = {
    "norm_feed_forward1": ("feed_forward1.expand",),
    "norm_attention": ("attention.query", "attention.key", "attention.value"),
    "norm_convolution": ("convolution.expand",),
    "norm_feed_forward2": ("feed_forward2.expand",),
}


@pytest.fixture(scope="module")
def speech(tiny_export) -> np.ndarray:
    genai = GenAI(tiny_export)
    return genai.features(genai.config.read_audio(CLIPS[0]))[None]


def encode(folder: Path, features: np.ndarray) -> np.ndarray:
    return OrtGraph(folder, ENCODER)(features, np.array([features.shape[2]]))[0]


@pytest.fixture(scope="module")
def loud_export(tiny_export, tmp_path_factory) -> Path:
    """The exported folder with two channels of each normalization times 30, and the rows behind them divided."""
    folder = tmp_path_factory.mktemp("loud") / "onnx_models"
    shutil.copytree(tiny_export, folder)
    model = onnx.load(tiny_export / ENCODER.file)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    def multiply(name: str, channels: np.ndarray, factor: float) -> None:
        array = numpy_helper.to_array(tensors[name]).copy()
        array[channels] *= factor
        tensors[name].CopyFrom(numpy_helper.from_array(array, name))

    draw = np.random.default_rng(5)
    for layer in range(5):
        for norm, readers in READERS.items():
            channels = draw.choice(128, 2, replace=False)
            for part in ("weight", "bias"):
                multiply(f"layers.{layer}.{norm}.{part}", channels, LOUD)
            for reader in readers:
                multiply(f"layers.{layer}.{reader}.weight", channels, 1 / LOUD)
    (folder / ENCODER.data_file).unlink()
    onnx.save(model, folder / ENCODER.file, save_as_external_data=True, location=ENCODER.data_file)
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in (ENCODER.file, ENCODER.data_file):
        manifest["files"].pop(name, None)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def test_the_loud_graph_is_the_same_function(tiny_export, loud_export, speech):
    assert sqnr_db(encode(tiny_export, speech), encode(loud_export, speech)) > 100


@pytest.mark.parametrize("fused", [False, True])
def test_a_folded_graph_is_the_exported_one(fused, loud_export, tmp_path, speech):
    path = loud_export / ENCODER.file
    model = fuse(path)[0] if fused else load(path)
    factors = factors_without_speech(model, quantizable(model))
    assert len(factors) == 5 * sum(map(len, READERS.values()))
    assert all(factor.max() == 1 and factor.min() < 0.1 for factor in factors.values())
    fold(model, factors)
    save_model(model, tmp_path / ENCODER.file)
    np.testing.assert_allclose(encode(tmp_path, speech), encode(loud_export, speech), atol=1e-4)
    kept, changed = (
        {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(where / ENCODER.file).graph.initializer}
        for where in (loud_export, tmp_path)
    )
    for name, factor in factors.items():
        np.testing.assert_allclose(changed[name], kept[name] * factor, rtol=1e-6)


@pytest.mark.parametrize(
    ("flags", "loss"), [(("--quant_method", "rtn"), 3), (("--quant_method", "int8"), 6)], ids=["rtn", "int8"]
)
def test_loud_channels_cost_little_with_scaling_and_much_without(
    flags, loss, tiny_export, loud_export, optimized, tmp_path, speech, monkeypatch, capsys
):
    reference = encode(tiny_export, speech)
    flags = ("--skip_fusion", *flags)
    folder = optimized(*flags, "--verbose", source=loud_export)
    assert "input channels of 30 weights scaled" in printed_by(folder)
    tame, scaled = (sqnr_db(reference, encode(each, speech)) for each in (optimized(*flags), folder))
    assert abs(scaled - tame) < 1  # the factors undo the change, up to the rounding of float32
    monkeypatch.setattr("common.quantize.rewrite.factors_without_speech", lambda model, weights: {})
    argv = ["--model_dir", str(loud_export), "--output_dir", str(tmp_path / "unscaled"), *flags]
    assert optimize_encoder.main(argv) == 0, capsys.readouterr().err
    assert sqnr_db(reference, encode(tmp_path / "unscaled", speech)) < scaled - loss


def test_factors_undo_what_was_moved_between_channels_and_rows():
    draw = np.random.default_rng(3)
    power, rows, moved = draw.uniform(0.5, 2, (3, 64)).astype(np.float64)
    moved[:2] = 9.0
    before, after = row_factors(power, rows)[:, 0], row_factors(power * moved**2, rows / moved**2)[:, 0]
    np.testing.assert_allclose((after / moved) / (after / moved)[5], before / before[5], rtol=1e-5)


@pytest.mark.parametrize("elsewhere", [None, "Add", "output", "two weights, one unknown"])
def test_a_normalization_that_also_goes_elsewhere_is_left_alone(elsewhere):
    K, weight = 64, "layers.0.attention.query.weight"
    draw = np.random.default_rng(1)
    arrays = {
        name: draw.standard_normal(shape) for name, shape in {"g": K, "b": K, weight: (K, K), "v": (K, K)}.items()
    }
    nodes = [
        helper.make_node("LayerNormalization", ["x", "g", "b"], ["n"]),
        helper.make_node("MatMul", ["n", weight], ["y"]),
    ]
    outputs = ["y"]
    if elsewhere == "Add":
        nodes.append(helper.make_node("Add", ["n", "x"], ["z"]))
        outputs.append("z")
    elif elsewhere == "output":
        outputs.append("n")
    elif elsewhere:
        nodes.append(helper.make_node("MatMul", ["n", "v"], ["z"]))
        outputs.append("z")
    ends = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in side] for side in (["x"], outputs)]
    constants = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "norm", *ends, constants)
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    found = factors_without_speech(model, [weight])
    assert set(found) == (set() if elsewhere else {weight})
    if elsewhere:
        assert normalized_inputs(model, [weight]) == {}
        with pytest.raises(ValueError, match="has no normalization before it"):
            fold(model, {weight: np.ones((K, 1), np.float32)})


def test_normalizations_with_the_same_numbers_get_their_own():
    """The exporter stores equal scales only once, but each normalization needs factors of its own."""
    K, draw = 64, np.random.default_rng(4)
    weights = [f"layers.{i}.feed_forward1.expand.weight" for i in range(2)]
    arrays = {"g": draw.uniform(0.5, 9, K), "b": draw.standard_normal(K)}
    arrays |= {name: draw.standard_normal((K, K)) * draw.uniform(0.1, 3, (K, 1)) for name in weights}
    nodes = [
        helper.make_node("LayerNormalization", ["x", "g", "b"], ["n"]),
        helper.make_node("MatMul", ["n", weights[0]], ["h"]),
        helper.make_node("LayerNormalization", ["h", "g", "b"], ["m"]),
        helper.make_node("MatMul", ["m", weights[1]], ["y"]),
    ]
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, ["R", K])] for name in "xy"]
    constants = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "norms", *ends, constants)
    exported = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model = ir.from_proto(exported)
    factors = factors_without_speech(model, weights)
    assert not np.allclose(factors[weights[0]], factors[weights[1]], rtol=0.01)
    fold(model, factors)
    x = draw.standard_normal((7, K)).astype(np.float32)
    expected, actual = (
        ort.InferenceSession(proto.SerializeToString()).run(None, {"x": x})[0]
        for proto in (exported, ir.to_proto(model))
    )
    np.testing.assert_allclose(actual, expected, atol=1e-3)


@pytest.fixture(scope="module")
def biased_checkpoint(tmp_path_factory) -> Path:
    """A random model with biases."""
    path = tmp_path_factory.mktemp("tame") / "tame.nemo"
    topology = {"mels": 80, "predictor": 48, "pieces": 64, "encoder": {**SMALL, "d_model": 96, "use_bias": True}}
    write_checkpoint(path, topology)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scales", "stream"])
def test_a_checkpoint_with_loud_channels_loses_little(kind, biased_checkpoint, tmp_path, monkeypatch, capsys):
    """Run the scripts on the tool's checkpoints."""
    loud = tmp_path / "loud.nemo"
    ratio = write_loud(biased_checkpoint, loud, kind)
    assert ratio > (100 if kind == "scales" else 3)
    exported = tmp_path / "exported"
    source = ["--model_name", str(loud), "--output_dir", str(exported)]
    assert export_parakeet_to_onnx.main(source) == 0, capsys.readouterr().err
    assert export_tokenizer.main(source) == 0, capsys.readouterr().err

    def noise_ratio(name: str) -> float:
        argv = ["--model_dir", str(exported), "--output_dir", str(tmp_path / name), "--quant_method", "int8"]
        assert optimize_encoder.main(argv) == 0, capsys.readouterr().err
        return json.loads((tmp_path / name / MANIFEST).read_text())["optimize"]["sqnr_db_on_noise"]

    scaled = noise_ratio("scaled")
    monkeypatch.setattr("common.quantize.rewrite.factors_without_speech", lambda model, weights: {})
    unscaled = noise_ratio("unscaled")
    assert scaled > unscaled + (3 if kind == "scales" else 0)
