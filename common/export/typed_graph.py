"""Graphs for measuring and converting: the type of every value is known, and they run exactly as they are written."""

from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common as passes

from common.onnx_io import load
from common.run.ort import open_session

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def load_typed(path: Path) -> ir.Model:
    """The model at `path`, with constants as initializers and the type of every value inferred.

    Raises ValueError if a type cannot be inferred.
    """
    model = passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(load(path)).model
    model = passes.ShapeInferencePass()(model).model
    unknown = next((node for node in model.graph if any(value.dtype is None for value in node.outputs)), None)
    if unknown is not None:
        raise ValueError(f"{path}: expected known types of all values, got none for {unknown.op_type} {unknown.name}")
    return model


def float_values(node: ir.Node) -> list[ir.Value]:
    """The inputs and outputs of `node` that are float32 or float16."""
    return [value for value in (*node.inputs, *node.outputs) if value is not None and value.dtype in FLOATS]


def name_of(item: ir.Node | ir.Value) -> str:
    """The name of a node or value; onnx_ir gives one to each when it is loaded."""
    assert item.name is not None
    return item.name


def exact_session(model: ir.Model, folder: Path, *, fold: bool = False) -> Any:
    """An ONNX Runtime session of `model`, whose weights are in `folder`, that changes nothing in the graph.

    No cast is dropped and no weight is repacked. With `fold`, for small float32 graphs, what depends on weights alone
    is computed once.
    """
    import onnxruntime as ort

    levels = ort.GraphOptimizationLevel
    options = ort.SessionOptions()
    options.graph_optimization_level = levels.ORT_ENABLE_BASIC if fold else levels.ORT_DISABLE_ALL
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED  # the order of the file
    options.enable_cpu_mem_arena = fold
    entries = {
        "session.disable_prepacking": "1",
        "session.model_external_initializers_file_folder_path": str(folder),
    }
    return open_session(ir.to_proto(model).SerializeToString(), entries=entries, options=options)
