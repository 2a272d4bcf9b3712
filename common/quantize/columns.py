"""Weights of 8-bit integers with one scale a column, as integer products take them: pure NumPy."""

from dataclasses import dataclass

import numpy as np

from common.quantize.blocks import compensate, relative_error
from common.quantize.method import WeightOptions

WEIGHT_BITS, REDUCED_BITS = 8, 7
BLOCK = 128  # rows whose feedback is one product; nothing else depends on it


@dataclass(frozen=True)
class Columns:
    """A weight W [K, N] ≈ codes · scales, and what it lost."""

    codes: np.ndarray  # [K, N] int8
    scales: np.ndarray  # [N]
    error: float  # Σ (W - Ŵ)² / Σ W²
    fitted: bool = False  # whether the codes were fitted to speech


def weight_bits(options: WeightOptions) -> int:
    return REDUCED_BITS if options.reduce_range else WEIGHT_BITS


def quantize_columns(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """W [K, N] → codes [K, N] int8 and scales [N]: W ≈ codes · scales, and a column of zeros is 0 · 0.

    With 7 bits no sum of two products uint8 · int8 leaves int16, where AVX2 without VNNI adds them: 2 · 255 · 63 is
    32130, while 2 · 255 · 127 = 64770 is cut to 32767.
    """
    top = np.float32(2 ** (bits - 1) - 1)
    scales = np.max(np.abs(weight), axis=0) / top
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    return np.rint(weight * inverse).astype(np.int8), scales


def rounded_columns(weight: np.ndarray, bits: int) -> Columns:
    """The weight [K, N] rounded to the nearest codes."""
    codes, scales = quantize_columns(weight, bits)
    return Columns(codes, scales, relative_error(weight, codes * scales))


def fitted_columns(weight: np.ndarray, bits: int, feedback: np.ndarray, factors: np.ndarray | float) -> Columns:
    """The weight times factors of its rows [K, 1], rounded with the feedback of `blocks.error_feedback`.

    Feedback may lead to a code of -2^(bits-1), one beyond the plain ones: 2 · 255 · 64 = 32640 is in int16 as well.
    """
    scaled = weight * factors
    _, scales = quantize_columns(scaled, bits)
    codes, _, _, errors = compensate(scaled, bits, BLOCK, lambda rows, bits: (scales, None), feedback)
    codes = codes.reshape(-1, weight.shape[1])[: len(weight)].astype(np.int16) - 2 ** (bits - 1)
    error = relative_error(weight, weight - errors / factors)
    return Columns(codes.astype(np.int8), scales, error, fitted=True)
