"""Read audio as the models take it: mono float32 samples at the model's rate, from whole files or segments of them.

Files are read in blocks, so that memory use depends on the audio that is there and not on what a header claims. The
formats are libsndfile's, and soxr resamples with its HQ setting.

Clips are listed in a manifest of NeMo's, a file of JSON lines. Each line has `audio_filepath`, relative to the
manifest, and may have `text`, the language of the text as `lang`, `language` or `target_lang`, and a segment of the
file as `offset` and `duration` in seconds. Without an `offset` the clip is the whole file, whatever its `duration`
says: tools that write manifests round that number, or take it from the audio before it was cut or resampled.
"""

import contextlib
import functools
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import silent_stderr, warn
from common.folder import require_file

# GenAI computes the features of a whole clip at once, in 2 GB per hour of audio; the encoder then runs chunk by chunk.
MAX_SECONDS = 4 * 3600
# Full scale is 1, or 2^31 where a program stored integers as floats. The power of the features is finite up to there.
MAX_AMPLITUDE = 2.0**31
BLOCK_VALUES = 2**20  # samples times channels decoded at a time, 4 MB
# Subtypes in which libsndfile seeks to the exact sample; FLAC's is PCM. In the others the decoder lacks the
# preceding samples after a seek: Opus samples are then off by up to 0.002, and MP3 samples audibly.
SEEKABLE = ("PCM_", "FLOAT", "DOUBLE", "ULAW", "ALAW")
# Manifests round durations, so a segment that ends this close to the end of the file is read to the end.
SEGMENT_TOLERANCE = 0.05  # seconds
UNKNOWN_BYTES = 2**31 - 2**16  # or more: written where the length is not known, as by a program that writes to a pipe
# In an MP3 file that states its number of frames. For others libsndfile estimates it, up to ten times too large.
MP3_LENGTH = re.compile(rb"(Xing|Info)\0\0\0[\x01-\x0f]|VBRI")
HEAD = 2**20  # bytes in which that is looked for
# The smallest share of the channels' energy that their average may have. It is 1/channels for unrelated channels, and
# near 0 where one channel is the other with its sign inverted.
MIN_MONO_ENERGY = 1e-4
LANGUAGE_KEYS = ("lang", "language", "target_lang")  # of a line of a manifest, the first that is there


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
    def end(self) -> float:
        """Where the clip ends in the file, in seconds; infinite for the end of the file."""
        return math.inf if self.duration is None else self.offset + self.duration

    @property
    def segment(self) -> str:
        """The segment as messages show it after the name of the file: ` [1.5–3 s]`, or nothing for a whole file."""
        end = "" if self.duration is None else f"{self.end:g}"
        return f" [{self.offset:g}–{end} s]" if self.offset or end else ""

    @property
    def name(self) -> str:
        """The file, and the segment of it."""
        return f"{self.path}{self.segment}"

    @property
    def label(self) -> str:
        """The name of the file without its folder, and the segment."""
        return f"{self.path.name}{self.segment}"


def read_clips(manifest: Path, *, with_text: bool = False) -> list[Clip]:
    """The clips of a manifest, in its order; the audio files are not read.

    Raises FileNotFoundError, or ValueError naming the line that does not describe a clip in JSON, or that has no text
    although `with_text` asks for one.
    """
    require_file(manifest, "a clip list")
    try:
        lines = manifest.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{manifest} is not in UTF-8; save the clip list as UTF-8") from None
    clips = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{manifest}:{number}"
            try:
                clips.append(_read_clip(line, manifest.parent, place))
            except ValueError as error:  # json.JSONDecodeError is a ValueError
                raise ValueError(f"{place}: a line must be a JSON object with audio_filepath ({error})") from None
            if with_text and clips[-1].text is None:
                raise ValueError(f"{place}: {clips[-1].path.name} has no text, which word errors are counted by")
    if not clips:
        raise ValueError(f"{manifest} lists no clip; it needs a line for each")
    return clips


def _read_clip(line: str, folder: Path, place: str) -> Clip:
    row = json.loads(line)
    if not isinstance(row, dict) or row.get("audio_filepath") is None:
        raise ValueError("it has none")
    for key in ("audio_filepath", "text", *LANGUAGE_KEYS):
        if not isinstance(row.get(key), str | None):
            raise ValueError(f"{key} must be a string, not {row[key]!r}")
    for key in ("offset", "duration"):
        if row.get(key) is not None and not (isinstance(row[key], int | float) and 0 <= row[key] < math.inf):
            raise ValueError(f"{key} must be a number of seconds, 0 or more, not {row[key]!r}")
    path = folder / row["audio_filepath"]
    lang = next((row[key] for key in LANGUAGE_KEYS if row.get(key) is not None), None)
    offset, duration = row.get("offset"), row.get("duration")
    if offset is None:
        return Clip(path, row.get("text"), lang, stated_length=duration, line=place)
    return Clip(path, row.get("text"), lang, offset, duration, line=place)


def shared_clips(clips: Iterable[Clip], others: Iterable[Clip]) -> list[Clip]:
    """Those of `clips` that have samples in common with one of `others`; links to the same file are recognized."""
    by_file: dict[str, list[Clip]] = {}
    for other in others:
        by_file.setdefault(os.path.realpath(other.path), []).append(other)
    return [
        clip
        for clip in clips
        if any(
            max(clip.offset, other.offset) < min(clip.end, other.end)
            for other in by_file.get(os.path.realpath(clip.path), ())
        )
    ]


def load_clip(clip: Clip, sample_rate: int, min_samples: int) -> np.ndarray:
    """The samples of a clip, [N] float32 at `sample_rate` Hz, its channels averaged.

    Warns, once a clip, of a WAV or MP3 file that ends before its header says. Raises FileNotFoundError; ValueError,
    with the line of the manifest, for a file that is not audio or not a regular file, a segment outside of it, and for
    samples that are not finite, cancel each other out, are fewer than `min_samples` or longer than MAX_SECONDS.
    """
    import soxr

    with _open_audio(clip) as file:
        resampler = soxr.ResampleStream(file.samplerate, sample_rate, 1, dtype="float32")  # copies at an equal rate
        parts = [resampler.resample_chunk(block) for block in _mono_blocks(clip, file)]
        mono = np.concatenate([*parts, resampler.resample_chunk(np.zeros(0, np.float32), last=True)])
        seconds = len(mono) / sample_rate
        _require_length(clip, seconds, min_samples / sample_rate)
    if clip.duration is None:
        _warn_if_cut(clip.path, file.format, file.frames / file.samplerate, clip.offset + seconds)
    return mono


def check_audio(clip: Clip, sample_rate: int, min_samples: int) -> float:
    """The length of the clip in seconds according to the header of its file; nothing else of the file is read.

    Raises as load_clip does, for the faults that the header shows.
    """
    with _open_audio(clip) as file:
        seconds: float = max(min(clip.end, file.frames / file.samplerate) - clip.offset, 0.0)
        _require_length(clip, seconds, min_samples / sample_rate)
    return seconds


@contextlib.contextmanager
def _open_audio(clip: Clip) -> Iterator[Any]:
    """Yield an open soundfile.SoundFile. Errors inside the block begin with the clip's line of the manifest."""
    import soundfile

    at = f"{clip.line}: " if clip.line else ""
    try:
        require_file(clip.path, "an audio file")
        with silent_stderr(), contextlib.ExitStack() as stack:
            # To libsndfile, `-` is the standard input.
            file = stack.enter_context(soundfile.SoundFile(clip.path.absolute()))
            if not file.frames and file.format.startswith("WAV"):
                # What recorded it was stopped. With a length of 8 for the whole, libsndfile reads to the end.
                content = bytearray(clip.path.read_bytes())
                content[4:8] = (8).to_bytes(4, "little")
                file = stack.enter_context(soundfile.SoundFile(io.BytesIO(content)))
            # After each read soundfile seeks to the position that it is at, where an MP3 decoder starts again, audibly.
            file.seekable = lambda: False
            yield file
    except soundfile.LibsndfileError as error:
        reason = f"is not an audio file that libsndfile reads ({error.error_string}); convert it to WAV"
        raise ValueError(f"{at}{clip.path} {reason}") from None
    except (ValueError, OSError) as error:
        if not at:
            raise
        raise ValueError(f"{at}{error}") from error


def _require_length(clip: Clip, seconds: float, least: float) -> None:
    """Raise ValueError where a clip has fewer seconds than `least`, or than its segment."""
    least = max(least, (clip.duration or 0) - SEGMENT_TOLERANCE)
    if seconds < least:
        raise ValueError(f"{clip.name} has {seconds:.3f} s of audio, and needs at least {least:.3f} s")


@functools.cache
def _warn_if_cut(path: Path, form: str, frames_seconds: float, found: float) -> None:
    """Warn of a WAV or MP3 file whose header states more than the seconds `found`."""
    with path.open("rb") as raw:
        head = raw.read(HEAD)
    stated = 0.0
    if form == "MP3" and MP3_LENGTH.search(head):
        stated = frames_seconds
    elif form.startswith("WAV") and (size := int.from_bytes(head[4:8], "little") + 8) < UNKNOWN_BYTES:
        stated = found * size / path.stat().st_size
    if stated > found + SEGMENT_TOLERANCE:
        warn(f"{path} ends early: its header states {stated:.1f} s of audio, and {found:.1f} s are there")


def _mono_blocks(clip: Clip, file: Any) -> Iterator[np.ndarray]:
    """The average of the channels of a clip in an open sound file, in blocks [N]."""
    begin = round(clip.offset * file.samplerate)  # frames, as below
    is_open = clip.end >= file.frames / file.samplerate - SEGMENT_TOLERANCE
    end = None if is_open else round(clip.end * file.samplerate)
    position = file.seek(min(begin, file.frames)) if begin and file.subtype.startswith(SEEKABLE) else 0
    size = max(BLOCK_VALUES // file.channels, 1)
    energy = mono_energy = 0.0
    while end is None or position < end:
        read = file.read(size if end is None else min(size, end - position), dtype="float32", always_2d=True)
        if not len(read):
            break
        block = read[max(begin - position, 0) :]
        position += len(read)
        if position - begin > MAX_SECONDS * file.samplerate:
            hours = MAX_SECONDS / 3600
            raise ValueError(f"{clip.path} has more than {hours:.0f} h of audio; cut it into parts")
        mono = block.mean(axis=1)
        if not np.abs(mono).max(initial=0) <= MAX_AMPLITUDE:  # written so that NaN fails too
            raise ValueError(
                f"{clip.path} has samples that are larger than {MAX_AMPLITUDE:.0f} or not finite; make it again"
            )
        energy += float(np.square(block, dtype=np.float64).sum()) / block.shape[1]
        mono_energy += float(np.square(mono, dtype=np.float64).sum())
        yield mono
    if mono_energy < MIN_MONO_ENERGY * energy:
        raise ValueError(
            f"the channels of {clip.name} cancel each other out: one is the other with its sign inverted; save one of "
            "them as mono"
        )
