"""One PyTorch module → one `.onnx` and one `.data` file."""

import io
import warnings
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnx_ir.tensor_adapters import TorchTensor

from common.contract import Graph
from common.export.options import check_opset
from common.export.wrappers import Wrapper, named_weights
from common.onnx_io import save_model

# torch.onnx.export(dynamo=False) of torch 2.13 ends at 20; the newer exporter goes on, but takes four times as long.
EXPORTER_MAX_OPSET = 20


def export_graph(module: Wrapper, graph: Graph, folder: Path, opset: int) -> None:
    """Write `graph.file` and `graph.data_file` into `folder`. Raises ValueError as check_opset does.

    A module with `weights_as_inputs` is traced with its weights as graph inputs, which then become initializers that
    are read straight from the module: nothing is copied, and the 2 GB limit of a protobuf is not reached. The other
    modules are small, and their weights need the exporter's constant folding (the gates of an LSTM change order).
    """
    check_opset(opset)
    proto = onnx.load_from_string(_trace(module, graph, min(opset, EXPORTER_MAX_OPSET)))
    if opset > EXPORTER_MAX_OPSET:
        proto = onnx.version_converter.convert_version(proto, opset)
    model = ir.from_proto(proto)
    if module.weights_as_inputs:
        _bind_weights(model, module)
    for graph_pass in (
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.ClearMetadataAndDocStringPass(),  # stack traces with paths of this machine
    ):
        model = graph_pass(model).model
    save_model(model, folder / graph.file)


def _trace(module: Wrapper, graph: Graph, opset: int) -> bytes:
    """The serialized ONNX model that torch makes of `module`."""
    buffer = io.BytesIO()
    device = next(module.parameters()).device
    inputs = tuple(tensor.to(device) for tensor in module.example_inputs())
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of every shape that NeMo's code compares
        torch.onnx.export(
            module,
            inputs,
            buffer,  # type: ignore[arg-type]  # a file object is what dynamo=False accepts as well
            input_names=graph.input_names,
            output_names=graph.output_names,
            dynamic_axes=graph.dynamic_axes(),
            opset_version=opset,
            dynamo=False,
            export_params=not module.weights_as_inputs,
            do_constant_folding=not module.weights_as_inputs,
        )
    return buffer.getvalue()


def _bind_weights(model: ir.Model, module: Wrapper) -> None:
    """Turn the graph inputs that are weights into initializers that hold the module's tensors."""
    weights = dict(named_weights(module))
    for value in list(model.graph.inputs):
        if value.name in weights:
            model.graph.inputs.remove(value)
            value.const_value = TorchTensor(weights[value.name], name=value.name)
            model.graph.register_initializer(value)
