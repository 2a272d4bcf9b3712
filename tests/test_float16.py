"""Float16 graphs: what they hold, that nothing overflows in them, and that values would overflow without the guard."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

import export_parakeet_to_onnx
import export_tokenizer
import optimize_encoder
import test_e2e
from common.contract import DECODER, ENCODER, GRAPHS, JOINT, Tensor
from common.evaluate.engines import OpenFolder
from common.export import float16, layers
from common.export.float16 import EmulatedGraph, RangeRecorder, _exact_operators, convert, measure_ranges
from common.export.wrappers import Encoder, export_graph
from common.layouts import layouts_for
from common.layouts.genai import GENAI
from common.layouts.onnx_asr import ONNX_ASR
from common.layouts.sherpa_onnx import SHERPA_ONNX
from common.quantize.fidelity import sqnr_db
from common.run.genai import GenAI
from common.run.ort import OrtGraph
from tests.helpers import CLIPS, TINY, narrow_encoder, rewrite_weights, runtime_texts

pytestmark = pytest.mark.slow  # the fixture exports, and measures on the bundled clips

LOUD = 2**17  # 131072, twice what float16 holds; a power of two changes no mantissa
LOUD_LAYER = 2


def loud_checkpoint(path):
    """The bundled checkpoint with the values of one layer's attention scaled up and its output scaled down as much."""

    def scale(weights):
        for name, factor in (("linear_v", LOUD), ("linear_out", 1 / LOUD)):
            weight = f"encoder.layers.{LOUD_LAYER}.self_attn.{name}.weight"
            weights[weight] = weights[weight].float() * factor

    return rewrite_weights(path, scale)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The loud checkpoint, exported with --precision fp16 for every runtime and verified; the folder for GenAI."""
    place = tmp_path_factory.mktemp("float16")
    source = ["--model_name", str(loud_checkpoint(place / "loud.nemo")), "--output_dir", str(place / "fp16")]
    assert export_parakeet_to_onnx.main([*source, "--precision", "fp16", "--runtime", "all"]) == 0
    assert export_tokenizer.main(source) == 0
    return place / "fp16" / GENAI.runtime


@pytest.fixture(scope="module")
def features(tiny_export):
    genai = GenAI(tiny_export)
    return [genai.features(genai.config.read_audio(path)) for path in CLIPS]


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.name)
def test_weights_are_float16_and_inputs_and_outputs_are_unchanged(graph, folder, tiny_export, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "models")  # the checker refuses data with hard links
    onnx.checker.check_model(copy / graph.file, full_check=True)
    actual, expected = (onnx.load(path / graph.file, load_external_data=False) for path in (folder, tiny_export))
    assert actual.graph.input == expected.graph.input
    assert actual.graph.output == expected.graph.output
    assert actual.opset_import == expected.opset_import
    weights = {tensor.name: tensor.data_type for tensor in actual.graph.initializer}
    products = [node for node in actual.graph.node if node.op_type in ("MatMul", "LSTM") and node.input[1] in weights]
    single = [node.name for node in products if weights[node.input[1]] == onnx.TensorProto.FLOAT]
    loud = [f"/layers.{LOUD_LAYER}/attention/{name}/MatMul" for name in ("value", "out")]
    assert single == (loud if graph is ENCODER else [])
    sizes = [graph.bytes_in(path) for path in (folder, tiny_export)]
    assert sizes[0] < 0.55 * sizes[1]


def test_manifest_names_what_stayed_float32(folder):
    export = json.loads((folder / "manifest.json").read_text())["export"]
    assert export["flags"]["precision"] == "fp16"
    encoder = export["float16"][ENCODER.file]
    attention = f"/layers.{LOUD_LAYER}/attention"
    kept = encoder["kept_float32"]
    assert {
        "/subsampling/Conv",
        f"{attention}/value/MatMul",
        f"{attention}/MatMul_2",
        f"{attention}/out/MatMul",
    } <= set(kept)
    assert all(name.startswith((attention, "/subsampling")) for name in kept)
    assert kept[f"{attention}/value/MatMul"] > 65504
    assert "/positions/Range" in encoder["kept_exact"]
    assert "/positions/Sin" in encoder["kept_exact"]
    for graph in GRAPHS:
        row = export["float16"][graph.file]
        assert row["max_abs"]
        assert max(row["max_abs"].values()) < row["limit"] <= min(row["kept_float32"].values(), default=np.inf)
        assert 0 < row["rounded_parity"]["max_rel"] < 2e-2
        assert export["float32_parity"][graph.file]["max_abs"] < 1e-3


def test_attention_is_in_one_block_whose_values_were_all_measured(folder, tiny_export):
    """No measured clip is long enough for some of the blocks that attention otherwise has; those would become float16
    whatever their values are."""
    graphs = [onnx.load(path / ENCODER.file, load_external_data=False).graph for path in (folder, tiny_export)]
    counts = [sum(node.op_type == "Softmax" for node in graph.node) for graph in graphs]
    assert counts == [5, 5 * layers.BLOCKS]


def test_an_overflow_is_prevented_by_the_guard_alone(folder, tiny_export, features, tmp_path, monkeypatch):
    loud = tmp_path / "float32"
    shutil.copytree(tiny_export, loud)
    proto = onnx.load(loud / ENCODER.file, load_external_data=False)
    places = {tensor.name: onnx.external_data_helper.ExternalDataInfo(tensor) for tensor in proto.graph.initializer
              if tensor.external_data}  # fmt: skip
    for name, factor in (("value", LOUD), ("out", 1 / LOUD)):
        place = places[f"layers.{LOUD_LAYER}.attention.{name}.weight"]
        data = np.memmap(loud / ENCODER.data_file, np.float32, "r+", place.offset or 0, (place.length // 4,))
        data *= factor
        data.flush()
    ranges = measure_ranges(loud, features[:1])[ENCODER.name]
    clip = features[0][None], np.array([features[0].shape[1]])
    expected = OrtGraph(tiny_export, ENCODER)(*clip)[0]
    assert sqnr_db(expected, EmulatedGraph(folder, ENCODER)(*clip)[0]) > 50
    with monkeypatch.context() as patch:
        patch.setattr(float16, "LIMIT", np.inf)
        assert not convert(loud, tmp_path, ENCODER, ranges)[0]["kept_float32"]
    for engine in (EmulatedGraph, OrtGraph):
        assert not np.isfinite(engine(tmp_path, ENCODER)(*clip)[0]).any()


def test_sums_inside_a_product_are_measured(tmp_path):
    """1e5 - 1e5 + 1 is 1, but not in float16."""
    weight = onnx.numpy_helper.from_array(np.array([[1e5], [-1e5], [1]], np.float32) / 10, "weight")
    node = onnx.helper.make_node("MatMul", ["x", "weight"], ["y"], name="product")
    values = [onnx.helper.make_tensor_value_info(name, 1, [1, size]) for name, size in (("x", 3), ("y", 1))]
    proto = onnx.helper.make_model(onnx.helper.make_graph([node], "g", values[:1], values[1:], [weight]))
    proto.ir_version, proto.opset_import[0].version = 8, 17
    onnx.save(proto, tmp_path / JOINT.file)
    graph = dataclasses.replace(JOINT, inputs=(Tensor("x", (1, 3), ""),), outputs=(Tensor("y", (1, 1), ""),))
    recorder = RangeRecorder(tmp_path, graph)
    assert recorder(np.full((1, 3), 10, np.float32))[0] == 1
    assert recorder.ranges()["product"] == pytest.approx(2e5 + 1)


def test_positions_beyond_2048_stay_exact(tmp_path, monkeypatch):
    """Float16 counts exactly up to 2048. Positions beyond that stay exact, since they are not counted in float16."""
    source = tmp_path / "float32"
    source.mkdir()
    export_graph(Encoder(narrow_encoder(32, 2, 30)), ENCODER, source, 17)
    frames = 2200 * 8
    features = np.random.default_rng(0).standard_normal((1, 80, frames), dtype=np.float32)
    recorder = RangeRecorder(source, ENCODER)
    recorder(features[:, :, :2000], np.array([2000]))
    ranges = recorder.ranges()
    clip = features, np.array([frames])
    expected = OrtGraph(source, ENCODER)(*clip)[0]
    convert(source, tmp_path, ENCODER, ranges)
    ratio = sqnr_db(expected, EmulatedGraph(tmp_path, ENCODER)(*clip)[0])
    assert ratio > 55
    exact = _exact_operators
    monkeypatch.setattr(
        float16, "_exact_operators", lambda model: {node for node in exact(model) if node.op_type in ("Cast", "Range")}
    )
    convert(source, tmp_path, ENCODER, ranges)
    assert sqnr_db(expected, EmulatedGraph(tmp_path, ENCODER)(*clip)[0]) < ratio - 10


@pytest.mark.parametrize("layout", [ONNX_ASR, SHERPA_ONNX], ids=lambda layout: layout.runtime)
def test_other_runtimes_transcribe_what_nemo_transcribes(layout, folder, nemo_texts):
    assert runtime_texts(layout, folder.parent / layout.runtime) == nemo_texts


def test_genai_transcribes_what_nemo_transcribes(folder, nemo_transcripts, capsys):
    genai = GenAI(folder)
    for path, transcript in zip(CLIPS, nemo_transcripts, strict=True):
        assert genai.transcribe(genai.config.read_audio(path)) == transcript.tokens, path
    assert test_e2e.main(["--model_dir", str(folder)]) == 0
    assert "We have 13 black fans." in capsys.readouterr().out


def test_decoder_and_joint_are_emulated_with_float16_rounding(folder, tiny_export):
    zeros = np.zeros((2, 1, 64), np.float32)
    decoder = np.array([[7]]), np.ones(1, np.int64), zeros, zeros
    random = np.random.default_rng(0)
    joint = [np.tanh(random.standard_normal((1, 1, width), dtype=np.float32)) for width in (128, 64)]
    for graph, inputs in ((DECODER, decoder), (JOINT, joint)):
        expected, actual = OrtGraph(tiny_export, graph)(*inputs)[0], EmulatedGraph(folder, graph)(*inputs)[0]
        assert actual.dtype == np.float32
        assert 45 < sqnr_db(expected, actual) < 100  # rounded, and no more than that


def test_a_float16_folder_is_not_quantized(folder, tmp_path, capsys):
    assert optimize_encoder.main(["--model_dir", str(folder), "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "only float32 weights can be quantized" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_next_step_is_to_test_or_to_use_it(folder, tmp_path, capsys):
    copied = tmp_path / "fp16"
    shutil.copytree(folder, copied)
    checkpoint = folder.parents[1] / "loud.nemo"
    assert export_tokenizer.main(["--model_name", str(checkpoint), "--output_dir", str(copied)]) == 0
    assert f"next: python test_e2e.py --model_dir {copied}" in capsys.readouterr().out
    step = export_parakeet_to_onnx.next_step(Path("out"), layouts_for("onnx-asr"), is_float16=True)
    assert step == "how to use it: out/onnx-asr/README.md"


def test_a_float16_folder_need_not_equal_float32(folder):
    assert not OpenFolder(folder).is_float32


def test_the_conversion_needs_speech(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("common.export.pipeline.SPEECH", tmp_path)
    argv = ["--model_name", str(TINY), "--output_dir", str(tmp_path / "out"), "--precision", "fp16", "--skip_verify"]
    assert export_parakeet_to_onnx.main(argv) == 2
    assert "measures on the audio in" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
