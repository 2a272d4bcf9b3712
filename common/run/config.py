"""XXX docstring of run.config"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.cli import EXPORT_COMMAND
from common.contract import GENAI_CONFIG
from common.folder.outputs import read_json
from common.run.audio import load_audio

# NeMo's features need two frames for a standard deviation; a shorter clip holds no speech anyway.
MIN_FRAMES = 2


@dataclass(frozen=True)
class RuntimeConfig:
    """What genai_config.json says of decoding: the raw baseline is bound to the same numbers as GenAI."""

    sample_rate: int
    hop_length: int
    subsampling_factor: int
    chunk: int  # samples
    left: int
    right: int
    blank_id: int
    durations: tuple[int, ...]
    max_symbols: int
    decoder_layers: int
    decoder_dim: int

    @classmethod
    def read(cls, folder: Path) -> "RuntimeConfig":
        """Raises FileNotFoundError, or ValueError where the file is no such config."""
        path = Path(folder) / GENAI_CONFIG
        config = read_json(path, EXPORT_COMMAND.format(folder))
        try:
            model = config["model"]
            return cls(
                model["sample_rate"],
                model["hop_length"],
                model["subsampling_factor"],
                model["chunk_samples"],
                model["left_context_samples"],
                model["right_context_samples"],
                model["blank_id"],
                tuple(model["tdt_durations"]),
                model["max_symbols_per_step"],
                model["decoder"]["num_hidden_layers"],
                model["decoder"]["hidden_size"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path} lacks a setting ({error}); make it again: {EXPORT_COMMAND.format(folder)}"
            ) from None

    @property
    def frame_seconds(self) -> float:
        """Length of an encoder frame."""
        return self.hop_length * self.subsampling_factor / self.sample_rate

    @property
    def min_samples(self) -> int:
        return MIN_FRAMES * self.hop_length

    def fits_one_window(self, seconds: float) -> bool:
        """Whether the encoder sees a clip of that length whole, as NeMo's does."""
        return seconds * self.sample_rate <= self.chunk

    def read_audio(self, path: Path) -> np.ndarray:
        """Mono samples at the model's rate, a whole number of hops of them.

        Up to 10 ms are cut off the end: there GenAI may compute one frame more than NeMo, the window's last 9 ms being
        enough for it (NemoStreamingMelExtractor in nemo_mel_spectrogram.cc), and both normalise over their frames.
        """
        samples = load_audio(path, self.sample_rate, self.min_samples)
        return samples[: len(samples) // self.hop_length * self.hop_length]


@dataclass(frozen=True)
class Piece:
    """One encoder run: mel frames `begin` … `end` - 1 go in, encoder frames `start` … `stop` - 1 are decoded."""

    begin: int
    end: int
    start: int
    stop: int | None  # None: to the last


def windows(config: RuntimeConfig, mel_frames: int) -> Iterator[Piece]:
    """How GenAI cuts a clip of `mel_frames` (EncodeNextChunk in src/models/parakeet.cpp): integer divisions and all."""
    hop, sub = config.hop_length, config.subsampling_factor
    total = mel_frames * hop
    chunk_begin = 0
    while chunk_begin < total:
        chunk_end = min(chunk_begin + config.chunk, total)
        begin = max(chunk_begin - config.left, 0) // hop
        end = min(min(chunk_end + config.right, total) // hop, mel_frames)
        start = (chunk_begin // hop - begin) // sub
        stop = None if chunk_end == total else (chunk_end // hop - begin) // sub
        yield Piece(begin, end, start, stop)
        chunk_begin = chunk_end
