"""Plain ONNX Runtime on the CPU: one graph in a session, or a model folder with the greedy loop of `common.run.decode`.

`OnnxRuntime` reads genai_config.json and the three graphs, cuts long clips into windows as ONNX Runtime GenAI does, and
follows the greedy rule of either NeMo or GenAI. It shares no code with GenAI, so that each of the two checks the other.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import onnxruntime as ort

from common.cli import EXPORT_COMMAND, progress_bar
from common.contract import DECODER, ENCODER, JOINT, Graph
from common.folder import verify_files
from common.run.config import MIN_WINDOWS_OF_BAR, RuntimeConfig
from common.run.decode import BlankZero, Hypothesis, Prediction, greedy_tdt_decode

ERRORS_AND_WORSE = 3  # a severity of OrtLoggingLevel
ENDED = np.zeros((0, 1), dtype=np.float32)  # the frames of a clip that has no more windows


def open_session(
    model: Path | bytes,
    *,
    entries: Mapping[str, str] | None = None,
    options: ort.SessionOptions | None = None,
    mapped: bool = False,
) -> ort.InferenceSession:
    """A session on the CPU that logs nothing but errors.

    model: a path, or a serialized ModelProto.
    entries: configuration by key, such as {"session.intra_op.allow_spinning": "0"}.
    options: further options, such as the level of graph optimization.
    mapped: leave the weights in the data file; see OrtGraph.
    """
    options = options or ort.SessionOptions()
    options.log_severity_level = ERRORS_AND_WORSE
    for key, value in {**(entries or {}), **({"session.disable_prepacking": "1"} if mapped else {})}.items():
        options.add_session_config_entry(key, value)
    disabled = ["ConstantFolding"] if mapped else None
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)


class OrtGraph:
    """One graph of a folder, called with arrays in the order of its declaration.

    `mapped` leaves the weights in the data file instead of repacking copies: at 0.6B the session opens in 0.2 s instead
    of 6 s, with 2.4 GB less memory of its own. It suits a few runs only, since each run converts float16 weights to
    float32 again. Raises FileNotFoundError, or ValueError where ONNX Runtime does not load the graph.
    """

    def __init__(self, folder: Path, graph: Graph, *, mapped: bool = False) -> None:
        self.graph = graph
        path = Path(folder) / graph.file
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}; first run: {EXPORT_COMMAND.format(folder)}")
        try:
            self.session = open_session(path, mapped=mapped)
        except Exception as error:  # onnxruntime raises its own types, one per status
            verify_files(path.parent, graph.files)  # raises where it knows the file
            raise ValueError(f"{path} does not load ({error}); make it again") from error

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


WHOLE = (slice(None), slice(None))  # a clip in one window


def windows(config: RuntimeConfig, mel_frames: int) -> Iterator[tuple[slice, slice]]:
    """The windows of a clip of `mel_frames`: the mel frames that go in, and those encoder frames that are decoded.

    They are cut as GenAI cuts them (EncodeNextChunk in src/models/parakeet.cpp).
    """
    hop = config.hop_length
    sub = config.subsampling_factor
    total = mel_frames * hop
    for chunk_begin in range(0, total, config.chunk):
        chunk_end = min(chunk_begin + config.chunk, total)
        begin = max(chunk_begin - config.left, 0) // hop
        end = min(chunk_end + config.right, total) // hop
        start = (chunk_begin // hop - begin) // sub
        stop = None if chunk_end == total else (chunk_end // hop - begin) // sub
        yield slice(begin, end), slice(start, stop)


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
        return self.transcribe_all([features], rule, whole=whole)[0]

    def transcribe_all(
        self,
        features: Sequence[np.ndarray],
        rule: BlankZero = BlankZero.GENAI,
        batch_size: int = 1,
        *,
        whole: bool = False,
    ) -> list[Hypothesis]:
        """`transcribe` for each clip, in batches of similar length, which need the least padding; in the order given.

        The clips of a batch are encoded and decoded window by window, so that memory is proportional to `batch_size`
        times the longest clip of a batch, or the window where that is shorter.
        """
        by_length = sorted(range(len(features)), key=lambda clip: features[clip].shape[1])
        results: dict[int, Hypothesis] = {}
        for first in range(0, len(features), batch_size):
            batch = by_length[first : first + batch_size]
            encoded = self._encode_windows([features[clip] for clip in batch], whole=whole)
            found = greedy_tdt_decode(
                encoded,
                self.predict,
                self.join,
                blank_id=self.config.blank_id,
                durations=self.config.durations,
                max_symbols=self.config.max_symbols,
                rule=rule,
            )
            results |= zip(batch, found, strict=True)
        return [results[clip] for clip in range(len(features))]

    def _encode_windows(self, features: Sequence[np.ndarray], *, whole: bool) -> Iterator[list[np.ndarray]]:
        """For one window after the other, those encoder frames [S, D] of each clip that are decoded."""
        cuts = [[WHOLE] if whole else [*windows(self.config, one.shape[1])] for one in features]
        count = max(map(len, cuts))
        with progress_bar(total=count, task="windows", unit="window", shown=count >= MIN_WINDOWS_OF_BAR) as bar:
            for row in zip_longest(*cuts):
                encoded = iter(self.encode([one[:, cut[0]] for one, cut in zip(features, row, strict=True) if cut]))
                bar.update()
                yield [next(encoded)[cut[1]] if cut else ENDED for cut in row]

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
