"""The words of a clip with their start and end, from the steps that the greedy loop recorded.

A token begins at the frame it was emitted at and ends its duration later. Words and their times follow NeMo
(RNNTBPEDecoding.compute_rnnt_timestamps in nemo/collections/asr/parts/submodules/rnnt_decoding.py 3.0.0,
get_words_offsets in nemo/collections/asr/parts/utils/timestamp_utils.py), including its peculiarities:

* A word begins with a piece that holds `▁`, and lasts from the start of its first token to the end of its last one, so
  that the silence a duration jumps over is part of it; where that duration is 0, a word of one token has no length.
* A piece that is one punctuation mark belongs to the word before it, even after a `▁` (an opening quote too), and takes
  no time: it is put where the token before it ends, since marks are often emitted long after, in the silence.
* Marks are the characters of Unicode's category P within pieces that do not begin with `▁`.

It differs from NeMo in two points: bytes are merged into characters (in NeMo each byte is a word, shown as U+FFFD),
and special tokens are left out, as from every transcript here.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.checkpoint.tokenizer import SPACE
from common.cli import TOKENIZER_COMMAND
from common.folder import read_json
from common.run.confidence import Confidence
from common.run.decode import Step

# Pieces that NeMo takes for special tokens, and not for sources of punctuation (extract_punctuation_from_vocab).
NO_MARKS = re.compile(rf"\[.*\]$|<.*>$|##|{SPACE}")


@dataclass(frozen=True)
class TimedWord:
    """One word as it is shown, from encoder frame `start` up to `end`."""

    text: str
    start: int
    end: int
    confidence: Confidence | None = field(default=None, compare=False)  # where the engine gives it


@dataclass(frozen=True)
class Pieces:
    """What each token id spells."""

    names: tuple[str, ...]
    special: frozenset[int]  # shown in no transcript
    byte_ids: frozenset[int]  # `<0x41>`
    marks: frozenset[str]  # punctuation

    @classmethod
    def read(cls, folder: Path) -> "Pieces":
        """Read tokenizer.json of a model folder. Raises as read_json does, and ValueError for another kind of file."""
        path = Path(folder) / "tokenizer.json"
        tokenizer = read_json(path, TOKENIZER_COMMAND.format(folder))
        try:
            names = tuple(name.replace(" ", SPACE) for name, _ in tokenizer["model"]["vocab"])
            special = frozenset(token["id"] for token in tokenizer["added_tokens"] if token["special"])
            is_byte = re.compile("<0x[0-9A-F]{2}>" if tokenizer["model"]["byte_fallback"] else r"(?!)").fullmatch
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a Unigram tokenizer of this project ({error})") from None
        marks = {mark for name in names if not NO_MARKS.match(name) for mark in name if _is_punctuation(mark)}
        return cls(names, special, frozenset(i for i, name in enumerate(names) if is_byte(name)), frozenset(marks))

    def spell(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without outer spaces; bytes that form no character become U+FFFD."""
        raw = (bytes([int(self.names[i][3:5], 16)]) if i in self.byte_ids else self.names[i].encode() for i in tokens)
        return b"".join(raw).decode("utf-8", errors="replace").replace(SPACE, " ").strip()


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character).startswith("P")


def timed_words(emitted: Sequence[Step], pieces: Pieces) -> list[TimedWord]:
    """The words of a clip whose decoding emitted these steps."""
    words: list[TimedWord] = []
    tokens: list[int] = []  # of the word that is being built
    confidences: list[Confidence] = []  # of these tokens
    start = end = 0
    for step in emitted:
        if step.token in pieces.special:
            continue
        name = pieces.names[step.token]
        is_mark = name.lstrip(SPACE) in pieces.marks
        if tokens and SPACE in name and not is_mark:
            words.append(TimedWord(pieces.spell(tokens), start, end, _least(confidences)))
            tokens, confidences = [], []
        if not tokens:
            start = step.frame
        if not (is_mark and (words or tokens)):
            end = step.frame + step.duration
        tokens.append(step.token)
        if step.confidence:
            confidences.append(step.confidence)
    if tokens:
        words.append(TimedWord(pieces.spell(tokens), start, end, _least(confidences)))
    return words


def _least(tokens: Sequence[Confidence]) -> Confidence | None:
    """The confidence of a word, which is the lowest of its tokens by each measure; None where tokens have none."""
    if not tokens:
        return None
    return Confidence(min(each.max_prob for each in tokens), min(each.entropy for each in tokens))


def furthest_apart(expected: Sequence[TimedWord], actual: Sequence[TimedWord]) -> float:
    """Largest difference of a start or an end, in frames; infinite where the words themselves differ."""
    if [word.text for word in expected] != [word.text for word in actual]:
        return float("inf")
    pairs = zip(expected, actual, strict=True)
    return max((max(abs(a.start - b.start), abs(a.end - b.end)) for a, b in pairs), default=0)
