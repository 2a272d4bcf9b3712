"""Rounding of weights to whole multiples of a scale: the arithmetic, the packed result, and feedback of errors.

A product with a weight W [K, N] changes less if later rows make up for the errors of earlier ones. How much of an error
each row takes over follows from the second moments of the product's inputs (InputMoments), and `round_rows` applies it.
(This is QuIP's LDLQ, Chee et al. 2023; it gives the codes of GPTQ, Frantar et al. 2023, with one factorization.)
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import cho_solve, cholesky

TINY = np.float32(1e-30)  # replaces a divisor of zero, whose dividend is then zero as well
# Added to the diagonal of the second moments, as a fraction of its mean, as in GPTQ. Where rows are sorted it is more:
# these moments also determine what makes up for earlier errors, and that should hold for other speech as well. With
# 0.05 instead, 4 bits lose 0.2 to 0.4 dB if the speech is 29 s, and there is no difference if it is 194 s (the tiny
# checkpoints).
DAMPING, SORTED_DAMPING = 0.01, 0.1
# A Fitter fits one slab of blocks, each a column: (x [block, n], bits) → scale [n] and zero point [n] of whole numbers,
# or None for the middle code 2^(bits-1), which MatMulNBits assumes where no zero points are stored.
Fit = tuple[np.ndarray, np.ndarray | None]
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


@dataclass(frozen=True)
class InputMoments:
    """Second moments of a product's inputs, in the order opposite to that in which the rows of its weight are rounded.

    With Σ xᵀx = Rᵀ R, errors E [K, N] of the weight put an error of ‖R E‖² into the product. R is upper triangular, so
    a row can make up for the errors of the rows after it, which are therefore rounded before it.
    """

    order: np.ndarray  # [K], places in the product of the inputs below
    moments: np.ndarray  # [K, K]
    factor: np.ndarray  # R [K, K] of the damped moments

    @classmethod
    def in_order(cls, moments: np.ndarray) -> "InputMoments":
        """For rows that are rounded from first to last, from the second moments [K, K]."""
        return cls._of(moments, np.arange(len(moments))[::-1], DAMPING)

    @classmethod
    def strongest_first(cls, moments: np.ndarray) -> "InputMoments":
        """For rows that are rounded in the order of their inputs' power, the strongest first: GPTQ's act-order."""
        return cls._of(moments, np.argsort(np.diag(moments), kind="stable"), SORTED_DAMPING)

    @classmethod
    def _of(cls, moments: np.ndarray, order: np.ndarray, damping: float) -> "InputMoments":
        moments = moments[np.ix_(order, order)]
        damped = moments.copy()
        damped[np.diag_indices_from(damped)] += damping * np.trace(moments) / len(moments) + TINY
        # SciPy takes a quarter of NumPy's time, and overwrites its input.
        return cls(order, moments, np.asarray(cholesky(damped.T, overwrite_a=True, check_finite=False)))

    @property
    def feedback(self) -> np.ndarray:
        """[K, K], upper triangular, ones on the diagonal: row k has the shares of other rows' errors that it takes."""
        return np.asarray(self.factor / np.diag(self.factor)[:, None])

    def solve(self, right: np.ndarray) -> np.ndarray:
        """The solution X [K, N] of (Σ xᵀx, damped) · X = right. The rows of both have the order of the product."""
        solution = np.empty_like(right)
        solution[self.order] = cho_solve((self.factor, False), right[self.order], overwrite_b=True, check_finite=False)
        return solution


@dataclass(frozen=True)
class RoundedRows:
    """A weight W [K, N] after `round_rows`; its blocks are numbered in the order in which they were rounded."""

    steps: np.ndarray  # code - zero, [K, N] float32
    scales: np.ndarray  # [blocks, N]
    zeros: np.ndarray  # [blocks, N]
    errors: np.ndarray  # W - Ŵ, [K, N]


def round_rows(
    weight: np.ndarray, bits: int, block: int, fit: Fitter, feedback: np.ndarray, *, last_first: bool
) -> RoundedRows:
    """Round a weight [K, N] row by row, each first moved by its share of the errors of the rows before it.

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
        scale, zero = fit(target, bits)
        scales[i], zeros[i] = scale, 2 ** (bits - 1) if zero is None else zero
        inverse, within = inverse_of(scale), np.ascontiguousarray(feedback[rows, rows])
        exact, row_steps, row_errors = weight[rows], steps[rows], errors[rows]  # views
        for k in reversed(range(end - begin)) if last_first else range(end - begin):
            earlier = slice(k + 1, end - begin) if last_first else slice(0, k)
            row = target[k] + within[k, earlier] @ row_errors[earlier]
            row_steps[k] = steps_of(row, inverse, zeros[i], bits)
            row_errors[k] = exact[k] - row_steps[k] * scale
    return RoundedRows(steps, scales, zeros, errors)


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
