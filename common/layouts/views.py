"""Graphs in the form that another runtime expects: renamed, axes in another order, or several graphs in one file.

The nodes and weights are those of the source graphs. Where an encoder's weights are in a data file, that of the view is
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
    model = load(source / view.parts[0].file)
    for part in view.parts[1:]:
        _join(model.graph, load(source / part.file).graph, view)
    _rename(model.graph, view)
    model.metadata_props.update(metadata)
    data = source / view.parts[0].data_file
    if data.exists() and len(view.parts) == 1:
        _save_with_data_of(data, model, target / view.file)
    else:
        save_model(model, target / view.file, single_file=True)


def _save_with_data_of(data: Path, model: ir.Model, path: Path) -> None:
    """Save a model whose weights are in the file `data`; a link to that file becomes the data file of `path`."""
    name = f"{path.name}.data"
    link(data, path.with_name(name))
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                name,
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=tensor.name,
                base_dir=path.parent,
            )
    ir.save(model, path)


def check_view(view: View, source: Path, target: Path, vocabulary: int) -> None:
    """Run `view` in folder `target` and its parts in `source` on the same noise, one session at a time.

    vocabulary: V. Raises CheckError unless every output is equal, bit for bit.
    """
    values = _run_parts(view, source, vocabulary)
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


def _run_parts(view: View, source: Path, vocabulary: int) -> dict[str, np.ndarray]:
    """Run the parts, where one may feed the next; returns every input and output by name."""
    values: dict[str, np.ndarray] = {}
    for part in view.parts:
        graph = OrtGraph(source, part, mapped=True)
        inputs = dict(zip(part.input_names, graph.noise(vocabulary, **CHECK_SIZES), strict=True))
        for tensor in part.inputs:
            if tensor.name in values:
                inputs[tensor.name] = _rearranged(values[tensor.name], view.part(tensor.name), tensor)
        values |= inputs | dict(zip(part.output_names, graph(*inputs.values()), strict=True))
    return values


def _rearranged(array: np.ndarray, old: Tensor, new: Tensor) -> np.ndarray:
    """`array`, declared as `old`, with the axes and type of `new`."""
    return array.transpose(_order(old, new)).astype(new.dtype)


def _order(old: Tensor, new: Tensor) -> list[int]:
    """The permutation that brings the axes of `old` into the order of `new`."""
    return [old.axes.index(axis) for axis in new.axes]


def _join(graph: ir.Graph, other: ir.Graph, view: View) -> None:
    """Move the nodes, weights, inputs and outputs of `other` into `graph`.

    An input of `other` that is an output of `graph` is connected to it.
    """
    _prefix(graph, view.parts[0].name)
    _prefix(other, view.parts[1].name)
    first_outputs = {value.name: value for value in graph.outputs}
    inputs = list(other.inputs)
    outputs = list(other.outputs)
    nodes = list(other)
    weights = list(other.initializers.values())
    other.inputs.clear()
    other.outputs.clear()
    other.initializers.clear()
    other.remove(nodes)
    for value in weights:
        graph.register_initializer(value)
    graph.extend(nodes)
    for value in inputs:
        if value.name is None or value.name not in first_outputs:
            graph.inputs.append(value)
            continue
        output = first_outputs[value.name]
        needed = next(tensor for tensor in view.parts[1].inputs if tensor.name == value.name)
        converted, added = _converted(output, view.part(value.name), needed)
        graph.insert_before(nodes[0], added)
        value.replace_all_uses_with(converted)
        graph.outputs.remove(output)
    graph.outputs.extend(outputs)


def _prefix(graph: ir.Graph, prefix: str) -> None:
    """Prefix the names of all values inside `graph`, so that no other part has the same."""
    ends = {*graph.inputs, *graph.outputs}
    inner = [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    for value in inner:
        if value not in ends:
            value.name = f"{prefix}/{value.name}"


def _rename(graph: ir.Graph, view: View) -> None:
    """Give the inputs and outputs of `graph` the names, axes, types and order of `view`."""
    sources = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    for value in sources.values():
        value.name = f"{value.name}.source"  # the view may use the name for another tensor
    inputs = []
    outputs = []
    for tensor in view.inputs:
        part = view.part(tensor.source)
        source = sources[tensor.source]
        new = ir.Value(name=tensor.name, type=ir.TensorType(_dtype(tensor)), shape=_shape(source, part, tensor))
        converted, added = _converted(new, tensor, part)
        source.replace_all_uses_with(converted)
        graph.insert_before(graph[0], added)
        inputs.append(new)
    for tensor in view.outputs:
        part = view.part(tensor.source)
        source = sources[tensor.source]
        shape = _shape(source, part, tensor)
        converted, added = _converted(source, part, tensor)
        graph.extend(added)
        converted.name = tensor.name
        converted.type = ir.TensorType(_dtype(tensor))
        converted.shape = shape
        outputs.append(converted)
    graph.inputs[:] = inputs
    graph.outputs[:] = outputs


def _converted(value: ir.Value, old: Tensor, new: Tensor) -> tuple[ir.Value, list[ir.Node]]:
    """`value`, declared as `old`, in the type and order of axes of `new`; and the nodes needed for that, if any."""
    nodes: list[ir.Node] = []
    if old.dtype != new.dtype:
        nodes.append(ir.node("Cast", [value], {"to": _dtype(new)}))
    if old.axes != new.axes:
        inputs = [nodes[-1].outputs[0] if nodes else value]
        nodes.append(ir.node("Transpose", inputs, {"perm": _order(old, new)}))
    for node in nodes:
        node.outputs[0].name = f"{value.name}.{node.op_type.lower()}"
    return nodes[-1].outputs[0] if nodes else value, nodes


def _shape(value: ir.Value, old: Tensor, new: Tensor) -> ir.Shape:
    """The shape of `value`, an input or output of an exported graph, in the order of axes of `new`."""
    assert value.shape is not None
    return ir.Shape([value.shape[axis] for axis in _order(old, new)])


def _dtype(tensor: Tensor) -> ir.DataType:
    return ir.DataType.from_numpy(np.dtype(tensor.dtype))
