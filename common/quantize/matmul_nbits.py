"""Weights of 4 and 8 bits in blocks, for ONNX Runtime's MatMulNBits: the methods rtn, k_quant_mixed and hqq."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from common.contract import MICROSOFT, EncoderWeight, Role
from common.onnx_io import add_initializer, input_of, load, shape_of
from common.quantize.blocks import (
    BITS,
    Fitter,
    Packed,
    ceil_div,
    hqq,
    k_quant,
    quantize,
    quantize_compensated,
    rtn,
)
from common.quantize.calibration import ObservedProduct, calibrated_products
from common.quantize.method import Calibrated, QuantMethod, Replace, WeightOptions
from common.quantize.moments import error_feedback
from common.quantize.plan import Format, Plan, Sensitivity, SizeModel, smallest_plan, spend
from common.quantize.rewrite import plan_encoder

LOW, HIGH = BITS
# The roles where 8 bits gain most per byte. On speech through the tiny checkpoint (k_quant, block 32, the ends of the
# graph always at 8 bits), 4 bits elsewhere give 23.1 dB, and 8 bits for these roles 31.2 dB at 13 % more bytes. Values
# and feed-forward outputs of some layers, llama.cpp's choice for language models, give 23.6 dB at 8 %; values,
# attention and feed-forward outputs of all layers give 24.1 dB at 24 %.
EIGHT_BIT_ROLES = (
    Role.ATTENTION_VALUE,
    Role.ATTENTION_OUT,
    Role.CONVOLUTION_EXPAND,
    Role.CONVOLUTION_PROJECT,
)


@dataclass(frozen=True, kw_only=True)
class BlockMethod(QuantMethod[Packed]):
    """4 bits for every weight; the codes of a block are found by `fit`."""

    fit: Fitter
    uses_blocks: bool = True
    unfused_gain_on_cpu: str = "6 to 10 %"  # of the time of an encoder in 4 bits: see fusion.py

    def plan(self, weights: Mapping[str, EncoderWeight], options: WeightOptions) -> Plan:
        return dict.fromkeys(weights, Format(LOW, options.block_size))

    def pack(self, weight: np.ndarray, form: Format) -> Packed:
        return quantize(weight, form.bits, block_of(form), self.fit)

    def replace(self, model: ir.Model, options: WeightOptions) -> Replace[Packed]:
        def put(nodes: Sequence[ir.Node], name: str, packed: Packed, form: Format) -> None:
            tensors = (ir.tensor(array, name=f"{name}.{part}") for part, array in packed.tensors())
            constants = [add_initializer(model.graph, tensor) for tensor in tensors]
            for node in nodes:
                _replace_node(model.graph, node, constants, form, options.accuracy_level)

        return put


def block_of(form: Format) -> int:
    """The block size of a format that has one."""
    if form.block is None:
        raise ValueError(f"expected a block size for a weight of {form.bits} bits, got none")
    return form.block


def tensor_bytes(shape: tuple[int, ...], form: Format) -> tuple[int, int, int]:
    """Bytes of codes, scales and zero points of a weight [K, N]."""
    (K, N), block = shape, block_of(form)
    blocks = ceil_div(K, block)
    return N * blocks * block * form.bits // 8, 4 * N * blocks, N * ceil_div(blocks * form.bits, 8)


def _replace_node(graph: ir.Graph, node: ir.Node, constants: list[ir.Value], form: Format, accuracy_level: int) -> None:
    K, N = shape_of(input_of(node, 1))
    numbers = {"K": K, "N": N, "bits": form.bits, "block_size": block_of(form), "accuracy_level": accuracy_level}
    new = ir.Node(
        MICROSOFT,
        "MatMulNBits",
        [node.inputs[0], *constants],
        [ir.AttrInt64(name, number) for name, number in numbers.items()],
        name=node.name,
    )
    ir.convenience.replace_nodes_and_values(graph, node, [node], [new], node.outputs, new.outputs)


@dataclass(frozen=True)
class FittedWeight:
    """One weight at one width, fitted to speech: its stored form, and the damage that it alone does to the encoder's
    output y, Σ (y - ŷ)² / Σ y²."""

    packed: Packed
    damage: float


@dataclass(frozen=True)
class FittedWidths:
    """Each weight in both widths: by name, in graph order, and then by bits."""

    weights: dict[str, dict[int, FittedWeight]]
    factors: dict[str, np.ndarray]  # [K, 1], of the rows of the weights whose input channels are scaled

    @property
    def sensitivity(self) -> Sensitivity:
        return {name: {bits: one.damage for bits, one in widths.items()} for name, widths in self.weights.items()}


def fit_widths(encoder: Path, batches: Sequence[np.ndarray], block: int) -> FittedWidths:
    """Fit each quantizable weight of the float32 graph at `encoder` to features [B, M, T] of speech, in both widths."""
    fitted = FittedWidths({}, {})
    for product in calibrated_products(encoder, batches):
        fitted.weights[product.name] = _fit_product(product, block)
        if product.scaled:
            fitted.factors[product.name] = product.factors
    return fitted


def _fit_product(product: ObservedProduct, block: int) -> dict[int, FittedWeight]:
    feedback = error_feedback(product.moments)

    def fit(bits: int) -> tuple[Packed, np.ndarray]:
        return quantize_compensated(product.weight, bits, block, k_quant, feedback, product.factors)

    with ThreadPoolExecutor(len(BITS)) as pool:
        packed, errors = zip(*pool.map(fit, BITS), strict=True)
    damages = product.damages(dict(zip(BITS, errors, strict=True)))
    return {bits: FittedWeight(codes, damages[bits]) for bits, codes in zip(BITS, packed, strict=True)}


@dataclass(frozen=True, kw_only=True)
class MixedBlockMethod(BlockMethod):
    """4 bits, and 8 where a rule, or a measurement on speech, says that they help most."""

    calibrates: bool = True
    has_size_budget: bool = True

    def plan(self, weights: Mapping[str, EncoderWeight], options: WeightOptions) -> Plan:
        """8 bits for EIGHT_BIT_ROLES, and for the first and last matrix, through which everything passes."""
        ends = (next(iter(weights)), next(reversed(list(weights))))
        eight = {name for name, weight in weights.items() if weight.role in EIGHT_BIT_ROLES or name in ends}
        return {name: Format(HIGH if name in eight else LOW, options.block_size) for name in weights}

    def calibrate(self, encoder: Path, batches: Sequence[np.ndarray], options: WeightOptions) -> Calibrated[Packed]:
        """Spend the size budget, or as many bytes as `plan` needs, where they help most. Raises ValueError for a budget
        that is exceeded even with 4 bits for every weight."""
        model, low, high = load(encoder), Format(LOW, options.block_size), Format(HIGH, options.block_size)
        sizes = SizeModel(model, encoder.stat().st_size, tensor_bytes)
        rule = plan_encoder(model, self, options)
        budget = sizes.total(rule) if options.size_budget_mb is None else options.size_budget_mb * 1e6
        smallest_plan(sizes, rule, low, budget)  # raises ValueError before the long work begins
        fitted = fit_widths(encoder, batches, options.block_size)
        plan = spend(sizes, fitted.sensitivity, low, high, budget)
        weights = {name: fitted.weights[name][form.bits].packed for name, form in plan.items()}
        return Calibrated(plan, weights, fitted.factors, fitted.sensitivity)


RTN = BlockMethod(name="rtn", fit=rtn, help="4 bits, rounded to nearest with a searched scale")
K_QUANT_MIXED = MixedBlockMethod(
    name="k_quant_mixed",
    fit=k_quant,
    help="4 bits with zero points by llama.cpp's search, and 8 bits where they matter most",
)
HQQ = BlockMethod(
    name="hqq",
    fit=hqq,
    help="4 bits with whole zero points by half-quadratic optimization; the slowest to make",
)
