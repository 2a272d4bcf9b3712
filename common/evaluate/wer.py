"""Word error rates with their intervals, and transcripts aligned word by word."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

BOOTSTRAP_SAMPLES = 2000
CONFIDENCE = 95  # per cent
PARENTHESES = str.maketrans("()", "  ")
# Per cent of a float32 model's words, normalised. Published checkpoints stay far below this on languages they know.
SUSPICIOUS_WER = 60
CONTEXT = 4  # words shown before and after a change
MAX_PRINTED_CLIPS = 20  # a person reads no more
NONE = "–"  # stands for a figure where there is nothing to compare with, and for no words


@dataclass(frozen=True)
class WordErrorRate:
    """Corpus word error rate in per cent, with the interval from resampling the clips; no interval without words."""

    errors: int
    words: int
    low: float | None
    high: float | None

    @property
    def percent(self) -> float:
        return 100 * self.errors / max(self.words, 1)

    def __str__(self) -> str:
        if not self.words:  # every error is a word inserted
            return f"{NONE} ({self.errors} inserted)" if self.errors else NONE
        return f"{self.percent:.2f} % [{self.low:.2f}, {self.high:.2f}]"


def normalize(text: str) -> str:
    """`text` without case and punctuation, in any language (Whisper's basic normaliser, whisper_normalizer).

    Every digit stays: `90%` becomes `90`, `$19.99` `19 99`, `3:30` `3 30`, `½` `1 2`, and `1st` stays. Whisper's
    normaliser drops text in parentheses, which may be the `(555)` of a phone number, so the parentheses are removed
    before it runs. Text between `<` and `>` or `[` and `]` is dropped: marks such as `[noise]`.
    """
    from whisper_normalizer.basic import BasicTextNormalizer

    return " ".join(BasicTextNormalizer()(text.translate(PARENTHESES)).split())


@dataclass(frozen=True)
class WordCounts:
    """Words of a transcript aligned with a reference."""

    lost: int  # deletions
    added: int  # insertions
    changed: int  # substitutions
    words: int  # of the reference

    @property
    def errors(self) -> int:
        return self.lost + self.added + self.changed

    @property
    def missed(self) -> int:
        """Words of the reference that are not in the transcript."""
        return self.lost + self.changed

    @property
    def percent_missed(self) -> float:
        return 100 * self.missed / max(self.words, 1)


def word_counts(reference: str, hypothesis: str) -> WordCounts:
    """Count the words of an alignment with the fewest errors (jiwer)."""
    import jiwer

    counts = jiwer.process_words(reference, hypothesis)
    return WordCounts(counts.deletions, counts.insertions, counts.substitutions, len(reference.split()))


def word_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """The number of words lost, added or changed, and the number of words of the reference."""
    counts = word_counts(reference, hypothesis)
    return counts.errors, counts.words


def word_error_rate(references: list[str], hypotheses: list[str], baseline: list[str] | None = None) -> WordErrorRate:
    """WER over all clips, with a 95 % bootstrap interval over clips (Bisani & Ney, ICASSP 2004; seeded).

    With a `baseline`, the result is how much higher the rate is than that of the baseline's hypotheses. Each draw takes
    both from the same clips, so the interval is that of the difference.
    """
    counts = np.array([word_errors(*pair) for pair in zip(references, hypotheses, strict=True)])  # [clips, 2]
    if baseline is not None:
        counts[:, 0] -= [word_errors(*pair)[0] for pair in zip(references, baseline, strict=True)]
    rng, n = np.random.default_rng(0), len(counts)
    draws = (counts[rng.integers(n, size=n)].sum(axis=0) for _ in range(BOOTSTRAP_SAMPLES))
    total_errors, total_words = map(int, counts.sum(axis=0))
    if not total_words:
        return WordErrorRate(total_errors, total_words, None, None)
    errors, words = np.array([draw for draw in draws if draw[1]]).T  # a draw of silent clips alone has no rate
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(100 * errors / words, [tail, 100 - tail])
    return WordErrorRate(total_errors, total_words, float(low), float(high))


def print_warnings(transcripts: Mapping[str, Iterable[str]], float32: WordErrorRate | None) -> None:
    """Print a warning of each engine whose transcripts are all empty, and of a float32 model whose normalised error
    rate is too high for a model that works."""
    for engine, texts in transcripts.items():
        if not any(text.strip() for text in texts):
            print(f"warning: every transcript of {engine} is empty, so its word errors mean nothing")
    if float32 and float32.words and float32.percent > SUSPICIOUS_WER:
        print(
            f"warning: the float32 model has {float32.percent:.0f} % of the words wrong, more than {SUSPICIOUS_WER} %: "
            "the clips may be in a language that it does not know, their texts may be wrong, or its folder may hold "
            "parts of different checkpoints"
        )


def word_runs(one: Sequence[str], other: Sequence[str]) -> list[tuple[range, range, bool]]:
    """Align words, none of which has a space, with the fewest errors (jiwer): runs as positions in each sequence, and
    whether they are equal."""
    import jiwer

    return [
        (range(c.ref_start_idx, c.ref_end_idx), range(c.hyp_start_idx, c.hyp_end_idx), c.type == "equal")
        for c in jiwer.process_words(" ".join(one), " ".join(other)).alignments[0]
    ]


def marked_changes(before: str, after: str) -> list[tuple[str, str]]:
    """Align two transcripts word by word: pairs of runs of words, which are equal or replace each other. Equal words
    far from any change are cut to an ellipsis."""
    one, other = before.split(), after.split()
    runs = word_runs(one, other)
    changes = []
    for number, (own, its, is_equal) in enumerate(runs):
        words = one[own.start : own.stop]
        begin = CONTEXT if number > 0 else 0
        end = CONTEXT if number < len(runs) - 1 else 0
        if is_equal and len(words) > begin + end + 1:
            words = [*words[:begin], "…", *words[len(words) - end :]]
        shown = " ".join(words)
        changes.append((shown, shown if is_equal else " ".join(other[its.start : its.stop])))
    return changes


def changes_text(before: str, after: str) -> str:
    """Two transcripts in one line, `a [old → new] b`; equal words far from any change are cut to an ellipsis."""
    return " ".join(
        one if one == other else f"[{one or NONE} → {other or NONE}]" for one, other in marked_changes(before, after)
    )
