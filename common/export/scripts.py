"""Keeps a model's text in chosen scripts (writing systems): tokens with letters of others get a bias in the joint.

A multilingual checkpoint without a language input sometimes writes one language in the script of another. A bias that
no logit outweighs costs nothing when the model runs, and it works in every runtime.
"""

from collections.abc import Iterable
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto

from common.checkpoint.tokenizer import Piece, special_ids

SUPPRESSED = "suppressed_tokens"  # in the manifest: how many tokens --scripts suppresses
BIAS = -1e4  # logits are at most hundreds; float16 can hold this number
# ISO 15924 codes of characters that belong to several scripts or to none: digits, accents
SHARED = ("Zyyy", "Zinh", "Zzzz")
LETTERS = ("L", "M")  # of Unicode's general categories: letters, and the marks that some scripts write vowels with


def suppressed_ids(tokenizer: ModelProto, scripts: str | None) -> list[int]:
    """Ids of the tokens with letters of other scripts than `scripts`, names separated by commas; none if it is None.

    Marks, bytes, the unknown piece and the blank are never among them. Raises ValueError for a script that the
    vocabulary has no letter of, listing those that it has.
    """
    if scripts is None:
        return []
    from fontTools import unicodedata

    hidden = set(special_ids(tokenizer))
    scripts_of_token: dict[int, set[str]] = {}
    for index, piece in enumerate(tokenizer.pieces):
        if index not in hidden and piece.type != Piece.BYTE:
            letters = [one for one in piece.piece if unicodedata.category(one)[0] in LETTERS]
            codes = {unicodedata.script(one) for one in letters}.difference(SHARED)
            scripts_of_token[index] = {unicodedata.script_name(code).lower() for code in codes}
    known = sorted(set().union(*scripts_of_token.values()))
    allowed = {name.strip().lower() for name in scripts.split(",")}
    if unknown := sorted(allowed.difference(known)):
        raise ValueError(
            f"--scripts must be among {', '.join(known)}, of which the checkpoint's vocabulary has letters, not "
            f"{', '.join(unknown) or 'empty'}"
        )
    return [index for index, names in scripts_of_token.items() if not names <= allowed]


def suppress(joint: Any, ids: Iterable[int]) -> None:
    """Add BIAS to the logits of the tokens `ids` in NeMo's `joint`. Raises ValueError where the joint has no bias."""
    import torch

    last = joint.joint_net[-1]
    if last.bias is None:
        raise ValueError("--scripts needs a joint with a bias, which this checkpoint lacks; leave --scripts out")
    with torch.no_grad():
        last.bias[list(ids)] += BIAS
