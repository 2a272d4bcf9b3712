"""XXX docstring of run.audio"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from common.cli import silent_stderr
from common.folder.outputs import require_file
from common.run.clips import Clip

# GenAI computes a clip's features at once, in 2 GB an hour; the encoder then runs chunk by chunk.
MAX_SECONDS = 4 * 3600
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 4_000, 768_000  # Hz: what converters have; a header beyond is damaged
# Full scale is 1, or 2^31 where a program stored integers as floats. Powers of features stay finite up to there.
MAX_AMPLITUDE = 2.0**31
BLOCK_VALUES = 2**20  # samples times channels decoded at a time, 4 MB
# Formats in which libsndfile finds a sample by its number. After a seek in others the decoder lacks what went before:
# samples of Opus are up to 0.002 off, those of MP3 audibly where it has been reading.
SEEKABLE = ("PCM_", "FLOAT", "DOUBLE", "ULAW", "ALAW")  # subtypes; FLAC's is PCM
# Manifests round durations; the end of a segment that is as near to the end of the file is that.
SEGMENT_TOLERANCE = 0.05  # seconds
# Of the energy of the channels, what their average has at least: 1/channels where they have nothing to do with each
# other, next to nothing where one is the other upside down.
MIN_MONO_ENERGY = 1e-4


def load_audio(path: Path, sample_rate: int, min_samples: int) -> np.ndarray:
    """A whole file, as load_clip gives it."""
    return load_clip(Clip(Path(path)), sample_rate, min_samples)


def load_clip(clip: Clip, sample_rate: int, min_samples: int) -> np.ndarray:
    """Any file libsndfile reads, or the segment of it that is the clip, as mono float32 at `sample_rate`; channels are
    averaged, resampling is soxr's HQ.

    Raises FileNotFoundError, or ValueError for a file that is no audio or no regular file, for a segment outside of it,
    and for samples that are not finite, cancel each other out, are under `min_samples` or longer than MAX_SECONDS.
    """
    with _open_audio(clip.path) as file:
        begin, end = _segment(clip, file)
        blocks = _mono_blocks(clip, _blocks(clip, file, begin, end))
        parts = blocks if file.samplerate == sample_rate else _resampled(blocks, file.samplerate, sample_rate)
        mono = np.concatenate([np.zeros(0, np.float32), *parts])
    _require_length(clip, len(mono) / sample_rate, min_samples / sample_rate)
    return mono


def check_audio(clip: Clip, sample_rate: int, min_samples: int) -> float:
    """Seconds of the clip by the header of its file, and nothing read but that. Raises as load_clip does where that
    is enough to know."""
    with _open_audio(clip.path) as file:
        begin, end = _segment(clip, file)
        seconds = ((file.frames if end is None else end) - begin) / file.samplerate
    _require_length(clip, seconds, min_samples / sample_rate)
    return seconds


@contextlib.contextmanager
def _open_audio(path: Path) -> Iterator:
    import soundfile

    require_file(path, "an audio file")
    try:
        with silent_stderr(), soundfile.SoundFile(path) as file:
            if not MIN_SAMPLE_RATE <= file.samplerate <= MAX_SAMPLE_RATE:
                limits = f"{MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE}"
                raise ValueError(f"{path} has a sample rate of {file.samplerate} Hz, wanted {limits}")
            # After each read soundfile seeks to where it is already, and an MP3 starts anew there, audibly.
            file.seekable = lambda: False
            yield file
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} is not audio that libsndfile reads ({error.error_string})") from None


def _segment(clip: Clip, file) -> tuple[int, int | None]:
    """First frame of the clip in an open sound file, and the one after its last; None: the end of the file, wherever
    that is. Raises ValueError where it is outside."""
    begin, length = round(clip.offset * file.samplerate), file.frames / file.samplerate
    end = length if clip.duration is None else clip.offset + clip.duration
    if (begin and begin >= file.frames) or end > length + SEGMENT_TOLERANCE:
        raise ValueError(f"expected a segment of {clip.path}, which is {length:g} s long, got{clip.segment}")
    return begin, None if end >= length - SEGMENT_TOLERANCE else round(end * file.samplerate)


def _require_length(clip: Clip, seconds: float, least: float) -> None:
    if seconds < least:
        raise ValueError(f"{clip.path}{clip.segment} holds {seconds:.3f} s of audio, wanted {least:.3f} s or more")


def _blocks(clip: Clip, file, begin: int, end: int | None) -> Iterator[np.ndarray]:
    """The frames from `begin` up to `end` of an open sound file, in blocks [N, channels]: memory for one block,
    whatever the header claims."""
    size, position = max(BLOCK_VALUES // file.channels, 1), 0  # frames
    if begin and file.subtype.startswith(SEEKABLE):
        position = file.seek(begin)
    last = begin + MAX_SECONDS * file.samplerate
    while end is None or position < end:
        read = file.read(size if end is None else min(size, end - position), dtype="float32", always_2d=True)
        if not len(read):
            break
        skipped = max(begin - position, 0)  # frames that only lead to those that are asked for
        position += len(read)
        if position > last:
            raise ValueError(f"{clip.path} is longer than {MAX_SECONDS / 3600:.0f} h; cut it into parts")
        if skipped < len(read):
            yield read[skipped:]
    if end is not None and position < end:
        raise ValueError(f"{clip.path} ends after {position / file.samplerate:.3f} s, before{clip.segment}; is it cut?")


def _mono_blocks(clip: Clip, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The average of the channels of each block."""
    energy = mono_energy = 0.0
    for block in blocks:
        mono = block.mean(axis=1)
        if not np.abs(mono).max() <= MAX_AMPLITUDE:  # NaN is not, either
            raise ValueError(f"{clip.path} holds samples that are not finite numbers, or beyond any scale of audio")
        energy += float(np.square(block, dtype=np.float64).sum()) / block.shape[1]
        mono_energy += float(np.square(mono, dtype=np.float64).sum())
        yield mono
    if mono_energy < MIN_MONO_ENERGY * energy:
        raise ValueError(
            f"the channels of {clip.path}{clip.segment} cancel each other out when they are averaged, so its speech "
            "would be lost; one is the other upside down: save one of them as mono"
        )


def _resampled(blocks: Iterable[np.ndarray], rate: int, sample_rate: int) -> Iterator[np.ndarray]:
    import soxr

    resampler = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32")
    for block in blocks:
        yield resampler.resample_chunk(block)
    yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
