"""The clips of a NeMo manifest: JSON lines with audio_filepath (relative to the manifest), and perhaps text, lang, and
the segment of the file that is meant, as offset and duration in seconds."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.files import require_file

MAX_NUMBER = 1e9  # seconds; 31 years


@dataclass
class Clip:
    """One line of a manifest; `text` is its transcript, `lang` its language, as the manifest names it."""

    path: Path
    text: str | None = None
    lang: str | None = None
    offset: float = 0.0  # seconds; where the clip begins in the file
    duration: float | None = None  # seconds; None: to the end of the file
    line: str | None = None  # manifest:number, for messages

    @property
    def segment(self) -> str:
        """What to write behind the name of the file, where the clip may be a part of it."""
        end = "" if self.duration is None else f"{self.offset + self.duration:g}"
        return f" [{self.offset:g}–{end} s]" if self.offset or end else ""

    def overlaps(self, other: "Clip") -> bool:
        """Whether two clips of one file have samples in common."""
        ends = (float("inf") if clip.duration is None else clip.offset + clip.duration for clip in (self, other))
        return max(self.offset, other.offset) < min(ends)

    @contextlib.contextmanager
    def located(self) -> Iterator[None]:
        """Name the line of the manifest in what is raised about the clip."""
        try:
            yield
        except (ValueError, OSError) as error:
            if self.line is None:
                raise
            raise ValueError(f"{self.line}: {error}") from error


def read_clips(manifest: Path, *, with_text: bool = False) -> list[Clip]:
    """The clips of a manifest in its order; their files are not looked at. An empty text means silence.

    Raises FileNotFoundError, or ValueError naming the line that is not JSON of this kind, or `with_text` has no text.
    """
    require_file(manifest, "a manifest")
    clips = []
    for number, line in enumerate(_read_utf8(manifest).split("\n"), 1):
        if not line.strip():
            continue
        try:
            clip = _read_clip(line, manifest.parent)
        except ValueError as error:  # json.JSONDecodeError is one
            raise ValueError(f"{manifest}:{number}: {error}") from None
        if with_text and clip.text is None:
            raise ValueError(f"{manifest}:{number}: expected the text of {clip.path.name}, got none")
        clip.line = f"{manifest}:{number}"
        clips.append(clip)
    if not clips:
        raise ValueError(f"{manifest} lists no clips")
    return clips


def _read_utf8(manifest: Path) -> str:
    """Its text, without a byte order mark. Raises ValueError naming the line that is in another encoding."""
    content = manifest.read_bytes()
    try:
        text = content.decode("utf-8-sig")
        wrong = text.find("\0")  # UTF-16 of English is UTF-8 as well, every second character of it being this
    except UnicodeDecodeError as error:
        text, wrong = content[: error.start].decode("utf-8", "replace"), error.start
    if wrong >= 0:
        line = text[:wrong].count("\n") + 1
        raise ValueError(f"{manifest}:{line} is not UTF-8, the encoding of JSON; save the manifest as UTF-8")
    return text


def _read_clip(line: str, folder: Path) -> Clip:
    try:
        row = json.loads(line)
    except RecursionError:
        row = None
    except ValueError as error:
        raise ValueError(f"expected a JSON object with audio_filepath, got what is not JSON ({error})") from None
    if not isinstance(row, dict) or row.get("audio_filepath") is None:
        raise ValueError("expected a JSON object with audio_filepath, got another")
    if row["audio_filepath"] == "":
        raise ValueError("expected a path as audio_filepath, got an empty one")
    for key in ("audio_filepath", "text", "lang"):
        value = row.get(key)
        if not isinstance(value, str | None):
            raise ValueError(f"expected a string as {key}, got {value!r}")
        if value and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"expected Unicode as {key}, got half of a surrogate pair in {value!r}")
    offset, duration = (_seconds(row, key) for key in ("offset", "duration"))
    if duration == 0:
        raise ValueError("expected a duration of more than 0 s, got 0")
    return Clip(folder / row["audio_filepath"], row.get("text"), row.get("lang"), offset or 0.0, duration)


def _seconds(row: dict, key: str) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    # `not <=` holds for NaN, which JSON of Python's has; True is an int.
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= MAX_NUMBER:
        raise ValueError(f"expected a number of seconds, 0 or more, as {key}, got {value!r}")
    return float(value)


def shared_clips(clips: Iterable[Clip], others: Iterable[Clip]) -> list[Clip]:
    """Those of `clips` whose samples are, in part at least, in one of `others`: of one file, links followed."""
    by_file: dict[str, list[Clip]] = {}
    for other in others:
        by_file.setdefault(os.path.realpath(other.path), []).append(other)
    return [clip for clip in clips if any(map(clip.overlaps, by_file.get(os.path.realpath(clip.path), ())))]
