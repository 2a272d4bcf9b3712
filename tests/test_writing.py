"""--scripts: tokens with letters of other scripts are never emitted, and nothing else changes."""

import copy
import unicodedata
from collections.abc import Iterator

import numpy as np
import pytest

import export_parakeet_to_onnx
import test_real_speech
from common.checkpoint import nemo
from common.checkpoint.find import find_checkpoint
from common.checkpoint.tokenizer import Piece, parse_model
from common.contract import JOINT
from common.export.pipeline import suppress, suppressed_ids
from common.export.wrappers import WRAPPERS, export_graph
from common.folder import read_manifest
from common.layouts.genai import GENAI
from common.report.card import model_card
from common.run.genai import GenAI
from common.run.ort import OrtGraph
from tests.helpers import CLIPS, TINY, handmade, rejected, trained

pytestmark = pytest.mark.slow


@pytest.fixture
def stored_bias(tiny_model, monkeypatch) -> Iterator[None]:
    """Each time the bundled checkpoint is loaded, its joint has the bias that is stored in it, which --scripts changes
    in place."""
    bias, load = tiny_model.joint.joint_net[-1].bias.data, nemo.load_model
    stored = bias.clone()

    def loaded(*given, **options):
        model = load(*given, **options)
        bias.copy_(stored)
        return model

    monkeypatch.setattr(nemo, "load_model", loaded)
    yield
    bias.copy_(stored)


def letters_beside(text: str, name: str) -> bool:
    """Whether `text` has a letter whose Unicode name does not begin with that of the script. The code under test reads
    another source, the script property."""
    return any(one.isalpha() and not unicodedata.name(one).startswith((name, "MODIFIER")) for one in text)


@pytest.mark.parametrize("script", ["latin", "cyrillic", "greek"])
def test_tokens_with_letters_of_other_scripts(script):
    """On the vocabulary of parakeet-tdt-0.6b-v3, checked by the Unicode names of the characters."""
    proto = find_checkpoint(str(TINY)).tokenizer
    found = set(suppressed_ids(proto, script))
    ordinary = {index for index, piece in enumerate(proto.pieces) if piece.type == Piece.NORMAL}
    expected = {index for index in ordinary if letters_beside(proto.pieces[index].piece, script.upper())}
    odd = {proto.pieces[index].piece for index in found ^ expected}
    assert not {piece for piece in odd if piece not in ("▁ª", "ª", "º", "µ", "▁µ")}, odd  # Latin or common by Unicode
    assert found
    assert len(found) < len(ordinary)
    assert not found & {index for index, piece in enumerate(proto.pieces) if piece.piece.strip("▁").isdigit()}


def test_several_scripts_marks_bytes_and_vowel_signs():
    proto = parse_model(trained("bpe nemo"))
    one, two = (set(suppressed_ids(proto, names)) for names in ("latin", "latin, Greek "))
    assert two < one
    assert {proto.pieces[index].piece for index in one} >= {"я", "ω", "न", "े", "世"}
    assert not {proto.pieces[index].piece for index in one} & {"<|en|>", "%", ".", "1", "é", "▁", "<unk>"}
    proto = parse_model(handmade(("ab", 0, 1), ("aя", -1, 1), ("<|ru|>", 0, 4), ("é", -2, 1), ("1", -3, 1)))
    assert [proto.pieces[index].piece for index in suppressed_ids(proto, "latin")] == ["aя"]
    proto = parse_model(handmade(("ab", 0, 1), *((f"<0x{value:02X}>", 0, 6) for value in range(256))))
    assert suppressed_ids(proto, "latin") == []


def test_only_their_logits_change(tiny_model, tmp_path):
    """Only the joint is given to `suppress`, so the other graphs cannot change."""
    import torch

    joint, ids = copy.deepcopy(tiny_model.joint), suppressed_ids(find_checkpoint(str(TINY)).tokenizer, "latin")
    with torch.no_grad():
        joint.joint_net[-1].bias[ids] += 60  # so loud that they would be emitted
    for folder, suppressed in ((tmp_path / "any", []), (tmp_path / "latin", ids)):
        folder.mkdir()
        suppress(joint, suppressed)
        export_graph(WRAPPERS[JOINT](joint), JOINT, folder, 17)
    draw = np.random.default_rng(0)
    encoded = draw.normal(0, 30, (1, 500, 128)).astype(np.float32)  # far louder than any speech
    predicted = draw.normal(0, 1, (1, 1, 64)).astype(np.float32)
    before, after = (OrtGraph(tmp_path / name, JOINT)(encoded, predicted)[0] for name in ("any", "latin"))
    others = np.setdiff1d(np.arange(before.shape[-1]), ids)
    assert np.array_equal(before[..., others], after[..., others])
    np.testing.assert_allclose(after[..., ids], before[..., ids] - 1e4, atol=0.01)
    assert np.isin(before[..., :8193].argmax(-1), ids).any()
    assert not np.isin(after[..., :8193].argmax(-1), ids).any()


def test_a_script_that_the_vocabulary_lacks(tmp_path, capsys):
    argv = ("--model_name", TINY, "--output_dir", tmp_path / "out", "--scripts")
    error = rejected(capsys, export_parakeet_to_onnx, *argv, "latin,klingon")
    assert "among cyrillic, greek, latin, of which the checkpoint's vocabulary has letters, not klingon" in error
    assert "among cyrillic, greek, latin" in rejected(capsys, export_parakeet_to_onnx, *argv, "")


def test_an_export_in_one_script(stored_bias, tiny_export, tmp_path, capsys):
    """Greek alone cannot spell an English clip, so tokens must change; the reference has the same bias."""
    import shutil

    folder = tmp_path / "onnx_models"
    shutil.copytree(tiny_export, folder)
    argv = ["--model_name", str(TINY), "--output_dir", str(folder), "--scripts", "greek"]
    assert export_parakeet_to_onnx.main(argv) == 0
    manifest = read_manifest(folder)
    assert manifest["export"]["flags"]["scripts"] == "greek"
    ids = suppressed_ids(find_checkpoint(str(TINY)).tokenizer, "greek")
    assert manifest["export"]["suppressed_tokens"] == len(ids)
    assert f"in these scripts alone: greek. The {len(ids)} tokens" in model_card(manifest, GENAI)
    genai = GenAI(folder)
    tokens = genai.transcribe(genai.config.read_audio(CLIPS[0]))
    assert not set(tokens) & set(ids)
    assert set(GenAI(tiny_export).transcribe(genai.config.read_audio(CLIPS[0]))) & set(ids)
    capsys.readouterr()
    assert test_real_speech.main(["--model_dir", str(folder), "--audio", str(CLIPS[0])]) == 0
    assert "equals NeMo token for token on 1 of 1" in capsys.readouterr().out
