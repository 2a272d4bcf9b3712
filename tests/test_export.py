"""The exported graphs: their contract, their opsets, and errors that the verification must find."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import export_parakeet_to_onnx
from common.cli import CheckError, Stages
from common.contract import DECODER, ENCODER, GRAPHS, JOINT, PARITY_TOLERANCE
from common.export import layers, parity, wrappers
from common.export.parity import verify_graphs
from common.export.pipeline import OPSETS, ExportOptions, export_graphs
from common.export.wrappers import WRAPPERS, export_graph
from common.folder import CHECKPOINT, read_location
from common.run.ort import OrtGraph
from tests.helpers import ROOT, TINY, change_weights, narrow_encoder, rejected


def export(folder, *flags):
    return export_parakeet_to_onnx.main(["--model_name", str(TINY), "--output_dir", str(folder), *flags])


def load(folder, graph):
    return onnx.load(folder / graph.file, load_external_data=False)


@pytest.mark.parametrize("opset", OPSETS)
def test_opset_is_what_was_asked_for(opset, tiny_model, tmp_path):
    for graph in GRAPHS:
        module = WRAPPERS[graph](getattr(tiny_model, graph.name))
        export_graph(module, graph, tmp_path, opset)
        proto = load(tmp_path, graph)
        onnx.checker.check_model(tmp_path / graph.file)
        assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", opset)]
        with torch.inference_mode():
            inputs = module.example_inputs()
            expected = module(*inputs)
        actual = OrtGraph(tmp_path, graph)(*(tensor.numpy() for tensor in inputs))
        expected = expected if isinstance(expected, tuple) else (expected,)
        for one, other in zip(actual[: len(expected)], expected, strict=True):
            if graph is not ENCODER:  # its padded frames may differ
                np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("opset", [16, 22])
def test_other_opsets_are_rejected(opset, tmp_path, capsys):
    error = rejected(capsys, export_parakeet_to_onnx, "--opset_version", opset, "--output_dir", tmp_path / "out")
    assert f"--opset_version: invalid choice: {opset} (choose from 17, 18, 19, 20, 21)" in error
    assert not list(tmp_path.iterdir())


def test_options_need_neither_torch_nor_nemo():
    program = "import sys, common.export.pipeline; assert not {'torch', 'nemo'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    ExportOptions(runtime="genai")


def test_the_folder_holds_these_files_and_the_manifest_its_source(tiny_export):
    assert {path.name for path in tiny_export.iterdir()} == {
        "encoder.onnx", "encoder.onnx.data", "decoder.onnx", "joint.onnx",
        "genai_config.json", "audio_processor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
        "manifest.json", "README.md", ".cache",
    }  # fmt: skip
    manifest = json.loads((tiny_export / "manifest.json").read_text())
    assert manifest["export"]["flags"] == dataclasses.asdict(ExportOptions(runtime="genai"))
    assert manifest["export"]["flags"]["opset_version"] == 17
    assert manifest["export"]["source"]["file"] == TINY.name
    assert read_location(tiny_export, CHECKPOINT).samefile(TINY)
    assert manifest["tokenizer"]["source"] == manifest["export"]["source"]


def test_the_checkpoint_is_found_from_a_folder_behind_a_link(tiny_export, tmp_path):
    """NeMo reads the dots of a path without looking at links."""
    link = tmp_path / "deeper" / "down" / "link"
    link.parent.mkdir(parents=True)
    link.symlink_to(tiny_export, target_is_directory=True)
    assert Path(os.path.normpath(read_location(link, CHECKPOINT))).samefile(TINY)


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.name)
def test_graphs_have_the_declared_names_axes_and_types(graph, tiny_export):
    proto = load(tiny_export, graph)
    sizes = {"M": 128, "D": 128, "H": 64, "L": 2, "V+K": 8198, "B": "batch", "T": "time", "S": "frames", "U": "targets"}
    for tensors, values in ((graph.inputs, proto.graph.input), (graph.outputs, proto.graph.output)):
        assert [value.name for value in values] == [tensor.name for tensor in tensors]
        for tensor, value in zip(tensors, values, strict=True):
            shape = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            assert shape == [sizes[axis] for axis in tensor.axes], tensor.name
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            assert dtype == np.dtype(tensor.dtype), tensor.name


def test_graphs_hold_no_path_of_this_machine(tiny_export):
    for graph in GRAPHS:
        content = (tiny_export / graph.file).read_bytes()
        assert b".py" not in content
        assert str(TINY.parents[1]).encode() not in content
        proto = load(tiny_export, graph)
        assert not any(node.doc_string or node.metadata_props for node in proto.graph.node)
        locations = {entry.value for tensor in proto.graph.initializer for entry in tensor.external_data
                     if entry.key == "location"}  # fmt: skip
        assert locations == ({graph.data_file} if graph is ENCODER else set())


def test_positions_are_computed_and_pointwise_convolutions_are_products(tiny_export):
    proto = load(tiny_export, ENCODER)
    assert max(size for tensor in proto.graph.initializer for size in tensor.dims) < 5000
    assert {"Sin", "Cos"} <= {node.op_type for node in proto.graph.node}
    weights = {tensor.name: tensor.dims for tensor in proto.graph.initializer}
    pointwise = [node for node in proto.graph.node if node.op_type == "Conv" and set(weights[node.input[1]][2:]) == {1}]
    assert all("subsampling" in node.input[1] for node in pointwise)  # those are two-dimensional, over time and mels
    products = {node.input[1] for node in proto.graph.node if node.op_type == "MatMul"}
    assert {"layers.0.convolution.expand.weight", "layers.4.convolution.project.weight"} <= products


def test_joint_gives_raw_logits(tiny_export, tiny_model):
    module = wrappers.TdtJoint(tiny_model.joint)
    logits = OrtGraph(tiny_export, JOINT)(*(tensor.numpy() for tensor in module.example_inputs(2, 3, 4)))[0]
    assert logits.shape == (2, 3, 4, 8198)
    assert not np.allclose(np.exp(logits).sum(-1), 1, atol=1e-2)
    assert tiny_model.joint.log_softmax is None  # the wrapper did not change NeMo's own attribute


def test_one_mel_frame_and_long_clips_run(tiny_export):
    graph = OrtGraph(tiny_export, ENCODER)
    outputs, lengths = graph(np.zeros((1, 128, 1), np.float32), np.array([1]))
    assert outputs.shape == (1, 128, 1)
    assert lengths.tolist() == [1]
    assert np.isfinite(outputs).all()


def perturb_one_weight(folder, graph):
    """Change the sign of the largest weight of the graph's first product."""
    products = (node for node in load(folder, graph).graph.node if node.op_type in ("MatMul", "LSTM"))

    def changed(weight: np.ndarray) -> np.ndarray:
        weight.flat[np.argmax(np.abs(weight))] *= -1
        return weight

    change_weights(folder / graph.file, changed, next(products).input[1])


@pytest.mark.slow
def test_a_clip_longer_than_nemos_table_of_positions_is_verified(tmp_path, long_clips_are_not_verified, monkeypatch):
    """Where distances beyond that table are wrong, the difference is a hundred times as large as it is."""
    encoder = narrow_encoder(16, 1, 10)
    module = wrappers.Encoder(encoder)
    export_graph(module, ENCODER, tmp_path, 17)
    monkeypatch.setattr(parity, "LONG_CASE_MAX_PARAMETERS", long_clips_are_not_verified)
    cases = parity.make_cases(ENCODER, encoder, module.example_inputs)
    assert cases[-1].inputs[0].shape[2] > 8 * 5000
    assert parity.check_graph(tmp_path, ENCODER, cases[-1:])[0]["max_abs"] < PARITY_TOLERANCE / 50


class TestVerificationFails:
    @pytest.fixture(scope="class")
    def exported(self, tiny_model, tmp_path_factory):
        """The graphs, and what they are verified with."""
        folder = tmp_path_factory.mktemp("graphs")
        return folder, export_graphs(tiny_model, folder, ExportOptions(runtime="genai"), Stages(1))

    def assert_noticed(self, folder, references, message):
        with pytest.raises(CheckError, match=message):
            verify_graphs(folder, references, Stages(3))

    def assert_noticed_in_a_new_export(self, model, folder, message):
        self.assert_noticed(folder, export_graphs(model, folder, ExportOptions(runtime="genai"), Stages(1)), message)

    @pytest.mark.slow
    def test_by_exit_status_1_one_line_and_no_folder(self, tmp_path, capsys, monkeypatch):
        original = export_graph

        def export_and_perturb(module, exported, folder, opset, **options):
            original(module, exported, folder, opset, **options)
            if exported is JOINT:
                perturb_one_weight(folder, JOINT)

        monkeypatch.setattr("common.export.wrappers.export_graph", export_and_perturb)
        assert export(tmp_path / "out") == 1
        error = capsys.readouterr().err
        assert error.startswith("check failed: joint.onnx differs from NeMo by ")
        assert error.count("\n") == 1
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("graph", GRAPHS, ids=lambda graph: graph.name)
    def test_on_one_perturbed_weight(self, graph, exported, tmp_path):
        source, references = exported
        verify_graphs(source, references, Stages(3))
        folder = shutil.copytree(source, tmp_path / "perturbed")
        perturb_one_weight(folder, graph)
        self.assert_noticed(folder, references, f"{graph.file} differs from NeMo")

    def test_on_a_lost_padding_mask(self, tiny_model, tmp_path, monkeypatch):
        masks = wrappers.Encoder._attention_bias

        def unmasked(self, keep, length):
            return masks(self, keep, length) * 0

        monkeypatch.setattr(wrappers.Encoder, "_attention_bias", unmasked)
        self.assert_noticed_in_a_new_export(tiny_model, tmp_path, ENCODER.file)

    def test_on_a_lost_convolution_mask(self, tiny_model, tmp_path, monkeypatch):
        forward = layers.Convolution.forward
        monkeypatch.setattr(layers.Convolution, "forward", lambda self, x, keep: forward(self, x, keep * 0 + 1))
        self.assert_noticed_in_a_new_export(tiny_model, tmp_path, ENCODER.file)

    def test_on_a_lost_lstm_state(self, tiny_model, tmp_path, monkeypatch):
        forward = wrappers.StatefulDecoder.forward

        def stale(self, targets, lengths, h_in, c_in):
            output, lengths, h_out, _ = forward(self, targets, lengths, h_in, c_in)
            return output, lengths, h_out, c_in.clone()

        monkeypatch.setattr(wrappers.StatefulDecoder, "forward", stale)
        self.assert_noticed_in_a_new_export(tiny_model, tmp_path, DECODER.file)


def test_rerun_replaces_its_own_files_only(tiny_export, tmp_path):
    folder = tmp_path / "models"
    shutil.copytree(tiny_export, folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "encoder.onnx").write_bytes(b"old")
    assert export(folder, "--skip_verify", "--opset_version", "19") == 0
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "tokenizer.json").is_file()
    assert load(folder, ENCODER).opset_import[0].version == 19
    assert [path.name for path in tmp_path.iterdir()] == ["models"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest) == {"export", "tokenizer", "files"}
    assert manifest["export"]["parity"] == {}
