"""The baseline: run a model folder in plain ONNX Runtime sessions with the greedy loop of `common.run.decode`.

It reads genai_config.json and the three graphs, cuts long clips into windows as ONNX Runtime GenAI does, and follows
the greedy rule of either NeMo or GenAI. It shares no code with GenAI, so that each of the two checks the other.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import progress_bar
from common.contract import DECODER, ENCODER, JOINT
from common.run.config import MIN_WINDOWS_OF_BAR, Piece, RuntimeConfig, windows
from common.run.decode import GENAI_RULE, BlankZero, DecodingConfig, Frames, Hypothesis, Prediction, greedy_tdt_decode
from common.run.ort import OpenGraph, OrtGraph


class RawOrt:
    """A model folder in three ONNX Runtime sessions, with windows as GenAI cuts them."""

    def __init__(self, folder: Path, open_graph: OpenGraph = OrtGraph) -> None:
        self.config = RuntimeConfig.read(folder)
        zeros = np.zeros((self.config.decoder_layers, 1, self.config.decoder_dim), dtype=np.float32)
        self._start = (zeros, zeros)
        self.encoder, self.decoder, self.joint = (open_graph(folder, graph) for graph in (ENCODER, DECODER, JOINT))

    def encode(self, features: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Encode clips together, padded to the longest: features [M, T] of each → valid frames [S, D] of each."""
        lengths = np.array([one.shape[1] for one in features])
        padded = np.zeros((len(features), len(features[0]), lengths.max()), dtype=np.float32)
        for row, one in zip(padded, features, strict=True):
            row[:, : one.shape[1]] = one
        outputs, lengths = self.encoder(padded, lengths)
        return [np.ascontiguousarray(row[:, :length].T) for row, length in zip(outputs, lengths, strict=True)]

    def transcribe(self, features: np.ndarray, rule: BlankZero = GENAI_RULE, *, whole: bool = False) -> Hypothesis:
        """features [M, T], normalised over the clip → the decoded steps.

        whole: encode the clip in one window, however long it is.
        """
        return self._transcribe_batch([features], rule, whole=whole)[0]

    def transcribe_all(
        self, features: Sequence[np.ndarray], rule: BlankZero = GENAI_RULE, batch_size: int = 1
    ) -> list[Hypothesis]:
        """`transcribe` for each clip, in batches of similar length, which need the least padding; in the order given.

        Memory is proportional to `batch_size` times the longest clip of a batch, or the window where that is shorter.
        The encoder frames of a batch of several clips are kept until the batch is decoded, which is 0.2 GB for an hour
        of audio at D = 1024; of a clip that is transcribed alone, two windows are kept.
        """
        by_length = sorted(range(len(features)), key=lambda clip: features[clip].shape[1])
        results: dict[int, Hypothesis] = {}
        for first in range(0, len(features), batch_size):
            batch = by_length[first : first + batch_size]
            results |= zip(batch, self._transcribe_batch([features[clip] for clip in batch], rule), strict=True)
        return [results[clip] for clip in range(len(features))]

    def _transcribe_batch(
        self, features: Sequence[np.ndarray], rule: BlankZero, *, whole: bool = False
    ) -> list[Hypothesis]:
        """Cut the clips into windows, and decode them together."""
        pieces = [
            [Piece(0, one.shape[1], 0, None)] if whole else [*windows(self.config, one.shape[1])] for one in features
        ]
        if len(features) == 1:
            count = len(pieces[0])
            with progress_bar(total=count, task="windows", unit="window", shown=count >= MIN_WINDOWS_OF_BAR) as bar:
                window_frames = _WindowFrames(pieces[0], lambda piece: self._encode_piece(features[0], piece, bar))
                return self._decode([window_frames], [window_frames.ends], rule)
        parts = self._encode_together(features, pieces)
        frames = [np.concatenate(own) for own in parts]
        return self._decode(frames, [np.cumsum([len(part) for part in own]).tolist() for own in parts], rule)

    def _encode_piece(self, features: np.ndarray, piece: Piece, bar: Any) -> np.ndarray:
        """Encode one window of features [M, T] → those of its encoder frames that are decoded, [S, D]."""
        (frames,) = self.encode([features[:, piece.begin : piece.end]])
        bar.update()
        return frames[piece.start : piece.stop]

    def _encode_together(
        self, features: Sequence[np.ndarray], pieces: Sequence[Sequence[Piece]]
    ) -> list[list[np.ndarray]]:
        """The encoder frames of all windows of each clip; as many windows are encoded at once as there are clips."""
        cuts = [(clip, piece) for clip, own in enumerate(pieces) for piece in own]
        cuts.sort(key=lambda cut: cut[1].end - cut[1].begin)
        encoded: dict[tuple[int, Piece], np.ndarray] = {}
        for first in range(0, len(cuts), len(features)):
            group = cuts[first : first + len(features)]
            runs = self.encode([features[clip][:, piece.begin : piece.end] for clip, piece in group])
            encoded |= {cut: run[cut[1].start : cut[1].stop] for cut, run in zip(group, runs, strict=True)}
        return [[encoded[clip, piece] for piece in own] for clip, own in enumerate(pieces)]

    def _decode(self, frames: Sequence[Frames], ends: Sequence[Sequence[int]], rule: BlankZero) -> list[Hypothesis]:
        config = self.config
        return greedy_tdt_decode(
            frames,
            ends,
            self.predict,
            self.join,
            DecodingConfig(
                blank_id=config.blank_id,
                durations=config.durations,
                max_symbols=config.max_symbols,
                blank_zero=rule,
            ),
        )

    def predict(
        self, tokens: Sequence[int], states: Sequence[tuple[np.ndarray, np.ndarray] | None]
    ) -> list[Prediction]:
        """Run one step of the prediction network for each token; where the state is None, it starts from zeros."""
        h, c = zip(*(state or self._start for state in states), strict=True)
        targets, ones = np.array(tokens)[:, None], np.array([1] * len(tokens))
        outputs, _, h, c = self.decoder(targets, ones, np.concatenate(h, axis=1), np.concatenate(c, axis=1))
        return [
            Prediction(output.T, (h[:, row : row + 1], c[:, row : row + 1])) for row, output in enumerate(outputs)
        ]  # outputs [B, H, 1]

    def join(self, frames: np.ndarray, outputs: Sequence[np.ndarray]) -> np.ndarray:
        """Encoder frames [B, D] and the prediction output [1, H] of each → logits [B, V+K]."""
        return self.joint(frames[:, None], np.array(outputs))[0][:, 0, 0]


class _WindowFrames:
    """The encoder frames of a clip, by number.

    A window is encoded when its first frame is asked for, and the window before it is then dropped, since the decoding
    loop only moves forward.
    """

    def __init__(self, pieces: Sequence[Piece], encode: Callable[[Piece], np.ndarray]) -> None:
        self._pieces = pieces
        self._encode = encode
        # The last window is encoded first, since only its output shows how many frames it has, and it is kept.
        self._last = encode(pieces[-1])
        lengths = [piece.stop - piece.start for piece in pieces[:-1] if piece.stop is not None] + [len(self._last)]
        self.ends: list[int] = np.cumsum(lengths).tolist()  # frames at which the windows end
        self._window = len(pieces) - 1
        self._frames = self._last

    def __getitem__(self, frame: int) -> np.ndarray:
        window = bisect_right(self.ends, frame)
        if window != self._window:
            is_last = window == len(self._pieces) - 1
            self._frames = self._last if is_last else self._encode(self._pieces[window])
            self._window = window
        encoded: np.ndarray = self._frames[frame - (self.ends[window - 1] if window else 0)]
        return encoded
