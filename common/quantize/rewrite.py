"""Makes the exported encoder small and fast: its graph is fused, then its weights are quantized by a plan.

Weights are mapped, never loaded as a whole: a pass holds one tensor for each thread, and the quantized results.
"""

import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from common.cli import Stages, progress, size_text
from common.contract import encoder_weights
from common.onnx_io import computed_from, input_of, load, name_of, tensor_of
from common.quantize.fusion import fuse
from common.quantize.method import Calibrated, P, QuantMethod, WeightOptions
from common.quantize.options import OptimizeOptions
from common.quantize.plan import Plan, Sensitivity, Stored
from common.quantize.smoothing import factors_without_speech, fold

MIN_WEIGHTS = 4096  # a matrix smaller than this (16 kB) gains less than its extra tensors cost


@dataclass(frozen=True)
class OptimizedEncoder:
    """An encoder's graph as it will be written, and what was done to it."""

    model: ir.Model
    fused: Mapping[str, int]  # number of fused nodes by operator
    stored: Mapping[str, Stored]  # the quantized weights, by name
    sensitivity: Sensitivity | None  # damage of each weight to the output, where calibration measured it

    @property
    def weights_by_bits(self) -> dict[int, int]:
        """Number of quantized weights by width, the smallest first."""
        return dict(sorted(Counter(stored.form.bits for stored in self.stored.values()).items()))


def optimize_graph(path: Path, options: OptimizeOptions, device: str, calibrated: Calibrated[P] | None,
                   stages: Stages) -> OptimizedEncoder:  # fmt: skip
    """Fuse and quantize the float32 encoder at `path`, exported for `device`, in two of `stages`.

    calibrated: from `QuantMethod.calibrate`, of the same checkpoint; None without speech.
    Raises ValueError where the encoder has no float32 matrix, or one whose role is not declared.
    """
    stages.begin("fusion")
    model, fused = fuse(path) if options.fuses(device) else (load(path), Counter[str]())
    stages.end(_fusion_text(fused, options, device), details=[f"{len(model.graph)} nodes"])
    stages.begin(f"quantization ({options.description})" if options.method else "quantization")
    plan: Plan = {}
    factors: Mapping[str, np.ndarray] = {}
    stored: dict[str, Stored] = {}
    initializers, method = model.graph.initializers, options.method
    if method:
        plan = calibrated.plan if calibrated else plan_encoder(model, method, options)
        factors = calibrated.factors if calibrated else factors_without_speech(model, plan)
        fold(model, factors)
    float32_bytes = sum(tensor_of(value).nbytes for name, value in initializers.items() if name not in plan)
    if method:
        stored = quantize_weights(model, plan, method, options, calibrated.weights if calibrated else {})
    encoder = OptimizedEncoder(model, fused, stored, calibrated.sensitivity if calibrated else None)
    counts = "  ".join(f"{count} weights at {bits} bits" for bits, count in encoder.weights_by_bits.items())
    scaled = [f"input channels of {len(factors)} weights scaled"] if options.method else []
    stages.end(counts or "skipped", details=[*scaled, f"{size_text(float32_bytes)} left float32"])
    return encoder


def _fusion_text(fused: Mapping[str, int], options: OptimizeOptions, device: str) -> str:
    if options.skip_fusion:
        return "skipped"
    if not options.fuses(device):
        return f"none: on a CPU, {options.quant_method} is faster without"
    return "  ".join(f"{count} {operator}" for operator, count in fused.items()) or "nothing to fuse"


def plan_encoder(model: ir.Model, method: QuantMethod[P], options: WeightOptions) -> Plan:
    """The format of each weight of an encoder, without calibration.

    Raises ValueError where there is no weight to quantize, and as `contract.encoder_weights` does.
    """
    weights = encoder_weights(matrices(model))
    large = quantizable(model)
    if not large:
        raise ValueError("expected an encoder with float32 MatMul weights, got one without; is it optimized already?")
    return method.plan({name: weights[name] for name in large}, options)


def matrices(model: ir.Model) -> dict[str, list[ir.Node]]:
    """Name of each constant float32 matrix → the MatMuls that multiply by it, in graph order.

    Products of two activations have no constant matrix, and Conv weights are not matrices.
    """
    products: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        if (node.op_type, node.domain) != ("MatMul", ""):
            continue
        weight = input_of(node, 1)
        tensor = weight.const_value if weight.is_initializer() else None
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 2:
            products.setdefault(name_of(weight), []).append(node)
    return products


def quantizable(model: ir.Model) -> dict[str, list[ir.Node]]:
    """The matrices that are large enough to gain from quantization; in the form of `matrices`."""
    initializers = model.graph.initializers
    return {name: nodes for name, nodes in matrices(model).items() if tensor_of(initializers[name]).size >= MIN_WEIGHTS}


def quantize_weights(model: ir.Model, plan: Plan, method: QuantMethod[P], options: WeightOptions,
                     fitted: Mapping[str, P]) -> dict[str, Stored]:  # fmt: skip
    """Store the weights of `plan` in place, in the form of `method`. fitted: weights that are packed already."""
    products, initializers = matrices(model), model.graph.initializers
    weights = {name: initializers[name] for name in plan}
    replace = method.replace(model, options)

    def pack(name: str) -> P:
        if name in fitted:
            return fitted[name]
        return computed_from(weights[name], lambda weight: method.pack(weight, plan[name]))

    stored = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy releases Python's lock
        packed_weights = progress(pool.map(pack, plan), total=len(plan), task="quantizing", unit="weight")
        for name, packed in zip(plan, packed_weights, strict=True):
            replace(products[name], name, packed, plan[name])
            stored[name] = Stored(plan[name], packed.error)
    RemoveUnusedNodesPass()(model)  # the float32 weights, and factors that went into scales
    return stored
