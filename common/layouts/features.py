"""Which features a runtime computes whatever its configuration says, and errors for checkpoints that need others."""

import math
from collections.abc import Mapping

from common.checkpoint.spec import ModelSpec

# To GenAI, 0 means "force a step after every token"; the largest int means "no limit" to GenAI and to onnx-asr.
NO_SYMBOL_LIMIT = 2**31 - 1
# The features that onnx-asr (preprocessors/nemo.py) and sherpa-onnx (csrc/features.h) compute.
# sherpa-onnx's differ a little from every NeMo model's: see docs/runtimes.md.
FIXED_FEATURES: Mapping[str, tuple[float, ...]] = {
    "sample_rate": (16000,),
    "fft_size": (512,),
    "win_length": (400,),
    "hop_length": (160,),
    "preemphasis": (0.97,),
    "log_guard": (2.0**-24,),
}


def check_fixed(spec: ModelSpec, runtime: str, features: Mapping[str, tuple[float, ...]] = FIXED_FEATURES) -> None:
    """Raise ValueError naming what a runtime with fixed features, and durations by index, cannot compute of `spec`.

    features: field of ModelSpec → the values that the runtime can compute with.
    """
    if spec.durations != tuple(range(len(spec.durations))):
        raise ValueError(
            f"durations {list(spec.durations)}: {runtime} takes a duration's index for its frames, so they must be "
            f"{list(range(len(spec.durations)))}"
        )
    different = [
        f"{name} is {getattr(spec, name):g}, not {' or '.join(f'{value:g}' for value in values)}"
        for name, values in features.items()
        if not any(math.isclose(getattr(spec, name), value, rel_tol=1e-6) for value in values)
    ]
    check_log_mel(runtime, (*spec.unsupported_features, *different))


def check_log_mel(runtime: str, different: tuple[str, ...]) -> None:
    """Raise ValueError if a checkpoint's features differ, in the ways listed, from the log-mel ones of `runtime`."""
    if different:
        raise ValueError(
            f"{runtime} computes log-mel features one way only, and this checkpoint's differ: " + "; ".join(different)
        )
