"""genai_config.json as the engines read it: the numbers of decoding, and the windows in which GenAI encodes a clip.

Plain ONNX Runtime takes its numbers from the same file as GenAI, so that a wrong one shows as a difference from NeMo.
"""

from collections.abc import Iterable
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
LEAST = {"left": 0, "right": 0, "blank_id": 0, "durations": 0}  # of these numbers; of the others 1


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
        again = f"make it again: {EXPORT_COMMAND.format(folder)}"
        try:
            model = read_json(path, EXPORT_COMMAND.format(folder))["model"]
            config = cls(
                sample_rate=model["sample_rate"],
                hop_length=model["hop_length"],
                subsampling_factor=model["subsampling_factor"],
                chunk=model["chunk_samples"],
                left=model["left_context_samples"],
                right=model["right_context_samples"],
                blank_id=model["blank_id"],
                durations=tuple(model["tdt_durations"]),
                max_symbols=model["max_symbols_per_step"],
                decoder_layers=model["decoder"]["num_hidden_layers"],
                decoder_dim=model["decoder"]["hidden_size"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} lacks a setting ({error}); {again}") from None
        for name, value in vars(config).items():
            numbers = value if isinstance(value, tuple) else (value,)
            least = LEAST.get(name, 1)
            if not all(isinstance(number, int) and number >= least for number in numbers):
                raise ValueError(f"{path}: {name} must be whole and {least} or more, not {value!r}; {again}")
        if config.chunk < config.hop_length * config.subsampling_factor:
            raise ValueError(f"{path}: chunk_samples of {config.chunk} are less than an encoder frame; {again}")
        return config

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
        samples = load_clip(clip, self.sample_rate, self.min_samples)
        return samples[: len(samples) // self.hop_length * self.hop_length]
