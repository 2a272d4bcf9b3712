"""Small operations on onnx_ir graphs that several rooms need, with definite types where onnx_ir leaves them open."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import onnx_ir as ir

T = TypeVar("T")


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initializer of `graph` with the tensor's name and content."""
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=tensor.name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def shared_initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """The initializer of that name, which is created from `array` on first use."""
    existing = graph.initializers.get(name)
    return add_initializer(graph, ir.tensor(array, name=name)) if existing is None else existing


def remove_if_unused(graph: ir.Graph, value: ir.Value) -> None:
    """Remove an initializer that no node uses any more."""
    if not value.uses():
        del graph.initializers[name_of(value)]


def input_of(node: ir.Node, index: int) -> ir.Value:
    """An input that the operator requires. Raises ValueError where it is left out."""
    value = node.inputs[index]
    if value is None:
        raise ValueError(f"expected input {index} of {node.op_type} {node.name}, got none; export the graph again")
    return value


def name_of(value: ir.Value) -> str:
    """The name of a value of a graph that was read from a file, where each has one."""
    assert value.name is not None, f"{value} has no name"
    return value.name


def tensor_of(value: ir.Value) -> ir.TensorProtocol:
    """The tensor of an initializer. Raises ValueError where the value is computed."""
    if value.const_value is None:
        raise ValueError(f"expected a constant, got {value.name}, which is computed; export the graph again")
    return value.const_value


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """The shape of an initializer."""
    return tuple(tensor_of(value).shape.numpy())


def release(tensor: ir.TensorProtocol) -> None:
    """Unmap the data file that a tensor was read from, if any. Arrays that view it must not be used afterwards."""
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()


def computed_from(value: ir.Value, function: Callable[[np.ndarray], T]) -> T:
    """`function` of an initializer's content. Its data file is mapped only for that, so the result must not view it."""
    tensor = tensor_of(value)
    try:
        return function(tensor.numpy())  # not kept in a variable: a mapping that is viewed cannot be closed
    finally:
        release(tensor)
