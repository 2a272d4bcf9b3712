"""Plain ONNX Runtime on the CPU: one graph in a session, or a model folder with the greedy loop of `common.run.decode`.

`OnnxRuntime` reads genai_config.json and the three graphs, cuts long clips into windows as ONNX Runtime GenAI does, and
follows the greedy rule of either NeMo or GenAI. It shares no code with GenAI, so that each of the two checks the other.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from common.cli import EXPORT_COMMAND, progress_bar
from common.contract import DECODER, ENCODER, JOINT, Graph
from common.folder import verify_files
from common.run.config import MIN_WINDOWS_OF_BAR, RuntimeConfig, Window, windows
from common.run.decode import BlankZero, DecodingConfig, Frames, Hypothesis, Prediction, greedy_tdt_decode

ERRORS_AND_WORSE = 3  # a severity of OrtLoggingLevel


def open_session(
    model: Path | bytes,
    *,
    entries: Mapping[str, str] | None = None,
    disabled_optimizers: Sequence[str] = (),
    options: ort.SessionOptions | None = None,
) -> ort.InferenceSession:
    """A session on the CPU that logs nothing but errors.

    model: a path, or a serialized ModelProto.
    entries: configuration by key, such as {"session.disable_prepacking": "1"}.
    disabled_optimizers: names of graph transformers to leave out.
    options: further options, such as the level of graph optimization; ONNX Runtime's defaults where it is None.
    """
    options = options or ort.SessionOptions()
    options.log_severity_level = ERRORS_AND_WORSE
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(
        model,
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=list(disabled_optimizers) or None,
    )


class OrtGraph:
    """One graph of a folder, called with arrays in the order of its declaration.

    `mapped` leaves the weights in the data file instead of repacking copies: at 0.6B the session opens in 0.2 s instead
    of 6 s, with 2.4 GB less memory of its own. It suits a few runs only, since each run converts float16 weights to
    float32 again. Raises FileNotFoundError, or ValueError where ONNX Runtime does not load the graph.
    """

    def __init__(self, folder: Path, graph: Graph, *, mapped: bool = False) -> None:
        path = Path(folder) / graph.file
        if not path.is_file():
            raise FileNotFoundError(f"expected {path}, got no such file; first run: {EXPORT_COMMAND.format(folder)}")
        try:
            self.session = open_session(
                path,
                entries={"session.disable_prepacking": "1"} if mapped else None,
                disabled_optimizers=("ConstantFolding",) if mapped else (),
            )
        except Exception as error:  # onnxruntime raises its own types, one per status
            verify_files(path.parent, graph.files)  # raises where it knows the file
            raise ValueError(f"{path} does not load ({error}); make it again") from error
        self.graph = graph

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """Outputs in the order of the declaration."""
        named = dict(zip(self.graph.input_names, inputs, strict=True))
        outputs: list[np.ndarray] = self.session.run(self.graph.output_names, named)
        return outputs

    def noise(self, vocabulary: int, **sizes: int) -> list[np.ndarray]:
        """Inputs on which to compare two graphs: noise, tokens below `vocabulary`, whole lengths.

        sizes: the size of each axis that the caller chooses: B, T, S and U.
        """
        draw = np.random.default_rng(0)
        arrays = []
        for tensor, value in zip(self.graph.inputs, self.session.get_inputs(), strict=True):
            shape = [sizes.get(str(axis), size) for axis, size in zip(tensor.axes, value.shape, strict=True)]
            if tensor.dtype == "float32":
                array: np.ndarray = draw.standard_normal(shape, dtype=np.float32)
                if "T" not in tensor.axes:  # features are not bounded, states and frames are
                    array = np.tanh(array)
            elif len(shape) == 1:
                array = np.full(shape, sizes["T"] if "T" in self.graph.inputs[0].axes else sizes["U"])
            else:
                array = draw.integers(vocabulary, size=shape)
            arrays.append(array.astype(tensor.dtype))
        return arrays


OpenGraph = Callable[[Path, Graph], OrtGraph]
MAPPED: OpenGraph = partial(OrtGraph, mapped=True)


class OnnxRuntime:
    """A model folder in three ONNX Runtime sessions, with windows as GenAI cuts them."""

    def __init__(self, folder: Path, open_graph: OpenGraph = OrtGraph) -> None:
        self.config = RuntimeConfig.read(folder)
        zeros = np.zeros((self.config.decoder_layers, 1, self.config.decoder_dim), dtype=np.float32)
        self._start = (zeros, zeros)
        self.kept: list[np.ndarray] | None = None  # a list to which `encode` adds its results, where it is set
        self.encoder, self.decoder, self.joint = (open_graph(folder, graph) for graph in (ENCODER, DECODER, JOINT))

    def encode(self, features: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Encode clips together, padded to the longest: features [M, T] of each → valid frames [S, D] of each."""
        lengths = np.array([one.shape[1] for one in features])
        padded = np.zeros((len(features), len(features[0]), lengths.max()), dtype=np.float32)
        for row, one in zip(padded, features, strict=True):
            row[:, : one.shape[1]] = one
        outputs, lengths = self.encoder(padded, lengths)
        encoded = [np.ascontiguousarray(row[:, :length].T) for row, length in zip(outputs, lengths, strict=True)]
        if self.kept is not None:
            self.kept += encoded
        return encoded

    def transcribe(self, features: np.ndarray, rule: BlankZero = BlankZero.GENAI, *, whole: bool = False) -> Hypothesis:
        """features [M, T], normalised over the clip → the decoded steps.

        whole: encode the clip in one window, however long it is.
        """
        return self._transcribe_batch([features], rule, whole=whole)[0]

    def transcribe_all(
        self,
        features: Sequence[np.ndarray],
        rule: BlankZero = BlankZero.GENAI,
        batch_size: int = 1,
        *,
        whole: bool = False,
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
            found = self._transcribe_batch([features[clip] for clip in batch], rule, whole=whole)
            results |= zip(batch, found, strict=True)
        return [results[clip] for clip in range(len(features))]

    def _transcribe_batch(
        self, features: Sequence[np.ndarray], rule: BlankZero, *, whole: bool = False
    ) -> list[Hypothesis]:
        """Cut the clips into windows, and decode them together."""
        cuts = [
            [Window(0, one.shape[1], 0, None)] if whole else [*windows(self.config, one.shape[1])] for one in features
        ]
        if len(features) == 1:
            count = len(cuts[0])
            with progress_bar(total=count, task="windows", unit="window", shown=count >= MIN_WINDOWS_OF_BAR) as bar:
                frames = _WindowFrames(cuts[0], lambda window: self._encode_window(features[0], window, bar))
                return self._decode([frames], [frames.ends], rule)
        parts = self._encode_together(features, cuts)
        return self._decode(
            [np.concatenate(own) for own in parts],
            [np.cumsum([len(part) for part in own]).tolist() for own in parts],
            rule,
        )

    def _encode_window(self, features: np.ndarray, window: Window, bar: Any) -> np.ndarray:
        """Encode one window of features [M, T] → those of its encoder frames that are decoded, [S, D]."""
        (frames,) = self.encode([features[:, window.begin : window.end]])
        bar.update()
        return frames[window.start : window.stop]

    def _encode_together(
        self, features: Sequence[np.ndarray], cuts: Sequence[Sequence[Window]]
    ) -> list[list[np.ndarray]]:
        """The encoder frames of all windows of each clip; as many windows are encoded at once as there are clips."""
        numbered = [(clip, window) for clip, own in enumerate(cuts) for window in own]
        numbered.sort(key=lambda each: each[1].end - each[1].begin)
        encoded: dict[tuple[int, Window], np.ndarray] = {}
        for first in range(0, len(numbered), len(features)):
            group = numbered[first : first + len(features)]
            runs = self.encode([features[clip][:, window.begin : window.end] for clip, window in group])
            for (clip, window), run in zip(group, runs, strict=True):
                encoded[clip, window] = run[window.start : window.stop]
        return [[encoded[clip, window] for window in own] for clip, own in enumerate(cuts)]

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

    def __init__(self, cuts: Sequence[Window], encode: Callable[[Window], np.ndarray]) -> None:
        self._cuts = cuts
        self._encode = encode
        # The last window is encoded first, since only its output shows how many frames it has, and it is kept.
        self._last = encode(cuts[-1])
        lengths = [window.stop - window.start for window in cuts[:-1] if window.stop is not None] + [len(self._last)]
        self.ends: list[int] = np.cumsum(lengths).tolist()  # frames at which the windows end
        self._current = len(cuts) - 1
        self._frames = self._last

    def __getitem__(self, frame: int) -> np.ndarray:
        number = bisect_right(self.ends, frame)
        if number != self._current:
            is_last = number == len(self._cuts) - 1
            self._frames = self._last if is_last else self._encode(self._cuts[number])
            self._current = number
        encoded: np.ndarray = self._frames[frame - (self.ends[number - 1] if number else 0)]
        return encoded
