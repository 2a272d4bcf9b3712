"""SentencePiece, Hugging Face `tokenizers` and ORT GenAI read one tokenizer and show one text."""

import io
import json
import random
import subprocess
import sys
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import onnx
import onnxruntime_genai as og
import pytest
from onnx import TensorProto, helper, numpy_helper
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

import export_tokenizer
from common import cli as console
from common.checkpoint import tokenizer
from common.checkpoint.tokenizer import (
    NOT_ZERO,
    ModelProto,
    Piece,
    parse_model,
    probe_sequences,
    special_ids,
    tokenizer_config,
    tokenizer_json,
    vocab_text,
    vocabulary,
)
from common.folder.outputs import write_json
from tests.helpers import MARKS, RECIPES, ROOT, SENTENCES, TINY, handmade, trained


class Readers:
    """One exported tokenizer as the three programs see it. `decode` asserts that they agree and returns the text."""

    def __init__(self, model: bytes, folder: Path):
        self.proto = parse_model(model)
        self.sentencepiece = SentencePieceProcessor(model_proto=model)
        write_json(folder / "tokenizer.json", tokenizer_json(self.proto))
        write_json(folder / "tokenizer_config.json", tokenizer_config(self.proto))
        write_stub_model(folder, vocab_size=len(self.proto.pieces) + 1)
        self.hugging_face = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.genai_model = og.Model(str(folder))
        self.genai = og.Tokenizer(self.genai_model)
        self.processor = self.genai_model.create_multimodal_processor()
        self.special = set(special_ids(self.proto))

    def decode(self, ids: list[int]) -> str:
        wanted = self.sentencepiece.decode([index for index in ids if index not in self.special])
        assert self.hugging_face.decode(ids) == wanted, ids
        assert self.genai.decode(np.array(ids, np.int32)) == wanted, ids
        assert self.processor.decode(np.array(ids, np.int32)) == wanted, ids
        return wanted

    def id(self, piece: str) -> int:
        index = self.sentencepiece.piece_to_id(piece)
        assert self.sentencepiece.id_to_piece(index) == piece
        return index


@pytest.fixture(scope="module", params=RECIPES)
def readers(request, tmp_path_factory) -> Readers:
    return Readers(trained(request.param), tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def bytes_readers(tmp_path_factory) -> Readers:
    return Readers(trained("unigram bytes"), tmp_path_factory.mktemp("bytes"))


def write_stub_model(folder: Path, vocab_size: int) -> None:
    """The least that og.Model loads as parakeet_tdt: three graphs of constants and a config."""
    f32, i64, width = TensorProto.FLOAT, TensorProto.INT64, 4
    state = [1, 1, width]
    graphs = {
        "encoder": (
            {"audio_signal": (f32, [1, 8, "T"]), "length": (i64, [1])},
            {"outputs": (f32, [1, width, 1]), "encoded_lengths": (i64, [1])},
        ),
        "decoder": (
            {"targets": (i64, [1, 1]), "target_length": (i64, [1]), "h_in": (f32, state), "c_in": (f32, state)},
            {"outputs": (f32, [1, width, 1]), "lengths": (i64, [1]), "h_out": (f32, state), "c_out": (f32, state)},
        ),
        "joiner": (
            {"encoder_output": (f32, state), "decoder_output": (f32, state)},
            {"logits": (f32, [1, 1, 1, vocab_size + 2])},
        ),
    }
    roles = {
        "encoder": (("audio_features", "input_lengths"), ("encoder_outputs", "output_lengths")),
        "decoder": (
            ("targets", "targets_length", "lstm_hidden_state", "lstm_cell_state"),
            ("outputs", "outputs_length", "lstm_hidden_state", "lstm_cell_state"),
        ),
        "joiner": (("encoder_outputs", "decoder_outputs"), ("logits",)),
    }
    model = {"type": "parakeet_tdt", "vocab_size": vocab_size, "context_length": 100, "tdt_durations": [0, 1]}
    model |= {"blank_id": vocab_size - 1, "decoder_start_token_id": vocab_size - 1, "eos_token_id": vocab_size - 1}
    model |= {"sample_rate": 16000, "num_mels": 8, "fft_size": 512, "hop_length": 160, "win_length": 400}
    model |= {"preemph": 0.97, "log_eps": 5.96e-8, "norm_eps": 1e-5, "subsampling_factor": 8}
    model |= {"chunk_samples": 12800, "left_context_samples": 0, "right_context_samples": 0, "max_symbols_per_step": 10}
    for name, (inputs, outputs) in graphs.items():
        write_constants(folder / f"{name}.onnx", inputs, outputs)
        model[name] = {"filename": f"{name}.onnx"}
        if name != "joiner":
            model[name] |= {"hidden_size": width, "num_hidden_layers": 1}
        model[name] |= {side: dict(zip(roles[name][index], graphs[name][index], strict=True))
                        for index, side in enumerate(("inputs", "outputs"))}  # fmt: skip
    write_json(folder / "genai_config.json", {"model": model, "search": {"max_length": 100}})


def write_constants(path: Path, inputs: dict, outputs: dict) -> None:
    """An ONNX graph that ignores its inputs and returns zeros. Both map a name to (element type, shape)."""
    values = {name: np.zeros(shape, helper.tensor_dtype_to_np_dtype(kind)) for name, (kind, shape) in outputs.items()}
    nodes = [helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values[name])) for name in values]
    sides = [[helper.make_tensor_value_info(name, *info) for name, info in side.items()] for side in (inputs, outputs)]
    graph = helper.make_graph(nodes, path.stem, *sides)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def write_checkpoint(path: Path, model: bytes) -> Path:
    """A .nemo whose tokenizer is `model` and whose weights are empty."""
    members = {
        "model_config.yaml": b"tokenizer: {type: bpe, model_path: 'nemo:0123_tokenizer.model'}",
        "model_weights.ckpt": b"",
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
    assert all(new == old.replace("▁", " ") for old, new in respelled)
    assert all(len(old.encode()) == 6 or "▁" in old[1:] for old, _ in respelled)
    assert [score for _, score in entries[:-1]] == pytest.approx([score for _, score in own], abs=1e-8)
    assert entries[-1] == ["<blank>", 0.0]
    assert len(entries) == len(own) + 1


def test_vocab_text_is_one_piece_a_line(readers):
    lines = vocab_text(readers.proto).splitlines()
    assert lines == [readers.sentencepiece.id_to_piece(index) for index in range(len(lines) - 1)] + ["<blank>"]


def test_marks_and_the_blank_are_never_shown(readers):
    marks = [index for index, piece in enumerate(readers.proto.pieces) if piece.type in tokenizer.HIDDEN_TYPES]
    assert {*marks, len(readers.proto.pieces)} <= readers.special
    word = readers.sentencepiece.encode("dog")
    for index in [*marks, len(readers.proto.pieces)]:
        assert readers.decode([index, *word, index]) == "dog"


def test_control_and_user_defined_pieces_are_special(bytes_readers):
    for mark in (*MARKS["control_symbols"], *MARKS["user_defined_symbols"]):
        assert bytes_readers.id(mark) in bytes_readers.special


# What the three readers show


def test_probe_sequences_hold_every_piece_and_decode_alike(readers):
    sequences = probe_sequences(readers.proto)
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
    wanted = readers.sentencepiece.normalize(sentence).replace("▁", " ").strip()
    assert shown == (wanted.replace("%", "") if readers.id("%") in readers.special else wanted)
    assert readers.decode(readers.hugging_face.encode(sentence).ids) == shown
    assert readers.decode(readers.genai.encode(sentence).tolist()) == shown


def test_unigram_encodes_like_sentencepiece_but_for_respelled_pieces(bytes_readers):
    entries = vocabulary(bytes_readers.proto)
    respelled = {index for index, piece in enumerate(bytes_readers.proto.pieces) if piece.piece != entries[index][0]}
    same = []
    for sentence in SENTENCES:
        wanted = bytes_readers.sentencepiece.encode(sentence)
        same.append(bytes_readers.hugging_face.encode(sentence).ids == wanted)
        assert same[-1] or respelled & set(wanted)
    assert same.count(False) == 1


def test_characters_without_a_piece_come_back_from_bytes(bytes_readers):
    for text in ("ß", "🦜", "ok 🦜 Ω Ж", "#@~", "한국어"):
        assert bytes_readers.decode(bytes_readers.sentencepiece.encode(text)) == unicodedata.normalize("NFKC", text)


def test_each_ascii_byte_is_its_character_or_hidden(bytes_readers):
    pieces = {piece.piece for piece in bytes_readers.proto.pieces} | {" "}
    for value in range(1, 128):
        index = bytes_readers.id(f"<0x{value:02X}>")
        assert bytes_readers.decode([index]) == ("" if chr(value) in pieces else chr(value))
        assert (index in bytes_readers.special) == (chr(value) in pieces)


def test_leading_spaces(readers):
    """SentencePiece drops all or one; `tokenizers` does the same, ORT GenAI drops one."""
    space, word = readers.id("▁"), readers.sentencepiece.encode("dog")
    ids = [space, space, *word]
    wanted = readers.sentencepiece.decode(ids)
    assert readers.hugging_face.decode(ids) == wanted
    keeps = not readers.proto.normalizer_spec.remove_extra_whitespaces
    assert wanted == ("  dog" if keeps else "dog")
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


def test_ids_do_not_shift_after_a_zero_score(tmp_path):
    """`<0x25>` of score 0 after the piece `%` gets no id from ORT Extensions, unless its score says otherwise."""
    pieces = [("%", 0.0, 4), *((f"<0x{value:02X}>", 0.0, 6) for value in range(256)), ("a", 0.0, 1), ("b", -1.0, 1)]
    readers = Readers(handmade(*pieces), tmp_path)
    assert readers.decode([readers.id("b"), readers.id("a"), readers.id("<0x25>"), readers.id("b")]) == "bab"
    assert vocabulary(readers.proto)[readers.id("<0x25>")][1] == NOT_ZERO


# What is refused


def test_a_piece_without_a_spelling_is_refused_by_name(tmp_path, capsys):
    model = handmade(("▁100", -1.0, 1), ("IMPACT", -2.0, 1), ("fine", -3.0, 1))
    checkpoint = write_checkpoint(tmp_path / "impact.nemo", model)
    assert export_tokenizer.main(["--model_name", str(checkpoint), "--output_dir", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "'IMPACT'" in message
    assert "100" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", [b"", b"not a model", b"\x0a\x02"])
def test_other_bytes_are_refused(model):
    with pytest.raises(ValueError, match="wanted a SentencePiece model"):
        parse_model(model)


def test_half_a_model_and_a_repeated_piece_are_refused():
    for model in (trained("bpe")[:1000], handmade(("a", -1.0, 1), ("a", -2.0, 1))):
        with pytest.raises(ValueError, match="wanted a SentencePiece model"):
            parse_model(model)


def test_a_line_break_in_a_piece_is_refused():
    with pytest.raises(ValueError, match="line break in 'a"):
        vocab_text(parse_model(handmade(("a\n", -1.0, 1))))


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


@pytest.mark.parametrize("damage", [swap_pieces, show_a_mark, forget_bytes, keep_leading_space])
def test_script_catches_a_wrong_tokenizer(tmp_path, monkeypatch, capsys, damage):
    right = tokenizer_json

    def wrong(proto: ModelProto) -> dict:
        content = right(proto)
        damage(content)
        return content

    monkeypatch.setattr(tokenizer, "tokenizer_json", wrong)
    checkpoint = write_checkpoint(tmp_path / "model.nemo", trained("unigram bytes"))
    out = tmp_path / "out"
    assert export_tokenizer.main(["--model_name", str(checkpoint), "--output_dir", str(out)]) == console.EXIT_CHECK
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
