"""How each weight of an encoder is stored, and how a size budget is spent on the weights where bits help most."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from common.onnx_io import data_bytes, shape_of, tensor_of

# Bytes that a quantized product adds to the graph file: attributes, and the names and places of its tensors. Up to 500
# were measured for a MatMulNBits.
NODE_BYTES = 600


@dataclass(frozen=True)
class Format:
    """How one weight is stored."""

    bits: int
    block: int | None = None  # weights that share a scale; None: a column, or no scale at all


Plan = Mapping[str, Format]  # weight name → its format; a weight that is not in it stays float32
# weight name → bits → relative error power of the encoder's output on speech, if only this weight has these bits
Sensitivity = Mapping[str, Mapping[int, float]]
TensorBytes = Callable[[tuple[int, ...], Format], tuple[int, ...]]  # shape, format → bytes of each tensor stored


@dataclass(frozen=True)
class Stored:
    """How one weight was stored, and its relative error: Σ (W - Ŵ)² / Σ W²."""

    form: Format
    error: float


@dataclass(frozen=True)
class SizeModel:
    """Predicts the bytes of an encoder's files for any plan, without carrying it out."""

    model: ir.Model
    graph_bytes: int  # of the exported graph file, without its data
    tensor_bytes: TensorBytes
    node_bytes: int = NODE_BYTES  # that a quantized product adds to the graph file

    def total(self, plan: Plan) -> int:
        """Bytes of graph and data once `plan` has been carried out; the files may be up to a per cent smaller."""
        initializers = self.model.graph.initializers
        others = (tensor_of(value).nbytes for name, value in initializers.items() if name not in plan)
        packed = (size for name, form in plan.items() for size in self.bytes_of(name, form))
        return self.graph_bytes + self.node_bytes * len(plan) + data_bytes((*others, *packed))

    def bytes_of(self, name: str, form: Format) -> tuple[int, ...]:
        """Bytes of each tensor of one weight."""
        return self.tensor_bytes(shape_of(self.model.graph.initializers[name]), form)


def smallest_plan(sizes: SizeModel, weights: Iterable[str], low: Format, budget: float) -> Plan:
    """All weights in the format `low`. Raises ValueError if that takes more than `budget` bytes."""
    plan = dict.fromkeys(weights, low)
    smallest = sizes.total(plan)
    if not smallest <= budget:
        or_block = "" if low.block is None else " or --block_size"
        raise ValueError(
            f"expected a --size_budget_mb of at least {math.ceil(smallest / 1e4) / 100} MB, which {low.bits} bits for "
            f"every weight take, got {budget / 1e6:g} MB; give a larger --size_budget_mb{or_block}"
        )
    return plan


def spend(sizes: SizeModel, damage: Sensitivity, low: Format, high: Format, budget: float) -> Plan:
    """The format `low` for all weights, and `high` where that removes most damage per byte, as long as everything fits
    into `budget` bytes. Raises ValueError as `smallest_plan` does."""
    plan = dict(smallest_plan(sizes, damage, low, budget))
    extra = {name: sum(sizes.bytes_of(name, high)) - sum(sizes.bytes_of(name, low)) for name in plan}
    gain = {name: (damage[name][low.bits] - damage[name][high.bits]) / extra[name] for name in plan}
    for name in sorted(plan, key=gain.__getitem__, reverse=True):
        richer = {**plan, name: high}
        if sizes.total(richer) <= budget:
            plan = richer
    return plan
