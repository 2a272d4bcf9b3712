"""A quantization method: an object that says how weights are stored, packs them, and puts them into the graph.

The package registers each once; the choices of `--quant_method`, its help, the checks of flags and the tests follow
from the registry. There are two kinds: MatMulNBits (matmul_nbits.py), with three ways to find the codes, and integer
products (int8.py). `docs/architecture.md` shows how to add one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import onnx_ir as ir

from common.contract import EncoderWeight
from common.quantize.plan import Format, Plan, Sensitivity


class PackedWeight(Protocol):
    """A weight matrix in the form in which a method stores it."""

    @property
    def error(self) -> float:
        """The relative error of the stored weight: Σ (W - Ŵ)² / Σ W²."""


P = TypeVar("P", bound=PackedWeight)


@dataclass(frozen=True)
class WeightOptions:
    """The flags that a method needs to know."""

    block_size: int = 32  # weights that share a scale
    accuracy_level: int = 4  # of MatMulNBits
    weight_bits: int = 8  # of integers in the file
    reduce_range: bool = False  # integers of 7 bits instead of 8
    size_budget_mb: float | None = None  # of encoder.onnx and its data, in 10^6 bytes


@dataclass(frozen=True)
class Calibrated(Generic[P]):
    """The result of calibration: how speech says that an encoder's weights should be stored."""

    plan: Plan
    weights: Mapping[str, P]  # each weight of the plan, fitted to its inputs on speech
    # Row factors [K, 1] of those weights whose input channels are scaled; `smoothing.fold` puts them into the graph.
    factors: Mapping[str, np.ndarray] = field(default_factory=dict)
    sensitivity: Sensitivity | None = None  # where it was measured

    def summary(self) -> list[str]:
        """What to tell the user, as the fields of one line."""
        if not self.sensitivity:
            return []
        damage = {name: widths[min(widths)] for name, widths in self.sensitivity.items()}
        worst = max(damage, key=damage.__getitem__)
        share = 100 * damage[worst] / max(sum(damage.values()), 1e-30)
        bits = min(self.sensitivity[worst])
        return [f"{worst} is most sensitive to {bits} bits ({share:.0f} % of the error of all weights)"]


# Puts packed weights into one graph. Called for each weight in graph order with the MatMul nodes that multiply by it,
# its name and its packed form.
Replace = Callable[[Sequence[ir.Node], str, P, Format], None]


@dataclass(frozen=True, kw_only=True)
class QuantMethod(ABC, Generic[P]):
    """One value of --quant_method."""

    name: str
    help: str  # a clause that follows the name and a colon
    uses_blocks: bool = False  # whether --block_size and --accuracy_level apply
    weight_bits: tuple[int, ...] = ()  # the values that --weight_bits may have, where it applies
    reduces_range: bool = False  # whether --reduce_range applies
    calibrates: bool = False  # whether it fits weights to --calibration_manifest
    has_size_budget: bool = False  # whether --size_budget_mb applies, which needs calibration
    fused_on_cpu: bool = True  # whether the graph of a folder for a CPU is fused unless --skip_fusion says otherwise
    unfused_gain_on_cpu: str = ""  # how much faster --skip_fusion makes it on a CPU, where that was measured

    @abstractmethod
    def plan(self, weights: Mapping[str, EncoderWeight], options: WeightOptions) -> Plan:
        """The format of each weight, without calibration. weights: of one encoder, by name, in graph order."""

    @abstractmethod
    def pack(self, weight: np.ndarray, form: Format) -> P:
        """A weight [K, N] in the form that is stored. Called from several threads."""

    @abstractmethod
    def replace(self, model: ir.Model, options: WeightOptions) -> Replace[P]:
        """The function that puts the packed weights into `model`, in place."""

    def calibrate(self, encoder: Path, batches: Sequence[np.ndarray], options: WeightOptions) -> Calibrated[P]:
        """Fit the weights of the float32 graph at `encoder` to speech: features [B, M, T] of each batch."""
        raise NotImplementedError(f"{self.name} does not calibrate")

    def uncalibrated_advice(self, options: WeightOptions) -> str | None:
        """A line for the user who gave no --calibration_manifest, where that costs much accuracy."""
        return None

    def runs_as(self, bits: Collection[int]) -> str:
        """How weights that are stored in these bits are multiplied, in words for the report and the model card."""
        return ""

    def describe(self, options: WeightOptions) -> str:
        """The method in one line of output: `rtn, block 32`."""
        return f"{self.name}, block {options.block_size}" if self.uses_blocks else self.name


METHODS: dict[str, QuantMethod[Any]] = {}  # by name, in the order of the help


def register(method: QuantMethod[P]) -> QuantMethod[P]:
    """Add a method to the registry. Raises ValueError where another has its name."""
    if method.name in METHODS:
        raise ValueError(f"expected a new name for a quantization method, got {method.name}, which is taken")
    METHODS[method.name] = method
    return method
