"""Checkpoints in the format of transformers: the same graphs, transformers as the reference, hostile files.

They are written by transformers' own `save_pretrained` (benchmarks/transformers_checkpoint.py), and read by
transformers' own `from_pretrained` where a transcript is compared.
"""

import json
import os
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import export_parakeet_to_onnx
import export_tokenizer
import test_real_speech
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.transformers_checkpoint import convert, save_processor
from common.checkpoint.find import find_checkpoint
from common.checkpoint.spec import ModelSpec
from common.checkpoint.tokenizer import (
    parse_model,
    sentencepiece_model,
    tokenizer_config,
    tokenizer_json,
    vocab_text,
)
from common.cli import CheckError, Stages
from common.contract import GRAPHS
from common.evaluate.compare import NO_LIMIT
from common.export.parity import verify_graphs
from common.export.pipeline import ExportOptions, export_graphs
from common.folder import read_manifest
from common.layouts.genai import GENAI
from common.report.card import model_card
from common.run.genai import GenAI
from common.run.reference import Transformers
from tests.helpers import (
    CLIPS,
    ROOT,
    SMALL,
    TINY,
    edit_json,
    edit_tensors,
    files_in,
    hostile_cases,
    load_model,
    prefer,
    rejected,
    run_python,
    shard,
    trained,
)

pytestmark = pytest.mark.slow  # the fixture imports transformers and converts the checkpoint

# tests/conftest.py verifies the same graphs on a long clip.
WITHOUT_NEMO = """
import sys
import common.export.parity
common.export.parity.LONG_CASE_MAX_PARAMETERS = 0
import export_parakeet_to_onnx, export_tokenizer
assert export_parakeet_to_onnx.main(sys.argv[1:]) == export_tokenizer.main(sys.argv[1:]) == 0
loaded = [name for name in sys.modules if name.split(".")[0] == "nemo"]
sys.exit(f"imported {loaded[:3]}" if loaded else 0)
"""


@pytest.fixture(scope="module")
def converted_export(tiny_transformers, tmp_path_factory) -> Path:
    """The converted checkpoint, exported by scripts that never import NeMo, in a process with another hash seed."""
    folder = tmp_path_factory.mktemp("exported") / "onnx_models"
    argv = ("--model_name", tiny_transformers, "--output_dir", folder)
    done = run_python(WITHOUT_NEMO, *argv, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def of_transformers(tiny_transformers):
    """The checkpoint in transformers, by its own loaders: the processor and the model."""
    from transformers import ParakeetForTDT, ParakeetProcessor

    return ParakeetProcessor.from_pretrained(tiny_transformers), ParakeetForTDT.from_pretrained(
        tiny_transformers
    ).eval()


def test_the_bundled_checkpoint_has_the_same_graphs_and_tokenizer_in_both_formats(converted_export, tiny_export):
    for name in files_in(tiny_export, GENAI):
        assert (converted_export / name).read_bytes() == (tiny_export / name).read_bytes(), name


def test_the_manifest_and_the_card_name_the_format_and_the_library(converted_export):
    manifest = read_manifest(converted_export)
    assert manifest["export"]["source"]["format"] == manifest["tokenizer"]["source"]["format"] == "transformers"
    assert manifest["export"]["parity"].keys() == {graph.file for graph in GRAPHS}
    card = model_card(manifest, GENAI)
    assert "Largest difference from the modules of transformers" in card
    assert card.count("NeMo") == GENAI.usage.count("NeMo")  # a comment of the snippet


RANDOM = {
    "80 mels, biases, xscaling, durations 0-1-2-4-8, one LSTM layer": {
        "mels": 80,
        "durations": [0, 1, 2, 4, 8],
        "predictor": 48,
        "predictor_layers": 1,
        "pieces": 64,
        "encoder": {**SMALL, "d_model": 96, "use_bias": True, "xscaling": True, "conv_kernel_size": 15},
    },
    "4× subsampling, three LSTM layers": {
        "predictor": 32,
        "predictor_layers": 3,
        "pieces": 40,
        "encoder": {**SMALL, "d_model": 64, "subsampling_factor": 4},
    },
}  # fmt: skip


@pytest.mark.parametrize("topology", RANDOM.values(), ids=RANDOM)
def test_random_checkpoints_have_the_same_graphs_in_both_formats(topology, tmp_path, capsys):
    """The graphs also equal transformers' own modules within the tolerance."""
    source = tmp_path / "model.nemo"
    write_checkpoint(source, topology)
    folder = convert(source, tmp_path / "converted")
    options, specs = ExportOptions(runtime="genai"), []
    for checkpoint, target, known in ((source, tmp_path / "a", "nemo"), (folder, tmp_path / "b", "transformers")):
        target.mkdir()
        found = find_checkpoint(str(checkpoint))
        assert found.format == known
        model = found.load_model()
        specs.append(ModelSpec.of(model))
        references = export_graphs(model, target, options, Stages(1))
    assert specs[0] == specs[1]
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["decoder.onnx", "encoder.onnx", "encoder.onnx.data", "joint.onnx"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    capsys.readouterr()
    verify_graphs(tmp_path / "b", references, Stages(len(GRAPHS)))
    assert capsys.readouterr().out.count("largest difference from transformers") == len(GRAPHS)


def test_a_graph_that_differs_from_transformers_is_an_error(tiny_transformers, tmp_path):
    import torch

    model = load_model(tiny_transformers)
    references = export_graphs(model, tmp_path, ExportOptions(runtime="genai", skip_verify=True), Stages(1))
    from common.export.parity import make_cases
    from common.export.wrappers import WRAPPERS

    with torch.no_grad():
        model.network.joint.head.bias[5] += 0.01
    references = {
        graph: make_cases(graph, module, WRAPPERS[graph](module).example_inputs)
        for graph, module in ((GRAPHS[2], model.joint),)
    }
    with pytest.raises(CheckError, match=r"joint.onnx differs from transformers by 1.0e-02 absolute"):
        verify_graphs(tmp_path, references, Stages(3))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_checkpoints_in_half_precision_are_widened(dtype, tiny_transformers, tmp_path):
    import torch

    half = load_model(convert(TINY, tmp_path / dtype, dtype)).network.state_dict()
    whole = load_model(tiny_transformers).network.state_dict()
    assert half.keys() == whole.keys()
    for name, tensor in whole.items():
        rounded = tensor.to(getattr(torch, dtype)).float() if tensor.is_floating_point() else tensor
        assert half[name].dtype == tensor.dtype
        assert torch.equal(half[name], rounded), name


def test_transcripts_are_those_of_generate(converted_export, of_transformers):
    """Through transformers' own processor, on every bundled clip: tokens and text of GenAI on the exported folder."""
    import torch

    processor, model = of_transformers
    genai = GenAI(converted_export)
    for clip in CLIPS:
        samples = genai.config.read_audio(clip)
        inputs = processor(samples, sampling_rate=16000)
        with torch.inference_mode():
            made = model.generate(**inputs)
        expected = [token for token in made.sequences[0].tolist() if token != model.config.blank_token_id]
        tokens = genai.transcribe(samples)
        assert tokens == expected, clip
        assert genai.text(tokens) == processor.decode(made.sequences, skip_special_tokens=True)[0].strip(), clip


def test_the_prediction_network_is_that_of_the_whole_decoder(tiny_transformers):
    """Its steps, chained and projected, give what transformers' decoder gives for the whole sequence."""
    import torch

    model = load_model(tiny_transformers)
    tokens = torch.tensor([[8192, 300, 17, 8000, 300, 42]])
    state, steps = None, []
    with torch.inference_mode():
        for place in range(tokens.size(1)):
            output, state = model.decoder.predict(tokens[:, place : place + 1] if place else None, state)
            steps.append(model.joint.project_prednet(output))
        expected = model.network.decoder(tokens)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected)


def test_transformers_is_the_reference_row(tiny_transformers, converted_export, capsys):
    clips = list(map(str, CLIPS[:2]))
    argv = ["--model_dir", str(converted_export), "--timestamps", "--audio", *clips]
    assert test_real_speech.main(argv) == 0
    output = capsys.readouterr().out
    assert "float32 ONNX equals transformers token for token on 2 of 2 clips of one window" in output
    assert "4 transcripts with the tokens of transformers also have its text, letter for letter" in output
    assert "no times of words were compared; 2 clips left out" in output
    assert "NeMo" not in output
    assert output.count("\ntransformers ") == 1  # its row of the table of engines
    reference = Transformers(load_model(tiny_transformers))
    features = reference.features(GenAI(converted_export).config.read_audio(CLIPS[0]))
    made, traced = reference.transcribe(features), reference.trace(features)
    assert made.tokens
    assert (made.tokens, made.frames) == (traced.tokens, traced.frames)


def test_a_step_that_transformers_does_not_force_is_a_listed_reason(
    tiny_transformers, converted_export, tmp_path, monkeypatch, capsys
):
    """The joint chooses a token and duration 0 on every frame, in transformers as in the folder."""
    token, folder = 300, shutil.copytree(converted_export, tmp_path / "models")
    prefer(folder, token)
    model = load_model(tiny_transformers)
    model.joint.joint_net[-1].bias.data[[token, 8193]] += 1000
    reference = Transformers(model)
    monkeypatch.setattr(test_real_speech, "load_reference", lambda *_, **__: reference)
    argv = ["--model_dir", str(folder), "--audio", str(CLIPS[3])]
    assert test_real_speech.main(argv) == 0
    place = "token 11 of the transcript, encoder frame 0: token 300 is emitted at another frame"
    assert f"{place}; {NO_LIMIT}" in capsys.readouterr().out
    monkeypatch.setattr(Transformers, "limits_symbols", True)
    assert test_real_speech.main(argv) == 1
    assert f"{place}; nothing excuses it" in capsys.readouterr().out


def test_which_of_two_forms_is_taken(tiny_transformers, tmp_path, capsys):
    both = tmp_path / "both"
    shutil.copytree(tiny_transformers, both)
    shutil.copy(TINY, both / "model.nemo")
    for found in (find_checkpoint(str(both)), find_checkpoint(str(both), None, "nemo")):
        assert (found.path, found.format) == (both / "model.nemo", "nemo")
    assert find_checkpoint(str(both), None, "transformers").path == both
    assert find_checkpoint(str(tiny_transformers)).path == tiny_transformers
    argv = ["--output_dir", tmp_path / "out", "--model_name"]
    error = rejected(capsys, export_tokenizer, *argv, tiny_transformers, "--checkpoint_format", "nemo")
    assert "there is no checkpoint of the format nemo in" in error
    error = rejected(capsys, export_tokenizer, *argv, TINY, "--checkpoint_format", "transformers")
    assert "there is no checkpoint of the format transformers in" in error
    assert "invalid choice" in rejected(capsys, export_tokenizer, *argv, TINY, "--checkpoint_format", "onnx")


def test_shards_and_half_precision_are_the_same_weights(tiny_transformers, tmp_path):
    """Shards as transformers itself writes them; bfloat16 takes half of the disk, and as much memory as float32."""
    import torch
    from transformers import ParakeetForTDT

    sharded, half = tmp_path / "sharded", tmp_path / "half"
    whole = load_model(tiny_transformers).network.state_dict()
    shutil.copytree(tiny_transformers, sharded)
    (sharded / "model.safetensors").unlink()
    ParakeetForTDT.from_pretrained(tiny_transformers).save_pretrained(sharded, max_shard_size="2MB")
    shutil.copytree(sharded, half)
    for path in (*half.glob("model-*"), half / "model.safetensors.index.json"):
        path.unlink()
    ParakeetForTDT.from_pretrained(tiny_transformers, dtype=torch.bfloat16).save_pretrained(half)
    assert len(find_checkpoint(str(sharded)).files) > 5
    assert find_checkpoint(str(half)).size < 0.6 * find_checkpoint(str(tiny_transformers)).size
    for folder, rounding in ((sharded, torch.float32), (half, torch.bfloat16)):
        found = load_model(folder).network.state_dict()
        assert found.keys() == whole.keys()
        for name, tensor in found.items():
            expected = whole[name].to(rounding).float() if whole[name].is_floating_point() else whole[name]
            assert torch.equal(tensor, expected), name
        assert find_checkpoint(str(folder)).loaded_bytes == find_checkpoint(str(tiny_transformers)).loaded_bytes
    floats = sum(4 * tensor.numel() for tensor in whole.values())
    assert find_checkpoint(str(half)).loaded_bytes == pytest.approx(floats, rel=0.001)


# ---- tokenizers


def files_of(model: bytes) -> tuple:
    proto = parse_model(model)
    return tokenizer_json(proto), tokenizer_config(proto), vocab_text(proto)


@pytest.mark.parametrize("recipe", ["bpe", "bpe bytes", "bpe nemo", "unigram", "unigram nemo"])
def test_a_tokenizer_json_gives_the_files_of_its_sentencepiece_model(recipe, tmp_path):
    """The tokenizer.json is made as transformers makes it, from a BPE model (as Parakeet's is) or a Unigram model."""
    from tokenizers import AddedToken
    from transformers.convert_slow_tokenizer import SpmConverter

    proto = parse_model(trained(recipe))
    proto.normalizer_spec.remove_extra_whitespaces = False  # as NeMo trains, which tokenizer.json does not say
    model = proto.SerializeToString()
    if "unigram" in recipe:
        (tmp_path / "tokenizer.model").write_bytes(model)
        converted = SpmConverter(SimpleNamespace(vocab_file=str(tmp_path / "tokenizer.model"))).converted()
        converted.add_special_tokens([AddedToken("<blank>", normalized=False, special=True)])
        converted.save(str(tmp_path / "tokenizer.json"))
    else:
        features = {"sample_rate": 16000, "features": 80, "window_stride": 0.01, "window_size": 0.025, "n_fft": 512}
        save_processor(features, model, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    found = sentencepiece_model(content, len(proto.pieces))
    assert files_of(found) == files_of(model)


def test_sentencepiece_beside_the_weights_is_read(tiny_transformers, tmp_path):
    folder = tmp_path / "spm"
    shutil.copytree(tiny_transformers, folder)
    (folder / "tokenizer.json").unlink()
    own = find_checkpoint(str(TINY)).sentencepiece
    (folder / "tokenizer.model").write_bytes(own)
    assert find_checkpoint(str(folder)).sentencepiece == own
    assert files_of(find_checkpoint(str(tiny_transformers)).sentencepiece) == files_of(own)


# ---- hostile and damaged folders

CASES, case = hostile_cases()


def edit_header(path: Path, change) -> None:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


NAME = "encoder.layers.0.conv.depthwise_conv.weight"


@case("not a safetensors file")
def offsets_that_overlap(folder):
    def overlap(header):
        names = [name for name in header if name != "__metadata__"]
        header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]

    edit_header(folder / "model.safetensors", overlap)


@case("not a safetensors file")
def offsets_beyond_the_file(folder):
    edit_header(folder / "model.safetensors", lambda header: header[NAME].update(data_offsets=[0, 2**40]))


@case("not a safetensors file")
def an_absurd_shape(folder):
    edit_header(folder / "model.safetensors", lambda header: header[NAME].update(shape=[2**62, 2**62]))


@case("not a safetensors file")
def a_header_of_an_exabyte(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + data[8:])


@case("not a safetensors file")
def half_of_the_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@case("not a safetensors file")
def a_pickle_under_that_name(folder):
    import torch

    torch.save({NAME: torch.zeros(3)}, folder / "model.safetensors")


@case("has the type I32, a packing that is not known")
def a_type_that_is_no_float(folder):
    edit_tensors(folder, lambda tensors: tensors.update({NAME: tensors[NAME].int()}))


@case("does not fit its config.json", f"size mismatch for {NAME}")
def a_tensor_of_another_shape(folder):
    edit_tensors(folder, lambda tensors: tensors.update({NAME: tensors[NAME].reshape(64, 2, 9)}))


@case("does not fit its config.json", f'Missing key(s) in state_dict: "{NAME}"')
def a_tensor_missing(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(NAME))


@case("does not fit its config.json", 'Unexpected key(s) in state_dict: "extra", "more"')
def tensors_too_many(folder):
    import torch

    edit_tensors(folder, lambda tensors: tensors.update(extra=torch.zeros(2), more=torch.zeros(2)))


@case("values that are not finite")
def a_weight_that_is_no_number(folder):
    edit_tensors(folder, lambda tensors: tensors[NAME].fill_(float("nan")))


@case("has no weight_map, which gives the file of each tensor")
def an_index_of_nothing(folder):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text("{}")


@case("there is no ../model-00001-of-00002.safetensors in")
def a_shard_outside_the_folder(folder):
    index = shard(folder)
    shutil.move(folder / "model-00001-of-00002.safetensors", folder.parent)
    places = {name: place.replace("model-00001", "../model-00001") for name, place in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@case("there is no model-00002-of-00002.safetensors in")
def a_shard_missing(folder):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


@case("a link to a place outside")
def a_shard_that_is_a_link_out_of_the_folder(folder):
    shard(folder)
    shutil.move(folder / "model-00002-of-00002.safetensors", folder.parent / "elsewhere")
    (folder / "model-00002-of-00002.safetensors").symlink_to(folder.parent / "elsewhere")


@case("not a safetensors file")
def half_of_a_shard(folder):
    shard(folder)
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@case("does not fit its config.json", f'Missing key(s) in state_dict: "{NAME}"')
def a_tensor_in_no_shard(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(NAME))
    shard(folder)


@case("there is no model.safetensors or model.safetensors.index.json in")
def a_pickle_alone(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@case("code of its own (auto_map)")
def code_in_the_config(folder):
    (folder / "model.py").write_text(f"open({str(folder.parent / 'canary')!r}, 'w')")
    edit_json(folder / "config.json", lambda config: config.update(auto_map={"AutoModel": "model.ParakeetForTDT"}))


@case("code of its own (auto_map)")
def code_in_the_processor(folder):
    edit_json(
        folder / "processor_config.json",
        lambda config: config["feature_extractor"].update(auto_map={"AutoFeatureExtractor": "model.X"}),
    )


@case("a link to a place outside")
def a_link_out_of_the_folder(folder):
    shutil.move(folder / "model.safetensors", folder.parent / "elsewhere")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere")


@case("a link to a place outside")
def a_link_to_a_link_out_of_the_folder(folder):
    shutil.move(folder / "config.json", folder.parent / "elsewhere")
    (folder / "inner").symlink_to(Path("..", "elsewhere"))
    (folder / "config.json").symlink_to("inner")


@case("there is no tokenizer.json or tokenizer.model in")
def a_pipe_as_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")


@case("config.json is damaged or not JSON")
def a_config_of_brackets(folder):
    (folder / "config.json").write_text("[" * 100_000)


@case("holds JSON of type list, not a mapping")
def a_config_that_is_a_list(folder):
    (folder / "config.json").write_text("[1, 2]")


@case("not a TDT model", "ParakeetForCTC")
def another_family(folder):
    edit_json(folder / "config.json", lambda config: config.update(architectures=["ParakeetForCTC"]))


@case("att_context_size", "only encoders of whole clips are supported")
def an_encoder_for_streaming(folder):
    edit_json(folder / "config.json", lambda config: config["encoder_config"].update(att_context_size=[70, 13]))


@case("cannot be built")
def a_width_that_is_a_word(folder):
    edit_json(folder / "config.json", lambda config: config["encoder_config"].update(hidden_size="wide"))


@case("are not numbered from 0 to 5, the blank")
def a_blank_in_the_vocabulary(folder):
    edit_json(folder / "config.json", lambda config: config.update(blank_token_id=5))


@case("cannot be built")
def an_activation_of_its_own(folder):
    edit_json(folder / "config.json", lambda config: config["encoder_config"].update(hidden_act="my_own"))


@case("feature_size of the feature extractor")
def features_of_another_size(folder):
    edit_json(folder / "processor_config.json", lambda config: config["feature_extractor"].update(feature_size=80))


@pytest.mark.parametrize("name", CASES)
def test_what_no_one_should_load_is_rejected_in_one_line(name, tiny_transformers, tmp_path, capsys):
    change, expected = CASES[name]
    folder = tmp_path / "in"
    shutil.copytree(tiny_transformers, folder)
    change(folder)
    before = sorted(tmp_path.rglob("*"))
    error = rejected(capsys, export_parakeet_to_onnx, "--model_name", folder, "--output_dir", tmp_path / "out")
    assert all(part in error for part in expected), error
    assert sorted(tmp_path.rglob("*")) == before


TOKENIZERS = {
    "a token missing": (
        lambda content: content["model"]["vocab"].pop("e"),
        "are not numbered from 0 to 8192, the blank",
    ),
    "another kind": (
        lambda content: content["model"].update(type="WordPiece"),
        "its type is 'WordPiece', not BPE or Unigram",
    ),
    "byte-level": (
        lambda content: content.update(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False}),
        "its pre-tokenizer is 'ByteLevel', not Metaspace",
    ),
    "another text": (
        lambda content: content["decoder"].update(replacement="e"),
        "converted from SentencePiece: it decodes",
    ),
    "a broken map": (
        lambda content: content["normalizer"]["normalizers"][0].update(precompiled_charsmap="%%%"),
        "converted from SentencePiece",
    ),
    "no model": (lambda content: content.pop("model"), "converted from SentencePiece"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_that_cannot_be_used(name, tiny_transformers, tmp_path, capsys):
    change, expected = TOKENIZERS[name]
    folder = tmp_path / "in"
    shutil.copytree(tiny_transformers, folder)
    edit_json(folder / "tokenizer.json", change)
    error = rejected(capsys, export_tokenizer, "--model_name", folder, "--output_dir", tmp_path / "out")
    assert expected in error, error


def test_features_are_those_of_transformers(tiny_transformers, of_transformers):
    samples = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
    expected = of_transformers[0](samples, sampling_rate=16000)
    features = Transformers(load_model(tiny_transformers)).features(samples)
    valid = int(expected["attention_mask"].sum())
    np.testing.assert_array_equal(features, expected["input_features"][0, :valid].T.numpy())
