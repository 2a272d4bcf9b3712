"""Quantization methods and the flags that choose among them.

A method is an object that says how weights are stored, packs them, and puts them into the graph. The package registers
each once; the choices of `--quant_method`, its help, the checks of flags and the tests follow from the registry. There
are two kinds: MatMulNBits (blocks.py), with three ways to find the codes, and integer products (int8.py).
`docs/architecture.md` shows how to add one.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir

from common.contract import EncoderWeight
from common.quantize.rounding import LOW_BITS, TERNARY_BITS, InputMoments, Packed

TOKEN_PRECISIONS = ("fp32", "int8")
EVERY_CPU = "every CPU"
VNNI_ALONE = (
    "CPUs with VNNI (Intel since Ice Lake, AMD since Zen 4) and ARM; on other x86 CPUs sums of its products overflow "
    "without an error, and words are lost"
)
# Not recorded as flags: of the clip lists the checksums are recorded, and the limit is in the report.
NOT_RECORDED = ("calibration_manifest", "eval_manifest", "max_wer_increase")
T = TypeVar("T")


@dataclass(frozen=True)
class Format:
    """How one weight is stored."""

    bits: int
    block: int = 0  # weights that share a scale, or a multiplier if they are ternary; 0: a column, or no scale at all
    full_range: bool = False  # of 8 bits, for CPUs that sum all products of 8 bits exactly: see rounding.py


@dataclass(frozen=True)
class Weight:
    """A constant float32 matrix of a graph, and the MatMuls that multiply by it."""

    name: str
    value: ir.Value
    tensor: ir.TensorProtocol
    products: list[ir.Node]  # in graph order

    @property
    def shape(self) -> tuple[int, int]:
        """K, N"""
        K, N = self.tensor.shape.numpy()
        return K, N

    def read(self, function: Callable[[np.ndarray], T]) -> T:
        """`function` of the matrix. Its data file is mapped only for that, so the result must not view it."""
        try:
            return function(self.tensor.numpy())  # not kept in a variable: a mapping that is viewed cannot be closed
        finally:
            if isinstance(self.tensor, ir.ExternalTensor):
                self.tensor.release()


Plan = Mapping[str, Format]  # weight name → its format; a weight that is not in it stays float32
# weight name → bits → relative error power of the encoder's output on speech, if only this weight has these bits
Sensitivity = Mapping[str, Mapping[int, float]]
# Puts a packed weight of this format into one graph, in place of the MatMuls. Called for each weight in graph order.
Replace = Callable[[Weight, Packed, Format], None]


@dataclass(frozen=True, kw_only=True)
class QuantMethod(ABC):
    """One value of --quant_method."""

    name: str
    help: str  # a clause that follows the name and a colon
    uses_blocks: bool = False  # whether --block_size and --accuracy_level apply
    weight_bits: tuple[int, ...] = ()  # the values that --weight_bits may have, where it applies
    has_range: bool = False  # whether --full_range applies
    calibrates: bool = False  # whether it fits weights to --calibration_manifest, and keeps to --size_budget_mb
    fused_on_cpu: bool = True  # whether the graph of a folder for a CPU is fused unless --skip_fusion says otherwise

    @abstractmethod
    def plan(self, weights: Mapping[str, EncoderWeight], options: "OptimizeOptions") -> Plan:
        """The format of each weight, without calibration. weights: of one encoder, by name, in graph order."""

    def ternary_format(self, group: int, options: "OptimizeOptions") -> Format | None:
        """The format of a weight that is ternary in groups of `group` rows; None: as for any other weight."""
        return None

    @abstractmethod
    def pack(self, weight: np.ndarray, form: Format) -> Packed:
        """A weight [K, N] in the form that is stored. Called from several threads."""

    @abstractmethod
    def replace(self, model: ir.Model, options: "OptimizeOptions") -> Replace:
        """The function that puts the packed weights into `model`, in place."""

    def runs_as(self, bits: Collection[int]) -> str:
        """How weights that are stored in these bits are multiplied, in words for the report and the model card."""
        return ""


@dataclass(frozen=True, kw_only=True)
class FittingMethod(QuantMethod):
    """A method whose weights can be fitted to speech; `calibrates` says whether they are."""

    fits_in_sequence: bool = False  # each weight to what the rounded ones before it give; else each by itself
    node_bytes: int = 600  # that a quantized product adds to the graph file; up to 500 were measured for a MatMulNBits

    @abstractmethod
    def widths(self, options: "OptimizeOptions") -> tuple[Format, Format]:
        """The formats between which a budget chooses."""

    @abstractmethod
    def stored_bytes(self, shape: tuple[int, ...], form: Format) -> tuple[int, ...]:
        """Bytes of each tensor of a weight [K, N]."""

    @abstractmethod
    def fit(
        self, weight: np.ndarray, form: Format, inputs: InputMoments, factors: np.ndarray, missing: np.ndarray | None
    ) -> tuple[Packed, np.ndarray]:
        """A weight [K, N] in the form that is stored, its rows multiplied by `factors` [K, 1], such that products with
        these inputs change least; and what it becomes by that, [K, N], divided by the factors again.

        missing: xᵀ times what the product lacks because of earlier weights, [K, N], if they are rounded.
        """


METHODS: dict[str, QuantMethod] = {}  # by name, in the order of the help


def register(method: QuantMethod) -> QuantMethod:
    """Add a method to the registry. Raises ValueError where another has its name."""
    if method.name in METHODS:
        raise ValueError(f"there is a quantization method called {method.name} already")
    METHODS[method.name] = method
    return method


@dataclass(frozen=True)
class OptimizeOptions:
    """Each flag that decides what is done, under its own name."""

    quant_method: str = "rtn"
    block_size: int = 32  # weights that share a scale
    accuracy_level: int = 4  # of MatMulNBits
    weight_bits: int = 8  # of integers in the file
    full_range: bool = False  # of 8-bit integers, for CPUs with VNNI
    size_budget_mb: float | None = None  # of encoder.onnx and its data, in 10^6 bytes
    decoder_joint_precision: str = TOKEN_PRECISIONS[0]
    skip_fusion: bool = False
    skip_quantization: bool = False
    single_file: bool = False  # the encoder's weights are in encoder.onnx
    calibration_manifest: Path | None = None
    eval_manifest: Path | None = None
    max_wer_increase: float | None = None

    @property
    def method(self) -> QuantMethod | None:
        """How the encoder's weights are stored; None leaves them float32."""
        return None if self.skip_quantization else METHODS[self.quant_method]

    @property
    def int8_tokens(self) -> bool:
        """Whether the decoder's and the joint's weights are stored in 8 bits."""
        return self.decoder_joint_precision == TOKEN_PRECISIONS[1]

    @property
    def insists_on_ternary(self) -> bool:
        """Whether the matrices of the encoder's layers have to be ternary."""
        return self.weight_bits == TERNARY_BITS

    @property
    def description(self) -> str | None:
        """How the encoder's weights are stored, in one line of output, such as `rtn, block 32`; None for float32."""
        if self.method is None:
            return None
        if self.insists_on_ternary:
            return f"{self.method.name}, ternary"
        return f"{self.method.name}, block {self.block_size}" if self.method.uses_blocks else self.method.name

    def fuses(self, device: str) -> bool:
        """Whether the graph of a folder exported for `device` is fused."""
        return not self.skip_fusion and (device != "cpu" or self.method is None or self.method.fused_on_cpu)

    def advice(self, device: str) -> list[str]:
        """Lines for the user of a folder exported for `device`: where the files are exact on some CPUs alone, and where
        leaving out calibration costs much accuracy, or the default costs speed (rewrite.fuse)."""
        lines = [f"--full_range makes a folder for {self.cpus}"] if self.full_range else []
        if self.weight_bits == LOW_BITS and self.calibration_manifest is None:
            lines.append(
                "without calibration 4 bits lose more: 19.3 dB on speech through a small checkpoint, 26.7 dB with it; "
                "add --calibration_manifest FILE, a few minutes of speech"
            )
        if device == "cpu" and self.method is not None and self.method.uses_blocks and not self.skip_fusion:
            lines.append(
                f"this folder is for a CPU, where {self.method.name} runs 6 to 10 % faster without fusion; add "
                "--skip_fusion for that"
            )
        return lines

    @property
    def cpus(self) -> str:
        """The CPUs that the files are for, in words for the report and the model card."""
        return VNNI_ALONE if self.full_range else EVERY_CPU

    def __post_init__(self) -> None:
        """Raise ValueError naming a flag that does not go with the others, or has a value that is not possible."""
        bits = f"--weight_bits {self.weight_bits}"
        if self.weight_bits != OptimizeOptions.weight_bits:
            self._require_method(bits, lambda method: self.weight_bits in method.weight_bits)
            if self.size_budget_mb is not None:
                raise ValueError(f"{bits} does not go with --size_budget_mb, which chooses the bits of each weight")
        if self.method is not None:  # without one, the two flags change nothing and are not in the way
            for flag in ("block_size", "accuracy_level"):
                if getattr(self, flag) != getattr(OptimizeOptions, flag):
                    self._require_method(f"--{flag} {getattr(self, flag)}", lambda method: method.uses_blocks)
        has_range = self.method is not None and self.method.has_range and self.weight_bits != LOW_BITS
        if self.full_range and not (has_range or self.int8_tokens):
            raise ValueError(
                "--full_range needs --quant_method int8 or --decoder_joint_precision int8; --weight_bits 4 is exact "
                "without it"
            )
        for flag in ("calibration_manifest", "size_budget_mb"):
            if getattr(self, flag) is not None:
                self._require_method(f"--{flag}", lambda method: method.calibrates)
        if self.size_budget_mb is not None and self.calibration_manifest is None:
            raise ValueError("--size_budget_mb needs --calibration_manifest, the speech to decide by")
        if self.max_wer_increase is not None:
            if self.eval_manifest is None:
                raise ValueError("--max_wer_increase needs --eval_manifest, the clips to count words on")
            if not 0 <= self.max_wer_increase < math.inf:
                raise ValueError(f"--max_wer_increase must be 0 points or more, not {self.max_wer_increase}")

    def _require_method(self, flag: str, suits: Callable[[QuantMethod], bool]) -> None:
        """Raise ValueError where the flag does not apply to the method."""
        if self.method is None or not suits(self.method):
            given = "--skip_quantization" if self.skip_quantization else self.quant_method
            names = " or ".join(method.name for method in METHODS.values() if suits(method))
            raise ValueError(f"{flag} needs --quant_method {names}, not {given}")

    def record(self) -> dict[str, Any]:
        """What the manifest keeps: the flags that decide the files, by name."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_RECORDED}
