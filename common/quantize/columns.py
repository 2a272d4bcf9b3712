"""Integer weights with one scale for each column, as integer products need them, in pure NumPy.

They have 8 bits, 7 for CPUs on which sums of 8-bit products overflow (`fidelity.exact_bits`), or 4.
"""

import numpy as np

from common.quantize.rounding import (
    TINY,
    InputMoments,
    Packed,
    ceil_div,
    inverse_of,
    relative_error,
    round_rows,
    steps_of,
    sum_of_products,
    symmetric_scales,
)

LOW_BITS = 4
BLOCK = 128  # rows whose feedback is computed by one product; nothing else depends on this number
# By how many codes the largest weight of a column may lie beyond the range of 4 bits. It is then clipped, but the finer
# scale makes up for that in the rest of the column.
SCALE_STEPS = (0.0, 1.0, 2.0, 3.5, 5.5)


def column_bytes(shape: tuple[int, ...], bits: int) -> tuple[int, int]:
    """Bytes of codes and scales of a weight [K, N]; two codes of 4 bits share a byte."""
    K, N = shape
    return ceil_div(K * N, 2) if bits == LOW_BITS else K * N, 4 * N


def quantize_columns(weight: np.ndarray, bits: int) -> Packed:
    """Round W [K, N] to the nearest codes [K, N]: W ≈ codes · scales, and a column of zeros is 0 · 0."""
    scales = _scales(weight, bits, None)
    codes = steps_of(weight, inverse_of(scales), 2 ** (bits - 1), bits).astype(np.int8)
    return Packed(codes, scales, error=relative_error(weight, codes * scales))


def fit_columns(
    weight: np.ndarray,
    bits: int,
    inputs: InputMoments,
    factors: np.ndarray | float = 1.0,
    missing: np.ndarray | None = None,
) -> tuple[Packed, np.ndarray]:
    """Multiply the rows of the weight [K, N] by `factors` [K, 1], and round it such that products with these inputs,
    `InputMoments.strongest_first`, change least. Also returns the rounded weight, [K, N], divided by the factors again.

    missing: xᵀ times what the product lacks, [K, N]. The rounded weight makes up for it; its error is still measured
    from the weight that was given.

    With 4 bits the scales are fitted to the codes at the end. Feedback may lead to a code of -2^(bits-1), one beyond
    those of plain rounding: with 7 bits, sums of 2 · 255 · 64 = 32640 fit into int16 too.
    """
    target = weight * factors
    if missing is not None:
        target = target + inputs.solve(missing / factors)
    rows = target[inputs.order]
    scales = _scales(rows, bits, np.diag(inputs.moments))
    steps = round_rows(rows, bits, BLOCK, lambda *_: (scales, None), inputs.feedback, last_first=True).steps
    if bits == LOW_BITS:
        scales = _least_squares(rows, steps, inputs.moments)
    codes = np.empty(rows.shape, np.int8)
    codes[inputs.order] = steps
    became = np.asarray(codes * scales / factors)
    return Packed(codes, scales, error=relative_error(weight, became), fitted=True), became


def _scales(weight: np.ndarray, bits: int, power: np.ndarray | None) -> np.ndarray:
    """Scales [N] for a weight [K, N]: in 4 bits those of least error, weighted by the power [K] of the inputs; in more
    bits those that just reach the largest number of each column."""
    if bits == LOW_BITS:
        by_row = None if power is None else np.maximum(power, TINY).astype(np.float32)[:, None]
        return symmetric_scales(weight, bits, SCALE_STEPS, by_row)
    top = np.float32(2 ** (bits - 1) - 1)
    return np.asarray(np.max(np.abs(weight), axis=0) / top)


def _least_squares(weight: np.ndarray, codes: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """Scales [N] that, for these codes, change products with inputs of such second moments [K, K] least."""
    projected = moments @ codes
    return np.asarray(sum_of_products(projected, weight) * inverse_of(sum_of_products(projected, codes)))
