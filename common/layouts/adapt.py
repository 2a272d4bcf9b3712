"""A graph as another runtime wants it: renamed, its axes in another order, several in one, checked against its source.

The nodes and weights are the source's own. The weights of a view of one graph are the source's file under a second
name, so a folder for another runtime costs next to nothing; a copy where the file system has no hard links.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from common.cli import CheckError
from common.contract import Tensor, View
from common.folder.atomic import link
from common.folder.onnx_files import load, save_model
from common.run.ort import OrtGraph

# On which a view is compared with its source: batch, mel frames, encoder frames, target positions.
CHECK_SIZES = {"B": 2, "T": 160, "S": 1, "U": 1}


def write_view(view: View, source: Path, target: Path, metadata: Mapping[str, str]) -> None:
    """Write `view` of the graphs in folder `source` into folder `target`, with `metadata` in the model."""
    model = load(source / view.parts[0].file)
    for part in view.parts[1:]:
        _join(model.graph, load(source / part.file).graph, view)
    _rename(model.graph, view)
    model.metadata_props.update(metadata)
    if len(view.parts) > 1:
        save_model(model, target / view.file)
        return
    link(source / view.parts[0].data_file, target / view.data_file)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            place = (view.data_file, tensor.offset, tensor.length, tensor.dtype)
            value.const_value = ir.ExternalTensor(*place, shape=tensor.shape, name=tensor.name, base_dir=target)
    ir.save(model, target / view.file)


def check_view(view: View, source: Path, target: Path, vocabulary: int) -> None:
    """Run `view` in folder `target` and its parts in `source` on the same noise. Raises CheckError unless every output
    is equal, bit for bit. One session at a time."""
    known = _run_parts(view, source, vocabulary)
    wanted = {t.name: _arranged(known[t.source], view.part(t.source), t) for t in (*view.inputs, *view.outputs)}
    found = OrtGraph(target, view, mapped=True)(*(wanted[name] for name in view.input_names))
    for name, array in zip(view.output_names, found, strict=True):
        if array.dtype != wanted[name].dtype or not np.array_equal(array, wanted[name]):
            parts = " and ".join(part.file for part in view.parts)
            raise CheckError(f"{name} of {view.file} is not what {parts} compute: the layout is wrong")


def _run_parts(view: View, source: Path, vocabulary: int) -> dict[str, np.ndarray]:
    """Every input and output of the parts, one of which may feed the next, by name."""
    known: dict[str, np.ndarray] = {}
    for part in view.parts:
        graph = OrtGraph(source, part, mapped=True)
        inputs = dict(zip(part.input_names, graph.noise(vocabulary, **CHECK_SIZES), strict=True))
        for tensor in part.inputs:
            if tensor.name in known:
                inputs[tensor.name] = _arranged(known[tensor.name], view.part(tensor.name), tensor)
        known |= inputs | dict(zip(part.output_names, graph(*inputs.values()), strict=True))
    return known


def _arranged(array: np.ndarray, have: Tensor, want: Tensor) -> np.ndarray:
    return array.transpose(_order(have, want)).astype(want.dtype)


def _order(have: Tensor, want: Tensor) -> list[int]:
    """The permutation that brings the axes of `have` into the order of `want`."""
    return [have.axes.index(axis) for axis in want.axes]


def _join(graph: ir.Graph, other: ir.Graph, view: View) -> None:
    """Move the nodes, weights, inputs and outputs of `other` into `graph`, its inputs that `graph` puts out bound to
    those."""
    _prefix(graph, view.parts[0].name)
    _prefix(other, view.parts[1].name)
    made = {value.name: value for value in graph.outputs}
    inputs, outputs, nodes = list(other.inputs), list(other.outputs), list(other)
    weights = list(other.initializers.values())
    other.inputs.clear()
    other.outputs.clear()
    other.initializers.clear()
    other.remove(nodes)
    for value in weights:
        graph.register_initializer(value)
    graph.extend(nodes)
    for value in inputs:
        if value.name not in made:
            graph.inputs.append(value)
            continue
        wanted = next(tensor for tensor in view.parts[1].inputs if tensor.name == value.name)
        given, added = _converted(made[value.name], view.part(value.name), wanted)
        graph.insert_before(nodes[0], added)
        value.replace_all_uses_with(given)
        graph.outputs.remove(made[value.name])
    graph.outputs.extend(outputs)


def _prefix(graph: ir.Graph, prefix: str) -> None:
    """Give everything inside `graph` a name that no other part has."""
    ends = {*graph.inputs, *graph.outputs}
    inner = [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    for value in inner:
        if value not in ends:
            value.name = f"{prefix}/{value.name}"


def _rename(graph: ir.Graph, view: View) -> None:
    """Bring the inputs and outputs of `graph` to the names, axes, types and order of `view`."""
    sources = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    for value in sources.values():
        value.name = f"{value.name}.source"  # a name may be wanted for another tensor
    inputs, outputs = [], []
    for tensor in view.inputs:
        have, old = view.part(tensor.source), sources[tensor.source]
        new = ir.Value(name=tensor.name, type=ir.TensorType(_dtype(tensor)), shape=_shape(old, have, tensor))
        given, added = _converted(new, tensor, have)
        old.replace_all_uses_with(given)
        graph.insert_before(graph[0], added)
        inputs.append(new)
    for tensor in view.outputs:
        have, old = view.part(tensor.source), sources[tensor.source]
        shape = _shape(old, have, tensor)
        given, added = _converted(old, have, tensor)
        graph.extend(added)
        given.name, given.type, given.shape = tensor.name, ir.TensorType(_dtype(tensor)), shape
        outputs.append(given)
    graph.inputs[:], graph.outputs[:] = inputs, outputs


def _converted(value: ir.Value, have: Tensor, want: Tensor) -> tuple[ir.Value, list[ir.Node]]:
    """`value`, declared as `have`, in the type and order of axes of `want`; also the nodes that this takes, if any."""
    nodes = []
    if have.dtype != want.dtype:
        nodes.append(ir.node("Cast", [value], {"to": _dtype(want)}))
    if have.axes != want.axes:
        inputs = [nodes[-1].outputs[0] if nodes else value]
        nodes.append(ir.node("Transpose", inputs, {"perm": _order(have, want)}))
    for node in nodes:
        node.outputs[0].name = f"{value.name}.{node.op_type.lower()}"
    return nodes[-1].outputs[0] if nodes else value, nodes


def _shape(value: ir.Value, have: Tensor, want: Tensor) -> ir.Shape:
    return ir.Shape([value.shape[axis] for axis in _order(have, want)])


def _dtype(tensor: Tensor) -> ir.DataType:
    return ir.DataType.from_numpy(np.dtype(tensor.dtype))
