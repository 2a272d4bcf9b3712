"""Integer weights with one scale for each column, as integer products need them, in pure NumPy."""

from dataclasses import dataclass

import numpy as np

from common.quantize.blocks import (
    TINY,
    ceil_div,
    inverse_of,
    relative_error,
    steps_of,
    sum_of_products,
    symmetric_scales,
)
from common.quantize.method import WeightOptions
from common.quantize.moments import SortedMoments
from common.quantize.plan import Format

WEIGHT_BITS, REDUCED_BITS, LOW_BITS = 8, 7, 4
BLOCK = 128  # rows whose feedback is computed by one product; nothing else depends on this number
# By how many codes the largest weight of a column may lie beyond the range of 4 bits. It is then clipped, but the finer
# scale makes up for that in the rest of the column.
SCALE_STEPS = (0.0, 1.0, 2.0, 3.5, 5.5)


@dataclass(frozen=True)
class Columns:
    """A weight W [K, N] ≈ codes · scales, and its error."""

    codes: np.ndarray  # [K, N] int8
    scales: np.ndarray  # [N]
    error: float  # Σ (W - Ŵ)² / Σ W²
    fitted: bool = False  # whether the codes were fitted to speech

    @property
    def weight(self) -> np.ndarray:
        """The weight that codes and scales stand for, [K, N] float32."""
        return np.asarray(self.codes * self.scales)


def high_bits(options: WeightOptions) -> int:
    """Bits of the integer weights that are not stored in 4."""
    return REDUCED_BITS if options.reduce_range else WEIGHT_BITS


def weight_bits(options: WeightOptions) -> int:
    """Bits of the encoder's weights where all weights have the same number of bits."""
    return LOW_BITS if options.weight_bits == LOW_BITS else high_bits(options)


def column_bytes(shape: tuple[int, ...], form: Format) -> tuple[int, int]:
    """Bytes of codes and scales of a weight [K, N]; two codes of 4 bits share a byte."""
    K, N = shape
    return ceil_div(K * N, 2) if form.bits == LOW_BITS else K * N, 4 * N


def quantize_columns(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """W [K, N] → codes [K, N] int8 and scales [N]: W ≈ codes · scales, and a column of zeros is 0 · 0.

    With 7 bits a sum of two products uint8 · int8 always fits into int16, in which AVX2 without VNNI adds them:
    2 · 255 · 63 is 32130, while 2 · 255 · 127 = 64770 is cut to 32767. Sums with 4 bits, 2 · 255 · 8, are far below.
    """
    scales = _scales(weight, bits, None)
    return steps_of(weight, inverse_of(scales), 2 ** (bits - 1), bits).astype(np.int8), scales


def rounded_columns(weight: np.ndarray, bits: int) -> Columns:
    """The weight [K, N] rounded to the nearest codes."""
    codes, scales = quantize_columns(weight, bits)
    return Columns(codes, scales, relative_error(weight, codes * scales))


def fitted_columns(
    weight: np.ndarray,
    bits: int,
    inputs: SortedMoments,
    factors: np.ndarray | float = 1.0,
    missing: np.ndarray | None = None,
) -> tuple[Columns, np.ndarray]:
    """Multiply the rows of the weight [K, N] by `factors` [K, 1], and round it such that products with these inputs
    change least. Also returns the rounded weight, [K, N], divided by the factors again.

    missing: xᵀ times what the product lacks, [K, N]. The rounded weight makes up for it; its error is still measured
    from the weight that was given.

    Rows are rounded in the order of the power of their inputs, the strongest first, and later rows make up for the
    errors of earlier ones (moments.py). With 4 bits the scales are fitted to the codes at the end.

    Feedback may lead to a code of -2^(bits-1), one beyond those of plain rounding: 2 · 255 · 64 = 32640 fits as well.
    """
    target = weight * factors
    if missing is not None:
        target = target + inputs.solve(missing / factors)
    rows = target[inputs.order]
    scales = _scales(rows, bits, np.diag(inputs.moments))
    rounded = _round_rows(rows, scales, bits, inputs.factor)
    if bits == LOW_BITS:
        scales = _least_squares(rows, rounded, inputs.moments)
    codes = np.empty(rows.shape, np.int8)
    codes[inputs.order] = rounded
    became = np.asarray(codes * scales / factors)
    return Columns(codes, scales, relative_error(weight, became), fitted=True), became


def _scales(weight: np.ndarray, bits: int, power: np.ndarray | None) -> np.ndarray:
    """Scales [N] for a weight [K, N]: in 4 bits those of least error, weighted by the power [K] of the inputs; in more
    bits those that just reach the largest number of each column."""
    if bits == LOW_BITS:
        by_row = None if power is None else np.maximum(power, TINY).astype(np.float32)[:, None]
        return symmetric_scales(weight, bits, SCALE_STEPS, by_row)
    top = np.float32(2 ** (bits - 1) - 1)
    return np.asarray(np.max(np.abs(weight), axis=0) / top)


def _round_rows(weight: np.ndarray, scales: np.ndarray, bits: int, factor: np.ndarray) -> np.ndarray:
    """Codes [K, N], in float32, of a weight [K, N]. Rows are rounded from the last to the first. Each is first moved by
    the errors of the rows after it, weighted by the factor [K, K] of the inputs' second moments."""
    codes, errors = np.empty_like(weight), np.empty_like(weight)
    inverse, middle = inverse_of(scales), 2 ** (bits - 1)
    for end in range(len(weight), 0, -BLOCK):
        begin = max(0, end - BLOCK)
        feedback = factor[begin:end] / np.diag(factor)[begin:end, None]
        expected = weight[begin:end] + feedback[:, end:] @ errors[end:]
        within = np.ascontiguousarray(feedback[:, begin:end])
        for k in reversed(range(begin, end)):
            i = k - begin
            row = expected[i] + within[i, i + 1 :] @ errors[k + 1 : end]
            codes[k] = steps_of(row, inverse, middle, bits)
            errors[k] = weight[k] - codes[k] * scales
    return codes


def _least_squares(weight: np.ndarray, codes: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """Scales [N] that, for these codes, change products with inputs of such second moments [K, K] least."""
    projected = moments @ codes
    return np.asarray(sum_of_products(projected, weight) * inverse_of(sum_of_products(projected, codes)))
