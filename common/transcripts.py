"""Comparing what engines heard: token by token with the reason for a difference, and word by word as an error rate."""

from dataclasses import dataclass

import numpy as np

from common.decode import Hypothesis
from common.graphs import PARITY_TOLERANCE

BOOTSTRAP_SAMPLES = 2000
CONFIDENCE = 95  # per cent


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
    """Case and punctuation aside, language-neutral (Whisper's basic normaliser, whisper_normalizer)."""
    from whisper_normalizer.basic import BasicTextNormalizer

    return " ".join(BasicTextNormalizer()(text).split())


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
