"""Graphs with float16 weights and arithmetic, float32 inputs and outputs, and float32 where float16 could overflow.

What overflows on a GPU need not overflow on a CPU, where ONNX Runtime multiplies in float32 and leaves out roundings
in between. So the largest values are measured on speech, in the float32 graph (common/export/ranges.py), and operators
that come near the limit stay float32. What a GPU computes is emulated on the CPU: `EmulatedGraph` rounds the result of
each operator to float16.

onnxruntime.transformers.float16 is not used: between two operators that it leaves in float32 it converts the value to
float16 and back, it clips weights, and it needs all of them in memory. Here weights are read and written one by one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir
from onnx_ir.passes import common as passes

from common.contract import Graph
from common.export.typed_graph import FLOATS, exact_session, float_values, load_typed, name_of
from common.onnx_io import add_initializer, release, save_model, tensor_of
from common.run.ort import OrtGraph

LARGEST_FLOAT16 = 65504.0
# An operator stays float32 if one of its inputs, outputs or inner sums was as large as this or larger. It is a quarter
# of the largest float16, since other speech may have larger values. Masked attention scores, -10000, are below it.
LIMIT = 2.0**14
# Operators whose inner sums, perhaps of squares, have no declared precision; LayerNormalization declares it
# (stash_type, float32).
SUMS = ("InstanceNormalization", "GroupNormalization", "ReduceMean", "ReduceSum", "ReduceL2")
PERIODIC = ("Sin", "Cos")  # large angles in, small numbers out

Ranges = Mapping[str, float]  # operator's name → its largest magnitude


@dataclass
class Conversion:
    """How the operators of one graph were converted, each with the largest value measured in it."""

    overflowing: dict[str, float] = field(default_factory=dict)  # left in float32: name → largest value
    exact: list[str] = field(default_factory=list)  # left in float32: integer arithmetic, sums of unknown precision
    converted: dict[str, float] = field(default_factory=dict)  # now in float16: operator's type → largest value
    operators: int = 0  # that compute with floats

    @property
    def kept_float32(self) -> int:
        return len(self.overflowing) + len(self.exact)

    def record(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "limit": LIMIT,
            "kept_float32": _four_digits(self.overflowing),
            "kept_exact": self.exact,
            "max_abs": _four_digits(self.converted),
        }


def _four_digits(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in values.items()}


class EmulatedGraph(OrtGraph):
    """A float16 graph as a GPU computes it: sums in float32, the result of each operator rounded to float16."""

    def __init__(self, folder: Path, graph: Graph) -> None:
        model = load_typed(folder / graph.file)
        casts = _Casts(model, convert_weights=False)
        for node in list(model.graph):
            if node.op_type != "Cast" and any(value.dtype == ir.DataType.FLOAT16 for value in float_values(node)):
                _compute_in_float32(node, casts)
        model.graph.sort()
        self.graph = graph
        self.session = exact_session(model, folder)


def _compute_in_float32(node: ir.Node, casts: "_Casts") -> None:
    """Convert the float16 inputs of `node` to float32, and round its results to float16 for those that use them."""
    for index, value in enumerate(node.inputs):
        if value is not None and value.dtype == ir.DataType.FLOAT16:
            node.replace_input_with(index, casts.cast(value, ir.DataType.FLOAT))
    for value in node.outputs:
        if value.dtype == ir.DataType.FLOAT16:
            users = list(value.uses())
            value.dtype = ir.DataType.FLOAT
            rounded = casts.cast(value, ir.DataType.FLOAT16)
            for user, index in users:
                user.replace_input_with(index, rounded)


def convert(source: Path, target: Path, graph: Graph, ranges: Ranges) -> Conversion:
    """Write `graph` of the float32 folder `source` into `target`, in float16 where its `ranges` allow that."""
    model = load_typed(source / graph.file)
    exact = _exact_operators(model)
    conversion = Conversion()
    casts = _Casts(model, convert_weights=True)
    for node in list(model.graph):
        if any(value.dtype == ir.DataType.FLOAT for value in float_values(node)):
            _set_dtype(node, _chosen_dtype(node, exact, ranges, conversion), casts)
    _restore_outputs(model, casts)
    model.graph.sort()
    _forget_types(model)
    for graph_pass in (passes.RemoveUnusedNodesPass(), passes.RemoveUnusedOpsetsPass()):
        model = graph_pass(model).model
    save_model(model, target / graph.file)
    return conversion


def _chosen_dtype(node: ir.Node, exact: set[ir.Node], ranges: Ranges, conversion: Conversion) -> ir.DataType:
    """The type in which `node` is to compute, which is also recorded in `conversion`."""
    name = name_of(node)
    conversion.operators += 1
    if node in exact:
        conversion.exact.append(name)
        return ir.DataType.FLOAT
    if not ranges[name] < LIMIT:  # written so that NaN is not below it either
        conversion.overflowing[name] = ranges[name]
        return ir.DataType.FLOAT
    conversion.converted[node.op_type] = max(conversion.converted.get(node.op_type, 0.0), ranges[name])
    return ir.DataType.FLOAT16


def _set_dtype(node: ir.Node, dtype: ir.DataType, casts: "_Casts") -> None:
    """Let `node` compute in the float type `dtype`, with casts before its inputs where they are of the other type."""
    for index, value in enumerate(node.inputs):
        if value is not None and value.dtype in FLOATS and value.dtype != dtype:
            node.replace_input_with(index, casts.cast(value, dtype))
    for output in node.outputs:
        if output.dtype == ir.DataType.FLOAT:
            output.dtype = dtype
    if node.op_type == "Cast" and node.outputs[0].dtype in FLOATS:
        node.attributes["to"] = ir.AttrInt64("to", dtype)


def _restore_outputs(model: ir.Model, casts: "_Casts") -> None:
    """Cast graph outputs that have become float16 back to float32, under their old names."""
    for index, value in enumerate(model.graph.outputs):
        if value.dtype == ir.DataType.FLOAT16:
            name = value.name
            value.name = f"{name}.float16"
            output = casts.cast(value, ir.DataType.FLOAT)
            output.name = name
            output.shape = value.shape
            model.graph.outputs[index] = output


class _Casts:
    """Values of a graph in another float type, by one Cast node each; nodes are appended, so the graph needs sorting.

    With `convert_weights`, an initializer gets a second initializer instead, which is converted when it is written.
    """

    def __init__(self, model: ir.Model, *, convert_weights: bool) -> None:
        self.graph = model.graph
        self.convert_weights = convert_weights
        self.made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` in the type `dtype`; each call returns the same converted value."""
        key = value, dtype
        if key not in self.made:
            name = f"{value.name}.{dtype.name.lower()}"
            make = self._weight if self.convert_weights and value.is_initializer() else self._node
            self.made[key] = make(value, dtype, name)
        return self.made[key]

    def _node(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype)], name=f"{name}.Cast")
        output = node.outputs[0]
        output.name = name
        output.type = ir.TensorType(dtype)
        self.graph.append(node)
        return output

    def _weight(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        tensor = tensor_of(value)
        shape = cast(ir.Shape, tensor.shape)

        def converted() -> ir.TensorProtocol:
            try:
                return ir.tensor(tensor.numpy().astype(dtype.numpy()), name=name)
            finally:
                release(tensor)

        lazy = ir.LazyTensor(converted, dtype, shape, name=name)
        return add_initializer(self.graph, lazy)


def _forget_types(model: ir.Model) -> None:
    """Remove the types of the values inside the graph, as in the exported graph: a runtime infers them."""
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.type = None
                value.shape = None


def _exact_operators(model: ir.Model) -> set[ir.Node]:
    """Operators that stay float32 whatever their values are: SUMS, and those that count in floats.

    Float16 has no odd integer beyond 2048, and the positions of a clip of three minutes exceed that. So a Cast of
    integers stays float32, and so does what is computed from its result and constants alone, up to the sine or cosine.
    """
    exact = {node for node in model.graph if node.op_type in SUMS}
    for node in filter(float_values, model.graph):
        values = [value for value in node.inputs if value is not None and value.dtype in FLOATS]
        sources = [value.producer() for value in values if not value.is_initializer()]
        if sources:
            counts = all(
                source is not None and source in exact and source.op_type not in PERIODIC for source in sources
            )
        elif node.op_type == "Cast":
            counts = _is_integer(node.inputs[0])
        else:
            counts = not values  # an operator without float inputs, whose output type is an attribute
        if counts:
            exact.add(node)
    return exact


def _is_integer(value: ir.Value | None) -> bool:
    return value is not None and value.dtype is not None and value.dtype.is_integer()
