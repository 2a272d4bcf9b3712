"""The rules by which NeMo's text of a clip may differ from an exported folder's text of the same tokens, and the texts
of onnx-asr and sherpa-onnx from both."""

import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# How a user-defined piece that is not text is spelt. Defined here a second time, independently of the tokenizer's
# export, because this definition checks which pieces the export hides.
_MARK = re.compile(r"▁?(<.+>|\[.+\])", re.DOTALL)


def unchanged(text: str) -> str:
    return text


@dataclass(frozen=True)
class TextRule:
    """A difference between NeMo's text and an exported folder's that is no error, and how to remove it from both."""

    name: str
    nemo: Callable[[str], str]
    exported: Callable[[str], str] = unchanged


def runtime_rule(runtime: str) -> TextRule:
    """How the text of onnx-asr 0.12.0 or sherpa-onnx 2.0.1 differs from what an exported folder's tokens spell.

    Both delete spaces before marks, also before those that open something or stand alone, and before symbols, where
    NeMo keeps them: `costs $5 (net)` becomes `costs$5(net)`. Two words that are so joined are two word errors; in the
    normalised word error rate, which has a space for each mark, they are none.
    """
    marks, kind = {
        "onnx-asr": (r"[^\w\s]", "every character that is no letter, digit or _"),
        "sherpa-onnx": (f"[{re.escape(string.punctuation)}]", "every ASCII mark"),
    }[runtime]
    close_up = _remover(rf"\s+(?={marks})")
    return TextRule(f"{runtime} deletes the space before {kind}", close_up, close_up)


def text_rules(sentencepiece_model: bytes, library: str = "NeMo") -> tuple[TextRule, ...]:
    """How the text of the reference, NeMo or transformers, differs from GenAI's for the same tokens, in the order in
    which the rules are applied.

    `sentencepiece_model` is the checkpoint's own. The rules for NeMo are those of
    decode_tokens_to_str_with_strip_punctuation in nemo/collections/asr/parts/submodules/rnnt_decoding.py 3.0.0;
    docs/tdt.md lists them. transformers leaves out special tokens, but a mark is such a token only where the
    checkpoint's tokenizer.json says so.
    """
    proto = _parsed(sentencepiece_model)
    spellings = [_spelling(piece.piece) for piece in proto.pieces if _is_mark(piece)]
    marks = TextRule(f"{library} shows marks such as <|en|>", _remover("|".join(spellings) or "(?!)"))
    spaces = TextRule(f"{library} keeps spaces at both ends", str.strip, str.strip)
    if library != "NeMo":
        return marks, spaces
    # NeMo may have deleted the space after ` ⁇ `, if a punctuation mark followed.
    unknown = " ?" + re.escape(proto.trainer_spec.unk_surface.strip()) + " ?"
    return (
        marks,
        TextRule(f"NeMo shows{proto.trainer_spec.unk_surface}for <unk>", _remover(unknown)),
        spaces,
        TextRule("NeMo deletes the space before punctuation", _close_up, _close_up),
    )


def ids_of_other_words(sentencepiece_model: bytes) -> frozenset[int]:
    """Tokens that NeMo's timestamps turn into words of their own: the unknown piece, marks, and each byte."""
    proto = _parsed(sentencepiece_model)
    return frozenset(
        index
        for index, piece in enumerate(proto.pieces)
        if piece.type in (piece.UNKNOWN, piece.CONTROL, piece.BYTE) or _is_mark(piece)
    )


def _parsed(sentencepiece_model: bytes) -> Any:
    """A ModelProto, whose module has no types."""
    from sentencepiece import sentencepiece_model_pb2

    module: Any = sentencepiece_model_pb2
    return module.ModelProto.FromString(sentencepiece_model)


def _is_mark(piece: Any) -> bool:
    return bool(piece.type == piece.USER_DEFINED) and _MARK.fullmatch(piece.piece) is not None


def _spelling(piece: str) -> str:
    """A regular expression for a mark as it is shown; the space before it is missing where it is the first piece."""
    text = re.escape(piece.removeprefix("▁"))
    return f" ?{text}" if piece.startswith("▁") else text


def _remover(pattern: str) -> Callable[[str], str]:
    compiled = re.compile(pattern)
    return lambda text: compiled.sub("", text)


def _close_up(text: str) -> str:
    """`text` without spaces before punctuation marks. NeMo deletes one space, and only before the marks of its
    vocabulary; here all spaces before any mark are deleted, in both texts."""
    marks = {character for character in text if unicodedata.category(character).startswith("P")}
    return re.sub(rf"\s+(?=[{re.escape(''.join(sorted(marks)))}])", "", text) if marks else text


def explaining_rules(nemo: str, exported: str, rules: Sequence[TextRule]) -> list[str] | None:
    """Names of the rules by which two texts of the same tokens differ, empty where they are equal; None where no rule
    explains the difference."""
    names = []
    for rule in rules:
        if nemo == exported:
            break
        without = rule.nemo(nemo), rule.exported(exported)
        if without != (nemo, exported):
            names.append(rule.name)
        nemo, exported = without
    return names if nemo == exported else None


def comparable(nemo: str, exported: str, rules: Sequence[TextRule]) -> tuple[str, str]:
    """Both texts without the differences that rules explain, so that their words can be compared."""
    for rule in rules:
        nemo, exported = rule.nemo(nemo), rule.exported(exported)
    return nemo, exported
