"""XXX docstring of run.config"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.cli import EXPORT_COMMAND
from common.contract import GENAI_CONFIG
from common.folder.outputs import read_json
from common.run.audio import check_audio, load_clip
from common.run.clips import Clip

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
        """Raises FileNotFoundError, or ValueError where the file is no such config, or has a number that cannot be:
        with chunk_samples of 0 GenAI never ends."""
        path = Path(folder) / GENAI_CONFIG
        config = read_json(path, EXPORT_COMMAND.format(folder))
        again = f"make it again: {EXPORT_COMMAND.format(folder)}"

        def whole(value: object, key: str, least: int = 1) -> int:
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{path}: expected {key} as a whole number of {least} or more, got {value!r}; {again}")
            return value

        try:
            model, decoder = config["model"], config["model"]["decoder"]
            hop = whole(model["hop_length"], "hop_length")
            subsampling = whole(model["subsampling_factor"], "subsampling_factor")
            return cls(
                whole(model["sample_rate"], "sample_rate"),
                hop,
                subsampling,
                whole(model["chunk_samples"], "chunk_samples", hop * subsampling),  # an encoder frame
                whole(model["left_context_samples"], "left_context_samples", 0),
                whole(model["right_context_samples"], "right_context_samples", 0),
                whole(model["blank_id"], "blank_id", 0),
                tuple(whole(duration, "each of tdt_durations", 0) for duration in model["tdt_durations"]),
                whole(model["max_symbols_per_step"], "max_symbols_per_step"),
                whole(decoder["num_hidden_layers"], "num_hidden_layers of the decoder"),
                whole(decoder["hidden_size"], "hidden_size of the decoder"),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} lacks a setting ({error}); {again}") from None

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

    def check_clips(self, clips: Iterable[Clip]) -> float:
        """Seconds of all clips by the headers of their files. Raises as check_audio does, before the work, for one that
        is missing, too short or a segment outside of its file, naming its line."""
        seconds = 0.0
        for clip in clips:
            with clip.located():
                seconds += check_audio(clip, self.sample_rate, self.min_samples)
        return seconds

    def read_audio(self, path: Path) -> np.ndarray:
        """The samples of a whole file, as read_clip gives them."""
        return self.read_clip(Clip(Path(path)))

    def read_clip(self, clip: Clip) -> np.ndarray:
        """Mono samples at the model's rate, a whole number of hops of them.

        Up to 10 ms are cut off the end: there GenAI may compute one frame more than NeMo, the window's last 9 ms being
        enough for it (NemoStreamingMelExtractor in nemo_mel_spectrogram.cc), and both normalise over their frames.
        """
        with clip.located():
            samples = load_clip(clip, self.sample_rate, self.min_samples)
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
