"""The forms in which moondream/parakeet-ultra and moondream/parakeet-redux are published, read from stand-ins.

The stand-ins are the bundled checkpoint in both forms (benchmarks/published_forms.py). What a matrix must be is known
from the codes and scales that were packed, not from what is read back.
"""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import export_parakeet_to_onnx
import export_tokenizer
import test_real_speech
from benchmarks.published_forms import FILES, GROUP, MODULES, stored, ternary, vad_head, write_form
from common.checkpoint.find import find_checkpoint
from common.checkpoint.ternary import TernaryModule, unpack
from common.folder import read_manifest
from common.run.reference import Nemo, Transformers
from tests.helpers import CLIPS, REDUX, edit_json, edit_tensors, hostile_cases, rejected

NAME = "encoder.layers.0.self_attn.q_proj"
NO_FEATURES = "no feature extractor: transformers' own numbers for 128 mel bins are used"
HEADS = (
    "left out, since they are no part of ParakeetForTDT: vad_head.ctx.bias, vad_head.ctx.weight, vad_head.out.bias, "
    "vad_head.out.weight, vad_head.proj.bias, vad_head.proj.weight"
)


@pytest.fixture(scope="session")
def forms(made_once, tiny_transformers) -> dict[str, Path]:
    """`ultra` and `redux` → the bundled checkpoint in that form."""
    return {form: made_once(f"form-{form}", partial(write_form, form, tiny_transformers)) for form in FILES}


@pytest.fixture
def copied(forms, tmp_path):
    """`copied(form)`: a copy to change."""
    return lambda form: Path(shutil.copytree(forms[form], tmp_path / "in"))


def matrices(folder: Path) -> list[str]:
    """The names of the matrices that `redux` packs."""
    names = load_file(folder / "model.safetensors")
    return [name for name in names if name.removesuffix(".weight").endswith(MODULES)]


def notes_of(form: str, folder: Path) -> list[str]:
    packed = [
        f"{len(matrices(folder))} matrices are ternary, with a scale for 128 columns of a row; the exported encoder "
        "holds them in float32 (7.9 MB), and optimize_encoder.py --quant_method int8 stores them in 2 bits (507 kB)"
    ]
    return [NO_FEATURES, HEADS, *(packed if form == "redux" else [])]


def test_digits_are_read_least_significant_first():
    """A row of seven columns: −1 0 1 1 −1, then 1 0 and three unused digits."""
    qweight = torch.tensor([[0 + 1 * 3 + 2 * 9 + 2 * 27 + 0 * 81, 2 + 1 * 3], [242, 0]], dtype=torch.uint8)
    scales = torch.tensor([[0.5], [2.0]], dtype=torch.float16)
    weight = unpack(TernaryModule("m", rows=2, columns=7, group=7, is_convolution=False), qweight, scales)
    assert weight.tolist() == [[-0.5, 0, 0.5, 0.5, -0.5, 0.5, 0], [2, 2, 2, 2, 2, -2, -2]]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "size"), [("ultra", 1_255_353_386), ("redux", 177_774_490)])
def test_the_weights_of_the_stand_ins_have_the_published_size_at_the_full_topology(form, size):
    """Bytes of model.safetensors on Hugging Face, from the names, types and shapes of the tensors alone."""
    from transformers import ParakeetForTDT, ParakeetTDTConfig

    encoder = {"num_mel_bins": 128, "attention_bias": False, "convolution_bias": False, "scale_input": False}
    with torch.device("meta"):
        network = ParakeetForTDT(ParakeetTDTConfig(encoder_config=encoder, vocab_size=8193, blank_token_id=8192))
    tensors = {}
    for name, tensor in (network.state_dict() | vad_head(network.config.encoder_config.hidden_size)).items():
        module = name.removesuffix(".weight")
        if form == "redux" and module.endswith(MODULES):
            rows, columns = tensor.shape[:2]
            tensors[f"{module}.qweight"] = torch.empty(rows, -(-columns // 5), dtype=torch.uint8, device="meta")
            tensors[f"{module}.scales"] = torch.empty(rows, columns // GROUP, dtype=torch.float16, device="meta")
        else:
            tensors[name] = stored(name, tensor)
    header, end = {}, 0
    for name, tensor in sorted(tensors.items(), key=lambda named: (-named[1].element_size(), named[0])):
        start, end = end, end + tensor.nbytes
        kind = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64", torch.uint8: "U8"}[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"))
    assert 8 + -(-len(text) // 8) * 8 + end == size  # the header is padded to whole groups of 8 bytes


@pytest.mark.parametrize("form", FILES)
def test_weights_are_those_that_were_written(form, forms, tiny_transformers):
    assert {path.name for path in forms[form].iterdir()} == FILES[form]
    found = find_checkpoint(str(forms[form])).load_model().network.state_dict()
    written = load_file(tiny_transformers / "model.safetensors")
    assert found.keys() == written.keys()
    packed = matrices(tiny_transformers) if form == "redux" else []
    assert bool(packed) == (form == "redux")
    for name, tensor in written.items():
        if name in packed:
            codes, scales = ternary(tensor.float().flatten(1))
            groups = codes.reshape(len(codes), -1, GROUP).double() * scales.double()[..., None]
            expected = groups.reshape(tensor.shape).float()
        elif tensor.is_floating_point():
            expected = tensor.half().float() if tensor.dim() >= 2 else tensor
        else:
            continue  # a counter, which nothing uses
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], expected), name


def test_the_bundled_ternary_checkpoint_has_the_published_form(forms):
    """The same files, tensors, types and keys as the stand-in, which at the full topology has the published sizes."""
    assert {path.name for path in REDUX.iterdir()} == FILES["redux"]
    assert (REDUX / "model.safetensors").stat().st_size < 3e6
    stand_in, sample = (load_file(folder / "model.safetensors") for folder in (forms["redux"], REDUX))
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in sample.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in stand_in.items()
    }
    for name in ("config.json", "ternary.json"):
        one, other = (json.loads((folder / name).read_text()) for folder in (forms["redux"], REDUX))
        assert one.keys() == other.keys()
    assert find_checkpoint(str(REDUX)).notes == find_checkpoint(str(forms["redux"])).notes


@pytest.mark.parametrize("form", FILES)
def test_notes_and_memory(form, forms, tiny_transformers):
    checkpoint = find_checkpoint(str(forms[form]))
    assert checkpoint.notes == notes_of(form, tiny_transformers)
    assert checkpoint.record()["notes"] == checkpoint.notes
    assert checkpoint.loaded_bytes == find_checkpoint(str(tiny_transformers)).loaded_bytes
    assert "notes" not in find_checkpoint(str(tiny_transformers)).record()


def test_features_are_those_of_transformers_and_nemo(forms, tiny_model):
    from transformers import ParakeetFeatureExtractor

    samples = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
    features = Transformers(find_checkpoint(str(forms["ultra"])).load_model()).features(samples)
    made = ParakeetFeatureExtractor(feature_size=128)(samples, sampling_rate=16000, return_tensors="np")
    valid = int(made["attention_mask"].sum())
    np.testing.assert_array_equal(features, made["input_features"][0, :valid].T)
    np.testing.assert_allclose(features, Nemo(tiny_model).features(samples), rtol=0, atol=1e-3)


@pytest.mark.parametrize("form", FILES)
def test_the_exported_folder_transcribes_as_transformers_does(form, forms, tiny_transformers, tmp_path, capsys):
    """Tokens and texts on every bundled clip, and the notes in what is printed and in the manifest."""
    argv = ["--model_name", str(forms[form]), "--output_dir", str(tmp_path / "out")]
    assert export_parakeet_to_onnx.main(argv) == 0
    printed = capsys.readouterr().out.splitlines()
    notes = notes_of(form, tiny_transformers)
    assert printed[: len(notes)] == [f"{forms[form].name}: {note}" for note in notes]
    assert export_tokenizer.main(argv) == 0
    assert read_manifest(tmp_path / "out")["export"]["source"]["notes"] == notes
    clips = [str(clip) for clip in CLIPS]
    assert test_real_speech.main(["--model_dir", str(tmp_path / "out"), "--audio", *clips]) == 0
    output = capsys.readouterr().out
    assert f"float32 ONNX equals transformers token for token on {len(clips)} of {len(clips)} clips" in output
    assert f"{2 * len(clips)} transcripts with the tokens of transformers also have its text" in output


# ---- what differs in ways that do not matter


def counters_that_overflowed(folder: Path) -> None:
    def overflow(tensors: dict) -> None:
        for name in tensors:
            if name.endswith("num_batches_tracked"):
                tensors[name] = torch.tensor(float("inf"), dtype=torch.float16)

    edit_tensors(folder, overflow)


def test_counters_that_overflowed_are_accepted(copied):
    folder = copied("redux")
    counters_that_overflowed(folder)
    counters = [
        tensor
        for name, tensor in find_checkpoint(str(folder)).load_model().network.state_dict().items()
        if name.endswith("num_batches_tracked")
    ]
    assert counters
    assert not any(counters)


# ---- hostile and damaged folders

CASES, case = hostile_cases()


@case(f"{NAME}.qweight has a byte of 243", "at most 242")
def a_byte_that_is_not_five_digits(folder):
    edit_tensors(folder, lambda tensors: tensors[f"{NAME}.qweight"][3, 5:6].fill_(243))


@case(f"{NAME}.weight and 0 more tensors", "not finite")
def a_scale_that_is_no_number(folder):
    edit_tensors(folder, lambda tensors: tensors[f"{NAME}.scales"][0, :1].fill_(float("nan")))


@case("there is no ternary.json in")
def no_description(folder):
    (folder / "ternary.json").unlink()


@case("has the packing thrush-ternary-v1", "only thrush-ternary-v2")
def another_format(folder):
    edit_json(folder / "ternary.json", lambda content: content.update(format="thrush-ternary-v1"))


@case("has the packing thrush-ternary-v2 {'base': 3,", "'code_offset': 0")
def another_packing(folder):
    edit_json(folder / "ternary.json", lambda content: content["packing"].update(code_offset=0))


@case("describes other matrices", "ternary_modules")
def a_matrix_that_config_json_does_not_list(folder):
    extra = {"name": "joint.head", "out_features": 128, "in_features": 128, "group_size": 128}
    edit_json(folder / "ternary.json", lambda content: content["quantized_modules"].append(extra))


@case("other groups of columns", "ternary_group_size")
def another_group_in_config_json(folder):
    edit_json(folder / "config.json", lambda config: config.update(ternary_group_size=64))


@case(f"expected {NAME}.qweight of type and shape ('U8', (128, 26)) by ternary.json, got ('U8', (128, 25))")
def a_packed_matrix_of_another_shape(folder):
    def cut(tensors: dict) -> None:
        tensors[f"{NAME}.qweight"] = tensors[f"{NAME}.qweight"][:, :-1].contiguous()

    edit_tensors(folder, cut)


@case(f"expected {NAME}.scales of type and shape ('F16', (128, 1)) by ternary.json, got None")
def no_scales(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(f"{NAME}.scales"))


@case(f"expected {NAME}.weight of type and shape None by ternary.json, got ('F32', (128, 128))")
def packed_and_unpacked(folder):
    edit_tensors(folder, lambda tensors: tensors.update({f"{NAME}.weight": torch.zeros(128, 128)}))


@case("codes in", "has the type U8, a packing that is not known")
def bytes_that_nothing_describes(folder):
    edit_tensors(folder, lambda tensors: tensors.update(codes=torch.zeros(4, dtype=torch.uint8)))


@case("does not fit its config.json", 'Unexpected key(s) in state_dict: "other_head.weight"')
def a_head_that_is_not_known(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"other_head.weight": torch.zeros(4)}))


@case("not a TDT model", "of model_type 'parakeet_ctc'")
def another_model_without_architectures(folder):
    edit_json(folder / "config.json", lambda config: config.update(model_type="parakeet_ctc"))


@case("cannot be built")
def no_mel_bins(folder):
    edit_json(folder / "config.json", lambda config: config["encoder_config"].pop("num_mel_bins"))


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_right_is_rejected_in_one_line(name, copied, tmp_path, capsys):
    change, expected = CASES[name]
    folder = copied("redux")
    change(folder)
    before = sorted(tmp_path.rglob("*"))
    error = rejected(capsys, export_parakeet_to_onnx, "--model_name", folder, "--output_dir", tmp_path / "out")
    assert all(part in error for part in expected), error
    assert sorted(tmp_path.rglob("*")) == before
