"""Comparing what engines heard: token by token with the reason for a difference, and word by word as an error rate."""

from dataclasses import dataclass

import numpy as np

BOOTSTRAP_SAMPLES = 2000
CONFIDENCE = 95  # per cent


@dataclass(frozen=True)
class WordErrorRate:
    """Corpus word error rate in per cent, with the interval that resampling the clips gives."""

    errors: int
    words: int
    low: float
    high: float

    @property
    def percent(self) -> float:
        return 100 * self.errors / max(self.words, 1)

    def __str__(self) -> str:
        return f"{self.percent:.2f} % [{self.low:.2f}, {self.high:.2f}]"


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
    errors, words = np.array(list(draws)).T
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(100 * errors / np.maximum(words, 1), [tail, 100 - tail])
    return WordErrorRate(int(counts[:, 0].sum()), int(counts[:, 1].sum()), float(low), float(high))


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
