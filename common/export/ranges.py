"""XXX docstring of export.ranges"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from common.contract import ENCODER, GRAPHS, Graph
from common.export.float16 import release, session_of, typed
from common.run.baseline import RawOrt
from common.run.ort import OrtGraph

Largest = dict[str, float]  # operator's name → its largest magnitude


class Recorder(OrtGraph):
    """A float32 graph that notes, over all its calls, the largest magnitude at each of its operators.

    Of a product that is the sum of the terms' magnitudes: no order of summation, in float16 too, exceeds it.
    """

    def __init__(self, folder: Path, graph: Graph):
        model = typed(folder / graph.file)
        self.graph, self.known = graph, _largest_weights(model)  # name of a value, or of a product → largest magnitude
        self.operators = {
            node.name: [node.name, *(value.name for value in (*node.inputs, *node.outputs) if value is not None)]
            for node in model.graph
        }
        self.probes = _add_probes(model)  # name of an output → name in `known`
        # The magnitudes of the encoder's weights, gigabytes, are computed when they are wanted; the others once.
        self.session = session_of(model, folder, fold=graph is not ENCODER)

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        names = [*self.graph.output_names, *self.probes]
        found = self.session.run(names, dict(zip(self.graph.input_names, inputs, strict=True)))
        outputs, maxima = found[: len(self.graph.outputs)], found[len(self.graph.outputs) :]
        for name, value in zip(self.probes.values(), maxima, strict=True):
            self.known[name] = float(np.maximum(self.known.get(name, 0.0), value))  # NaN remains
        return outputs

    def largest(self) -> Largest:
        """Of each operator: among what went in, what came out and what was summed up inside."""
        return {
            operator: float(np.max([self.known[name] for name in names if name in self.known], initial=0.0))
            for operator, names in self.operators.items()
        }


def record(folder: Path, clips: Sequence[np.ndarray]) -> dict[str, Largest]:
    """Let the float32 folder hear `clips`, features [M, T] each; what its graphs' operators came to, by graph name."""
    recorders = {graph.name: Recorder(folder, graph) for graph in GRAPHS}
    engine = RawOrt(folder, lambda _, graph: recorders[graph.name])
    for features in clips:
        engine.transcribe(features)
    shortest = min(clips, key=lambda features: features.shape[1])
    frames = shortest.shape[1]
    engine.encoder(np.stack([shortest, shortest]), np.array([frames, frames // 2]))  # masked frames
    return {name: recorder.largest() for name, recorder in recorders.items()}


def _largest_weights(model: ir.Model) -> dict[str, float]:
    found = {}
    for name, value in model.graph.initializers.items():
        if value.dtype == ir.DataType.FLOAT:
            found[name] = float(np.max(np.abs(value.const_value.numpy()), initial=0.0))
            release(value.const_value)
    return found


def _add_probes(model: ir.Model) -> dict[str, str]:
    """Give the graph one scalar output for each float value and product; name of the output → of the value or node.

    Each is computed behind the operator that it is of: at the end of the graph, all values would be held until then.
    """
    graph, probes, magnitudes, made = model.graph, {}, {}, []

    def add(operator: str, inputs: list[ir.Value], attributes: Sequence[ir.Attr] = ()) -> ir.Value:
        made.append(ir.Node("", operator, inputs, attributes))
        made[-1].outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        return made[-1].outputs[0]

    def magnitude(value: ir.Value) -> ir.Value:
        if value not in magnitudes:
            magnitudes[value] = add("Abs", [value])
        return magnitudes[value]

    def probe(positive: ir.Value, name: str) -> None:
        largest = add("ReduceMax", [positive], [ir.AttrInt64("keepdims", 0)])
        largest.name, largest.shape = f"largest {len(probes)}", ir.Shape([])
        graph.outputs.append(largest)
        probes[largest.name] = name

    def matmul(rows: ir.Value, weight: ir.Value) -> ir.Value:
        """[S, B, I], an LSTM's [1, 4H, I] → [S, B, 4H]"""
        columns = add("Transpose", [magnitude(weight)], [ir.AttrInt64s("perm", [0, 2, 1])])
        return add("MatMul", [magnitude(rows), columns])

    nodes = list(graph)
    for value in graph.inputs:
        if value.dtype == ir.DataType.FLOAT:
            probe(magnitude(value), value.name)
    graph.insert_before(nodes[0], made)
    for node in nodes:
        made.clear()
        if node.op_type in ("MatMul", "Conv") and node.inputs[0].dtype == ir.DataType.FLOAT:
            terms = [magnitude(value) for value in node.inputs[:2]]
            probe(add(node.op_type, terms, list(node.attributes.values())), node.name)
        elif node.op_type == "LSTM":
            rows, weight, recurrence, _, _, state = node.inputs[:6]
            probe(add("Add", [matmul(rows, weight), matmul(state, recurrence)]), node.name)  # of the first step
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT:
                probe(magnitude(value), value.name)
        graph.insert_after(node, made)
    return probes
