"""Subtitles in SubRip's format (.srt) from words with their times."""

import itertools
import textwrap
from collections.abc import Iterator, Sequence

from common.evaluate.timestamps import TimedWord

# Subtitles as broadcasters set them (Netflix Timed Text Style Guide): two lines of 42 characters, 5/6 s to 7 s.
LINE_CHARACTERS = 42
LINES = 2
MIN_CUE_SECONDS = 5 / 6
MAX_CUE_SECONDS = 7.0
PAUSE_SECONDS = 1.0  # silence after which a new cue begins
SENTENCE_END = (".", "?", "!")  # NeMo's default segment_seperators


def cues(words: Sequence[TimedWord], frame_seconds: float) -> Iterator[list[TimedWord]]:
    """Words that are shown together: a sentence or less, two lines at most, up to a pause or the longest time.

    Each begins later than the one before.
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
    """SubRip subtitles; a short cue stays for the shortest time, or until the next one."""
    blocks = []
    groups = list(cues(words, frame_seconds))
    for number, (cue, following) in enumerate(itertools.zip_longest(groups, groups[1:]), 1):
        start = cue[0].start * frame_seconds
        end = max(cue[-1].end * frame_seconds, start + MIN_CUE_SECONDS)
        if following:
            end = min(end, following[0].start * frame_seconds)
        blocks.append("\n".join([str(number), f"{_clock(start)} --> {_clock(end)}", *_lines(cue), ""]))
    return "\n".join(blocks)


def _clock(seconds: float) -> str:
    """HH:MM:SS,mmm"""
    rest, milliseconds = divmod(round(1000 * seconds), 1000)
    return f"{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02},{milliseconds:03}"
