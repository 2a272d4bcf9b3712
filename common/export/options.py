"""The settings of an export. This module needs neither torch nor NeMo, so that usage errors are reported at once."""

import dataclasses
from typing import Any

from common.contract import GRAPHS

FP32 = "fp32"
FP16 = "fp16"
PRECISIONS = (FP32, FP16)

MIN_OPSET = 17  # the first with LayerNormalization
MAX_OPSET = 21  # the newest that the wheels of onnxruntime-genai were built for

# Peak memory and disk as multiples of the weights' size in float32, measured at 0.6B. Memory holds the weights (in NeMo
# or in the ONNX Runtime session), activations, and NeMo's code; disk the unpacked checkpoint and the exported weights.
MEMORY_FACTOR = 1.3
MEMORY_OF_NEMO = 1e9  # bytes
MEMORY_OF_LONG_CASE = 2.8e9  # bytes; a clip past 400 s, on which small encoders are verified; measured with 4 heads
# Encoders of up to this many parameters are also verified on a clip past 400 s; attention's memory is quadratic in it.
LONG_CASE_MAX_PARAMETERS = 20e6
FLOAT32_BYTES = 4
DISK_FACTOR = 2.0
FLOAT16_DISK_FACTOR = 0.5  # in addition: the float16 weights beside the float32 ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The flags of export_parakeet_to_onnx.py that decide what is exported."""

    runtime: str  # as the manifest records it; which layouts it stands for is the script's concern
    opset_version: int = MIN_OPSET
    precision: str = FP32
    device: str = "cpu"
    # Chunks of 60 s with this context encode each second of a long clip 1.2 times, and clips up to 60 s have the full
    # context that they have in NeMo.
    chunk_seconds: float = 60
    left_context_seconds: float = 10
    right_context_seconds: float = 2
    skip_verify: bool = False
    scripts: str | None = None  # writing systems that the text may be in, separated by commas; None: any

    def validate(self) -> None:
        """Raise ValueError naming the flag whose value cannot be used."""
        check_opset(self.opset_version)
        if self.chunk_seconds == 0:
            raise ValueError("expected --chunk_seconds of more than 0, got 0")
        if self.precision not in PRECISIONS:
            raise ValueError(f"expected --precision {' or '.join(PRECISIONS)}, got {self.precision}")

    def record(self) -> dict[str, Any]:
        """The flags as the manifest records them."""
        return dataclasses.asdict(self)

    @property
    def is_float16(self) -> bool:
        return self.precision == FP16

    @property
    def stages(self) -> int:
        """How many stages common/export/pipeline.py prints."""
        conversion = 1 + len(GRAPHS) if self.is_float16 else 0
        return 2 + len(GRAPHS) + conversion

    def memory_bytes(self, weight_bytes: int) -> float:
        """Peak memory of exporting a checkpoint whose weights have that size in float32."""
        verifies_long_case = not self.skip_verify and weight_bytes <= LONG_CASE_MAX_PARAMETERS * FLOAT32_BYTES
        long_case = MEMORY_OF_LONG_CASE if verifies_long_case else 0
        return MEMORY_FACTOR * weight_bytes + MEMORY_OF_NEMO + long_case

    def disk_bytes(self, weight_bytes: int) -> float:
        """Disk needed, scratch space included, to export a checkpoint whose weights have that size in float32."""
        return (DISK_FACTOR + (FLOAT16_DISK_FACTOR if self.is_float16 else 0)) * weight_bytes


def check_opset(opset: int) -> None:
    """Raise ValueError for an opset outside the range that is exported and tested."""
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise ValueError(f"expected --opset_version {MIN_OPSET} to {MAX_OPSET}, got {opset}")
