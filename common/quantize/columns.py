"""Integer weights with one scale for each column, as integer products need them, in pure NumPy. They have 8 or 4 bits.

ONNX Runtime multiplies uint8 activations by int8 weights. On x86 without VNNI, its kernels add the products of two
neighbours in a column in 16 bits (VPMADDUBSW: rows 0 and 1, 2 and 3, and so on), and cut larger sums off at 32767: with
codes of 127 a sum reaches 2 · 255 · 127 = 64770. So the scale of a column is such that the positive codes of two
neighbours, or the negative ones, add up to at most PAIR_LIMIT: 255 · 128 = 32640 fits, and every CPU computes the same.
Most columns then reach codes of 90 to 127, since two large neighbours of one sign are rare: Gaussian weights lose 2 dB
by that, where 7 bits lose 6. The full range is left to those who ask for it (`--full_range`). Codes of 4 bits are safe
anyway: 2 · 255 · 8 is 4080.
"""

import numpy as np

from common.quantize.rounding import (
    TINY,
    InputMoments,
    Packed,
    best_of,
    ceil_div,
    inverse_of,
    relative_error,
    round_rows,
    steps_of,
    sum_of_products,
    symmetric_scales,
)
from common.quantize.ternary import signs_and_sizes

LOW_BITS, HIGH_BITS = 4, 8
LARGEST_CODE = 127
PAIR_LIMIT = 128
BLOCK = 128  # rows whose feedback is computed by one product; nothing else depends on this number
# By how many codes the largest weight of a column may lie beyond the range of 4 bits. It is then clipped, but the finer
# scale makes up for that in the rest of the column.
SCALE_STEPS = (0.0, 1.0, 2.0, 3.5, 5.5)
# Scales of ternary columns are tried in steps of a quarter of a code, from half the largest code on, since with a scale
# twice as large the codes of half the scale are at hand as well. More scales would gain less than 0.1 dB.
TRIED_PER_CODE = 4


def column_bytes(shape: tuple[int, ...], bits: int) -> tuple[int, int]:
    """Bytes of codes and scales of a weight [K, N]; two codes of 4 bits share a byte."""
    K, N = shape
    return ceil_div(K * N, 2) if bits == LOW_BITS else K * N, 4 * N


def quantize_columns(weight: np.ndarray, bits: int, *, full_range: bool = False) -> Packed:
    """Round W [K, N] to the nearest codes [K, N]: W ≈ codes · scales, and a column of zeros is 0 · 0."""
    scales = _narrow_scales(weight) if bits == LOW_BITS else _wide_scales(weight, full_range=full_range)
    codes = steps_of(weight, inverse_of(scales), 2 ** (bits - 1), bits).astype(np.int8)
    if not full_range:
        _limit_pairs(codes)
    return Packed(codes, scales, error=relative_error(weight, codes * scales))


def ternary_columns(weight: np.ndarray, group: int, *, full_range: bool = False) -> Packed:
    """Round a weight [K, N] that is ternary in groups of `group` rows, whose codes are then −c, 0 and c, c · scale ≈ m.
    The scale of a column is that of least error: nothing is lost where all its m are whole multiples of one number.

    Without the full range c is at most half of PAIR_LIMIT, since two neighbours may both be c.
    """
    signs, sizes = signs_and_sizes(weight, group)
    largest = LARGEST_CODE if full_range else PAIR_LIMIT // 2
    counts = np.abs(signs).sum(axis=1, dtype=np.float32)  # by which the error of m counts in a column's
    per_size = inverse_of(sizes.max(axis=0))
    tried = np.arange(TRIED_PER_CODE * largest // 2, TRIED_PER_CODE * largest + 1, dtype=np.float32) / TRIED_PER_CODE
    candidates = ((code * per_size, 0) for code in tried)
    scales = best_of(sizes.astype(np.float64), counts, candidates, HIGH_BITS)[0].astype(np.float32)
    multipliers = np.minimum(np.rint(sizes * inverse_of(scales)), largest)
    codes = (signs * multipliers[:, None].astype(np.int8)).reshape(weight.shape)
    return Packed(codes, scales, error=relative_error(weight, codes * scales))


def fit_columns(
    weight: np.ndarray,
    bits: int,
    inputs: InputMoments,
    factors: np.ndarray | float = 1.0,
    missing: np.ndarray | None = None,
    *,
    full_range: bool = False,
) -> tuple[Packed, np.ndarray]:
    """Multiply the rows of the weight [K, N] by `factors` [K, 1], and round it such that products with these inputs,
    `InputMoments.strongest_first`, change least. Also returns the rounded weight, [K, N], divided by the factors again.

    missing: xᵀ times what the product lacks, [K, N]. The rounded weight makes up for it; its error is still measured
    from the weight that was given.

    With 4 bits the scales are fitted to the codes at the end. Feedback may lead to codes that are larger than those of
    plain rounding; without the full range, the few pairs that it puts beyond the limit are brought back.
    """
    target = weight * factors
    if missing is not None:
        target = target + inputs.solve(missing / factors)
    rows = target[inputs.order]
    power = np.diag(inputs.moments)
    scales = _narrow_scales(rows, power) if bits == LOW_BITS else _wide_scales(target, full_range=full_range)
    steps = round_rows(rows, bits, BLOCK, lambda *_: (scales, None), inputs.feedback, last_first=True).steps
    if bits == LOW_BITS:
        scales = _least_squares(rows, steps, inputs.moments)
    codes = np.empty(rows.shape, np.int8)
    codes[inputs.order] = steps
    if not full_range:
        _limit_pairs(codes)
    became = np.asarray(codes * scales / factors)
    return Packed(codes, scales, error=relative_error(weight, became), fitted=True), became


def _narrow_scales(weight: np.ndarray, power: np.ndarray | None = None) -> np.ndarray:
    """Scales [N] for a weight [K, N] in 4 bits: those of least error, weighted by the power [K] of the inputs."""
    by_row = None if power is None else np.maximum(power, TINY).astype(np.float32)[:, None]
    return symmetric_scales(weight, LOW_BITS, SCALE_STEPS, by_row)


def _wide_scales(weight: np.ndarray, *, full_range: bool) -> np.ndarray:
    """Scales [N] for a weight [K, N] in 8 bits: those whose codes just reach the largest sum of two neighbours of the
    same sign, or with the full range the largest number of each column."""
    scales = np.max(np.abs(weight), axis=0) / np.float32(LARGEST_CODE)
    if full_range:
        return np.asarray(scales)
    parts = np.maximum(weight, 0), np.maximum(-weight, 0)
    pairs = np.arange(0, len(weight), 2)
    largest = [np.add.reduceat(part, pairs, axis=0).max(axis=0) for part in parts]
    return np.asarray(np.maximum(scales, np.maximum(*largest) / np.float32(PAIR_LIMIT)))


def _limit_pairs(codes: np.ndarray) -> None:
    """Bring the larger code of two neighbours nearer to 0, in place, where their sum is beyond PAIR_LIMIT."""
    first, second = codes[: len(codes) // 2 * 2 : 2], codes[1::2]  # views
    sums = first + second.astype(np.int16)
    excess = (sums - np.clip(sums, -PAIR_LIMIT, PAIR_LIMIT)).astype(np.int8)
    first_is_larger = np.abs(first, dtype=np.int16) >= np.abs(second, dtype=np.int16)
    first -= np.where(first_is_larger, excess, 0)
    second -= np.where(first_is_larger, 0, excess)


def _least_squares(weight: np.ndarray, codes: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """Scales [N] that, for these codes, change products with inputs of such second moments [K, K] least."""
    projected = moments @ codes
    return np.asarray(sum_of_products(projected, weight) * inverse_of(sum_of_products(projected, codes)))
