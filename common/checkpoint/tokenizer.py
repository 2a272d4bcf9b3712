"""A SentencePiece model → the tokenizer files of Hugging Face and ONNX Runtime Extensions, and back from transformers'.

It needs no torch and no NeMo. Three readers must show the same text for the same ids: SentencePiece itself, Hugging
Face `tokenizers` and the Unigram reader of ORT Extensions that ORT GenAI uses (`SpmUgmTokenizer`, `SpmUgmDecoder` in
operators/tokenizer/ugm_kernels.hpp, observed with onnxruntime-genai 0.18.0). The last one has four properties that
decide how the files are written:

* Any piece of six bytes whose fourth and fifth are upper-case hexadecimal digits becomes one byte, not only `<0x41>`:
  `▁100` would show as `\x10` and `▁FBI` as the byte FB. With a plain space for `▁` such a piece is four bytes long; it
  decodes right, and the encoders spell its text with other pieces.
* `▁` becomes a space at the start of a piece, or else at its end, and nowhere else.
* Ids are counted, not read: a piece of score 0 whose string was seen before gets no id, and all later ids shift.
* A string has only the id of the last piece with it. Where `%` is a piece, `<0x25>` would share its string and take or
  lose the id. SentencePiece's encoder never uses such a byte, so no model learned to emit it: it is marked special, and
  written with more brackets, `<<0x25>>`, which is the string of no other piece.

V counts the blank, which SentencePiece does not have: it is the last id, V - 1.
"""

import base64
import binascii
import json
import math
import random
import re
import string
from collections.abc import Mapping
from typing import Any, TypeAlias

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Tokenizer

PLAIN_BLANK = "<blk>"  # the name by which onnx-asr and sherpa-onnx find the blank
SPACE = "▁"  # how SentencePiece writes a space inside a piece
Piece: TypeAlias = ModelProto.SentencePiece
MARK = re.compile(rf"{SPACE}?(<.+>|\[.+\])", re.DOTALL)  # the spelling of a user-defined piece that is not text
WHITE_SPACE = set(string.whitespace)  # of ASCII: the characters at which sherpa-onnx splits and trims a line
LAST_BYTE_BPE = 0xC6  # the largest byte of icefall's byte-level pieces, which are spelt up to U+01BF
UTF8_LENGTHS = ((0x80, 0x800), (0x800, 0xD800), (0x10000, 0x110000))  # code points of 2, 3, 4 bytes
PROBE_LENGTHS = (1, 32)  # ids that are decoded together where two readers are compared
BYTE_PIECES = frozenset(f"<0x{value:02X}>" for value in range(256))
NOT_CONVERTED = "the tokenizer was not converted from SentencePiece"  # begins a message
SIX_BYTES_READ_AS_ONE = re.compile(rb"...([0-9A-F]{2}).", re.DOTALL)


def parse_model(model: bytes) -> ModelProto:
    """The SentencePiece model in `model`. Raises ValueError where SentencePiece cannot load it."""
    try:
        SentencePieceProcessor().LoadFromSerializedProto(model)
        proto = ModelProto.FromString(model)
    except (RuntimeError, DecodeError) as error:
        raise ValueError(f"the tokenizer, of {len(model)} bytes, is not a SentencePiece model ({error})") from None
    if not all(isinstance(piece.piece, str) and math.isfinite(piece.score) for piece in proto.pieces):
        raise ValueError("the SentencePiece model has a piece that is not UTF-8 or whose score is not finite")
    return proto


def special_ids(proto: ModelProto) -> list[int]:
    """Ids that no transcript shows: unknown and control pieces, user-defined marks, unused bytes, the blank.

    A user-defined piece is a mark if it is spelt like one, `<|en|>` or `[noise]`. All others are text: v3 has its
    digits as user-defined pieces, and no other digit pieces. The unknown piece stands for what the vocabulary cannot
    spell; SentencePiece and NeMo show ` ⁇ ` for it, which is not text either.
    """
    texts = {_plain(piece) for piece in proto.pieces}
    # The bytes of characters that have a piece besides, and NUL, which would end the C string of a transcript.
    unused = {value for value in range(0x80) if value == 0 or chr(value) in texts}
    hidden = [
        index
        for index, piece in enumerate(proto.pieces)
        if piece.type in (Piece.UNKNOWN, Piece.CONTROL)
        or (piece.type == Piece.USER_DEFINED and MARK.fullmatch(piece.piece))
        or (piece.type == Piece.BYTE and _byte(piece) in unused)
    ]
    return [*hidden, len(proto.pieces)]


def vocabulary(proto: ModelProto) -> list[list[Any]]:
    """[piece, score] of each id, the blank last, as SentencePiece has them, unless ORT Extensions would misread them.

    Raises ValueError naming the pieces that ORT Extensions cannot show: `IMPACT`, six bytes with `AC` as the fourth and
    fifth, is read as a byte, and there is no other spelling of it.
    """
    hidden = set(special_ids(proto))
    entries = []
    expected = {}  # what SentencePiece shows
    for index, piece in enumerate(proto.pieces):
        text = piece.piece
        plain = _plain(piece)  # plain spaces stay as they are in ORT Extensions
        if piece.type != Piece.BYTE and _runtime_text(_runtime_key(text)) != plain.encode():
            text = plain
        if index in hidden and SIX_BYTES_READ_AS_ONE.fullmatch(text.encode()):
            text = _in_brackets(text, proto)
        entries.append([text, piece.score])
        expected[index] = bytes([_byte(piece)]) if piece.type == Piece.BYTE else plain.encode()
    entries.append([_in_brackets("blank", proto), 0.0])
    ids: dict[bytes, int] = {}
    count = 0
    for text, score in entries:  # the loop of `SpmUgmTokenizer::Load`
        key = _runtime_key(text)
        if score != 0 or key not in ids:
            ids[key] = count
            count += 1
    shown = {index: _runtime_text(key) for key, index in ids.items()}
    wrong = [index for index, text in expected.items() if index not in hidden and shown.get(index) != text]
    if wrong:
        named = _named([proto.pieces[index].piece for index in wrong])
        raise ValueError(f"ONNX Runtime GenAI would misread {len(wrong)} pieces, which have no other spelling: {named}")
    return entries


def _in_brackets(name: str, proto: ModelProto) -> str:
    """`name` in as many brackets as it takes until no piece of the model has that name; `<blank>` for the blank."""
    taken = {piece.piece for piece in proto.pieces}
    name = f"<{name}>"
    while name in taken:
        name = f"<{name}>"
    return name


def tokenizer_json(proto: ModelProto) -> dict[str, Any]:
    """The content of tokenizer.json: a Hugging Face Unigram tokenizer. Raises ValueError as `vocabulary` does."""
    entries = vocabulary(proto)
    spec = proto.normalizer_spec
    normalizers: list[dict[str, Any]] = []  # SentencePiece's own character map, then its handling of spaces
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode("ascii")
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        normalizers.append({"type": "Strip", "strip_left": True, "strip_right": True})
        normalizers.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    # What `SentencePieceProcessor::Decode` drops of leading spaces: all, one or none.
    dropped = 2**31 - 1 if spec.remove_extra_whitespaces else int(spec.add_dummy_prefix)
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": entries[index][0], **special} for index in special_ids(proto)],
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": SPACE,
            "prepend_scheme": "always" if spec.add_dummy_prefix else "never",
            "split": proto.trainer_spec.split_by_whitespace,
        },
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": dropped, "stop": 0},
            ],
        },
        "model": {
            "type": "Unigram",
            "unk_id": next(index for index, piece in enumerate(proto.pieces) if piece.type == Piece.UNKNOWN),
            "vocab": entries,
            "byte_fallback": any(piece.type == Piece.BYTE for piece in proto.pieces),
        },
    }


def tokenizer_config(proto: ModelProto) -> dict[str, Any]:
    """The content of tokenizer_config.json. ORT Extensions picks its Unigram reader by the class name T5Tokenizer."""
    return {
        "tokenizer_class": "T5Tokenizer",
        "unk_token": next(piece.piece for piece in proto.pieces if piece.type == Piece.UNKNOWN),
        "eos_token": _in_brackets("blank", proto),
        "pad_token": _in_brackets("blank", proto),
        "extra_ids": 0,  # T5 has 100 pieces of its own after the vocabulary; there is nothing after the blank
        "clean_up_tokenization_spaces": False,
    }


def vocab_text(proto: ModelProto) -> str:
    """The content of vocab.txt: one piece a line, in id order, the blank last."""
    return "".join(f"{piece}\n" for piece in (*(piece.piece for piece in proto.pieces), _in_brackets("blank", proto)))


def tokens_text(proto: ModelProto) -> str:
    """onnx-asr's vocab.txt and sherpa-onnx's tokens.txt: piece, space and id on each line, the blank `<blk>` last.

    Raises ValueError naming the pieces that either would misread, which have white space in them or are named like the
    blank; and for a vocabulary that sherpa-onnx mistakes for byte-level BPE (IsByteBPE in csrc/symbol-table.cc).
    """
    pieces = [piece.piece for piece in proto.pieces]
    wrong = [piece for piece in pieces if not piece or piece == PLAIN_BLANK or set(piece) & WHITE_SPACE]
    if wrong:
        raise ValueError(f"onnx-asr and sherpa-onnx would misread {len(wrong)} pieces: {_named(wrong)}")
    if max((byte for piece in pieces for byte in piece.lstrip(SPACE).encode()), default=0) == LAST_BYTE_BPE:
        raise ValueError("sherpa-onnx would take this vocabulary for byte-level BPE: no letter past U+01BF in it")
    return "".join(f"{piece} {index}\n" for index, piece in enumerate([*pieces, PLAIN_BLANK]))


def bpe_text(proto: ModelProto) -> str:
    """sherpa-onnx's bpe.vocab, by which it spells hotwords: piece, tab and score on each line, in id order.

    sherpa-onnx chooses the spelling with the largest sum of scores (pkufool/simple-sentencepiece, `CalcDp`), whatever
    the tokenizer is. The scores of a Unigram model are made for that. Those of a BPE model are minus the ranks of its
    merges, with which `▁y ou` wins over `▁you`: 34 % of the words in this repository's documents were spelled as the
    published v3 tokenizer spells them. With these scores the fewest pieces win, and of those the earliest merges: 73 %.
    """
    is_bpe = proto.trainer_spec.model_type == proto.trainer_spec.BPE
    scores = ((piece.piece, piece.score * 1e-5 - 1 if is_bpe else piece.score) for piece in proto.pieces)
    return "".join(f"{piece}\t{score:.7g}\n" for piece, score in scores)


def probe_sequences(proto: ModelProto, length: int, seed: int = 0) -> list[list[int]]:
    """Shuffled sequences of about `length` ids that together hold every piece, with bytes as whole UTF-8 characters.

    No sequence has invalid UTF-8: SentencePiece shows U+FFFD for each wrong byte, `tokenizers` for each byte of the
    run, and ORT GenAI raises UnicodeDecodeError. Where SentencePiece drops all spaces at the beginning, no sequence
    starts with several, since ORT GenAI always drops one. NUL, and bytes whose character is a piece by SentencePiece's
    own lookup, are left out, since only SentencePiece shows them. On all other sequences the three agree.
    """
    processor = SentencePieceProcessor(model_proto=proto.SerializeToString())
    draw = random.Random(seed)
    of_byte = {_byte(piece): index for index, piece in enumerate(proto.pieces) if piece.type == Piece.BYTE}
    bytes_used = set(of_byte.values())
    units = [[index] for index in range(len(proto.pieces) + 1) if index not in bytes_used]
    if of_byte:  # SentencePiece loads a model with all 256 or none
        units += [
            [of_byte[value]]
            for value in range(1, 0x80)
            if processor.piece_to_id(chr(value).replace(" ", SPACE)) == processor.unk_id()
        ]
        characters = [chr(draw.randrange(*limits)) for limits in UTF8_LENGTHS for _ in range(length)]
        units += [[of_byte[value] for value in character.encode()] for character in characters]
    draw.shuffle(units)
    groups = [units[start : start + length] for start in range(0, len(units), length)]
    sequences = [[index for unit in group for index in unit] for group in groups]
    if not proto.normalizer_spec.remove_extra_whitespaces:
        return sequences
    special = set(special_ids(proto))
    pieces = enumerate(piece.piece for piece in proto.pieces)
    spaces = {index for index, text in pieces if text == SPACE or text.startswith(2 * SPACE)}
    for place, ids in enumerate(sequences):
        start = next((i for i, index in enumerate(ids) if index not in special | spaces), len(ids))
        sequences[place] = [index for index in ids[:start] if index not in spaces] + ids[start:]
    return sequences


def _byte(piece: Piece) -> int:
    """65 for the byte piece `<0x41>`."""
    return int(piece.piece[3:5], 16)


def _plain(piece: Piece) -> str:
    """The text of a piece that is no byte."""
    return str(piece.piece).replace(SPACE, " ")


def _runtime_key(text: str) -> bytes:
    """The key under which `SpmUgmTokenizer::Load` stores a piece."""
    raw = text.encode()
    match = SIX_BYTES_READ_AS_ONE.fullmatch(raw)
    return bytes([int(match[1], 16)]) if match else raw


def _runtime_text(key: bytes) -> bytes:
    """What `SpmUgmDecoder::Id2Token` shows for a piece."""
    space = SPACE.encode()
    if key.startswith(space):
        return b" " + key.removeprefix(space)
    return key.removesuffix(space) + b" " if key.count(space) == 1 and key.endswith(space) else key


def _named(pieces: list[str], most: int = 8) -> str:
    more = f" and {len(pieces) - most} more" if len(pieces) > most else ""
    return ", ".join(map(repr, pieces[:most])) + more


def sentencepiece_model(content: Mapping[str, Any], blank_id: int) -> bytes:
    """The SentencePiece model that transformers has converted into a tokenizer.json of this content.

    blank_id: the ids below it are the pieces. transformers (ParakeetConverter and SpmConverter of
    convert_slow_tokenizer.py, 5.23) keeps these parts of the model:
        the pieces    in id order, as the vocabulary and the added tokens
        the types     control pieces are special added tokens, user-defined ones plain added tokens
        the scores    in full for a Unigram model; for a BPE model their order, which is all that its scores say:
                      SentencePiece numbers its pieces 0, -1, -2, … in the order in which they were learned
        the normalizer's map of characters, and whether a space is put before the text
    It does not keep `remove_extra_whitespaces`; NeMo trains its tokenizers without it. The result is compared with
    tokenizer.json itself: `tokenizers` and SentencePiece must decode the same text.

    Raises ValueError where the tokenizer was not made from such a model.
    """
    try:
        proto = _converted_pieces(content, blank_id)
        before = content.get("pre_tokenizer") or {}
        steps = [step for step in before.get("pretokenizers", [before]) if step.get("type") == "Metaspace"]
        if not steps:
            raise ValueError(f"{NOT_CONVERTED}: its pre-tokenizer is {before.get('type')!r}, not Metaspace")
        proto.trainer_spec.split_by_whitespace = bool(steps[0].get("split", True))
        proto.normalizer_spec.add_dummy_prefix = steps[0].get("prepend_scheme", "always") != "never"
        proto.normalizer_spec.remove_extra_whitespaces = False
        normalizing = content.get("normalizer") or {}
        for step in normalizing.get("normalizers", [normalizing]):
            if step.get("type") == "Precompiled":
                charsmap = base64.b64decode(step["precompiled_charsmap"], validate=True)
                proto.normalizer_spec.precompiled_charsmap = charsmap
    except (KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise ValueError(f"{NOT_CONVERTED} ({error!r})") from None
    model: bytes = proto.SerializeToString()
    _check_same_text(content, parse_model(model))
    return model


def _converted_pieces(content: Mapping[str, Any], blank_id: int) -> ModelProto:
    """A model of the pieces of a tokenizer.json, with their types and scores."""
    model, added = content["model"], {token["id"]: token for token in content["added_tokens"]}
    if model["type"] not in ("BPE", "Unigram"):
        raise ValueError(f"{NOT_CONVERTED}: its type is {model['type']!r}, not BPE or Unigram")
    is_unigram = model["type"] == "Unigram"
    if is_unigram:  # [name, score] in id order
        names = {index: name for index, (name, _) in enumerate(model["vocab"])}
        scores = {index: score for index, (_, score) in enumerate(model["vocab"])}
    else:  # the id of each name
        names = {index: name for name, index in model["vocab"].items()}
        scores = {}
    names |= {index: token["content"] for index, token in added.items()}
    if any(index not in names for index in range(blank_id)) or any(index > blank_id for index in names):
        raise ValueError(f"the tokenizer's {len(names)} tokens are not numbered from 0 to {blank_id}, the blank")
    has_bytes = BYTE_PIECES.issubset(names.values())  # SentencePiece has all 256 or none
    unknown = names[model["unk_id"]] if is_unigram else model["unk_token"]
    proto = ModelProto()
    proto.trainer_spec.model_type = proto.trainer_spec.UNIGRAM if is_unigram else proto.trainer_spec.BPE
    learned = 0
    for index in range(blank_id):
        name = names[index]
        score = float(scores.get(index, 0.0))
        kind = Piece.BYTE if has_bytes and name in BYTE_PIECES else Piece.NORMAL
        if index in added:
            kind = Piece.CONTROL if added[index]["special"] else Piece.USER_DEFINED
        if name == unknown:
            kind = Piece.UNKNOWN
            proto.trainer_spec.unk_id = index
        if not is_unigram and kind == Piece.NORMAL:
            score = -float(learned)
            learned += 1
        proto.trainer_spec.byte_fallback |= kind == Piece.BYTE
        proto.pieces.add(piece=name, score=score, type=kind)
    return proto


def _check_same_text(content: Mapping[str, Any], proto: ModelProto) -> None:
    """Raise ValueError where SentencePiece shows the pieces of `proto` as another text than tokenizer.json does."""
    processor = SentencePieceProcessor(model_proto=proto.SerializeToString())
    try:
        tokenizer = Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"`tokenizers` does not load the tokenizer ({error})") from None
    hidden = set(special_ids(proto))
    if "ByteFallback" not in json.dumps(content.get("decoder")):  # transformers then shows <0x41> as it is spelt
        hidden |= {index for index, piece in enumerate(proto.pieces) if piece.type == Piece.BYTE}
    for sequence in (ids for length in PROBE_LENGTHS for ids in probe_sequences(proto, length)):
        ids = [index for index in sequence if index not in hidden]
        expected, actual = tokenizer.decode(ids), processor.decode(ids)
        if expected != actual:
            raise ValueError(
                f"{NOT_CONVERTED}: it decodes {ids[:8]} to {expected[:60]!r}, and SentencePiece to {actual[:60]!r}"
            )
