"""The flags of optimize_encoder.py as one object, which is checked once and gives its record for the manifest."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.quantize.method import METHODS, QuantMethod, WeightOptions

TOKEN_PRECISIONS = ("fp32", "int8")
# Not recorded as flags: of the clip lists the checksums are recorded, and the limit is in the report.
NOT_RECORDED = ("calibration_manifest", "eval_manifest", "max_wer_increase")


@dataclass(frozen=True)
class OptimizeOptions(WeightOptions):
    """Each flag that decides what is done, under its own name."""

    quant_method: str = "rtn"
    decoder_joint_precision: str = TOKEN_PRECISIONS[0]
    skip_fusion: bool = False
    skip_quantization: bool = False
    calibration_manifest: Path | None = None
    eval_manifest: Path | None = None
    max_wer_increase: float | None = None

    @property
    def method(self) -> QuantMethod[Any] | None:
        """How the encoder's weights are stored; None leaves them float32."""
        return None if self.skip_quantization else METHODS[self.quant_method]

    @property
    def int8_tokens(self) -> bool:
        """Whether the decoder's and the joint's weights are stored in 8 bits."""
        return self.decoder_joint_precision == TOKEN_PRECISIONS[1]

    @property
    def has_8_bit_products(self) -> bool:
        """Whether there are weights that --reduce_range gives 7 bits."""
        narrow = self.weight_bits != WeightOptions.weight_bits
        return self.int8_tokens or (self.method is not None and self.method.reduces_range and not narrow)

    @property
    def description(self) -> str | None:
        """How the encoder's weights are stored, in one line of output; None for float32."""
        return self.method.describe(self) if self.method else None

    def fuses(self, device: str) -> bool:
        """Whether the graph of a folder exported for `device` is fused."""
        on_cpu = device == "cpu"
        return not (self.skip_fusion or (on_cpu and self.method is not None and not self.method.fused_on_cpu))

    def fusion_advice(self, device: str) -> str | None:
        """A line for the user where the fusion that is on by default costs speed."""
        if device != "cpu" or self.method is None or not self.fuses(device) or not self.method.unfused_gain_on_cpu:
            return None
        return (
            f"this folder is for a CPU, where {self.method.name} runs {self.method.unfused_gain_on_cpu} faster without "
            "fusion; add --skip_fusion for that"
        )

    def calibration_advice(self) -> str | None:
        """A line for the user where leaving out calibration costs much accuracy."""
        if self.method is None or self.calibration_manifest is not None:
            return None
        return self.method.uncalibrated_advice(self)

    def validate(self) -> None:
        """Raise ValueError naming a flag that does not go with the others, or has a value that is not possible."""
        self._validate_bits()
        if self.calibration_manifest is not None and not (self.method and self.method.calibrates):
            raise ValueError(
                f"--calibration_manifest expects {_flag(m for m in METHODS.values() if m.calibrates)}, "
                f"got {self._method_given()}"
            )
        if self.size_budget_mb is not None:
            if not (self.method and self.method.has_size_budget):
                raise ValueError(
                    f"--size_budget_mb expects {_flag(m for m in METHODS.values() if m.has_size_budget)}, "
                    f"got {self._method_given()}, which has one size"
                )
            if self.calibration_manifest is None:
                raise ValueError("--size_budget_mb expects a --calibration_manifest to decide by, got none")
        if self.max_wer_increase is not None:
            if self.eval_manifest is None:
                raise ValueError("--max_wer_increase expects --eval_manifest, the clips to count words on, got none")
            if not 0 <= self.max_wer_increase < math.inf:
                raise ValueError(f"expected --max_wer_increase in points, 0 or more, got {self.max_wer_increase}")

    def _validate_bits(self) -> None:
        """Like `validate`, for the flags about integers."""
        other_bits = self.weight_bits != WeightOptions.weight_bits
        if other_bits and not (self.method and self.weight_bits in self.method.weight_bits):
            raise ValueError(
                f"--weight_bits {self.weight_bits} expects {_flag(m for m in METHODS.values() if m.weight_bits)}, "
                f"got {self._method_given()}"
            )
        if other_bits and self.size_budget_mb is not None:
            raise ValueError(
                f"--weight_bits {self.weight_bits} expects no --size_budget_mb, which chooses the bits of each weight, "
                "got both; leave one out"
            )
        if self.reduce_range and not self.has_8_bit_products:
            got = f"--weight_bits {self.weight_bits}, which needs no reduction" if other_bits else "neither"
            raise ValueError(
                f"--reduce_range expects {_flag(m for m in METHODS.values() if m.reduces_range)} or "
                f"--decoder_joint_precision {TOKEN_PRECISIONS[1]}, got {got}"
            )

    def record(self) -> dict[str, Any]:
        """What the manifest keeps: the flags that decide the files, by name."""
        flags = {"quant_method": self.quant_method, **asdict(self)}  # the method first, as a person would write it
        return {name: value for name, value in flags.items() if name not in NOT_RECORDED}

    def _method_given(self) -> str:
        return "--skip_quantization" if self.skip_quantization else self.quant_method


def _flag(methods: Iterable[QuantMethod[Any]]) -> str:
    return f"--quant_method {' or '.join(method.name for method in methods)}"
