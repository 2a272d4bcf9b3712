"""Comparing transcripts: token by token with the reason for a difference, text by text with the rule that explains one,
and word by word as an error rate."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from common.decode import Hypothesis
from common.graphs import PARITY_TOLERANCE

BOOTSTRAP_SAMPLES = 2000
CONFIDENCE = 95  # per cent
PARENTHESES = str.maketrans("()", "  ")
# Of a float32 model's words, per cent, normalised; the published checkpoints stay far below on languages they know.
SUSPICIOUS_WER = 60
# How a user-defined piece that is no text is spelt. Written here anew, apart from the tokenizer's export: what that
# hides is checked against it.
_MARK = re.compile(r"▁?(<.+>|\[.+\])", re.DOTALL)


@dataclass(frozen=True)
class Difference:
    """Where two decodings part: emission index, frame, both tokens, and what excuses it (None: nothing does)."""

    index: int
    frame: int
    wanted: int | None
    found: int | None
    excuse: str | None


def first_difference(tokens: list[int], frames: list[int], found: Hypothesis) -> Difference | None:
    """Compare a reference's tokens and the frames they were emitted at with a traced decoding; None where equal.

    A difference is excused when, among the decisions between the last emission in common and the one that differs, one
    was nearer than the parity tolerance to going otherwise, or met the case in which NeMo and GenAI differ by design.
    """
    wanted = list(zip(tokens, frames, strict=True))
    emitted = [(step.token, step.frame) for step in found.emitted]
    if wanted == emitted:
        return None
    pairs = enumerate(zip(wanted, emitted, strict=False))
    index = next((i for i, (one, other) in pairs if one != other), min(len(wanted), len(emitted)))
    positions = [i for i, step in enumerate(found.steps) if step.token != found.blank_id]
    begin = positions[index - 1] if index else 0  # that emission's duration is a decision of this stretch
    end = positions[index] + 1 if index < len(positions) else len(found.steps)
    stretch = found.steps[begin:end]
    nearest = min((step.margin for step in stretch), default=float("inf"))
    excuse = None
    if nearest < PARITY_TOLERANCE:
        excuse = f"top-two margin {nearest:.1e} under the tolerance {PARITY_TOLERANCE:.0e}"
    elif any(step.blank_zero for step in stretch):
        excuse = "blank with duration 0, where the greedy rules of NeMo and GenAI differ"
    one, other = (pairs[index] if index < len(pairs) else (None, None) for pairs in (wanted, emitted))
    frame = one[1] if one[1] is not None else other[1]
    return Difference(index, frame, one[0], other[0], excuse)


def excused_by(reference: Hypothesis, difference: Difference, found: Hypothesis) -> Difference:
    """`difference` with the excuse that the reference's own decisions give for it: what is checked does not excuse
    itself. A broken graph whose logits are all alike would be a near tie everywhere."""
    own = first_difference(found.tokens, found.frames, reference)
    return replace(difference, excuse=own.excuse if own and difference.excuse else None)


def first_token_difference(wanted: Hypothesis, found: list[int]) -> Difference | None:
    """Compare tokens alone, where both must be equal; None where they are."""
    if wanted.tokens == found:
        return None
    pairs = enumerate(zip(wanted.tokens, found, strict=False))
    index = next((i for i, (one, other) in pairs if one != other), min(len(wanted.tokens), len(found)))
    step = wanted.emitted[index] if index < len(wanted.emitted) else None
    return Difference(
        index,
        step.frame if step else wanted.steps[-1].frame,
        step.token if step else None,
        found[index] if index < len(found) else None,
        None,
    )


def _unchanged(text: str) -> str:
    return text


@dataclass(frozen=True)
class TextRule:
    """A difference between NeMo's text and an exported folder's that is no error, and both texts without it."""

    name: str
    nemo: Callable[[str], str]
    exported: Callable[[str], str] = _unchanged


def text_rules(sentencepiece_model: bytes) -> tuple[TextRule, ...]:
    """How NeMo's text differs from GenAI's for the same tokens, in the order in which the rules are applied.

    `sentencepiece_model` is the checkpoint's own. Read from decode_tokens_to_str_with_strip_punctuation in
    nemo/collections/asr/parts/submodules/rnnt_decoding.py 3.0.0. README.md lists them for readers.
    """
    proto = _parsed(sentencepiece_model)
    spellings = [_spelling(piece.piece) for piece in proto.pieces if _is_mark(piece)]
    # NeMo may have deleted the space after it, which then stood before a punctuation mark.
    unknown = " ?" + re.escape(proto.trainer_spec.unk_surface.strip()) + " ?"
    return (
        TextRule("NeMo shows marks such as <|en|>", _remover("|".join(spellings) or "(?!)")),
        TextRule(f"NeMo shows{proto.trainer_spec.unk_surface}for <unk>", _remover(unknown)),
        TextRule("NeMo keeps spaces at both ends", str.strip, str.strip),
        TextRule("NeMo deletes the space before punctuation", _close_up, _close_up),
    )


def ids_of_other_words(sentencepiece_model: bytes) -> frozenset[int]:
    """Tokens of which NeMo's timestamps make words of their own: the unknown piece, marks, and each byte."""
    proto = _parsed(sentencepiece_model)
    return frozenset(
        index
        for index, piece in enumerate(proto.pieces)
        if piece.type in (piece.UNKNOWN, piece.CONTROL, piece.BYTE) or _is_mark(piece)
    )


def _parsed(sentencepiece_model: bytes):
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    return ModelProto.FromString(sentencepiece_model)


def _is_mark(piece) -> bool:
    return piece.type == piece.USER_DEFINED and _MARK.fullmatch(piece.piece) is not None


def _spelling(piece: str) -> str:
    """A pattern of how a mark is shown: its space is gone where it is the first piece."""
    text = re.escape(piece.removeprefix("▁"))
    return f" ?{text}" if piece.startswith("▁") else text


def _remover(pattern: str) -> Callable[[str], str]:
    compiled = re.compile(pattern)
    return lambda text: compiled.sub("", text)


def _close_up(text: str) -> str:
    """`text` without spaces before punctuation marks. NeMo deletes one space, before the marks of its vocabulary; of
    several, and before any mark, both texts are left without."""
    marks = {character for character in text if unicodedata.category(character).startswith("P")}
    return re.sub(rf"\s+(?=[{re.escape(''.join(sorted(marks)))}])", "", text) if marks else text


def explaining_rules(nemo: str, exported: str, rules: Sequence[TextRule]) -> list[str] | None:
    """The rules by which two texts of the same tokens differ, none where they are equal; None where no rule explains
    the difference."""
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
    """Both texts without what differs by rule, to count words in."""
    for rule in rules:
        nemo, exported = rule.nemo(nemo), rule.exported(exported)
    return nemo, exported


@dataclass(frozen=True)
class WordErrorRate:
    """Corpus word error rate in per cent, with the interval that resampling the clips gives; none of no words."""

    errors: int
    words: int
    low: float | None
    high: float | None

    @property
    def percent(self) -> float:
        return 100 * self.errors / max(self.words, 1)

    def __str__(self) -> str:
        if not self.words:
            return no_rate(self.errors)
        return f"{self.percent:.2f} % [{self.low:.2f}, {self.high:.2f}]"


def no_rate(errors: int) -> str:
    """What stands for an error rate where the reference has no words: every error is a word inserted."""
    return f"– ({errors} inserted)" if errors else "–"


def normalize(text: str) -> str:
    """Case and punctuation aside, language-neutral (Whisper's basic normaliser, whisper_normalizer).

    Every digit stays: `90%` becomes `90`, `$19.99` `19 99`, `3:30` `3 30`, `½` `1 2`, and `1st` stays. Whisper's
    normaliser drops what stands between parentheses, which may be the `(555)` of a phone number, so here those go
    before it. What stands between `<` and `>` or `[` and `]` is dropped: marks such as `[noise]`.
    """
    from whisper_normalizer.basic import BasicTextNormalizer

    return " ".join(BasicTextNormalizer()(text.translate(PARENTHESES)).split())


def word_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """Substitutions + deletions + insertions (jiwer), and the words of the reference."""
    import jiwer

    if not reference.split():  # jiwer refuses an empty reference; every word said is an insertion
        return len(hypothesis.split()), 0
    found = jiwer.process_words(reference, hypothesis)
    return found.substitutions + found.deletions + found.insertions, len(reference.split())


def word_error_rate(references: list[str], hypotheses: list[str], baseline: list[str] | None = None) -> WordErrorRate:
    """WER over all clips, with a 95 % bootstrap interval over clips (Bisani & Ney, ICASSP 2004; seeded).

    With a `baseline`, how much higher it is than that of those hypotheses: each draw takes both from the same clips, so
    the interval is that of the difference.
    """
    counts = _counts(references, hypotheses)
    if baseline is not None:
        counts[:, 0] -= _counts(references, baseline)[:, 0]
    rng, n = np.random.default_rng(0), len(counts)
    draws = (counts[rng.integers(n, size=n)].sum(axis=0) for _ in range(BOOTSTRAP_SAMPLES))
    total_errors, total_words = map(int, counts.sum(axis=0))
    if not total_words:
        return WordErrorRate(total_errors, total_words, None, None)
    errors, words = np.array([draw for draw in draws if draw[1]]).T  # of silent clips alone there is no rate
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(100 * errors / words, [tail, 100 - tail])
    return WordErrorRate(total_errors, total_words, float(low), float(high))


def high_error_warning(float32: WordErrorRate) -> str | None:
    """A line for a float32 model whose error rate, normalised, is too high for a model that works; None below."""
    if float32.percent <= SUSPICIOUS_WER:
        return None
    return (
        f"warning: the float32 model has {float32.percent:.0f} % of the words wrong, more than {SUSPICIOUS_WER} %: the "
        "clips may be in a language that it does not know, their texts may be wrong, or its folder may hold parts of "
        "different checkpoints"
    )


def _counts(references: list[str], hypotheses: list[str]) -> np.ndarray:
    """Errors and words of each clip, [clips, 2]."""
    return np.array([word_errors(*pair) for pair in zip(references, hypotheses, strict=True)])


def word_changes(wanted: str, found: str) -> list[tuple[str, str]]:
    """Two transcripts aligned word by word (jiwer): runs of words of each, equal ones, or what stands for what."""
    import jiwer

    one, other = wanted.split(), found.split()
    if not one or not other:  # jiwer refuses an empty reference
        return [(" ".join(one), " ".join(other))] if one or other else []
    chunks = jiwer.process_words(" ".join(one), " ".join(other)).alignments[0]
    return [
        (" ".join(one[c.ref_start_idx : c.ref_end_idx]), " ".join(other[c.hyp_start_idx : c.hyp_end_idx]))
        for c in chunks
    ]
