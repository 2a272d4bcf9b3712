"""genai_config.json as the engines read it: the numbers of decoding, and the windows in which GenAI encodes a clip.

Plain ONNX Runtime takes its numbers from the same file as GenAI, so that a wrong one shows as a difference from NeMo.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.cli import EXPORT_COMMAND, warn
from common.contract import GENAI_CONFIG
from common.folder import read_json
from common.run.audio import SEGMENT_TOLERANCE, Clip, check_audio, load_clip

# NeMo's features need two frames for a standard deviation.
MIN_FRAMES = 2
# A clip of so many windows, by default 4 minutes, gets a progress bar that counts its windows, or GenAI's tokens.
MIN_WINDOWS_OF_BAR = 4


@dataclass(frozen=True)
class RuntimeConfig:
    """The numbers of genai_config.json that decoding needs."""

    sample_rate: int  # Hz
    hop_length: int  # samples
    subsampling_factor: int  # mel frames to an encoder frame
    chunk: int  # samples decoded by one run of the encoder
    left: int  # samples of context before the chunk
    right: int  # samples of context after the chunk
    blank_id: int
    durations: tuple[int, ...]  # encoder frames, by index
    max_symbols: int  # tokens on one frame before a step of one frame is forced
    decoder_layers: int  # L
    decoder_dim: int  # H

    @classmethod
    def read(cls, folder: Path) -> "RuntimeConfig":
        """Read genai_config.json of a folder.

        Raises FileNotFoundError, or ValueError where a number is missing or impossible: with a chunk_samples of 0, for
        example, GenAI never ends.
        """
        path = Path(folder) / GENAI_CONFIG
        config = read_json(path, EXPORT_COMMAND.format(folder))
        again = f"make it again: {EXPORT_COMMAND.format(folder)}"

        def whole(value: object, key: str, least: int = 1) -> int:
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{path}: expected {key} as a whole number of {least} or more, got {value!r}; {again}")
            return value

        try:
            model = config["model"]
            decoder = model["decoder"]
            hop = whole(model["hop_length"], "hop_length")
            subsampling = whole(model["subsampling_factor"], "subsampling_factor")
            return cls(
                sample_rate=whole(model["sample_rate"], "sample_rate"),
                hop_length=hop,
                subsampling_factor=subsampling,
                chunk=whole(model["chunk_samples"], "chunk_samples", hop * subsampling),  # an encoder frame or more
                left=whole(model["left_context_samples"], "left_context_samples", 0),
                right=whole(model["right_context_samples"], "right_context_samples", 0),
                blank_id=whole(model["blank_id"], "blank_id", 0),
                durations=tuple(whole(duration, "each of tdt_durations", 0) for duration in model["tdt_durations"]),
                max_symbols=whole(model["max_symbols_per_step"], "max_symbols_per_step"),
                decoder_layers=whole(decoder["num_hidden_layers"], "num_hidden_layers of the decoder"),
                decoder_dim=whole(decoder["hidden_size"], "hidden_size of the decoder"),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} lacks a setting ({error}); {again}") from None

    @property
    def frame_seconds(self) -> float:
        """Length of an encoder frame in seconds."""
        return self.hop_length * self.subsampling_factor / self.sample_rate

    @property
    def window_seconds(self) -> float:
        """Length of audio that the encoder is given at a time, without its context; NeMo encodes a clip whole."""
        return self.chunk / self.sample_rate

    @property
    def min_samples(self) -> int:
        """Samples of the shortest clip that has features."""
        return MIN_FRAMES * self.hop_length

    def check_clips(self, clips: Iterable[Clip]) -> None:
        """Check clips by the headers of their files, before the work.

        Raises as check_audio does for a clip that is missing, too short or outside of its file, and names its line of
        the manifest. Warns of whole files that are not as long as the manifest says.
        """
        others: list[Clip] = []
        for clip in clips:
            with clip.located():
                seconds = check_audio(clip, self.sample_rate, self.min_samples)
            if clip.stated_length is not None and abs(clip.stated_length - seconds) > SEGMENT_TOLERANCE:
                others.append(clip)
        if others:
            warn(
                f"{others[0].line} and {len(others) - 1} other lines give a duration that is not the file's, and no "
                "offset; the whole files are taken. To cut the files, add an offset of 0 to the lines"
            )

    def read_audio(self, path: Path) -> np.ndarray:
        """The samples of a whole file, as read_clip returns them."""
        return self.read_clip(Clip(Path(path)))

    def read_clip(self, clip: Clip) -> np.ndarray:
        """Mono samples at the model's rate, [N] float32, a whole number of hops.

        Up to 10 ms are cut off the end. With them GenAI may compute one frame more than NeMo, since 9 ms of a window
        are enough for a frame there (NemoStreamingMelExtractor in nemo_mel_spectrogram.cc); and since both normalise
        over all their frames, every feature would differ.
        """
        with clip.located():
            samples = load_clip(clip, self.sample_rate, self.min_samples)
        return samples[: len(samples) // self.hop_length * self.hop_length]


@dataclass(frozen=True)
class Window:
    """One encoder run: mel frames `begin` … `end` - 1 go in, encoder frames `start` … `stop` - 1 are decoded."""

    begin: int
    end: int
    start: int
    stop: int | None  # None: to the last


def windows(config: RuntimeConfig, mel_frames: int) -> Iterator[Window]:
    """The windows of a clip of `mel_frames`, cut as GenAI cuts it (EncodeNextChunk in src/models/parakeet.cpp)."""
    hop = config.hop_length
    sub = config.subsampling_factor
    total = mel_frames * hop
    chunk_begin = 0
    while chunk_begin < total:
        chunk_end = min(chunk_begin + config.chunk, total)
        begin = max(chunk_begin - config.left, 0) // hop
        end = min(min(chunk_end + config.right, total) // hop, mel_frames)
        start = (chunk_begin // hop - begin) // sub
        stop = None if chunk_end == total else (chunk_end // hop - begin) // sub
        yield Window(begin, end, start, stop)
        chunk_begin = chunk_end
