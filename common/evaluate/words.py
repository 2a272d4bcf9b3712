"""Words: error rates and alignments of texts, words with their start and end, and subtitles.

A token begins at the frame it was emitted at and ends its duration later. Words and their times follow NeMo, with its
peculiarities (RNNTBPEDecoding.compute_rnnt_timestamps in nemo/collections/asr/parts/submodules/rnnt_decoding.py 3.0.0,
get_words_offsets in nemo/collections/asr/parts/utils/timestamp_utils.py). docs/timestamps.md lists them, and where the
words that are shown differ. Marks are the characters of Unicode's category P within pieces that do not begin with `▁`.
"""

import html
import itertools
import re
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from common.checkpoint.tokenizer import SPACE
from common.folder import STANDARD_OUTPUT
from common.run.audio import Clip
from common.run.decode import Confidence, Step, TimedWord

NONE = "–"  # stands for a figure where there is nothing to compare with, and for no words
MAX_PRINTED_CLIPS = 20  # a person reads no more
CONTEXT = 4  # words shown before and after a change
PARENTHESES = str.maketrans("()", "  ")
BOOTSTRAP_SAMPLES = 2000
CONFIDENCE = 95  # per cent
# Per cent of a float32 model's words, normalised. Published checkpoints stay far below this on languages they know.
SUSPICIOUS_WER = 60

# Pieces that NeMo takes for special tokens, and not for sources of punctuation (extract_punctuation_from_vocab).
NO_MARKS = re.compile(rf"\[.*\]$|<.*>$|##|{SPACE}")

# Subtitles as broadcasters set them (Netflix Timed Text Style Guide): two lines of 42 characters, 5/6 s to 7 s.
LINE_CHARACTERS = 42
LINES = 2
MIN_CUE_SECONDS = 5 / 6
MAX_CUE_SECONDS = 7.0
PAUSE_SECONDS = 1.0  # silence between two tokens after which a new word and a new cue begin
SENTENCE_END = (".", "?", "!")  # NeMo's default segment_seperators


# ---- error rates and alignments


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

    With a `baseline`, the result is how much higher the rate is than with the baseline's hypotheses. Each draw takes
    both from the same clips, so the interval is the difference's.
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


def comparable_words(words: Iterable[str]) -> list[str]:
    """A key for each word, without case, punctuation and spaces; a word of punctuation alone is its own key."""
    return ["-".join((normalize(word) or word).split()) or "-" for word in words]


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


# ---- words with their times


@dataclass(frozen=True)
class Pieces:
    """What each token id spells."""

    names: Sequence[str]
    special: frozenset[int]  # shown in no transcript
    marks: frozenset[str]  # punctuation
    spell: Callable[[list[int]], str]  # tokens → text without outer spaces, by Hugging Face's tokenizers

    @classmethod
    def read(cls, folder: Path) -> "Pieces":
        """Read tokenizer.json of a model folder, whose parts have been checked (Layout.check_one_checkpoint)."""
        tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        names = [(tokenizer.id_to_token(i) or "").replace(" ", SPACE) for i in range(tokenizer.get_vocab_size())]
        characters = {character for name in names if not NO_MARKS.match(name) for character in name}
        return cls(
            names,
            frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special),
            frozenset(each for each in characters if unicodedata.category(each).startswith("P")),
            lambda tokens: str(tokenizer.decode(tokens)).strip(),
        )


def timed_words(emitted: Sequence[Step], pieces: Pieces, frame_seconds: float = 0.0) -> list[TimedWord]:
    """The words of a clip whose decoding emitted these steps.

    frame_seconds: the length of an encoder frame, where words are to end before a pause of PAUSE_SECONDS and within
    MAX_CUE_SECONDS; 0 for NeMo's own words.
    """
    words: list[TimedWord] = []
    own: list[Step] = []  # of the word that is being built
    end = 0
    for step in emitted:
        if step.token in pieces.special:
            continue
        name = pieces.names[step.token]
        is_mark = name.lstrip(SPACE) in pieces.marks
        is_apart = (step.frame - end) * frame_seconds >= PAUSE_SECONDS
        is_long = own and (step.frame + step.duration - own[0].frame) * frame_seconds > MAX_CUE_SECONDS
        if own and not is_mark and (SPACE in name or is_apart or is_long):
            word = _word(own, end, pieces)
            if not frame_seconds or word.text:  # a `▁` alone is shown as no word
                words.append(word)
            own = []
        if not (is_mark and (words or own)):
            end = step.frame + step.duration
        own.append(step)
    return [*words, _word(own, end, pieces)] if own else words


def _word(steps: Sequence[Step], end: int, pieces: Pieces) -> TimedWord:
    """A word until frame `end`; its confidence is the lowest of its tokens by each measure."""
    sure = [step.confidence for step in steps if step.confidence]
    least = Confidence(min(each.max_prob for each in sure), min(each.entropy for each in sure)) if sure else None
    return TimedWord(pieces.spell([step.token for step in steps]), steps[0].frame, end, least)


def furthest_apart(expected: Sequence[TimedWord], actual: Sequence[TimedWord]) -> float:
    """Largest difference of a start or an end, in frames; infinite where the words themselves differ."""
    if [word.text for word in expected] != [word.text for word in actual]:
        return float("inf")
    pairs = zip(expected, actual, strict=True)
    return max((max(abs(a.start - b.start), abs(a.end - b.end)) for a, b in pairs), default=0)


# ---- subtitles: SubRip's format (.srt) and WebVTT (.vtt, W3C)


def cues(words: Sequence[TimedWord], frame_seconds: float) -> Iterator[list[TimedWord]]:
    """The words that are shown together: at most a sentence, two lines and the longest time, and without a pause.

    Each cue begins later than the one before it.
    """
    cue: list[TimedWord] = []
    for word in words:
        if (cue and word.start > cue[0].start) and (
            cue[-1].text.endswith(SENTENCE_END)
            or (word.start - cue[-1].end) * frame_seconds >= PAUSE_SECONDS
            or (word.end - cue[0].start) * frame_seconds > MAX_CUE_SECONDS
            or len(_lines([*cue, word])) > LINES
        ):
            yield cue
            cue = []
        cue.append(word)
    if cue:
        yield cue


def _lines(cue: Sequence[TimedWord]) -> list[str]:
    return textwrap.wrap(" ".join(word.text for word in cue), LINE_CHARACTERS, break_on_hyphens=False)


def srt(words: Sequence[TimedWord], frame_seconds: float) -> str:
    """SubRip subtitles."""
    timed = enumerate(_timed_cues(words, frame_seconds, ","), 1)
    return "\n".join(f"{number}\n{times}\n{text}\n" for number, (times, text) in timed)


def vtt(words: Sequence[TimedWord], frame_seconds: float) -> str:
    """WebVTT subtitles. `&`, `<` and `>` are written as references, since they would begin markup."""
    timed = _timed_cues(words, frame_seconds, ".")
    return "\n".join(["WEBVTT\n", *(f"{times}\n{html.escape(text, quote=False)}\n" for times, text in timed)])


def _timed_cues(words: Sequence[TimedWord], frame_seconds: float, point: str) -> Iterator[tuple[str, str]]:
    """Start and end, and the lines of each cue; a short cue stays for the shortest time, or until the next cue.

    point: the character before the milliseconds.
    """
    groups = list(cues(words, frame_seconds))
    for cue, following in itertools.zip_longest(groups, groups[1:]):
        start = cue[0].start * frame_seconds
        end = max(cue[-1].end * frame_seconds, start + MIN_CUE_SECONDS)
        if following:
            end = min(end, following[0].start * frame_seconds)
        yield f"{_clock(start, point)} --> {_clock(end, point)}", "\n".join(_lines(cue))


def _clock(seconds: float, point: str) -> str:
    """HH:MM:SS,mmm, with `point` in place of the comma."""
    rest, milliseconds = divmod(round(1000 * seconds), 1000)
    return f"{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}{point}{milliseconds:03}"


# The formats of subtitles by the suffix of their files. Each is given words and the length of a frame in seconds.
SUBTITLES: dict[str, Callable[[Sequence[TimedWord], float], str]] = {"srt": srt, "vtt": vtt}


def subtitle_paths(path: Path, suffix: str, clips: Sequence[Clip]) -> list[Path]:
    """The subtitle file of each clip.

    For one clip the path is the file. For several clips it is a folder, which may not exist yet; each file in it is
    named after the clip's file and, for a segment, after where the segment begins. Raises ValueError where several
    clips are given and the path is not a folder.
    """
    if len(clips) == 1:
        return [path]
    if path == STANDARD_OUTPUT or (path.exists() and not path.is_dir()):
        raise ValueError(f"the subtitles of {len(clips)} clips need a folder, and {path} is none; name a folder")
    return [path / f"{clip.path.stem}{f'_{clip.offset:g}s' if clip.segment else ''}.{suffix}" for clip in clips]
