"""Lifts a graph to a newer opset, for a type that its own opset does not have.

The converters of onnx and onnxscript need the weights in memory, and that of onnxscript begins at opset 18. An encoder
uses some thirty operators, of which only two are written in another way in newer opsets.
"""

import numpy as np
import onnx_ir as ir
from onnx import defs

from common.onnx_io import shared_initializer

# Operators whose newer versions only accept more types, or have new attributes whose defaults keep the old meaning
# (onnx's changelog, opsets 18 to 21).
SAME_MEANING = (
    "Cast", "Constant", "ConstantOfShape", "DequantizeLinear", "Equal", "Flatten", "Identity", "Pad", "QuantizeLinear",
    "Reshape", "Shape", "Size", "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip
AXES_BECAME_INPUT = ("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd")  # in opset 18
INT4_OPSET, INT4_IR_VERSION = 21, 10  # the first with 4-bit integers


def lift_opset(model: ir.Model, opset: int, ir_version: int) -> None:
    """Raise the opset of ONNX's own operators and the version of the format, in place, if they are lower.

    Raises ValueError for an operator that changed in between in a way not known here.
    """
    imports = model.graph.opset_imports
    model.ir_version = max(model.ir_version, ir_version)
    if imports[""] >= opset:
        return
    for node in model.graph:
        if node.domain == "" and _version(node, imports[""]) != _version(node, opset):
            _lift(model.graph, node)
    imports[""] = opset


def _version(node: ir.Node, opset: int) -> int:
    """The opset that defined the version of the operator that is valid in `opset`."""
    return defs.get_schema(node.op_type, opset, "").since_version


def _lift(graph: ir.Graph, node: ir.Node) -> None:
    """Rewrite a node for opset 21, whether its version is from before opset 18 or later."""
    if node.op_type in AXES_BECAME_INPUT:
        if axes := node.attributes.pop("axes", None):
            numbers = axes.as_ints()
            name = "axes_" + "_".join(map(str, numbers))
            node.resize_inputs(2)
            node.replace_input_with(1, shared_initializer(graph, name, np.array(numbers)))
    elif node.op_type == "Split":  # into equal parts: their number no longer follows from the outputs
        if len(node.inputs) == 1 and "num_outputs" not in node.attributes:
            node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))
    elif node.op_type not in SAME_MEANING:
        raise ValueError(
            f"expected operators that can be lifted to opset {INT4_OPSET}, which 4-bit weights need, got "
            f"{node.op_type}; export the encoder again with --opset_version {INT4_OPSET}"
        )
