"""The clips of a NeMo manifest, a file of JSON lines.

Each line has `audio_filepath`, relative to the manifest, and may have `text`, `lang`, and a segment of the file as
`offset` and `duration` in seconds. Without an `offset` the clip is the whole file, whatever its `duration` says: tools
that write manifests round that number, or take it from the audio before it was cut or resampled.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.folder import require_file

MAX_NUMBER = 1e9  # seconds; 31 years


@dataclass
class Clip:
    """One line of a manifest, or a whole file."""

    path: Path
    text: str | None = None  # the transcript; empty for silence
    lang: str | None = None  # the language, as the manifest names it
    offset: float = 0.0  # seconds; where the clip begins in the file
    duration: float | None = None  # seconds; None: to the end of the file
    stated_length: float | None = None  # seconds; what the manifest says of a whole file
    line: str | None = None  # manifest:number, for messages

    @property
    def segment(self) -> str:
        """The segment as messages show it after the name of the file: ` [1.5–3 s]`, or nothing for a whole file."""
        end = "" if self.duration is None else f"{self.offset + self.duration:g}"
        return f" [{self.offset:g}–{end} s]" if self.offset or end else ""

    @property
    def label(self) -> str:
        """The name of the file without its folder, and the segment."""
        return f"{self.path.name}{self.segment}"

    def overlaps(self, other: "Clip") -> bool:
        """Whether two clips of one file have samples in common."""
        ends = (float("inf") if clip.duration is None else clip.offset + clip.duration for clip in (self, other))
        return max(self.offset, other.offset) < min(ends)

    @contextlib.contextmanager
    def located(self) -> Iterator[None]:
        """Turn an error inside the block into a ValueError that begins with the line of the manifest."""
        try:
            yield
        except (ValueError, OSError) as error:
            if self.line is None:
                raise
            raise ValueError(f"{self.line}: {error}") from error


def read_clips(manifest: Path, *, with_text: bool = False) -> list[Clip]:
    """The clips of a manifest, in its order; the audio files are not read.

    Raises FileNotFoundError, or ValueError naming the line that does not describe a clip in JSON, or that has no text
    although `with_text` asks for one.
    """
    require_file(manifest, "a clip list")
    clips = []
    for number, line in enumerate(_read_utf8(manifest).split("\n"), 1):
        if not line.strip():
            continue
        try:
            clip = _read_clip(line, manifest.parent)
        except ValueError as error:  # json.JSONDecodeError is a ValueError
            raise ValueError(f"{manifest}:{number}: {error}") from None
        if with_text and clip.text is None:
            raise ValueError(f"{manifest}:{number}: expected the text of {clip.path.name}, got none")
        clip.line = f"{manifest}:{number}"
        clips.append(clip)
    if not clips:
        raise ValueError(f"expected a line for each clip in {manifest}, got none")
    return clips


def _read_utf8(manifest: Path) -> str:
    """The text of a manifest, without a byte order mark. Raises ValueError naming the first line that is not UTF-8."""
    content = manifest.read_bytes()
    try:
        text = content.decode("utf-8-sig")
        wrong = text.find("\0")  # in UTF-16 every second byte of English is 0, which is valid UTF-8 as well
    except UnicodeDecodeError as error:
        text = content[: error.start].decode("utf-8", "replace")
        wrong = error.start
    if wrong >= 0:
        line = text[:wrong].count("\n") + 1
        raise ValueError(f"{manifest}:{line}: expected UTF-8, got another encoding; save the clip list as UTF-8")
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
    path = folder / row["audio_filepath"]
    if offset is None:
        return Clip(path, row.get("text"), row.get("lang"), stated_length=duration)
    return Clip(path, row.get("text"), row.get("lang"), offset, duration)


def _seconds(row: dict[str, Any], key: str) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    # `not <=` rejects NaN, which Python's JSON reader accepts; to Python, True is an int.
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= MAX_NUMBER:
        raise ValueError(f"expected a number of seconds, 0 or more, as {key}, got {value!r}")
    return float(value)


def shared_clips(clips: Iterable[Clip], others: Iterable[Clip]) -> list[Clip]:
    """Those of `clips` that have samples in common with one of `others`; links to the same file are recognized."""
    by_file: dict[str, list[Clip]] = {}
    for other in others:
        by_file.setdefault(os.path.realpath(other.path), []).append(other)
    return [clip for clip in clips if any(map(clip.overlaps, by_file.get(os.path.realpath(clip.path), ())))]
