"""Graphs in the form that another runtime expects: renamed, axes in another order, or several graphs in one file.

The nodes and weights are the source graphs' own. Where an encoder's weights are in a data file, the view's data file is
the same file under a second name (a hard link, or a copy where the file system has no links), so that a folder for
another runtime takes little space. Every view is compared with its source.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from common.cli import CheckError
from common.contract import Tensor, View
from common.folder import link
from common.onnx_io import load, save_model
from common.run.ort import OrtGraph

# The sizes at which a view is compared with its source: batch, mel frames, encoder frames, target positions.
CHECK_SIZES = {"B": 2, "T": 160, "S": 1, "U": 1}


def write_view(view: View, source: Path, target: Path, metadata: Mapping[str, str]) -> None:
    """Write `view` of the graphs in folder `source` into folder `target`, with `metadata` in the model."""
    model, *others = (load(source / part.file) for part in view.parts)
    for other in others:
        _join(model.graph, other.graph, view)
    _rename(model.graph, view)
    model.metadata_props.update(metadata)
    data = source / view.parts[0].data_file
    if others or not data.exists():
        save_model(model, target / view.file, single_file=True)
        return
    link(data, target / view.data_file)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                view.data_file,
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=tensor.name,
                base_dir=target,
            )
    ir.save(model, target / view.file)


def check_view(view: View, source: Path, target: Path, vocabulary: int) -> None:
    """Run `view` in folder `target` and its parts in `source` on the same noise, one session at a time.

    vocabulary: V. Raises CheckError unless every output is equal, bit for bit.
    """
    values: dict[str, np.ndarray] = {}  # inputs and outputs of the parts, of which one may feed the next
    for part in view.parts:
        graph = OrtGraph(source, part, mapped=True)
        inputs = dict(zip(part.input_names, graph.noise(vocabulary, **CHECK_SIZES), strict=True))
        for tensor in part.inputs:
            if tensor.name in values:
                inputs[tensor.name] = _rearranged(values[tensor.name], view.part(tensor.name), tensor)
        values |= inputs | dict(zip(part.output_names, graph(*inputs.values()), strict=True))
    expected = {
        tensor.name: _rearranged(values[tensor.source], view.part(tensor.source), tensor)
        for tensor in (*view.inputs, *view.outputs)
    }
    actual = OrtGraph(target, view, mapped=True)(*(expected[name] for name in view.input_names))
    for name, array in zip(view.output_names, actual, strict=True):
        if array.dtype != expected[name].dtype or not np.array_equal(array, expected[name]):
            parts = " and ".join(part.file for part in view.parts)
            raise CheckError(
                f"{name} of {view.file} differs from the output of {parts}: the layout is wrong, please report it"
            )


def _rearranged(array: np.ndarray, old: Tensor, new: Tensor) -> np.ndarray:
    """`array`, declared as `old`, with the axes and type of `new`."""
    return array.transpose(_order(old, new)).astype(new.dtype)


def _order(old: Tensor, new: Tensor) -> list[int]:
    """The permutation that brings the axes of `old` into the order of `new`."""
    return [old.axes.index(axis) for axis in new.axes]


def _join(graph: ir.Graph, other: ir.Graph, view: View) -> None:
    """Move the nodes, weights, inputs and outputs of `other` into `graph`.

    An input of `other` that is an output of `graph` is connected to it. The names of all values inside get a prefix, so
    that no other part has the same.
    """
    for part, each in zip(view.parts, (graph, other), strict=True):
        ends = {*each.inputs, *each.outputs}
        for value in (*each.initializers.values(), *(value for node in each for value in node.outputs)):
            if value not in ends:
                value.name = f"{part.name}/{value.name}"
    first_outputs = {value.name: value for value in graph.outputs}
    inputs, outputs = list(other.inputs), list(other.outputs)
    nodes, weights = list(other), list(other.initializers.values())
    for ends_of_other in (other.inputs, other.outputs, other.initializers):
        ends_of_other.clear()
    other.remove(nodes)
    for value in weights:
        graph.register_initializer(value)
    graph.extend(nodes)
    for value in inputs:
        if value.name not in first_outputs:
            graph.inputs.append(value)
            continue
        output = first_outputs[value.name]
        needed = next(tensor for tensor in view.parts[1].inputs if tensor.name == value.name)
        converted, added = _converted(output, view.part(needed.name), needed)
        graph.insert_before(nodes[0], added)
        value.replace_all_uses_with(converted)
        graph.outputs.remove(output)
    graph.outputs.extend(outputs)


def _rename(graph: ir.Graph, view: View) -> None:
    """Give the inputs and outputs of `graph` the names, axes, types and order of `view`."""
    sources = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    for value in sources.values():
        value.name = f"{value.name}.source"  # the view may use the name for another tensor
    ends: dict[str, ir.Value] = {}
    for tensor in (*view.inputs, *view.outputs):
        part, source = view.part(tensor.source), sources[tensor.source]
        assert source.shape is not None
        shape = ir.Shape([source.shape[axis] for axis in _order(part, tensor)])
        if tensor in view.inputs:
            end = ir.Value(name=tensor.name)
            converted, added = _converted(end, tensor, part)
            source.replace_all_uses_with(converted)
            graph.insert_before(graph[0], added)
        else:
            end, added = _converted(source, part, tensor)
            graph.extend(added)
        end.name = tensor.name
        end.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(tensor.dtype)))
        end.shape = shape
        ends[tensor.name] = end
    graph.inputs[:] = [ends[name] for name in view.input_names]
    graph.outputs[:] = [ends[name] for name in view.output_names]


def _converted(value: ir.Value, old: Tensor, new: Tensor) -> tuple[ir.Value, list[ir.Node]]:
    """`value`, declared as `old`, in the type and order of axes of `new`; and the nodes needed for that, if any."""
    nodes: list[ir.Node] = []
    if old.dtype != new.dtype:
        nodes.append(ir.node("Cast", [value], {"to": ir.DataType.from_numpy(np.dtype(new.dtype))}))
    if old.axes != new.axes:
        inputs = [nodes[-1].outputs[0] if nodes else value]
        nodes.append(ir.node("Transpose", inputs, {"perm": _order(old, new)}))
    for node in nodes:
        node.outputs[0].name = f"{value.name}.{node.op_type.lower()}"
    return nodes[-1].outputs[0] if nodes else value, nodes
