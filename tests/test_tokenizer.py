"""SentencePiece, Hugging Face `tokenizers` and ORT GenAI read the same tokenizer and show the same text."""

import io
import json
import random
import string
import subprocess
import sys
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import pytest
from tokenizers import Tokenizer

import export_tokenizer
from common.checkpoint.tokenizer import (
    ModelProto,
    Piece,
    parse_model,
    probe_sequences,
    special_ids,
    tokenizer_json,
    vocab_text,
    vocabulary,
)
from common.cli import EXIT_CHECK
from tests.helpers import MARKS, RECIPES, ROOT, SENTENCES, TINY, handmade, trained
from tests.readers import Readers, write_stub_model


@pytest.fixture(scope="module", params=RECIPES)
def readers(request, tmp_path_factory) -> Readers:
    return Readers(trained(request.param), tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def bytes_readers(tmp_path_factory) -> Readers:
    return Readers(trained("unigram bytes"), tmp_path_factory.mktemp("bytes"))


def write_checkpoint(path: Path, model: bytes) -> Path:
    """A .nemo whose tokenizer is `model`, whose weights are an empty zip, and whose config describes no more of a TDT
    model than is read here."""
    config = {
        "tokenizer": {"type": "bpe", "model_path": "nemo:0123_tokenizer.model"},
        "decoder": {"blank_as_pad": True},
        "joint": {"num_extra_outputs": 2},
        "decoding": {"durations": [0, 1]},
    }
    members = {
        "model_config.yaml": json.dumps(config).encode(),
        "model_weights.ckpt": b"PK\5\6" + bytes(18),
        "0123_tokenizer.model": model,
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


# What the files hold


def test_pieces_and_scores_are_sentencepiece_s_own_and_the_blank_is_last(readers):
    entries = tokenizer_json(readers.proto)["model"]["vocab"]
    own = [(piece.piece, piece.score) for piece in readers.proto.pieces]
    respelled = [(old, new) for (old, _), (new, _) in zip(own, entries, strict=False) if old != new]
    bytes_with_pieces = {f"<0x{ord(character):02X}>" for character in {*string.printable, "\0"}}
    assert all(new == f"<{old}>" for old, new in respelled if old in bytes_with_pieces)
    respelled = [(old, new) for old, new in respelled if old not in bytes_with_pieces]
    assert all(new == old.replace("▁", " ") for old, new in respelled)
    assert all(len(old.encode()) == 6 or "▁" in old[1:] for old, _ in respelled)
    assert [score for _, score in entries[:-1]] == [score for _, score in own]
    assert entries[-1] == ["<blank>", 0.0]
    assert len(entries) == len(own) + 1


def test_vocab_text_is_one_piece_a_line(readers):
    lines = vocab_text(readers.proto).splitlines()
    assert lines == [readers.sentencepiece.id_to_piece(index) for index in range(len(lines) - 1)] + ["<blank>"]


def test_marks_and_the_blank_are_never_shown(readers):
    word = readers.sentencepiece.encode("dog")
    controls = [index for index, piece in enumerate(readers.proto.pieces) if piece.type == Piece.CONTROL]
    for index in [*readers.no_text, *controls]:
        assert readers.decode([index, *word, index]) == "dog"


def test_user_defined_pieces_are_text_unless_they_are_spelt_like_marks(bytes_readers):
    assert bytes_readers.marks == ["<|en|>", "<|pnc|>", "▁[no▁ise]"]
    special = set(special_ids(bytes_readers.proto))
    hidden = {*MARKS["control_symbols"], *bytes_readers.marks}
    assert {mark for marks in MARKS.values() for mark in marks if bytes_readers.id(mark) in special} == hidden
    assert bytes_readers.decode(bytes_readers.sentencepiece.encode("90% of 100")) == "90% of 100"


# What the three readers show


def test_probe_sequences_hold_every_piece_and_decode_alike(readers):
    sequences = probe_sequences(readers.proto, length=32)
    byte_ids = {index for index, piece in enumerate(readers.proto.pieces) if piece.type == Piece.BYTE}
    reached = {index for sequence in sequences for index in sequence}
    assert set(range(len(readers.proto.pieces) + 1)) - byte_ids <= reached | {readers.id("▁")}
    assert all(readers.decode(sequence) is not None for sequence in sequences)


@pytest.mark.parametrize("seed", range(20))
def test_random_sequences_decode_alike(readers, seed):
    for sequence in probe_sequences(readers.proto, length=1 + 3 * seed, seed=1000 + seed):
        readers.decode(sequence)


@pytest.mark.parametrize("sentence", SENTENCES)
def test_sentences_survive_every_encoder(readers, sentence):
    shown = readers.decode(readers.sentencepiece.encode(sentence))
    assert shown == readers.sentencepiece.normalize(sentence).replace("▁", " ").strip()
    assert readers.decode(readers.hugging_face.encode(sentence).ids) == shown
    assert readers.decode(readers.genai.encode(sentence).tolist()) == shown


def test_unigram_encodes_like_sentencepiece_but_for_respelled_pieces(bytes_readers):
    entries = vocabulary(bytes_readers.proto)
    respelled = {index for index, piece in enumerate(bytes_readers.proto.pieces) if piece.piece != entries[index][0]}
    same = []
    for sentence in SENTENCES:
        expected = bytes_readers.sentencepiece.encode(sentence)
        same.append(bytes_readers.hugging_face.encode(sentence).ids == expected)
        assert same[-1] or respelled & set(expected)
    assert same.count(False) == 1


def test_characters_without_a_piece_come_back_from_bytes(bytes_readers):
    for text in ("ß", "🦜", "ok 🦜 Ω Ж", "#@~", "한국어"):
        assert bytes_readers.decode(bytes_readers.sentencepiece.encode(text)) == unicodedata.normalize("NFKC", text)


def test_each_ascii_byte_is_its_character_or_hidden(bytes_readers):
    pieces = {piece.piece for piece in bytes_readers.proto.pieces} | {" "}
    for value in range(1, 128):
        index = bytes_readers.id(f"<0x{value:02X}>")
        assert bytes_readers.sentencepiece.decode([index]) == chr(value)
        assert bytes_readers.shown([index]) == ("" if chr(value) in pieces else chr(value))


def test_leading_spaces(readers):
    """SentencePiece drops all leading spaces or one, and so does `tokenizers`; ORT GenAI drops one."""
    space, word = readers.id("▁"), readers.sentencepiece.encode("dog")
    ids = [space, space, *word]
    expected = readers.sentencepiece.decode(ids)
    assert readers.hugging_face.decode(ids) == expected
    keeps = not readers.proto.normalizer_spec.remove_extra_whitespaces
    assert expected == ("  dog" if keeps else "dog")
    assert readers.genai.decode(np.array(ids, np.int32)) == "  dog"
    assert readers.decode([*word, space, space, *word]) == "dog   dog"


@pytest.mark.parametrize("piece", ["▁100", "▁FBI", "▁20%", "▁▁", "a▁b", "▁of▁the", "▁x▁", "x▁", "<|DE|>", "▁E5é"])
def test_pieces_that_the_runtime_would_misread(tmp_path, piece):
    readers = Readers(handmade(("a", -1.0, 1), (piece, -2.0, 1), ("é", -3.0, 1), ("▁", -4.0, 1)), tmp_path)
    assert readers.decode([1, 2, 3]) == f"a{piece.replace('▁', ' ')}é"
    assert readers.decode([2, 1]) == f"{piece.replace('▁', ' ')}a".removeprefix(" ")


def test_the_misreading_is_real(tmp_path):
    """The reason for the spelling: written as it is, the piece is a control character to ORT GenAI."""
    readers = Readers(handmade(("▁100", -1.0, 1)), tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace('" 100"', '"▁100"'), encoding="utf-8")
    assert og.Tokenizer(readers.genai_model).decode(np.array([1], np.int32)) == "\x10"


BYTES = [(f"<0x{value:02X}>", 0.0, 6) for value in range(256)]
PERCENT = {
    "user-defined before the bytes": [("%", 0.0, 4), *BYTES],
    "user-defined after the bytes": [*BYTES, ("%", 0.0, 4)],
    "normal before the bytes": [("%", 0.0, 1), *BYTES],
    "normal after the bytes": [*BYTES, ("%", -1.0, 1)],
}


@pytest.mark.parametrize("pieces", PERCENT.values(), ids=PERCENT)
def test_a_character_with_a_piece_is_shown_and_its_byte_is_not(tmp_path, pieces):
    readers = Readers(handmade(*pieces, ("9", 0.0, 4), *((text, -2.0, 1) for text in ("▁", "a", "b"))), tmp_path)
    ids = [readers.id(piece) for piece in ("b", "9", "%", "a", "%")]
    assert readers.decode(ids) == "b9%a%"
    assert readers.shown([*ids, readers.id("<0x25>"), *ids]) == "b9%a%b9%a%"
    others = [readers.id(f"<0x{value:02X}>") for value in "ß#語".encode()]
    assert readers.decode([*ids, *others]) == "b9%a%ß#語"
    assert readers.decode(readers.hugging_face.encode("b9%a%ß").ids) == "b9%a%ß"
    assert readers.decode(readers.genai.encode("b9%a%").tolist()) == "b9%a%"  # its encoder has no bytes for others


def test_the_lost_id_is_real(tmp_path):
    """The reason for the further brackets: without them, the byte piece that comes later takes the id of `%`."""
    readers = Readers(handmade(("%", 0.0, 4), *BYTES, ("a", -1.0, 1)), tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["vocab"][readers.id("<0x25>")] = ["<0x25>", -1e-9]
    path.write_text(json.dumps(content), encoding="utf-8")
    genai = og.Tokenizer(readers.genai_model)
    assert genai.decode(np.array([readers.id("a"), readers.id("%")], np.int32)) == "a<unk>"


# What is rejected


def test_a_piece_without_a_spelling_is_rejected_by_name(tmp_path, capsys):
    model = handmade(("▁100", -1.0, 1), ("IMPACT", -2.0, 1), ("fine", -3.0, 1))
    checkpoint = write_checkpoint(tmp_path / "impact.nemo", model)
    assert export_tokenizer.main(["--model_name", str(checkpoint), "--output_dir", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "'IMPACT'" in message
    assert "100" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", [b"", b"not a model", b"\x0a\x02"])
def test_other_bytes_are_rejected(model):
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        parse_model(model)


def test_half_a_model_and_a_repeated_piece_are_rejected():
    for model in (trained("bpe")[:1000], handmade(("a", -1.0, 1), ("a", -2.0, 1))):
        with pytest.raises(ValueError, match="is not a SentencePiece model"):
            parse_model(model)


def test_a_piece_named_like_the_blank_keeps_its_name(tmp_path):
    readers = Readers(handmade(("<blank>", 0.0, 4), ("a", -1.0, 1)), tmp_path)
    assert vocabulary(readers.proto)[-1][0] == "<<blank>>"
    assert readers.decode([1, 2, 3]) == "a"


# The script


def test_script_writes_a_whole_folder(tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "model.nemo", trained("unigram bytes"))
    out = tmp_path / "models" / "out"
    assert export_tokenizer.main(["--model_name", str(checkpoint), "--output_dir", str(out)]) == 0
    assert "sequences decode like SentencePiece" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "tokenizer.json", "tokenizer_config.json", "vocab.txt", "manifest.json", "README.md"
    }  # fmt: skip
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "T5Tokenizer"
    assert json.loads((out / "manifest.json").read_text())["tokenizer"]["source"]["sha256"]
    exported = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert exported.decode(exported.encode(SENTENCES[0]).ids) == SENTENCES[0]


def hide_user_defined_pieces(content: dict) -> None:
    """Mark `%`, a user-defined piece, as special, as `special_ids` once did."""
    percent = [entry[0] for entry in content["model"]["vocab"]].index("%")
    content["added_tokens"].append({**content["added_tokens"][0], "id": percent, "content": "%"})


def swap_pieces(content: dict) -> None:
    vocab = content["model"]["vocab"]
    vocab[-2], vocab[-3] = vocab[-3], vocab[-2]


def show_a_mark(content: dict) -> None:
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<|en|>"]
    content["model"]["vocab"][[entry[0] for entry in content["model"]["vocab"]].index("<|en|>")][0] = "<|de|>"


def forget_bytes(content: dict) -> None:
    del content["decoder"]["decoders"][1]


def keep_leading_space(content: dict) -> None:
    del content["decoder"]["decoders"][3]


def hide_a_byte(content: dict) -> None:
    hash_sign = [entry[0] for entry in content["model"]["vocab"]].index("<0x23>")
    content["added_tokens"].append({**content["added_tokens"][0], "id": hash_sign, "content": "<0x23>"})


@pytest.mark.parametrize(
    "damage", [hide_user_defined_pieces, swap_pieces, show_a_mark, forget_bytes, hide_a_byte, keep_leading_space]
)
def test_script_catches_a_wrong_tokenizer(tmp_path, monkeypatch, capsys, damage):
    right = tokenizer_json

    def wrong(proto: ModelProto) -> dict:
        content = right(proto)
        damage(content)
        return content

    monkeypatch.setattr(export_tokenizer, "tokenizer_json", wrong)
    checkpoint = write_checkpoint(tmp_path / "model.nemo", trained("unigram bytes"))
    out = tmp_path / "out"
    assert export_tokenizer.main(["--model_name", str(checkpoint), "--output_dir", str(out)]) == EXIT_CHECK
    assert "SentencePiece" in capsys.readouterr().err
    assert not out.exists()


def test_tiny_checkpoint(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-X", "importtime", "export_tokenizer.py", "--model_name", TINY, "--output_dir", out]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    imported = {line.rsplit("|", 1)[-1].strip() for line in finished.stderr.splitlines()}
    assert not imported & {"torch", "nemo"}

    pieces = (out / "vocab.txt").read_text(encoding="utf-8").splitlines()
    write_stub_model(out, vocab_size=len(pieces))
    genai = og.Tokenizer(og.Model(str(out)))
    exported = Tokenizer.from_file(str(out / "tokenizer.json"))
    ids = random.Random(0).sample(range(1, len(pieces)), k=len(pieces) - 1)
    assert genai.decode(np.array(ids, np.int32)) == exported.decode(ids)
    for encode in (genai.encode, lambda text: np.array(exported.encode(text).ids, np.int32)):
        assert genai.decode(encode("the seven trains turned right")) == "the seven trains turned right"
