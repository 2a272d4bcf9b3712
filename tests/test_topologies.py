"""Nothing about one published model is assumed: random models of other topologies go through all the scripts.

Verification compares logits; tokens are compared on trained weights elsewhere, since those of random ones nearly tie.
"""

import json
import shutil

import pytest

import export_parakeet_to_onnx
import export_tokenizer
import optimize_encoder
from benchmarks.random_checkpoint import write_checkpoint
from common.contract import GRAPHS
from common.export.float16 import Emulated, convert
from common.export.ranges import record
from common.quantize.fidelity import sqnr_db
from common.run.baseline import RawOrt
from common.run.genai import GenAI
from tests.conftest import SAMPLES

SMALL = {"n_layers": 2, "n_heads": 2, "subsampling_conv_channels": 16}
TOPOLOGIES = {
    "80 mels, durations 0-1-2-4-8, one LSTM layer, biases, xscaling, layer norm": {
        "mels": 80,
        "durations": [0, 1, 2, 4, 8],
        "predictor": 48,
        "predictor_layers": 1,
        "pieces": 64,
        "encoder": {**SMALL, "d_model": 96, "use_bias": True, "xscaling": True, "conv_norm_type": "layer_norm"},
    },
    "hybrid TDT-CTC, tied position biases, group norm, wide kernel": {
        "hybrid": True,
        "predictor": 64,
        "pieces": 100,
        "encoder": {**SMALL, "d_model": 64, "untie_biases": False, "conv_norm_type": "group_norm4",
                    "conv_kernel_size": 15},
    },
    "4× striding subsampling, limited context, instance norm, three LSTM layers": {
        "durations": [0, 1, 2],
        "predictor": 32,
        "predictor_layers": 3,
        "pieces": 40,
        "encoder": {**SMALL, "d_model": 64, "subsampling": "striding", "subsampling_factor": 4,
                    "att_context_size": [40, 20], "conv_norm_type": "instance_norm"},
        "preprocessor": {"window_stride": 0.02, "window_size": 0.032},
    },
    "causal convolutions and chunked attention, 64 mels": {
        "mels": 64,
        "predictor": 40,
        "pieces": 50,
        "encoder": {**SMALL, "d_model": 64, "causal_downsampling": True, "conv_context_size": "causal",
                    "att_context_style": "chunked_limited", "att_context_size": [14, 6]},
    },
}  # fmt: skip


@pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=TOPOLOGIES)
def test_all_scripts(topology, tmp_path, capsys):
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
        samples = genai.config.read_audio(SAMPLES / "jfk.wav")
        features = genai.features(samples)
        assert features.shape[0] == model["num_mels"]
        tokens = genai.transcribe(samples)
        assert tokens == RawOrt(folder).transcribe(features).tokens
        assert isinstance(genai.text(tokens), str)

    manifest, fitted = tmp_path / "speech.jsonl", tmp_path / "fitted"
    manifest.write_text(json.dumps({"audio_filepath": str(SAMPLES / "jfk.wav")}))
    flags = ["--quant_method", "int8", "--calibration_manifest", str(manifest), "--output_dir", str(fitted)]
    assert optimize_encoder.main(["--model_dir", str(exported), *flags]) == 0, capsys.readouterr().err
    assert f"input channels of {6 * SMALL['n_layers']} weights scaled" in capsys.readouterr().out
    (wanted,), (found,) = (RawOrt(folder).encode([features]) for folder in (exported, fitted))
    assert sqnr_db(wanted, found) > 30

    largest = record(exported, [features])
    shutil.copyfile(exported / "genai_config.json", tmp_path / "genai_config.json")
    for graph in GRAPHS:
        assert convert(exported, tmp_path, graph, largest[graph.name]).converted
    (wanted,), (found,) = (RawOrt(*args).encode([features]) for args in ((exported,), (tmp_path, Emulated)))
    assert sqnr_db(wanted, found) > 40
