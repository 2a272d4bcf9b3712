"""The largest values inside the graphs, measured on speech: they decide what the float16 conversion may convert."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from common.contract import ENCODER, GRAPHS, Graph
from common.export.float16 import Ranges
from common.export.typed_graph import exact_session, load_typed, name_of
from common.onnx_io import computed_from, input_of
from common.run.ort import OnnxRuntime, OrtGraph


class RangeRecorder(OrtGraph):
    """A float32 graph that records, over all its calls, the largest magnitude at each of its operators.

    For a product this is the sum of the magnitudes of its terms, which no order of summation exceeds, even in float16.
    """

    def __init__(self, folder: Path, graph: Graph) -> None:
        model = load_typed(folder / graph.file)
        self.graph = graph
        self.known = _largest_weights(model)  # name of a value, or of a product → largest magnitude
        self.operators = {
            name_of(node): [name_of(item) for item in (node, *node.inputs, *node.outputs) if item is not None]
            for node in model.graph
        }
        self.probes = _Probes(model).names  # name of an output → name in `known`
        # The magnitudes of the encoder's weights take gigabytes: they are computed when needed, those of others once.
        self.session = exact_session(model, folder, fold=graph is not ENCODER)

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        names = [*self.graph.output_names, *self.probes]
        results: list[np.ndarray] = self.session.run(names, dict(zip(self.graph.input_names, inputs, strict=True)))
        count = len(self.graph.outputs)
        for name, value in zip(self.probes.values(), results[count:], strict=True):
            self.known[name] = float(np.maximum(self.known.get(name, 0.0), value))  # a NaN stays
        return results[:count]

    def ranges(self) -> Ranges:
        """The largest magnitude of each operator: among its inputs, its outputs and its inner sums."""
        return {
            operator: float(np.max([self.known[name] for name in names if name in self.known], initial=0.0))
            for operator, names in self.operators.items()
        }


def measure_ranges(folder: Path, clips: Sequence[np.ndarray]) -> dict[str, Ranges]:
    """Transcribe `clips`, features [M, T] each, with the float32 folder: graph's name → ranges of its operators."""
    recorders = {graph.name: RangeRecorder(folder, graph) for graph in GRAPHS}
    engine = OnnxRuntime(folder, lambda _, graph: recorders[graph.name])
    for features in clips:
        engine.transcribe(features)
    shortest = min(clips, key=lambda features: features.shape[1])
    frames = shortest.shape[1]
    engine.encoder(np.stack([shortest, shortest]), np.array([frames, frames // 2]))  # with masked frames
    return {name: recorder.ranges() for name, recorder in recorders.items()}


def _largest_weights(model: ir.Model) -> dict[str, float]:
    """Initializer's name → largest magnitude."""
    largest = {}
    for name, value in model.graph.initializers.items():
        if value.dtype == ir.DataType.FLOAT:
            largest[name] = computed_from(value, lambda weight: float(np.max(np.abs(weight), initial=0.0)))
    return largest


class _Probes:
    """Adds one scalar output to the graph for each float value and each product: the largest magnitude in it.

    Each is computed directly after the operator it belongs to. At the end of the graph, all values would have to be
    held in memory until then.
    """

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.names: dict[str, str] = {}  # name of a probe → name of the value or node it measures
        self._magnitudes: dict[ir.Value, ir.Value] = {}
        self._added: list[ir.Node] = []
        nodes = list(model.graph)
        for value in model.graph.inputs:
            if value.dtype == ir.DataType.FLOAT:
                self._probe(self._magnitude(value), name_of(value))
        model.graph.insert_before(nodes[0], self._added)
        for node in nodes:
            self._added.clear()
            self._probe_sums(node)
            for value in node.outputs:
                if value.dtype == ir.DataType.FLOAT:
                    self._probe(self._magnitude(value), name_of(value))
            model.graph.insert_after(node, self._added)

    def _probe_sums(self, node: ir.Node) -> None:
        """Probe the sums inside `node` if it is a product."""
        if node.op_type in ("MatMul", "Conv") and input_of(node, 0).dtype == ir.DataType.FLOAT:
            terms = [self._magnitude(input_of(node, 0)), self._magnitude(input_of(node, 1))]
            self._probe(self._add(node.op_type, terms, *node.attributes.values()), name_of(node))
        elif node.op_type == "LSTM":
            by_input = self._lstm_product(input_of(node, 0), input_of(node, 1))
            by_state = self._lstm_product(input_of(node, 5), input_of(node, 2))  # of the first step
            self._probe(self._add("Add", [by_input, by_state]), name_of(node))

    def _lstm_product(self, rows: ir.Value, weight: ir.Value) -> ir.Value:
        """rows [S, B, I], an LSTM's weight [1, 4H, I] → the sums of magnitudes [S, B, 4H]"""
        columns = self._add("Transpose", [self._magnitude(weight)], ir.AttrInt64s("perm", [0, 2, 1]))
        return self._add("MatMul", [self._magnitude(rows), columns])

    def _magnitude(self, value: ir.Value) -> ir.Value:
        if value not in self._magnitudes:
            self._magnitudes[value] = self._add("Abs", [value])
        return self._magnitudes[value]

    def _probe(self, magnitudes: ir.Value, name: str) -> None:
        largest = self._add("ReduceMax", [magnitudes], ir.AttrInt64("keepdims", 0))
        largest.name = f"largest {len(self.names)}"
        largest.shape = ir.Shape([])
        self.graph.outputs.append(largest)
        self.names[largest.name] = name

    def _add(self, operator: str, inputs: Sequence[ir.Value], *attributes: ir.Attr) -> ir.Value:
        node = ir.Node("", operator, inputs, attributes)
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        self._added.append(node)
        return node.outputs[0]
