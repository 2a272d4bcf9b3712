"""The exported encoder made small and fast: fuse its graph, quantize its weights by a plan, compare it with its source.

Weights are mapped, never loaded as a whole: a pass holds the one tensor a thread works on and the quantized results.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from common.cli import CheckError
from common.contract import MICROSOFT, Graph
from common.folder.onnx_files import load, model_of, read_proto, save_model
from common.quantize.blocks import BLOCK_SIZES, METHODS, Packed, quantize
from common.quantize.fidelity import token_sqnr
from common.quantize.int8 import REDUCED_BITS, WEIGHT_BITS, Columns, quantize_lstms, quantize_products
from common.quantize.plan import INT8, Format, Plan, Stored

MIN_WEIGHTS = 4096  # a matrix smaller than this (16 kB) gains less than its extra tensors cost
# 8-bit decoder and joint: measured 54 dB and 41 dB at full size; on the tiny checkpoint 41 dB in the joint, and in the
# decoder 38 dB with 7 bits on a CPU without VNNI, which cuts off sums of 8 bits (22 dB; see int8.quantize_columns).
MIN_TOKEN_SQNR_DB = 20.0
# The joint multiplies one row at a time, which is reading weights: MatMulNBits of 8 bits takes 0.26 ms a token, with
# block 32 0.38 ms, DynamicQuantizeMatMul 0.39 ms, float32 0.75 ms.
JOINT_BITS, JOINT_BLOCK, JOINT_METHOD, JOINT_ACCURACY_LEVEL = 8, 128, "rtn", 4


def fuse(path: Path) -> tuple[ir.Model, Counter]:
    """Run ONNX Runtime's `conformer` fusions on the model at `path`; also the number of fused nodes by operator.

    The fusions read biases, so vectors are loaded, and no matrix. Symbolic shape inference is off: it takes more than
    a second a layer, for no other result than that the Adds do not broadcast, which `compare` would notice.
    """
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    proto = read_proto(path)
    for tensor in proto.graph.initializer:
        if uses_external_data(tensor) and len(tensor.dims) == 1:
            load_external_data_for_tensor(tensor, str(path.parent))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    options = FusionOptions("conformer")
    options.enable_shape_inference = False
    options.enable_attention = False  # its patterns are of attention with absolute positions
    model = model_of(optimize_model(proto, "conformer", opt_level=0, optimization_options=options).model, path.parent)
    return model, Counter(node.op_type for node in model.graph if node.domain == MICROSOFT)


def quantizable(model: ir.Model) -> dict[str, list[ir.Node]]:
    """Name of each constant float32 matrix → the MatMuls that multiply by it, in graph order.

    A product of two activations is left out by itself; Conv weights are not matrices.
    """
    found: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        if (node.op_type, node.domain) != ("MatMul", ""):
            continue
        weight = node.inputs[1]
        tensor = weight.const_value if weight.is_initializer() else None
        if (
            tensor is not None
            and tensor.dtype == ir.DataType.FLOAT
            and len(tensor.shape) == 2
            and tensor.size >= MIN_WEIGHTS
        ):
            found.setdefault(weight.name, []).append(node)
    return found


def quantize_weights(
    model: ir.Model,
    plan: Plan,
    method: str,
    accuracy_level: int,
    progress: Callable[[Iterator[Packed], int], Iterable[Packed]] = lambda items, total: items,
    fitted: dict[str, Packed] | dict[str, Columns] | None = None,
) -> dict[str, Stored]:
    """Put a MatMulNBits, or by the method `int8` what common.int8 says, in the place of each MatMul by a weight of
    `plan`, in place. `fitted` are weights that are quantized already."""
    nodes = quantizable(model)
    if method == INT8:
        bits = plan[next(iter(plan))].bits
        return _stored(plan, quantize_products(model, {name: nodes[name] for name in plan}, bits, progress, fitted))
    weights = {name: model.graph.initializers[name] for name in plan}

    def pack(name: str) -> Packed:
        if fitted:
            return fitted[name]
        tensor = weights[name].const_value
        try:
            return quantize(tensor.numpy(), plan[name].bits, plan[name].block, METHODS[method])
        finally:
            if isinstance(tensor, ir.ExternalTensor):
                tensor.release()  # its mapping of the data file

    errors = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy lets go of Python's lock
        for name, found in zip(plan, progress(pool.map(pack, plan), len(plan)), strict=True):
            constants = [_initializer(model, f"{name}.{part}", array) for part, array in found.tensors()]
            for node in nodes[name]:
                _replace(node, constants, plan[name], accuracy_level)
            if not weights[name].uses():
                del model.graph.initializers[name]
            errors[name] = found.error
    return _stored(plan, errors)


def _stored(plan: Plan, errors: dict[str, float]) -> dict[str, Stored]:
    return {name: Stored(form, errors[name]) for name, form in plan.items()}


def _initializer(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _replace(node: ir.Node, constants: list[ir.Value], form: Format, accuracy_level: int) -> None:
    K, N = node.inputs[1].const_value.shape.numpy()
    numbers = {"K": K, "N": N, "bits": form.bits, "block_size": form.block, "accuracy_level": accuracy_level}
    new = ir.Node(
        MICROSOFT,
        "MatMulNBits",
        [node.inputs[0], *constants],
        [ir.AttrInt64(name, number) for name, number in numbers.items()],
        name=node.name,
    )
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], [new], node.outputs, new.outputs)


def quantize_token_graphs(
    source: Path, target: Path, graphs: Iterable[Graph], vocabulary: int, reduce_range: bool
) -> tuple[dict[str, float], dict[str, dict[str, Stored]]]:
    """Write what `source` runs once a token, with 8-bit weights, into `target`, the embedding as it was; by the name of
    the graph its SQNR on noise, and how its weights were stored.

    Raises CheckError where that is so low that something is broken.
    """
    bits, stored = REDUCED_BITS if reduce_range else WEIGHT_BITS, {}
    ratios = {}
    for graph in graphs:
        model = load(source / graph.file)
        errors = quantize_lstms(model, bits)
        plan = {name: Format(JOINT_BITS, _joint_block(model, name)) for name in quantizable(model)}
        stored[graph.name] = _stored(dict.fromkeys(errors, Format(bits, None)), errors)
        stored[graph.name] |= quantize_weights(model, plan, JOINT_METHOD, JOINT_ACCURACY_LEVEL)
        save_model(model, target / graph.file)
        ratios[graph.name] = token_sqnr(source, target, graph, vocabulary)
        if not ratios[graph.name] >= MIN_TOKEN_SQNR_DB:
            raise CheckError(
                f"the 8-bit {graph.name} has an SQNR of {ratios[graph.name]:.1f} dB, wanted {MIN_TOKEN_SQNR_DB:.0f} dB"
            )
    return ratios, stored


def _joint_block(model: ir.Model, name: str) -> int:
    """JOINT_BLOCK, or less where a column is shorter and would be padded with zeros."""
    K, _ = model.graph.initializers[name].const_value.shape.numpy()
    return next(size for size in BLOCK_SIZES if size >= min(K, JOINT_BLOCK))
