"""XXX docstring of quantize.plan"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from common.folder.onnx_files import data_bytes
from common.quantize.blocks import BITS, METHODS
from common.quantize.int8 import REDUCED_BITS, WEIGHT_BITS

# What a MatMulNBits adds to the graph file: attributes, the names and places of three tensors; up to 500 were measured.
NODE_BYTES = 600
K_QUANT_MIXED = "k_quant_mixed"  # the method that spends 8 bits where they matter
INT8 = "int8"  # the method of common.int8, beside those of MatMulNBits
QUANT_METHODS = (*METHODS, INT8)
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
