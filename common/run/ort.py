"""Running a model: audio in, then NeMo, ONNX Runtime sessions or ONNX Runtime GenAI, tokens out."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from common.cli import EXPORT_COMMAND
from common.contract import Graph

ERRORS_AND_WORSE = 3  # a severity of OrtLoggingLevel


class OrtGraph:
    """One graph of a folder in an ONNX Runtime CPU session, called with arrays in the order of its declaration.

    `mapped` leaves the weights in the data file instead of repacking copies: at 0.6B the session is there in 0.2 s
    instead of 6 s, with 2.4 GB less memory of its own, and a run takes no longer. For a few runs, that is: a float16
    weight becomes the CPU's float32 in each of them.
    """

    def __init__(self, folder: Path, graph: Graph, *, mapped: bool = False) -> None:
        import onnxruntime as ort

        path = Path(folder) / graph.file
        if not path.is_file():
            raise FileNotFoundError(f"wanted {path}, found no such file; first run: {EXPORT_COMMAND.format(folder)}")
        options = ort.SessionOptions()
        options.log_severity_level = ERRORS_AND_WORSE
        options.add_session_config_entry("session.disable_prepacking", "1" if mapped else "0")
        try:
            self.session = ort.InferenceSession(
                path,
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=["ConstantFolding"] if mapped else None,
            )
        except Exception as error:  # onnxruntime raises its own types, one per status
            raise ValueError(f"{path} does not load ({error}); make it again") from error
        self.graph = graph

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """Outputs in the order of the declaration."""
        names = self.graph.input_names
        return self.session.run(self.graph.output_names, dict(zip(names, inputs, strict=True)))

    @property
    def output_width(self) -> int:
        """The size of the first output's last axis."""
        return self.session.get_outputs()[0].shape[-1]

    def noise(self, vocabulary: int, **sizes: int) -> list[np.ndarray]:
        """Inputs to compare two graphs on: noise, tokens below `vocabulary`, whole lengths. sizes: of the axes that are
        a caller's choice, B, T, S and U."""
        draw, found = np.random.default_rng(0), []
        for tensor, value in zip(self.graph.inputs, self.session.get_inputs(), strict=True):
            shape = [sizes.get(axis, size) for axis, size in zip(tensor.axes, value.shape, strict=True)]
            if tensor.dtype == "float32":
                array = draw.standard_normal(shape, dtype=np.float32)
                found.append(array if "T" in tensor.axes else np.tanh(array))  # features are not bounded, the rest is
            elif len(shape) == 1:
                found.append(np.full(shape, sizes["T"] if "T" in self.graph.inputs[0].axes else sizes["U"]))
            else:
                found.append(draw.integers(vocabulary, size=shape))
            found[-1] = found[-1].astype(tensor.dtype)
        return found


OpenGraph = Callable[[Path, Graph], OrtGraph]
MAPPED: OpenGraph = partial(OrtGraph, mapped=True)
