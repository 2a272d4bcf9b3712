"""tokenizer.json of a transformers checkpoint → the SentencePiece model that it was converted from.

transformers converts a checkpoint's SentencePiece model into tokenizer.json (ParakeetConverter and SpmConverter of
convert_slow_tokenizer.py, transformers 5.23), and keeps these parts of it:
    the pieces    in id order, as the vocabulary and the added tokens
    the types     control pieces are special added tokens, user-defined ones plain added tokens
    the scores    those of a Unigram model; of a BPE model their order, which is all that its scores say: SentencePiece
                  numbers its pieces 0, -1, -2, … in the order in which they were learned
    the normalizer's map of characters, and whether a space is put before the text
It does not keep `remove_extra_whitespaces`; NeMo trains its tokenizers without it. The result is compared with
tokenizer.json itself: `tokenizers` and SentencePiece must decode the same text.
"""

import base64
import binascii
import json
from typing import Any

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Tokenizer

from common.checkpoint.tokenizer import PROBE_LENGTHS, Piece, parse_model, probe_sequences, special_ids

MODELS = ("BPE", "Unigram")
BYTES = {f"<0x{value:02X}>" for value in range(256)}


def sentencepiece_model(content: dict[str, Any], blank_id: int) -> bytes:
    """The SentencePiece model of a tokenizer.json whose ids below `blank_id` are its pieces.

    Raises ValueError where the tokenizer was not made from such a model.
    """
    try:
        proto = _model(content, blank_id)
    except (KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise ValueError(f"expected a tokenizer that was converted from SentencePiece, got {error!r}") from None
    model: bytes = proto.SerializeToString()
    parse_model(model)
    _check_same_text(content, proto)
    return model


def _model(content: dict[str, Any], blank_id: int) -> ModelProto:
    model, added = content["model"], {token["id"]: token for token in content["added_tokens"]}
    if model["type"] not in MODELS:
        raise ValueError(f"expected a tokenizer of type {' or '.join(MODELS)}, got {model['type']!r}")
    unigram = model["type"] == "Unigram"
    if unigram:  # pieces and their scores, in id order
        scores = dict(enumerate(score for _, score in model["vocab"]))
        names = {index: name for index, (name, _) in enumerate(model["vocab"])}
    else:  # the id of each piece
        scores = {}
        names = {index: name for name, index in model["vocab"].items()}
    names |= {index: token["content"] for index, token in added.items()}
    missing = next((index for index in range(blank_id) if index not in names), None)
    if missing is not None or any(index > blank_id for index in names):
        raise ValueError(f"expected the tokens 0 to {blank_id}, the blank, got {len(names)} others")
    has_bytes = BYTES.issubset(names.values())  # SentencePiece has all 256 or none
    unknown = names[model["unk_id"]] if unigram else model["unk_token"]
    proto = ModelProto()
    learned = 0
    for index in range(blank_id):
        kind = _type(names[index], added.get(index), unknown, has_bytes=has_bytes)
        score = float(scores.get(index, 0.0)) if unigram else -float(learned) if kind == Piece.NORMAL else 0.0
        learned += kind == Piece.NORMAL
        proto.pieces.add(piece=names[index], score=score, type=kind)
    _set_specs(proto, content, unigram=unigram)
    return proto


def _type(name: str, token: dict[str, Any] | None, unknown: str | None, *, has_bytes: bool) -> int:
    if name == unknown:
        return int(Piece.UNKNOWN)
    if token is not None:
        return int(Piece.CONTROL if token["special"] else Piece.USER_DEFINED)
    return int(Piece.BYTE if has_bytes and name in BYTES else Piece.NORMAL)


def _set_specs(proto: ModelProto, content: dict[str, Any], *, unigram: bool) -> None:
    """The settings of the model that decide how text is encoded and decoded."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = trainer.UNIGRAM if unigram else trainer.BPE
    trainer.byte_fallback = any(piece.type == Piece.BYTE for piece in proto.pieces)
    trainer.unk_id = next((i for i, piece in enumerate(proto.pieces) if piece.type == Piece.UNKNOWN), 0)
    before = content.get("pre_tokenizer") or {}
    metaspace = next((step for step in before.get("pretokenizers", [before]) if step.get("type") == "Metaspace"), None)
    if metaspace is None:
        raise ValueError(f"expected a Metaspace pre-tokenizer, as for SentencePiece, got {before.get('type')!r}")
    trainer.split_by_whitespace = bool(metaspace.get("split", True))
    normalizer.add_dummy_prefix = metaspace.get("prepend_scheme", "always") != "never"
    normalizer.remove_extra_whitespaces = False
    normalizing = content.get("normalizer") or {}
    for step in normalizing.get("normalizers", [normalizing]):
        if step.get("type") == "Precompiled":
            normalizer.precompiled_charsmap = base64.b64decode(step["precompiled_charsmap"], validate=True)


def _check_same_text(content: dict[str, Any], proto: ModelProto) -> None:
    """Raise ValueError where SentencePiece shows the pieces of `proto` as another text than tokenizer.json does."""
    processor = SentencePieceProcessor(model_proto=proto.SerializeToString())
    try:
        tokenizer = Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"`tokenizers` does not load it ({error})") from None
    hidden = set(special_ids(proto))
    if "ByteFallback" not in json.dumps(content.get("decoder")):  # transformers then shows <0x41> as it is spelt
        hidden |= {index for index, piece in enumerate(proto.pieces) if piece.type == Piece.BYTE}
    for length in PROBE_LENGTHS:
        for sequence in probe_sequences(proto, length):
            ids = [index for index in sequence if index not in hidden]
            expected, actual = tokenizer.decode(ids), processor.decode(ids)
            if expected != actual:
                raise ValueError(
                    f"expected a tokenizer that was converted from SentencePiece, got one that decodes {ids[:8]} to "
                    f"{expected[:60]!r}, and not to {actual[:60]!r}"
                )
