"""Weights of integers with one scale a column, as integer products take them: pure NumPy."""

from dataclasses import dataclass

import numpy as np

from common.quantize.blocks import (
    TINY,
    ceil_div,
    damped,
    error_feedback,
    inverse_of,
    relative_error,
    symmetric_scales,
)
from common.quantize.method import WeightOptions
from common.quantize.plan import Format

WEIGHT_BITS, REDUCED_BITS, LOW_BITS = 8, 7, 4
BLOCK = 128  # rows whose feedback is one product; nothing else depends on it
# By how many codes the largest weight of a column may lie beyond the range of 4 bits, and be clipped to it: the finer
# scale makes up for that in the rest of the column.
SCALE_STEPS = (0.0, 1.0, 2.0, 3.5, 5.5)
# Times that 4-bit codes are rounded again, each row by the errors of all others. On speech through the tiny checkpoint
# one pass gains 0.4 dB, a second 0.1 dB.
PASSES = 1


@dataclass(frozen=True)
class Columns:
    """A weight W [K, N] ≈ codes · scales, and what it lost."""

    codes: np.ndarray  # [K, N] int8
    scales: np.ndarray  # [N]
    error: float  # Σ (W - Ŵ)² / Σ W²
    fitted: bool = False  # whether the codes were fitted to speech

    @property
    def weight(self) -> np.ndarray:
        """What it stands for, [K, N] float32."""
        return np.asarray(self.codes * self.scales)


def high_bits(options: WeightOptions) -> int:
    """Bits of the integer weights that are not stored in 4."""
    return REDUCED_BITS if options.reduce_range else WEIGHT_BITS


def weight_bits(options: WeightOptions) -> int:
    """Bits of the encoder's weights where they all have the same."""
    return LOW_BITS if options.weight_bits == LOW_BITS else high_bits(options)


def column_bytes(shape: tuple[int, ...], form: Format) -> tuple[int, int]:
    """Bytes of codes and scales of a weight [K, N]; two codes of 4 bits share a byte."""
    K, N = shape
    return ceil_div(K * N, 2) if form.bits == LOW_BITS else K * N, 4 * N


def quantize_columns(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """W [K, N] → codes [K, N] int8 and scales [N]: W ≈ codes · scales, and a column of zeros is 0 · 0.

    With 7 bits no sum of two products uint8 · int8 leaves int16, where AVX2 without VNNI adds them: 2 · 255 · 63 is
    32130, while 2 · 255 · 127 = 64770 is cut to 32767. Sums of 4 bits, 2 · 255 · 8, are far from it.
    """
    scales = _scales(weight, bits, None)
    return _codes(weight, scales, bits).astype(np.int8), scales


def rounded_columns(weight: np.ndarray, bits: int) -> Columns:
    """The weight [K, N] rounded to the nearest codes."""
    codes, scales = quantize_columns(weight, bits)
    return Columns(codes, scales, relative_error(weight, codes * scales))


def fitted_columns(weight: np.ndarray, bits: int, moments: np.ndarray) -> Columns:
    """The weight [K, N] rounded such that products with inputs of these second moments [K, K] change least.

    Rows go by the power of their inputs, the loudest first: the later ones make up for the errors of the earlier ones
    (`blocks.error_feedback`). With 4 bits scales are then fitted to the codes, and the codes to each other again.

    Feedback may lead to a code of -2^(bits-1), one beyond the plain ones: 2 · 255 · 64 = 32640 is in int16 as well.
    """
    order = np.argsort(-np.diag(moments), kind="stable")
    moments = moments[np.ix_(order, order)]
    rows = np.ascontiguousarray(weight[order])
    scales = _scales(rows, bits, np.diag(moments))
    errors = np.zeros_like(rows)
    _round_rows(rows, scales, bits, error_feedback(moments), errors)
    if bits == LOW_BITS:
        scales, errors = _refined(rows, scales, errors, damped(moments).astype(np.float32))
    codes = np.empty(rows.shape, np.int8)
    codes[order] = _codes(rows - errors, scales, bits)
    return Columns(codes, scales, relative_error(weight, codes * scales), fitted=True)


def _scales(weight: np.ndarray, bits: int, power: np.ndarray | None) -> np.ndarray:
    """Scales [N] for a weight [K, N]: of 4 bits those of least error under the power [K] of the inputs; of more, those
    that reach its largest number."""
    if bits == LOW_BITS:
        by_row = None if power is None else np.maximum(power, TINY).astype(np.float32)[:, None]
        return symmetric_scales(weight, bits, SCALE_STEPS, by_row)
    top = np.float32(2 ** (bits - 1) - 1)
    return np.asarray(np.max(np.abs(weight), axis=0) / top)


def _codes(weight: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """The nearest codes, in float32."""
    half = 2 ** (bits - 1)
    return np.asarray(np.clip(np.rint(weight * inverse_of(scales)), -half, half - 1))


def _round_rows(weight: np.ndarray, scales: np.ndarray, bits: int, mix: np.ndarray, errors: np.ndarray) -> None:
    """Round the rows of a weight [K, N] in turn, each moved by the errors [K, N] of the others times `mix` [K, K]; its
    diagonal does not count. The errors are updated in place."""
    for begin in range(0, len(weight), BLOCK):
        block = slice(begin, begin + BLOCK)
        within = mix[block, block].T.copy()
        np.fill_diagonal(within, 0)
        before = errors[block].copy()
        wanted = weight[block] + mix[:, block].T @ errors - np.diag(mix)[block, None] * before
        moved = np.zeros_like(before)
        for k, row in enumerate(wanted):
            codes = _codes(row + within[k, :k] @ moved[:k], scales, bits)
            errors[begin + k] = weight[begin + k] - codes * scales
            moved[k] = errors[begin + k] - before[k]


def _refined(
    weight: np.ndarray, scales: np.ndarray, errors: np.ndarray, moments: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Scales of 4-bit codes by least squares, then codes by coordinate descent, row by row; scales and errors."""
    mix = moments / np.diag(moments)
    projected = moments @ weight
    for _ in range(PASSES):
        scales, errors = _least_squares(weight, scales, errors, moments, projected)
        _round_rows(weight, scales, LOW_BITS, mix, errors)
    return _least_squares(weight, scales, errors, moments, projected)


def _least_squares(
    weight: np.ndarray, scales: np.ndarray, errors: np.ndarray, moments: np.ndarray, projected: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    codes = _codes(weight - errors, scales, LOW_BITS)
    norm = np.sum(codes * (moments @ codes), axis=0)
    scales = np.sum(codes * projected, axis=0) * inverse_of(norm)
    return scales, weight - codes * scales
