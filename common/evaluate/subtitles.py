"""Subtitles from words with their times, in SubRip's format (.srt) and in WebVTT (.vtt, W3C)."""

import html
import itertools
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.cli import Parser
from common.evaluate.timestamps import TimedWord
from common.folder import is_standard_output
from common.run.clips import Clip

# Subtitles as broadcasters set them (Netflix Timed Text Style Guide): two lines of 42 characters, 5/6 s to 7 s.
LINE_CHARACTERS = 42
LINES = 2
MIN_CUE_SECONDS = 5 / 6
MAX_CUE_SECONDS = 7.0
PAUSE_SECONDS = 1.0  # silence after which a new cue begins
SENTENCE_END = (".", "?", "!")  # NeMo's default segment_seperators


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
    blocks = (
        f"{number}\n{times}\n{text}\n" for number, (times, text) in enumerate(_timed_cues(words, frame_seconds, ","), 1)
    )
    return "\n".join(blocks)


def vtt(words: Sequence[TimedWord], frame_seconds: float) -> str:
    """WebVTT subtitles. `&`, `<` and `>` are written as references, since they would begin markup."""
    blocks = (f"{times}\n{html.escape(text, quote=False)}\n" for times, text in _timed_cues(words, frame_seconds, "."))
    return "\n".join(["WEBVTT\n", *blocks])


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


Render = Callable[[Sequence[TimedWord], float], str]  # words, and the length of a frame in seconds
FORMATS: dict[str, Render] = {"srt": srt, "vtt": vtt}  # by the suffix of their files
SUBTITLE_HELP = """write subtitles: for one clip to the file PATH (- as for --json), for several to files in the
folder PATH"""


def add_subtitle_flags(parser: Parser) -> None:
    """A flag for each format."""
    for suffix in FORMATS:
        parser.add_argument(f"--{suffix}", type=Path, metavar="PATH", help=SUBTITLE_HELP)


@dataclass(frozen=True)
class SubtitleFile:
    """A file of subtitles to be written."""

    path: Path
    clip: int  # number of the clip
    render: Render


def subtitle_files(paths: Mapping[str, Path | None], clips: Sequence[Clip]) -> list[SubtitleFile]:
    """The subtitle files to write, for each format that has a path.

    For one clip the path is the file. For several clips it is a folder, which is made here; each file in it is named
    after the clip's file and, for a segment, after where the segment begins. Raises ValueError where several clips are
    given and the path is not a folder.
    """
    files = []
    for suffix, path in paths.items():
        if path is None:
            continue
        if len(clips) == 1:
            files.append(SubtitleFile(path, 0, FORMATS[suffix]))
            continue
        if is_standard_output(path) or (path.exists() and not path.is_dir()):
            raise ValueError(f"expected a folder for the subtitles of {len(clips)} clips, got {path}; name a folder")
        path.mkdir(exist_ok=True)
        for number, clip in enumerate(clips):
            name = f"{clip.path.stem}{f'_{clip.offset:g}s' if clip.segment else ''}.{suffix}"
            files.append(SubtitleFile(path / name, number, FORMATS[suffix]))
    return files
