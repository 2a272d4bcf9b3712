"""One graph of a model folder in an ONNX Runtime session on the CPU."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from common.cli import EXPORT_COMMAND
from common.contract import Graph
from common.run.session import open_session


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
            raise ValueError(f"{path} does not load ({error}); make it again") from error
        self.graph = graph

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """Outputs in the order of the declaration."""
        named = dict(zip(self.graph.input_names, inputs, strict=True))
        outputs: list[np.ndarray] = self.session.run(self.graph.output_names, named)
        return outputs

    @property
    def output_width(self) -> int:
        """The size of the first output's last axis."""
        return int(self.session.get_outputs()[0].shape[-1])

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
