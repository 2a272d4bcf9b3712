"""How often words of each confidence are right: words are aligned with the texts, and counted in bins of confidence."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.evaluate.wer import normalize, word_runs

# Upper ends of the bins; most words are near 1, where the bins are narrow.
ENDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


@dataclass(frozen=True)
class Bin:
    """The words whose confidence is at least `low` and below `high`; only the last bin includes `high`."""

    low: float
    high: float
    words: int
    right: int
    mean: float  # confidence of these words

    @property
    def share_right(self) -> float:
        return self.right / self.words


def comparable_words(words: Iterable[str]) -> list[str]:
    """A key for each word, without case, punctuation and spaces; a word of punctuation alone is its own key."""
    return ["-".join((normalize(word) or word).split()) or "-" for word in words]


def words_right(text: str, words: Sequence[str]) -> list[bool]:
    """Whether each word of a transcript is a word of the text, in an alignment with the fewest errors."""
    right = [False] * len(words)
    for own, other, is_equal in word_runs(comparable_words(text.split()), comparable_words(words)):
        if is_equal and own:
            right[other.start : other.stop] = [True] * len(other)
    return right


def bins(words: Iterable[tuple[float, bool]]) -> list[Bin]:
    """Pairs of a confidence in 0 … 1 and whether the word is right → the bins that have words."""
    pairs = list(words)
    made = []
    for low, high in zip((0.0, *ENDS), ENDS, strict=False):
        own = [(sure, right) for sure, right in pairs if low <= sure and (sure < high or high == ENDS[-1])]
        if own:
            mean = sum(sure for sure, _ in own) / len(own)
            made.append(Bin(low, high, len(own), sum(right for _, right in own), mean))
    return made


def calibration_error(made: Sequence[Bin]) -> float:
    """Expected calibration error (Naeini et al., AAAI 2015): how far the confidence and the share of right words are
    apart, on average over the words."""
    words = sum(each.words for each in made)
    return sum(each.words * abs(each.share_right - each.mean) for each in made) / max(words, 1)
