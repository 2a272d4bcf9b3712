"""The exported encoder made small and fast: fuse its graph, quantize its weights by a plan, compare it with its source.

Weights are mapped, never loaded as a whole: a pass holds the one tensor a thread works on and the quantized results.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_tensor, uses_external_data

from common.console import CheckError
from common.files import data_bytes, save_model
from common.graphs import ENCODER, MICROSOFT, Graph
from common.int8 import REDUCED_BITS, WEIGHT_BITS, Columns, quantize_lstms, quantize_products
from common.quantize import BITS, BLOCK_SIZES, METHODS, Packed, quantize
from common.runtime import OrtGraph

MIN_WEIGHTS = 4096  # a matrix smaller than this (16 kB) gains less than its extra tensors cost

# What a MatMulNBits adds to the graph file: attributes, the names and places of three tensors; up to 500 were measured.
NODE_BYTES = 600

# Noise on which two encoders are compared: mel frames of a ragged batch. 4 s and a shorter one of odd length.
NOISE_FRAMES = (400, 267)
# A graph whose output has nothing to do with the wanted one has at most 0 dB (all zeros; -3 dB if it is as loud). At
# 3 dB half of the output is error: nobody would use that, and no weight quantization that works comes near.
MIN_SQNR_DB = 3.0
# Fusion reorders float32 sums: measured 123 dB on the tiny checkpoint. A wrong epsilon or bias falls far below 80.
MIN_FLOAT_SQNR_DB = 80.0

# 8-bit decoder and joint: measured 54 dB and 41 dB at full size; on the tiny checkpoint 41 dB in the joint, and in the
# decoder 38 dB with 7 bits on a CPU without VNNI, which cuts off sums of 8 bits (22 dB; see int8.quantize_columns).
MIN_TOKEN_SQNR_DB = 20.0

K_QUANT_MIXED = "k_quant_mixed"  # the method that spends 8 bits where they matter
INT8 = "int8"  # the method of common.int8, beside those of MatMulNBits
QUANT_METHODS = (*METHODS, INT8)
# The joint multiplies one row at a time, which is reading weights: MatMulNBits of 8 bits takes 0.26 ms a token, with
# block 32 0.38 ms, DynamicQuantizeMatMul 0.39 ms, float32 0.75 ms.
JOINT_BITS, JOINT_BLOCK, JOINT_METHOD, JOINT_ACCURACY_LEVEL = 8, 128, "rtn", 4

# Where 8 bits buy most per byte. On speech through the tiny checkpoint (k_quant, block 32, the ends of the graph always
# at 8) 4 bits elsewhere give 23.1 dB, 8 bits for these 31.2 dB at 13 % more bytes; values and feed-forward outputs of
# some layers, llama.cpp's choice for language models, 23.6 dB at 8 %; values, attention and feed-forward outputs of all
# layers 24.1 dB at 24 %.
EIGHT_BIT_ROLES = tuple(
    f".{role}.weight" for role in ("attention.value", "attention.out", "convolution.expand", "convolution.project")
)


@dataclass(frozen=True)
class Format:
    """How one weight is stored."""

    bits: int
    block: int | None  # weights that share a scale; None: a column


Plan = dict[str, Format]  # weight name → its format; a weight that is not in it stays float32
# weight name → bits → relative error power of the encoder's output on speech, this weight alone stored in those bits
Sensitivity = dict[str, dict[int, float]]


@dataclass(frozen=True)
class Stored:
    """How one weight was stored, and what it lost: Σ (W - Ŵ)² / Σ W²."""

    form: Format
    error: float


def load(path: Path) -> ir.Model:
    """The model at `path`, its large weights on disk. Raises ValueError if it is no ONNX model."""
    return _model(_proto(path), path.parent)


def fuse(path: Path) -> tuple[ir.Model, Counter]:
    """Run ONNX Runtime's `conformer` fusions on the model at `path`; also the number of fused nodes by operator.

    The fusions read biases, so vectors are loaded, and no matrix. Symbolic shape inference is off: it takes more than
    a second a layer, for no other result than that the Adds do not broadcast, which `compare` would notice.
    """
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    proto = _proto(path)
    for tensor in proto.graph.initializer:
        if uses_external_data(tensor) and len(tensor.dims) == 1:
            load_external_data_for_tensor(tensor, str(path.parent))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    options = FusionOptions("conformer")
    options.enable_shape_inference = False
    options.enable_attention = False  # its patterns are of attention with absolute positions
    model = _model(optimize_model(proto, "conformer", opt_level=0, optimization_options=options).model, path.parent)
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


def make_plan(weights: Iterable[str], method: str, block: int, reduce_range: bool = False) -> Plan:
    """The format of each weight (names in graph order) without calibration data. Raises ValueError if there is none."""
    weights = list(weights)
    if not weights:
        raise ValueError("wanted an encoder with float32 MatMul weights, found none: is it optimized already?")
    if method == INT8:
        return dict.fromkeys(weights, Format(REDUCED_BITS if reduce_range else WEIGHT_BITS, None))
    eight = eight_bit_weights(weights) if method == K_QUANT_MIXED else set()
    return {name: Format(8 if name in eight else 4, block) for name in weights}


def spend(model: ir.Model, graph_bytes: int, damage: Sensitivity, block: int, budget: float) -> Plan:
    """4 bits everywhere, then 8 where they take away most damage per byte, as far as `budget` bytes reach.

    damage: weight name → bits → damage (common.calibrate); graph_bytes: of the exported graph, without its data.
    Raises ValueError as `check_budget` does.
    """
    plan = check_budget(model, graph_bytes, damage, block, budget)
    low, high = BITS
    sizes = {name: _tensor_bytes(model, name, Format(high, block)) for name in plan}
    extra = {name: sum(sizes[name]) - sum(_tensor_bytes(model, name, plan[name])) for name in plan}
    for name in sorted(plan, key=lambda name: (damage[name][low] - damage[name][high]) / extra[name], reverse=True):
        richer = {**plan, name: Format(high, block)}
        if file_bytes(model, graph_bytes, richer) <= budget:
            plan = richer
    return plan


def check_budget(model: ir.Model, graph_bytes: int, weights: Iterable[str], block: int, budget: float) -> Plan:
    """The smallest plan. Raises ValueError if that takes more than `budget` bytes."""
    plan = {name: Format(min(BITS), block) for name in weights}
    smallest = file_bytes(model, graph_bytes, plan)
    if not smallest <= budget:
        raise ValueError(
            f"wanted an encoder of at most {budget / 1e6:g} MB, but 4 bits everywhere take "
            f"{math.ceil(smallest / 1e4) / 100} MB; give a larger --size_budget_mb or --block_size"
        )
    return plan


def file_bytes(model: ir.Model, graph_bytes: int, plan: Plan) -> int:
    """Bytes of graph and data once a plan with zero points has been carried out, or up to a per cent less."""
    others = (value.const_value.nbytes for name, value in model.graph.initializers.items() if name not in plan)
    packed = (size for name, form in plan.items() for size in _tensor_bytes(model, name, form))
    return graph_bytes + NODE_BYTES * len(plan) + data_bytes((*others, *packed))


def _tensor_bytes(model: ir.Model, name: str, form: Format) -> tuple[int, int, int]:
    """Codes, scales and zero points of one weight."""
    K, N = model.graph.initializers[name].const_value.shape.numpy()
    blocks = -(-K // form.block)
    return N * blocks * form.block * form.bits // 8, 4 * N * blocks, N * -(-blocks * form.bits // 8)


def eight_bit_weights(weights: list[str]) -> set[str]:
    """A rule of thumb: the roles above, and the first and last matrix of the graph, through which everything passes."""
    return {weights[0], weights[-1], *(name for name in weights if name.endswith(EIGHT_BIT_ROLES))}


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


def compare(reference: Path, optimized: Path, floor: float, graph: Graph = ENCODER) -> float:
    """Signal to quantization noise ratio in dB, over the valid frames of noise, of the encoder `graph` in folder
    `optimized` against that in `reference`. Raises CheckError below `floor`, and if shapes or lengths differ.

    One session at a time: at full size each holds gigabytes.
    """
    wanted, wanted_lengths = _encode_noise(reference, graph, mapped=True)
    try:
        # Repacked as in use: unpacked, MatMulNBits takes a float path that rounds no activations.
        found, found_lengths = _encode_noise(optimized, graph, mapped=False)
    except ValueError as error:
        raise CheckError(f"the optimized encoder does not run: {error}") from error
    if found.shape != wanted.shape or found_lengths.tolist() != wanted_lengths.tolist():
        raise CheckError(
            f"the optimized encoder gives {found.shape} and lengths {found_lengths.tolist()}, "
            f"the exported one {wanted.shape} and {wanted_lengths.tolist()}"
        )
    valid = np.arange(wanted.shape[2]) < wanted_lengths[:, None]  # [B, S]
    ratio = sqnr_db(wanted.transpose(0, 2, 1)[valid], found.transpose(0, 2, 1)[valid])
    if not ratio >= floor:
        raise CheckError(f"the optimized encoder has an SQNR of {ratio:.1f} dB, wanted {floor:.0f} dB: it is broken")
    return ratio


def _encode_noise(folder: Path, graph: Graph, *, mapped: bool) -> list[np.ndarray]:
    encoder = OrtGraph(folder, graph, mapped=mapped)
    mels = encoder.session.get_inputs()[0].shape[1]
    shape = (len(NOISE_FRAMES), mels, max(NOISE_FRAMES))
    return encoder(np.random.default_rng(0).standard_normal(shape, dtype=np.float32), np.array(NOISE_FRAMES))


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
        ratios[graph.name] = _token_sqnr(source, target, graph, vocabulary)
        if not ratios[graph.name] >= MIN_TOKEN_SQNR_DB:
            raise CheckError(
                f"the 8-bit {graph.name} has an SQNR of {ratios[graph.name]:.1f} dB, wanted {MIN_TOKEN_SQNR_DB:.0f} dB"
            )
    return ratios, stored


def _joint_block(model: ir.Model, name: str) -> int:
    """JOINT_BLOCK, or less where a column is shorter and would be padded with zeros."""
    K, _ = model.graph.initializers[name].const_value.shape.numpy()
    return next(size for size in BLOCK_SIZES if size >= min(K, JOINT_BLOCK))


def _token_sqnr(source: Path, target: Path, graph: Graph, vocabulary: int) -> float:
    """SQNR in dB of the first output for a batch of 16 random tokens, or frames and decoder outputs.

    What is the same for all of them is left out of the signal: biases of -30, of pieces that a joint never emits,
    would hide any error in the others.
    """
    wanted, found = OrtGraph(source, graph), OrtGraph(target, graph)
    inputs = wanted.noise(vocabulary, B=16, S=1, U=1)
    logits = wanted(*inputs)[0]
    constant = logits.mean(axis=0)
    return sqnr_db(logits - constant, found(*inputs)[0] - constant)


def sqnr_db(wanted: np.ndarray, found: np.ndarray) -> float:
    """10 log10(Σ wanted² / Σ (wanted - found)²); infinite where they are equal, NaN where a value is not finite."""
    signal = float(np.sum(np.square(wanted, dtype=np.float64)))
    noise = float(np.sum(np.square(wanted.astype(np.float64) - found)))
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if np.isfinite(noise) else math.nan


def _proto(path: Path) -> onnx.ModelProto:
    """The graph alone. Raises ValueError if it is none, or if the data file ends before its tensors do."""
    try:
        proto = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ValueError(f"{path} is not an ONNX model ({error}); export it again") from None
    for tensor in filter(uses_external_data, proto.graph.initializer):
        place = ExternalDataInfo(tensor)
        data = path.parent / place.location
        wanted, found = (place.offset or 0) + (place.length or 0), data.stat().st_size
        if found < wanted:
            raise ValueError(f"{data} ends after {found} bytes, {tensor.name} at {wanted}; export it again")
    return proto


def _model(proto: onnx.ModelProto, folder: Path) -> ir.Model:
    model = ir.from_proto(proto)
    model.graph.opset_imports.setdefault(MICROSOFT, 1)
    ir.external_data.set_base_dir(model.graph, folder)
    return model
