"""XXX docstring of run.audio"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.cli import silent_stderr

# GenAI computes a clip's features at once, in 2 GB an hour; the encoder then runs chunk by chunk.
MAX_SECONDS = 4 * 3600
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 4_000, 768_000  # Hz: what converters have; a header beyond is damaged
# Full scale is 1, or 2^31 where a program stored integers as floats. Powers of features stay finite up to there.
MAX_AMPLITUDE = 2.0**31
BLOCK_VALUES = 2**20  # samples times channels decoded at a time, 4 MB


def load_audio(path: Path, sample_rate: int, min_samples: int) -> np.ndarray:
    """Any file libsndfile reads, as mono float32 at `sample_rate`; channels are averaged, resampling is soxr's HQ.

    Raises FileNotFoundError, or ValueError for a file that is no audio, is not finite, is under `min_samples` or longer
    than MAX_SECONDS.
    """
    import soundfile

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"wanted an audio file, found nothing at {path}")
    try:
        with silent_stderr(), soundfile.SoundFile(path) as file:
            # After each read soundfile seeks to where it is already, and an MP3 starts anew there, audibly.
            file.seekable = lambda: False
            mono = np.concatenate([np.zeros(0, np.float32), *_mono_blocks(path, file, sample_rate)])
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} is not audio that libsndfile reads ({error.error_string})") from None
    if len(mono) < min_samples:
        raise ValueError(
            f"{path} holds {len(mono) / sample_rate:.3f} s of audio, wanted {min_samples / sample_rate:.3f} s or more"
        )
    return mono


def _mono_blocks(path: Path, file, sample_rate: int) -> Iterator[np.ndarray]:
    """The blocks of an open sound file as mono at `sample_rate`: memory for one block, whatever the header claims."""
    import soxr

    rate = file.samplerate
    if not MIN_SAMPLE_RATE <= rate <= MAX_SAMPLE_RATE:
        raise ValueError(f"{path} has a sample rate of {rate} Hz, wanted {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE}")
    resampler = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32") if rate != sample_rate else None
    block = max(BLOCK_VALUES // file.channels, 1)  # frames
    frames = 0
    while len(read := file.read(block, dtype="float32", always_2d=True)):
        frames += len(read)
        if frames > MAX_SECONDS * rate:
            raise ValueError(f"{path} is longer than {MAX_SECONDS / 3600:.0f} h; cut it into parts")
        mono = read.mean(axis=1)
        if not np.abs(mono).max() <= MAX_AMPLITUDE:  # NaN is not, either
            raise ValueError(f"{path} holds samples that are not finite numbers, or beyond any scale of audio")
        yield mono if resampler is None else resampler.resample_chunk(mono)
    if resampler is not None:
        yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
