"""Random models of other topologies go through all the scripts: nothing about one published model is assumed.

Verification compares logits. Tokens are compared elsewhere, on trained weights, since random weights nearly tie.
"""

import json
import shutil

import pytest

import export_parakeet_to_onnx
import export_tokenizer
import optimize_encoder
from benchmarks.random_checkpoint import write_checkpoint
from common.contract import GRAPHS
from common.export.float16 import EmulatedGraph, convert, measure_ranges
from common.quantize.fidelity import sqnr_db
from common.run.genai import GenAI
from common.run.ort import OnnxRuntime
from tests.helpers import CLIPS, SAMPLES, SMALL, TOPOLOGIES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=TOPOLOGIES)
def test_every_script_runs_on_every_topology(topology, tmp_path, capsys):
    checkpoint, exported, optimized = tmp_path / "model.nemo", tmp_path / "exported", tmp_path / "optimized"
    write_checkpoint(checkpoint, topology)
    source = ["--model_name", str(checkpoint), "--output_dir", str(exported)]
    frame = 0.16 if topology.get("preprocessor") else 0.08
    window = ["--chunk_seconds", f"{frame * 250}", "--left_context_seconds", f"{frame * 50}",
              "--right_context_seconds", f"{frame * 25}"]  # fmt: skip
    assert export_parakeet_to_onnx.main([*source, *window]) == 0, capsys.readouterr().err
    assert export_tokenizer.main(source) == 0, capsys.readouterr().err
    target = ["--model_dir", str(exported), "--output_dir", str(optimized), "--block_size", "16"]
    assert optimize_encoder.main(target) == 0, capsys.readouterr().err

    model = json.loads((exported / "genai_config.json").read_text())["model"]
    assert model["tdt_durations"] == topology.get("durations", [0, 1, 2, 3, 4])
    assert model["num_mels"] == topology.get("mels", 128)
    assert model["encoder"]["hidden_size"] == topology["encoder"]["d_model"]
    assert model["decoder"]["hidden_size"] == topology["predictor"]
    assert model["decoder"]["num_hidden_layers"] == topology.get("predictor_layers", 2)
    assert model["subsampling_factor"] == topology["encoder"].get("subsampling_factor", 8)
    assert model["vocab_size"] == topology["pieces"] + 1

    for folder in (exported, optimized):
        genai = GenAI(folder)
        samples = genai.config.read_audio(CLIPS[0])
        features = genai.features(samples)
        assert features.shape[0] == model["num_mels"]
        tokens = genai.transcribe(samples)
        assert tokens == OnnxRuntime(folder).transcribe(features).tokens
        assert isinstance(genai.text(tokens), str)

    manifest, fitted = tmp_path / "speech.jsonl", tmp_path / "fitted"
    manifest.write_text(json.dumps({"audio_filepath": str(SAMPLES / "jfk.wav")}))
    flags = ["--quant_method", "int8", "--calibration_manifest", str(manifest), "--output_dir", str(fitted)]
    assert optimize_encoder.main(["--verbose", "--model_dir", str(exported), *flags]) == 0, capsys.readouterr().err
    assert f"input channels of {6 * SMALL['n_layers']} weights scaled" in capsys.readouterr().out
    (expected,) = OnnxRuntime(exported).encode([features])
    (actual,) = OnnxRuntime(fitted).encode([features])
    assert sqnr_db(expected, actual) > 30

    ranges = measure_ranges(exported, [features])
    shutil.copyfile(exported / "genai_config.json", tmp_path / "genai_config.json")
    for graph in GRAPHS:
        record, converted = convert(exported, tmp_path, graph, ranges[graph.name])
        assert converted, record
    (actual,) = OnnxRuntime(tmp_path, EmulatedGraph).encode([features])
    assert sqnr_db(expected, actual) > 40
