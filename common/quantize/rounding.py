"""Weights as whole multiples of scales, in pure NumPy: the arithmetic, feedback of errors, columns, ternary groups.

A product with a weight W [K, N] changes less if later rows make up for the errors of earlier ones. How much of an error
each row takes over follows from the second moments of the product's inputs (InputMoments), and `round_rows` applies it.
(This is QuIP's LDLQ, Chee et al. 2023; it gives the codes of GPTQ, Frantar et al. 2023, with one factorization.)

Integer products have one scale for each column. On x86 without VNNI, ONNX Runtime's kernels add the products of two
neighbours in a column (rows 0 and 1, 2 and 3, …) in 16 bits, and cut larger sums off at 32767. So the scale of a column
is such that the positive codes of two neighbours, or the negative ones, add up to at most PAIR_LIMIT (255 · 128 fits),
and every CPU computes the same, except in the full range (docs/quantization.md). Codes of 4 bits are safe anyway.

In a weight that is ternary in groups, 128 rows of a column hold only −m, 0 and m, each group with its own m; 64 rows in
the matrices of relative positions, since the export takes sines and cosines apart (RelativeAttention). Such weights are
found by their values, and not scaled or fitted: both would leave groups with more values.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import cho_solve, cholesky

TERNARY_BITS, LOW_BITS, HIGH_BITS = 2, 4, 8  # of a weight in the file; 2 if it is ternary in groups
TINY = np.float32(1e-30)  # replaces a divisor of zero, whose dividend is then zero as well
# Added to the diagonal of the second moments, as a fraction of its mean, as in GPTQ. Where rows are sorted it is more,
# since what makes up for earlier errors should hold for other speech too: 0.05 loses 0.2 to 0.4 dB with 29 s of speech.
DAMPING, SORTED_DAMPING = 0.01, 0.1
LARGEST_CODE = 127
PAIR_LIMIT = 128
BLOCK = 128  # rows of columns whose feedback is computed by one product; nothing else depends on this number
# By how many codes the largest weight of a column may lie beyond the range of 4 bits. It is then clipped, but the finer
# scale makes up for that in the rest of the column.
SCALE_STEPS = (0.0, 1.0, 2.0, 3.5, 5.5)
GROUPS = (128, 64)  # rows that share m in a ternary weight; the largest that a weight fits is used
# Scales of ternary columns are tried in steps of a quarter of a code, from half the largest code on, since with a scale
# twice as large every code of half the scale can be had as well. More scales would gain less than 0.1 dB.
TRIED_PER_CODE = 4
# A Fitter fits one slab of blocks, each a column: (x [block, n], bits) → scale [n] and zero point [n] of whole numbers,
# or one zero point for all.
Fit = tuple[np.ndarray, ArrayLike]
Fitter = Callable[[np.ndarray, int], Fit]


@dataclass(frozen=True)
class Packed:
    """A weight W [K, N] as it is stored: constant inputs of the operator that multiplies by it, and its error.

    In blocks (MatMulNBits in docs/ContribOperators.md of onnxruntime): codes [N, blocks, block * bits / 8] uint8, low
    half first; scales [N, blocks]; zero points [N, ceil(blocks * bits / 8)] uint8, or None for the middle code.
    In columns: codes [K, N] int8, scales [N], and no zero points.
    """

    codes: np.ndarray
    scales: np.ndarray  # float32
    zero_points: np.ndarray | None = None
    error: float = math.nan  # Σ (W - Ŵ)² / Σ W²
    fitted: bool = False  # whether the codes were fitted to speech

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and array of each tensor, in the order of MatMulNBits' inputs."""
        return ((name, array) for name, array in vars(self).items() if isinstance(array, np.ndarray))


class InputMoments:
    """Second moments of a product's inputs, in the order opposite to that in which the rows of its weight are rounded.

    With Σ xᵀx = Rᵀ R, errors E [K, N] of the weight put an error of ‖R E‖² into the product. R is upper triangular, so
    a row can make up for the errors of the rows after it, which are therefore rounded before it.
    """

    def __init__(self, moments: np.ndarray, *, strongest_first: bool) -> None:
        """moments: Σ xᵀx [K, K]. strongest_first: rows are rounded in the order of their inputs' power (act-order), and
        else from first to last."""
        by_power = np.argsort(np.diag(moments), kind="stable")
        self.order = by_power if strongest_first else np.arange(len(moments))[::-1]  # [K], places in the product
        self.moments = moments[np.ix_(self.order, self.order)]
        damped, damping = self.moments.copy(), SORTED_DAMPING if strongest_first else DAMPING
        damped[np.diag_indices_from(damped)] += damping * np.trace(self.moments) / len(moments) + TINY
        # R of the damped moments. SciPy takes a quarter of NumPy's time, and overwrites its input.
        self.factor = np.asarray(cholesky(damped.T, overwrite_a=True, check_finite=False))

    @property
    def feedback(self) -> np.ndarray:
        """[K, K], upper triangular, ones on the diagonal: row k has the shares of other rows' errors that it takes."""
        return np.asarray(self.factor / np.diag(self.factor)[:, None])

    def solve(self, right: np.ndarray) -> np.ndarray:
        """The solution X [K, N] of (Σ xᵀx, damped) · X = right. The rows of both have the order of the product."""
        solution = np.empty_like(right)
        solution[self.order] = cho_solve((self.factor, False), right[self.order], overwrite_b=True, check_finite=False)
        return solution


def round_rows(
    weight: np.ndarray, bits: int, block: int, fit: Fitter, feedback: np.ndarray, *, last_first: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Round a weight W [K, N] row by row, each first moved by its share of the errors of the rows before it. Returns
    code - zero [K, N] float32, scales and zeros [blocks, N] in the order in which the blocks were rounded, and W - Ŵ.

    feedback: [K, K], the shares; upper triangular if `last_first`, when rows are rounded from the last to the first,
    and else lower triangular. `fit` is called with each block of `block` rows, moved by the errors outside it; the last
    one is padded with zeros.
    """
    K, N = weight.shape
    blocks = ceil_div(K, block)
    steps, errors = np.empty((K, N), np.float32), np.empty((K, N), np.float32)
    scales, zeros = np.empty((blocks, N), np.float32), np.empty((blocks, N), np.float32)
    for i, begin in enumerate(range(0, K, block)):
        end = min(begin + block, K)
        rows = slice(K - end, K - begin) if last_first else slice(begin, end)
        done = slice(K - begin, K) if last_first else slice(0, begin)
        target = np.zeros((block, N), np.float32)
        target[: end - begin] = weight[rows] + feedback[rows, done] @ errors[done]
        scales[i], zeros[i] = fit(target, bits)
        inverse, within = inverse_of(scales[i]), np.ascontiguousarray(feedback[rows, rows])
        exact, row_steps, row_errors = weight[rows], steps[rows], errors[rows]  # views
        for k in reversed(range(end - begin)) if last_first else range(end - begin):
            earlier = slice(k + 1, end - begin) if last_first else slice(0, k)
            row = target[k] + within[k, earlier] @ row_errors[earlier]
            row_steps[k] = steps_of(row, inverse, zeros[i], bits)
            row_errors[k] = exact[k] - row_steps[k] * scales[i]
    return steps, scales, zeros, errors


def quantize_columns(weight: np.ndarray, bits: int, *, full_range: bool = False) -> Packed:
    """Round W [K, N] to the nearest codes [K, N]: W ≈ codes · scales, and a column of zeros is 0 · 0."""
    scales = _column_scales(weight, bits, full_range=full_range)
    codes = steps_of(weight, inverse_of(scales), 2 ** (bits - 1), bits).astype(np.int8)
    if not full_range:
        _limit_pairs(codes)
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
    the strongest first, change least. Also returns the rounded weight, [K, N], divided by the factors again.

    missing: xᵀ times what the product lacks, [K, N]. The rounded weight makes up for it; its error is still measured
    from the weight that was given.

    With 4 bits the scales are fitted to the codes at the end. Feedback may lead to codes that are larger than in
    plain rounding; without the full range, the few pairs that it puts beyond the limit are brought back.
    """
    target = weight * factors
    if missing is not None:
        target = target + inputs.solve(missing / factors)
    rows = target[inputs.order]
    neighbours = rows if bits == LOW_BITS else target
    scales = _column_scales(neighbours, bits, np.diag(inputs.moments), full_range=full_range)
    middle = 2 ** (bits - 1)
    steps, *_ = round_rows(rows, bits, BLOCK, lambda *_: (scales, middle), inputs.feedback, last_first=True)
    if bits == LOW_BITS:  # those that change products with such inputs least
        projected = inputs.moments @ steps
        scales = sum_of_products(projected, rows) * inverse_of(sum_of_products(projected, steps))
    codes = np.empty(rows.shape, np.int8)
    codes[inputs.order] = steps
    if not full_range:
        _limit_pairs(codes)
    became = np.asarray(codes * scales / factors)
    return Packed(codes, scales, error=relative_error(weight, became), fitted=True), became


def _column_scales(weight: np.ndarray, bits: int, power: np.ndarray | None = None, *, full_range: bool) -> np.ndarray:
    """Scales [N] for a weight [K, N]. In 4 bits: with the least error, weighted by the power [K] of the inputs. In 8:
    those whose codes just reach the largest sum of two neighbours of the same sign, or with the full range the largest
    number of each column."""
    if bits == LOW_BITS:
        by_row = None if power is None else np.maximum(power, TINY).astype(np.float32)[:, None]
        return symmetric_scales(weight, LOW_BITS, SCALE_STEPS, by_row)
    scales = np.asarray(np.max(np.abs(weight), axis=0) / np.float32(LARGEST_CODE))
    if full_range:
        return scales
    pairs = np.arange(0, len(weight), 2)
    for part in np.maximum(weight, 0), np.maximum(-weight, 0):
        largest = np.add.reduceat(part, pairs, axis=0).max(axis=0)
        scales = np.maximum(scales, largest / np.float32(PAIR_LIMIT))
    return scales


def _limit_pairs(codes: np.ndarray) -> None:
    """Bring the larger code of two neighbours nearer to 0, in place, where their sum is beyond PAIR_LIMIT."""
    first, second = codes[: len(codes) // 2 * 2 : 2], codes[1::2]  # views
    sums = first + second.astype(np.int16)
    excess = (sums - np.clip(sums, -PAIR_LIMIT, PAIR_LIMIT)).astype(np.int8)
    first_is_larger = np.abs(first, dtype=np.int16) >= np.abs(second, dtype=np.int16)
    first -= np.where(first_is_larger, excess, 0)
    second -= np.where(first_is_larger, 0, excess)


def ternary_group(weight: np.ndarray) -> int | None:
    """The size of the groups in which the weight [K, N] is ternary; None where it is not. Most others are told by their
    first group, and the rest of them is not read."""

    def holds_one(rows: np.ndarray) -> bool:
        size = np.abs(rows)
        return bool(((size == size.max(axis=0)) | (size == 0)).all())

    for group in GROUPS:
        starts = range(0, len(weight), group)
        if len(weight) % group == 0 and all(holds_one(weight[start : start + group]) for start in starts):
            return group
    return None


def signs_and_sizes(weight: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight [K, N] of any type that is ternary in groups of `group` rows → −1, 0 and 1 as int8 [K/group, group, N],
    and m [K/group, N]."""
    groups = weight.reshape(-1, group, weight.shape[1])
    return np.sign(groups).astype(np.int8), np.abs(groups).max(axis=1)


def ternary_columns(weight: np.ndarray, group: int, *, full_range: bool = False) -> Packed:
    """Round a weight [K, N] that is ternary in groups of `group` rows, whose codes are then −c, 0 and c, c · scale ≈ m.
    The scale of a column has the least error: nothing is lost where all its m are whole multiples of one number.

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


def symmetric_scales(x: np.ndarray, bits: int, steps: Iterable[float], weight: np.ndarray | None = None) -> np.ndarray:
    """For each column of x [block, n] the scale of least squared error: [n], negative where the extreme of the column
    is positive. The scales that are tried are those with which the extreme is -2^(bits-1) - step codes, for each of
    `steps`. weight: of the squared errors, [block, n] or [block, 1]; None counts all alike."""
    half = 2 ** (bits - 1)
    high, low = x.max(axis=0), x.min(axis=0)
    per_extreme = inverse_of(np.where(high >= -low, high, low))
    candidates = ((np.float32(-(half + step)) * per_extreme, np.float32(half)) for step in steps)
    return best_of(x, weight, candidates, bits)[0]


def best_of(
    x: np.ndarray, weight: np.ndarray | None, candidates: Iterable[tuple[np.ndarray, ArrayLike]], bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero of the best candidate (1/scale, zero) in each column: the scale is fitted to a candidate's codes,
    and the least Σ weight · (x - scale · steps)² wins. A fit explains (Σ w x s)² / Σ w s² of Σ w x²."""
    weighted = x if weight is None else weight * x
    explained = np.full(x.shape[1], -1, np.float32)
    scale, zero = np.zeros_like(explained), np.zeros_like(explained)
    for inverse, candidate in candidates:
        steps = steps_of(x, inverse, candidate, bits)
        dot = sum_of_products(weighted, steps)
        norm = sum_of_products(steps, steps) if weight is None else sum_of_products(steps, steps, weight)
        norm = np.maximum(norm, TINY)
        better = dot * dot / norm > explained
        explained = np.where(better, dot * dot / norm, explained)
        scale, zero = np.where(better, dot / norm, scale), np.where(better, candidate, zero)
    return scale, zero


def steps_of(x: np.ndarray, inverse: np.ndarray, zero: ArrayLike, bits: int) -> np.ndarray:
    """code - zero of each weight, [block, n] float32: the nearest whole multiple of the scale that a code can reach."""
    zero = np.asarray(zero, np.float32)
    steps: np.ndarray = x * inverse
    np.rint(steps, out=steps)
    np.maximum(steps, -zero, out=steps)
    np.minimum(steps, np.float32(2**bits - 1) - zero, out=steps)
    return steps


def sum_of_products(*factors: np.ndarray) -> np.ndarray:
    """The sum over each column of the elementwise product of the factors [block, n]: [n]. It takes one pass; a product
    and then a sum would take two."""
    return np.asarray(np.einsum(", ".join(["ij"] * len(factors)) + " -> j", *factors))


def ceil_div(number: int, divisor: int) -> int:
    """number / divisor, rounded up."""
    return -(-number // divisor)


def relative_error(weight: np.ndarray, rounded: np.ndarray) -> float:
    """Σ (W - Ŵ)² / Σ W², and 0 for a weight of zeros."""
    power = power_of(weight)
    return power_of(rounded - weight) / power if power else 0.0


def power_of(x: np.ndarray) -> float:
    """Σ x²"""
    return float(np.vdot(x, x))


def inverse_of(x: np.ndarray) -> np.ndarray:
    """1/x, and 0 for 0: a block of zeros gets scale 0."""
    inverse = np.zeros_like(x)
    np.divide(1, x, out=inverse, where=x != 0)
    return inverse


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes of 2 or 4 bits into bytes along axis 1, the first code in the lowest bits; 8-bit codes stay as they
    are. [·, k, N] → [·, ⌈k·bits/8⌉, N]"""
    per_byte = 8 // bits
    packed = codes[:, 0::per_byte].copy()
    for place in range(1, per_byte):
        later = codes[:, place::per_byte]
        packed[:, : later.shape[1]] |= later << (bits * place)
    return packed
