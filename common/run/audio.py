"""Read audio as the models take it: mono float32 samples at the model's rate, from whole files or segments of them.

Files are read in blocks, so that memory use depends on the audio that is there and not on what a header claims. The
formats are those of libsndfile, and soxr resamples with its HQ setting.

Clips are listed in a manifest of NeMo's, a file of JSON lines. Each line has `audio_filepath`, relative to the
manifest, and may have `text`, the language of the text as `lang`, `language` or `target_lang`, and a segment of the
file as `offset` and `duration` in seconds. Without an `offset` the clip is the whole file, whatever its `duration`
says: tools that write manifests round that number, or take it from the audio before it was cut or resampled.
"""

import contextlib
import functools
import json
import mmap
import os
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import silent_stderr, warn
from common.folder import require_file

# GenAI computes the features of a whole clip at once, in 2 GB per hour of audio; the encoder then runs chunk by chunk.
MAX_SECONDS = 4 * 3600
# In Hz: the rates of audio converters. A header with a rate outside this range is damaged.
MIN_SAMPLE_RATE = 4_000
MAX_SAMPLE_RATE = 768_000
# Full scale is 1, or 2^31 where a program stored integers as floats. The power of the features is finite up to there.
MAX_AMPLITUDE = 2.0**31
BLOCK_VALUES = 2**20  # samples times channels decoded at a time, 4 MB
# Subtypes in which libsndfile seeks to the exact sample; that of FLAC is PCM. In the others the decoder lacks the
# preceding samples after a seek: Opus samples are then off by up to 0.002, and MP3 samples audibly.
SEEKABLE = ("PCM_", "FLOAT", "DOUBLE", "ULAW", "ALAW")
# Manifests round durations, so a segment that ends this close to the end of the file is read to the end.
SEGMENT_TOLERANCE = 0.05  # seconds
# What libsndfile notes of a WAV or AU file that ends before its header says, in bytes, and of an AIFF file, in frames.
STATED = re.compile(r"^ *data(?: size)? *: (\d+) \(should be (\d+)\)|'COMM' chunk \((\d+)\)", re.I | re.M)
UNKNOWN_BYTES = 2**31 - 2**16  # or more: written where the length is not known, as by a program that writes to a pipe
UNKNOWN_FRAMES = 2**62
# In an MP3 file that states its number of frames. For others libsndfile estimates it, up to ten times too large.
MP3_LENGTH = re.compile(rb"(Xing|Info)\0\0\0[\x01-\x0f]|VBRI")
MP3_HEAD = 2**20  # bytes in which that is looked for
# The smallest share of the channels' energy that their average may have. It is 1/channels for unrelated channels, and
# near 0 where one channel is the other with its sign inverted.
MIN_MONO_ENERGY = 1e-4
MAX_NUMBER = 1e9  # seconds; 31 years
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
    def segment(self) -> str:
        """The segment as messages show it after the name of the file: ` [1.5–3 s]`, or nothing for a whole file."""
        end = "" if self.duration is None else f"{self.offset + self.duration:g}"
        return f" [{self.offset:g}–{end} s]" if self.offset or end else ""

    @property
    def name(self) -> str:
        """The file, and the segment of it."""
        return f"{self.path}{self.segment}"

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
    try:
        lines = manifest.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{manifest} is not in UTF-8; save the clip list as UTF-8") from None
    clips = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            clip = _read_clip(line, manifest.parent)
        except ValueError as error:  # json.JSONDecodeError is a ValueError
            raise ValueError(f"{manifest}:{number}: {error}") from None
        if with_text and clip.text is None:
            raise ValueError(f"{manifest}:{number}: {clip.path.name} has no text, which word errors are counted by")
        clip.line = f"{manifest}:{number}"
        clips.append(clip)
    if not clips:
        raise ValueError(f"{manifest} lists no clip; it needs a line for each")
    return clips


def _read_clip(line: str, folder: Path) -> Clip:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"expected a JSON object with audio_filepath, got what is not JSON ({error})") from None
    if not isinstance(row, dict) or row.get("audio_filepath") is None:
        raise ValueError("expected a JSON object with audio_filepath, got another")
    if row["audio_filepath"] == "":
        raise ValueError("audio_filepath is empty; it must be the path of an audio file")
    for key in ("audio_filepath", "text", *LANGUAGE_KEYS):
        if not isinstance(row.get(key), str | None):
            raise ValueError(f"expected a string as {key}, got {row[key]!r}")
    offset, duration = (_seconds(row, key) for key in ("offset", "duration"))
    if duration == 0:
        raise ValueError("duration is 0; it must be more than 0 s")
    path = folder / row["audio_filepath"]
    lang = next((row[key] for key in LANGUAGE_KEYS if row.get(key) is not None), None)
    if offset is None:
        return Clip(path, row.get("text"), lang, stated_length=duration)
    return Clip(path, row.get("text"), lang, offset, duration)


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


def load_clip(clip: Clip, sample_rate: int, min_samples: int) -> np.ndarray:
    """The samples of a clip, [N] float32 at `sample_rate` Hz, its channels averaged.

    Warns, once a clip, of a file that ends before its header says. Raises FileNotFoundError; ValueError for a file that
    is not audio or not a regular file, a segment outside of it, and for samples that are not finite, cancel each other
    out, are fewer than `min_samples` or longer than MAX_SECONDS.
    """
    with _open_audio(clip.path) as file:
        begin, end = _segment(clip, file)
        blocks = _mono_blocks(clip, _blocks(clip, file, begin, end))
        parts = blocks if file.samplerate == sample_rate else _resampled(blocks, file.samplerate, sample_rate)
        mono = np.concatenate([np.zeros(0, np.float32), *parts])
        stated = _stated_frames(clip.path, file) / file.samplerate
    found = clip.offset + len(mono) / sample_rate
    if end is None and stated > found + SEGMENT_TOLERANCE:
        _warn_of_cut(clip.path, found, stated)
    _require_length(clip, len(mono) / sample_rate, min_samples / sample_rate)
    return mono


def check_audio(clip: Clip, sample_rate: int, min_samples: int) -> float:
    """The length of the clip in seconds according to the header of its file; nothing else of the file is read.

    Raises as load_clip does, for the faults that the header shows.
    """
    with _open_audio(clip.path) as file:
        begin, end = _segment(clip, file)
        seconds = float(((file.frames if end is None else end) - begin) / file.samplerate)
    _require_length(clip, seconds, min_samples / sample_rate)
    return seconds


@contextlib.contextmanager
def _open_audio(path: Path) -> Iterator[Any]:
    """Yield an open soundfile.SoundFile after checking that it is audio with a plausible sample rate."""
    import soundfile

    require_file(path, "an audio file")
    try:
        with silent_stderr(), _sound_file(path) as file:
            if not MIN_SAMPLE_RATE <= file.samplerate <= MAX_SAMPLE_RATE:
                limits = f"{MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE}"
                raise ValueError(f"expected a sample rate of {limits} Hz in {path}, got {file.samplerate}")
            # After each read soundfile seeks to the position that it is at, where an MP3 decoder starts again, audibly.
            file.seekable = lambda: False
            yield file
    except soundfile.LibsndfileError as error:
        raise ValueError(f"expected an audio file that libsndfile reads, got {path} ({error.error_string})") from None


def _sound_file(path: Path) -> Any:
    """An open soundfile.SoundFile.

    A WAV file whose header states that there are no samples, since what recorded it was stopped, is read to its end, as
    libsndfile does by itself where the header also states a length of 8 for the whole.
    """
    import soundfile

    file = soundfile.SoundFile(path.absolute())  # to libsndfile, `-` is the standard input
    if file.frames or not file.format.startswith("WAV"):
        return file
    file.close()
    with path.open("rb") as raw:
        content = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_COPY)  # changed in memory only
    content[4:8] = struct.pack("<I", 8)
    return soundfile.SoundFile(content)


def _stated_frames(path: Path, file: Any) -> int:
    """The number of frames that the header of an open sound file states; 0 where it states none."""
    if file.format == "MP3":
        with path.open("rb") as raw:
            if not MP3_LENGTH.search(raw.read(MP3_HEAD)):
                return 0
    if noted := STATED.search(file.extra_info):
        size, found, frames = (int(number or 0) for number in noted.groups())
        return frames or (file.frames * size // max(found, 1) if size < UNKNOWN_BYTES else 0)
    return file.frames if file.frames < UNKNOWN_FRAMES else 0


@functools.cache
def _warn_of_cut(path: Path, found: float, stated: float) -> None:
    warn(f"{path} ends early: its header states {stated:.1f} s of audio, and {found:.1f} s are there; the rest is lost")


def _segment(clip: Clip, file: Any) -> tuple[int, int | None]:
    """The first frame of the clip in an open sound file, and the frame after its last one (None: the end of the file).

    Raises ValueError where the clip is outside of the file.
    """
    begin = round(clip.offset * file.samplerate)
    length = file.frames / file.samplerate  # seconds
    end = length if clip.duration is None else clip.offset + clip.duration
    if (begin and begin >= file.frames) or end > length + SEGMENT_TOLERANCE:
        raise ValueError(f"expected a segment of {clip.path}, which is {length:g} s long, got{clip.segment}")
    return begin, None if end >= length - SEGMENT_TOLERANCE else round(end * file.samplerate)


def _require_length(clip: Clip, seconds: float, least: float) -> None:
    if seconds < least:
        raise ValueError(f"expected {least:.3f} s of audio or more in {clip.name}, got {seconds:.3f} s")


def _blocks(clip: Clip, file: Any, begin: int, end: int | None) -> Iterator[np.ndarray]:
    """The frames from `begin` up to `end` of an open sound file, in blocks [N, channels] of BLOCK_VALUES values."""
    size = max(BLOCK_VALUES // file.channels, 1)  # frames
    position = 0
    if begin and file.subtype.startswith(SEEKABLE):
        position = file.seek(begin)
    last = begin + MAX_SECONDS * file.samplerate
    while end is None or position < end:
        read = file.read(size if end is None else min(size, end - position), dtype="float32", always_2d=True)
        if not len(read):
            break
        skipped = max(begin - position, 0)  # frames before the segment
        position += len(read)
        if position > last:
            hours = MAX_SECONDS / 3600
            raise ValueError(f"expected {hours:.0f} h of audio or less in {clip.path}, got more; cut it into parts")
        if skipped < len(read):
            yield read[skipped:]
    if end is not None and position < end:
        raise ValueError(
            f"expected{clip.segment} in {clip.path}, got {position / file.samplerate:.3f} s of audio: it is truncated"
        )


def _mono_blocks(clip: Clip, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The average of the channels of each block."""
    energy = mono_energy = 0.0
    for block in blocks:
        mono = block.mean(axis=1)
        if not np.abs(mono).max() <= MAX_AMPLITUDE:  # written so that NaN fails too
            raise ValueError(
                f"expected samples up to {MAX_AMPLITUDE:.0f} in {clip.path}, got some that are larger or not finite"
            )
        energy += float(np.square(block, dtype=np.float64).sum()) / block.shape[1]
        mono_energy += float(np.square(mono, dtype=np.float64).sum())
        yield mono
    if mono_energy < MIN_MONO_ENERGY * energy:
        raise ValueError(
            f"expected channels that can be averaged in {clip.name}, got channels that cancel each other "
            "out: one is the other with its sign inverted; save one of them as mono"
        )


def _resampled(blocks: Iterable[np.ndarray], rate: int, sample_rate: int) -> Iterator[np.ndarray]:
    import soxr

    resampler = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32")
    for block in blocks:
        yield resampler.resample_chunk(block)
    yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
