"""Makes the exported encoder small and fast: its graph is fused, then its weights are quantized by a plan.

Before weights are quantized, channels are scaled, as in SmoothQuant (Xiao et al. 2022) and AWQ (Lin et al. 2023). Each
channel of a LayerNormalization's output is divided by a factor, and the row of each weight that this channel goes into
is multiplied by it, so that channels differ less in magnitude. The function stays the same, and nothing is added to the
graph: the factors go into the normalization's own scale and bias. Weights that are ternary in groups are left alone.

Weights are mapped, never loaded as a whole: a pass holds one tensor for each thread, and the quantized results.
"""

import os
from collections import Counter
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx.external_data_helper import uses_external_data
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from common.cli import Stages, progress
from common.contract import MICROSOFT, encoder_weight
from common.onnx_io import load, model_of, read_proto
from common.quantize.methods import Format, OptimizeOptions, Plan, QuantMethod, Sensitivity, Weight
from common.quantize.rounding import GROUPS, TERNARY_BITS, Packed, ternary_group

MIN_WEIGHTS = 4096  # a matrix smaller than this (16 kB) gains less than its extra tensors cost
# Where the scale is among the inputs, by operator; the bias follows it.
SCALE_INPUT = {"LayerNormalization": 1, "SkipLayerNormalization": 2}
MIN_FACTOR = 1e-2  # of the largest: a channel that is silent on this speech may not be silent on other speech
# How far the magnitudes of a channel and of the weight rows that it goes into are brought together: half way, where
# they meet, as in SmoothQuant.
SMOOTHING = 0.5
MIN_ROW_POWER = 1e-6  # of the mean: a row of zeros would have an infinite factor


@dataclass(frozen=True)
class Stored:
    """How one weight was stored, and its relative error: Σ (W - Ŵ)² / Σ W²."""

    form: Format
    error: float


@dataclass(frozen=True)
class Calibrated:
    """How an encoder's weights should be stored, as speech says."""

    plan: Plan
    weights: Mapping[str, Packed] = field(default_factory=dict)  # weights of the plan, fitted to their inputs on speech
    factors: Mapping[str, np.ndarray] = field(default_factory=dict)  # of the rows of weights that are scaled, [K, 1]
    sensitivity: Sensitivity = field(default_factory=dict)  # empty where it was not measured


@dataclass(frozen=True)
class OptimizedEncoder:
    """An encoder's graph as it will be written, and what was done to it."""

    model: ir.Model
    fused: Mapping[str, int]  # number of fused nodes by operator
    stored: Mapping[str, Stored]  # the quantized weights, by name

    @property
    def weights_by_bits(self) -> dict[int, int]:
        """Number of quantized weights by width, the smallest first."""
        return dict(sorted(Counter(stored.form.bits for stored in self.stored.values()).items()))


def optimize_graph(path: Path, options: OptimizeOptions, device: str, calibrated: Calibrated | None,
                   stages: Stages) -> OptimizedEncoder:  # fmt: skip
    """Fuse and quantize the float32 encoder at `path`, exported for `device`, in two of `stages`.

    calibrated: by `calibrate`, of the same checkpoint; None without speech. Raises ValueError as `plan_encoder` does.
    """
    stages.begin("fusion")
    model, fused = fuse(path) if options.fuses(device) else (load(path), Counter[str]())
    found = "  ".join(f"{count} {operator}" for operator, count in fused.items()) or "nothing to fuse"
    if not options.fuses(device):
        found = "skipped" if options.skip_fusion else f"none: on a CPU, {options.quant_method} is faster without it"
    stages.end(found, details=[f"{len(model.graph)} nodes"])
    stages.begin(f"quantization ({options.description})" if options.method else "quantization")
    encoder, details = OptimizedEncoder(model, fused, {}), []
    if options.method:
        if calibrated is None:
            plan = plan_encoder(model, options.method, options)
            calibrated = Calibrated(plan, factors=factors_without_speech(model, scalable(plan)))
        fold(model, calibrated.factors)
        stored = quantize_weights(model, calibrated.plan, options.method, options, calibrated.weights)
        encoder = OptimizedEncoder(model, fused, stored)
        details = [f"input channels of {len(calibrated.factors)} weights scaled"]
    counts = "  ".join(f"{count} weights at {bits} bits" for bits, count in encoder.weights_by_bits.items())
    stages.end(counts or "skipped", details=details)
    return encoder


def fuse(path: Path) -> tuple[ir.Model, Counter[str]]:
    """The model at `path`, fused by ONNX Runtime's `conformer`: each residual Add and the normalization after it become
    one operator. Also returns the number of fused nodes by operator.

    SkipLayerNormalization saves kernel launches on CUDA. On the CPU it takes 0.7 to 1 ms longer than Add and
    LayerNormalization (onnxruntime 1.32, [250, 1024]); there are 96 of them, 6 to 10 % of a 4-bit encoder's time.

    The fusions read biases, so vectors are loaded, but matrices are not. Symbolic shape inference is off: it takes more
    than a second a layer, and shows only that the Adds do not broadcast; if one did, `fidelity.compare` would notice.
    """
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    proto = read_proto(path)
    for tensor in proto.graph.initializer:
        if uses_external_data(tensor) and len(tensor.dims) == 1:
            tensor.raw_data = ir.from_proto(tensor).tobytes()
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    options = FusionOptions("conformer")
    options.enable_shape_inference = False
    options.enable_attention = False  # its patterns are of attention with absolute positions
    # Patterns that the exported encoder does not have; the search for them takes three quarters of the time.
    options.enable_rotary_embeddings = options.enable_embed_layer_norm = options.enable_qordered_matmul = False
    options.enable_gelu = options.enable_bias_gelu = False
    model = model_of(optimize_model(proto, "conformer", opt_level=0, optimization_options=options).model)
    return model, Counter(node.op_type for node in model.graph if node.domain == MICROSOFT)


def plan_encoder(model: ir.Model, method: QuantMethod, options: OptimizeOptions) -> Plan:
    """The format of each weight of an encoder, without calibration.

    Raises ValueError where there is no weight to quantize, where `options` say that the layers' matrices are all
    ternary and one is not, and as `contract.encoder_weight` does.
    """
    weights = quantizable(model)
    roles = {name: encoder_weight(name) for name in weights}
    if not weights:
        raise ValueError("this encoder has no float32 matrices to quantize; is it optimized already?")
    plan = dict(method.plan(roles, options))
    if method.ternary_format(GROUPS[0], options) is None:
        return plan
    for name, weight in weights.items():
        group = weight.read(ternary_group)
        if group is None and options.insists_on_ternary and roles[name].layer is not None:
            raise ValueError(
                f"--weight_bits {TERNARY_BITS} is for ternary checkpoints such as parakeet-redux, and {name} has more "
                f"values than −m, 0 and m in {GROUPS[0]} rows of a column; leave --weight_bits out"
            )
        form = None if group is None else method.ternary_format(group, options)
        plan[name] = plan[name] if form is None else form
    return plan


def scalable(plan: Plan) -> list[str]:
    """The weights of a plan whose rows may be scaled: all but the ternary ones, whose groups have one magnitude."""
    return [name for name, form in plan.items() if form.bits != TERNARY_BITS]


def quantizable(model: ir.Model) -> dict[str, Weight]:
    """The constant float32 matrices of MIN_WEIGHTS or more that MatMuls multiply by, by name, in graph order.

    Products of two activations have no constant matrix, and Conv weights are not matrices.
    """
    weights: dict[str, Weight] = {}
    for node in model.graph:
        value = node.inputs[1] if (node.op_type, node.domain) == ("MatMul", "") else None
        if value is None or value.name is None or value.const_value is None or not value.is_initializer():
            continue
        tensor = value.const_value
        if tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 2 and tensor.size >= MIN_WEIGHTS:
            weights.setdefault(value.name, Weight(value.name, value, tensor, [])).products.append(node)
    return weights


def constant_factor(y: ir.Value) -> tuple[ir.Node, np.ndarray] | None:
    """The node that multiplies y by a number, and that number, without axes; None if y is used in any other way."""
    if len(y.uses()) != 1 or y.is_graph_output():
        return None
    user = next(iter(y.uses())).node
    if (user.op_type, user.domain) != ("Mul", ""):
        return None
    others = [value for value in user.inputs if value is not None and value is not y]
    tensors = [ir.convenience.get_const_tensor(value) for value in others]
    if len(tensors) != 1 or tensors[0] is None or len(tensors[0].shape) != 0:
        return None
    return user, tensors[0].numpy().astype(np.float32)


def quantize_weights(model: ir.Model, plan: Plan, method: QuantMethod, options: OptimizeOptions,
                     fitted: Mapping[str, Packed]) -> dict[str, Stored]:  # fmt: skip
    """Store the weights of `plan` in place, in the form of `method`. fitted: weights that are packed already."""
    weights = quantizable(model)
    replace = method.replace(model, options)

    def pack(name: str) -> Packed:
        if name in fitted:
            return fitted[name]
        return weights[name].read(lambda weight: method.pack(weight, plan[name]))

    stored = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy releases Python's lock
        packed_weights = progress(pool.map(pack, plan), total=len(plan), task="quantizing", unit="weight")
        for name, packed in zip(plan, packed_weights, strict=True):
            replace(weights[name], packed, plan[name])
            stored[name] = Stored(plan[name], packed.error)
    RemoveUnusedNodesPass()(model)  # the float32 weights, and factors that went into scales
    return stored


def row_factors(power: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Σ x² of each input of products, and Σ W² of the row that it goes into, [K] → the factors of the rows, [K, 1]: the
    root mean square of the input divided by the row's, to the power SMOOTHING, scaled so that the largest factor is 1.

    If a checkpoint has a channel times s and its rows divided by s, the factors undo that, whatever s is.
    """
    ratios = power / np.maximum(rows, MIN_ROW_POWER * np.mean(rows) + 1e-30)
    factors = (ratios / max(ratios.max(), 1e-30)) ** (SMOOTHING / 2)
    return np.asarray(np.maximum(factors, MIN_FACTOR), np.float32)[:, None]


def row_powers(model: ir.Model, weights: Collection[str]) -> dict[str, np.ndarray]:
    """Σ W² of each row, [K], summed over all weights that follow the same normalization; for those that follow one."""

    def power(weight: np.ndarray) -> np.ndarray:
        return np.asarray(np.einsum("kn,kn->k", weight, weight))

    powers: dict[str, np.ndarray] = {}
    matrices = quantizable(model)
    for names in normalized_inputs(model, weights).values():
        parts = [matrices[name].read(power) for name in names]
        powers |= dict.fromkeys(names, np.sum(parts, axis=0))
    return powers


def factors_without_speech(model: ir.Model, weights: Collection[str]) -> dict[str, np.ndarray]:
    """Row factors [K, 1] of the weights that follow a normalization, from the parameters of the graph alone: a channel
    with scale γ and bias β has a mean square of about γ² + β²."""
    rows = row_powers(model, weights)
    factors: dict[str, np.ndarray] = {}
    for node, names in normalized_inputs(model, weights).items():
        parameters = [array for _, _, array in parameters_of(node)]
        factors |= dict.fromkeys(names, row_factors(np.sum(np.square(parameters), axis=0), rows[names[0]]))
    return factors


def normalized_inputs(model: ir.Model, weights: Collection[str]) -> dict[ir.Node, list[str]]:
    """Normalizations whose output goes only into products with some of the weights → those weights."""
    nodes = (node for node in model.graph if node.op_type in SCALE_INPUT)
    return {node: names for node in nodes if (names := _multiplied_by(node.outputs[0], weights))}


def _multiplied_by(x: ir.Value, weights: Collection[str]) -> list[str]:
    """The weights that multiply x and nothing else; none if x is used in any other way. Transposes that leave the last
    axis where it is are passed."""
    names: list[str] = []
    for node in (use.node for use in x.uses()):
        behind: list[str] = []
        if node.op_type == "Transpose":
            axes = node.attributes["perm"].as_ints()
            behind = _multiplied_by(node.outputs[0], weights) if axes[-1] == len(axes) - 1 else []
        elif node.op_type == "MatMul":
            weight = node.inputs[1]
            name = weight.name if weight is not None and len(weight.uses()) == 1 else None
            behind = [name] if name is not None and name in weights else []
        if not behind:
            return []
        names += behind
    return [] if x.is_graph_output() else names


def fold(model: ir.Model, factors: Mapping[str, np.ndarray]) -> None:
    """Divide the inputs of the products with these weights by the row factors and multiply the weights by them, in
    place: the function stays the same. A weight is multiplied each time that it is read, and the result is not kept.

    factors: weight name → [K, 1]; weights that follow the same normalization have equal factors.
    Raises ValueError where a weight has no normalization before it: the factors were computed from another graph.
    """
    normalized = normalized_inputs(model, factors)
    left = set(factors) - {name for names in normalized.values() for name in names}
    if left:
        raise ValueError(f"{min(left)} has no normalization before it; the factors are of another graph")
    weights = quantizable(model)
    for node, names in normalized.items():
        for i, value, array in parameters_of(node):
            divided = array / factors[names[0]][:, 0]
            if len(value.uses()) > 1:  # another normalization has the same numbers
                tensor = ir.tensor(divided, name=f"{names[0]}.smoothed.{i}")
                node.replace_input_with(i, Tape(model.graph).initializer(tensor))
            else:
                value.const_value = ir.tensor(divided, name=value.name)
        for name in names:
            product = partial(_times, weights[name], factors[name])
            shape = ir.Shape(weights[name].shape)
            weights[name].value.const_value = ir.LazyTensor(product, ir.DataType.FLOAT, shape, name=name)


def parameters_of(node: ir.Node) -> list[tuple[int, ir.Value, np.ndarray]]:
    """Scale and bias of a normalization: place among the inputs, value, and content; it may have no bias."""
    first = SCALE_INPUT[node.op_type]
    return [
        (i, value, value.const_value.numpy())
        for i, value in enumerate(node.inputs[first : first + 2], first)
        if value is not None and value.const_value is not None
    ]


def _times(weight: Weight, factors: np.ndarray) -> ir.TensorProtocol:
    return ir.tensor(weight.read(lambda array: array * factors), name=weight.name)
