"""The rules by which the reference's text of a clip may differ from an exported folder's text of the same tokens."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from sentencepiece.sentencepiece_model_pb2 import ModelProto

# How a user-defined piece that is not text is spelt. Defined here a second time, independently of the tokenizer's
# export, because this definition checks which pieces the export hides.
_MARK = re.compile(r"▁?(<.+>|\[.+\])", re.DOTALL)


@dataclass(frozen=True)
class TextRule:
    """A difference between the reference's text and an exported folder's that is no error, and how to remove it: from
    the reference's text or, where both texts may have it, from both."""

    name: str
    remove: Callable[[str], str]
    from_both: bool = False


def text_rules(sentencepiece_model: bytes, library: str = "NeMo") -> tuple[TextRule, ...]:
    """How the text of the reference, NeMo or transformers, differs from GenAI's for the same tokens, in the order in
    which the rules are applied.

    `sentencepiece_model` is the checkpoint's own. The rules for NeMo are taken from
    decode_tokens_to_str_with_strip_punctuation in nemo/collections/asr/parts/submodules/rnnt_decoding.py 3.0.0;
    docs/tdt.md lists them. transformers leaves out special tokens, but a mark is such a token only where the
    checkpoint's tokenizer.json says so.
    """
    proto = ModelProto.FromString(sentencepiece_model)
    # The space before a mark is missing where it is the first piece.
    marks = (re.sub("^▁", " ?", re.escape(piece.piece)) for piece in proto.pieces if _is_mark(piece))
    marks_rule = TextRule(f"{library} shows marks such as <|en|>", partial(re.sub, "|".join(marks) or "(?!)", ""))
    spaces_rule = TextRule(f"{library} keeps spaces at both ends", str.strip, from_both=True)
    if library != "NeMo":
        return marks_rule, spaces_rule
    # NeMo may have deleted the space after ` ⁇ `, if a punctuation mark followed.
    unknown = " ?" + re.escape(proto.trainer_spec.unk_surface.strip()) + " ?"
    return (
        marks_rule,
        TextRule(f"NeMo shows{proto.trainer_spec.unk_surface}for <unk>", partial(re.sub, unknown, "")),
        spaces_rule,
        TextRule("NeMo deletes the space before punctuation", _close_up, from_both=True),
    )


def ids_of_other_words(sentencepiece_model: bytes) -> frozenset[int]:
    """Tokens that NeMo's timestamps turn into words of their own: the unknown piece, marks, and each byte."""
    pieces = enumerate(ModelProto.FromString(sentencepiece_model).pieces)
    return frozenset(i for i, each in pieces if each.type in (each.UNKNOWN, each.CONTROL, each.BYTE) or _is_mark(each))


def _is_mark(piece: ModelProto.SentencePiece) -> bool:
    return piece.type == piece.USER_DEFINED and _MARK.fullmatch(piece.piece) is not None


def _close_up(text: str) -> str:
    """`text` without spaces before punctuation marks. NeMo deletes one space, and only before the marks of its
    vocabulary; here all spaces before any mark are deleted, in both texts."""
    marks = {character for character in text if unicodedata.category(character).startswith("P")}
    return re.sub(rf"\s+(?=[{re.escape(''.join(sorted(marks)))}])", "", text) if marks else text


def explaining_rules(reference: str, exported: str, rules: Sequence[TextRule]) -> list[str] | None:
    """Names of the rules by which two texts of the same tokens differ, empty where they are equal; None where no rule
    explains the difference."""
    names = []
    for rule in rules:
        if reference == exported:
            break
        without = comparable(reference, exported, [rule])
        if without != (reference, exported):
            names.append(rule.name)
        reference, exported = without
    return names if reference == exported else None


def comparable(reference: str, exported: str, rules: Sequence[TextRule]) -> tuple[str, str]:
    """Both texts without the differences that rules explain, so that their words can be compared."""
    for rule in rules:
        reference = rule.remove(reference)
        exported = rule.remove(exported) if rule.from_both else exported
    return reference, exported
