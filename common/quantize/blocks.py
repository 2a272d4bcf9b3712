"""Float32 matrices as the tensors of ONNX Runtime's MatMulNBits: one function for each way to find codes.

A weight W [K, N] is cut along K into blocks that share a scale and a zero point; W ≈ scale · (code - zero point).
In the functions here each block is a column of x [block, n], so a sum over every block adds long rows, which is fast.

A Fitter fits one slab of blocks: (x, bits) → scale [n] and zero point [n] of whole numbers, or None for the middle code
2^(bits-1), which MatMulNBits assumes where no zero points are stored. Rounding with these then gives the codes.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

BITS = (4, 8)
BLOCK_SIZES = (16, 32, 64, 128, 256)  # weights; those that ONNX Runtime's CPU kernels support (1.32)
# Number of weights fitted at a time: 1 MB, so that temporaries stay in cache and threads seldom wait for Python's lock.
SLAB = 1 << 18
TINY = np.float32(1e-30)  # replaces a divisor of zero, whose dividend is then zero as well
# By how many codes the scales that are tried are narrower than the block's range, or wider if the number is negative:
# the range is then stretched over fewer codes. More scales, beyond these ends or between these points, would improve a
# Gaussian or Laplacian matrix by less than 0.1 dB.
RTN_STEPS = (-2.0, -1.2, -0.6, 0.0, 0.5)
K_QUANT_STEPS = tuple(np.linspace(-3.0, 0.9, 14))
# Badri & Shaji's constants (mobiusml/hqq, `optimize_weights_proximal`, where 20 iterations use them and stop early).
HQQ_NORM, HQQ_BETA, HQQ_KAPPA = 0.7, 10.0, 1.01
HQQ_ITERATIONS = 10  # 20 gain 0.06 dB at block 128, less at 32
Fit = tuple[np.ndarray, np.ndarray | None]
Fitter = Callable[[np.ndarray, int], Fit]


@dataclass(frozen=True)
class Packed:
    """The constant inputs of one MatMulNBits node (docs/ContribOperators.md of onnxruntime), and their error."""

    codes: np.ndarray  # [N, blocks, block * bits / 8] uint8, low half first
    scales: np.ndarray  # [N, blocks] float32
    zero_points: np.ndarray | None  # [N, ceil(blocks * bits / 8)] uint8, low half first
    error: float = math.nan  # Σ (W - Ŵ)² / Σ W²

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and array of each input, in the order of the node."""
        return ((name, array) for name, array in vars(self).items() if isinstance(array, np.ndarray))


def quantize(weight: np.ndarray, bits: int, block: int, fit: Fitter) -> Packed:
    """Quantize weight [K, N] in blocks along K, the last one padded with zeros.

    Raises ValueError for bits or a block size that is not supported.
    """
    if bits not in BITS or block not in BLOCK_SIZES:
        raise ValueError(f"expected bits of {BITS} and a block size of {BLOCK_SIZES}, got {bits} and {block}")
    K, N = weight.shape
    blocks, middle = ceil_div(K, block), 2 ** (bits - 1)
    codes = np.empty((blocks, block, N), np.uint8)
    scales, zeros = np.empty((blocks, N), np.float32), np.full((blocks, N), middle, np.uint8)
    symmetric, power, noise = True, 0.0, 0.0
    for i in range(blocks):
        rows = weight[i * block : (i + 1) * block]
        for start in range(0, N, SLAB // block):
            columns = slice(start, start + SLAB // block)
            x = np.zeros((block, rows[:, columns].shape[1]), np.float32)
            x[: len(rows)] = rows[:, columns]
            scale, zero = fit(x, bits)
            if zero is not None:
                symmetric, zeros[i, columns] = False, zero
            scales[i, columns] = scale
            steps = steps_of(x, inverse_of(scale), zeros[i, columns], bits)
            codes[i, :, columns] = steps + zeros[i, columns]
            power += power_of(x)
            noise += power_of(np.subtract(x, np.multiply(steps, scale, out=steps), out=x))
    return _packed(codes, scales, None if symmetric else zeros, bits, noise / power if power else 0.0)


def _packed(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, bits: int, error: float) -> Packed:
    """Put codes [blocks, block, N], scales and zero points [blocks, N] into the layout of MatMulNBits."""
    return Packed(
        codes=np.ascontiguousarray(_pack(codes, bits).transpose(2, 0, 1)),
        scales=np.ascontiguousarray(scales.T),
        zero_points=None if zeros is None else np.ascontiguousarray(_pack(zeros[None], bits)[0].T),
        error=error,
    )


def quantize_compensated(
    weight: np.ndarray,
    bits: int,
    block: int,
    fit: Fitter,
    feedback: np.ndarray,
    factors: np.ndarray | float = 1.0,
) -> tuple[Packed, np.ndarray]:
    """Like `quantize`, but rows are multiplied by `factors` [K, 1] and then rounded one by one with the feedback of
    `moments.error_feedback`. Also returns the errors W - Ŵ [K, N], divided by the factors again."""
    codes, scales, zeros, errors = compensate(weight * factors, bits, block, fit, feedback)
    errors /= factors
    symmetric = bool(np.all(zeros == 2 ** (bits - 1)))
    error = relative_error(weight, weight - errors)
    return _packed(codes, scales, None if symmetric else zeros, bits, error), errors


def compensate(
    weight: np.ndarray, bits: int, block: int, fit: Fitter, feedback: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Round row by row, where each row makes up for the errors of the rows before it. Returns codes [blocks, block, N],
    scales and zero points [blocks, N], and errors W - Ŵ [K, N]."""
    K, N = weight.shape
    blocks, middle = ceil_div(K, block), 2 ** (bits - 1)
    codes, scales = np.zeros((blocks, block, N), np.uint8), np.empty((blocks, N), np.float32)
    zeros, errors = np.empty((blocks, N), np.uint8), np.empty((K, N), np.float32)
    for i, begin in enumerate(range(0, K, block)):
        end = min(begin + block, K)
        target = np.zeros((block, N), np.float32)
        target[: end - begin] = weight[begin:end] + feedback[:begin, begin:end].T @ errors[:begin]
        scales[i], zero = fit(target, bits)
        zero = np.full(N, middle, np.float32) if zero is None else zero
        inverse, within = inverse_of(scales[i]), np.ascontiguousarray(feedback[begin:end, begin:end].T)
        for k in range(begin, end):
            row = target[k - begin] + within[k - begin, : k - begin] @ errors[begin:k]
            steps = steps_of(row, inverse, zero, bits)
            errors[k] = weight[k] - steps * scales[i]
            codes[i, k - begin] = steps + zero
        zeros[i] = zero
    return codes, scales, zeros, errors


def rtn(x: np.ndarray, bits: int) -> Fit:
    """Symmetric round to nearest that tries five scales and keeps the best: 0.3 to 0.5 dB better than the plain form.

    As in ONNX Runtime and llama.cpp's Q4_0, the weight of largest magnitude gets code 0, whatever its sign. Code 0
    stands for -8, which is further from zero than 7, the other end of the range.
    """
    return symmetric_scales(x, bits, RTN_STEPS), None


def symmetric_scales(x: np.ndarray, bits: int, steps: Iterable[float], weight: np.ndarray | None = None) -> np.ndarray:
    """For each column of x [block, n] the scale of least squared error: [n], negative where the extreme of the column
    is positive. The scales that are tried are those with which the extreme is -2^(bits-1) - step codes, for each of
    `steps`. weight: of the squared errors, [block, n] or [block, 1]; None counts all alike."""
    half = 2 ** (bits - 1)
    high, low = x.max(axis=0), x.min(axis=0)
    per_extreme = inverse_of(np.where(high >= -low, high, low))
    candidates = ((np.float32(-(half + step)) * per_extreme, np.float32(half)) for step in steps)
    return _best_of(x, weight, candidates, bits)[0]


def k_quant(x: np.ndarray, bits: int) -> Fit:
    """Search for scale and zero point with llama.cpp's weights, rms + |x| (`make_qkx2_quants` in ggml-quants.c).

    llama.cpp's offset is a float. Here it is rounded before a candidate is judged, not after the search.
    """
    low, high = np.minimum(x.min(axis=0), 0), np.maximum(x.max(axis=0), 0)
    top, per_range = 2**bits - 1, inverse_of(high - low)
    inverses = (np.float32(top + step) * per_range for step in K_QUANT_STEPS)
    candidates = ((inverse, np.clip(np.rint(-low * inverse), 0, top)) for inverse in inverses)
    return _best_of(x, np.abs(x) + np.sqrt(np.mean(x * x, axis=0)), candidates, bits)


def hqq(x: np.ndarray, bits: int) -> Fit:
    """Half-quadratic quantization (Badri & Shaji 2023) with whole zero points, which the fast kernels need.

    An l_p shrinkage, p < 1, treats large errors as outliers, and scale and zero point are fitted to the rest. The
    original moves only the zero point, which would mostly be rounded back to where it began; here a closed form gives
    both. Errors are measured in steps of the block, so the constants mean the same for any magnitude of weight. The
    iterate of least squared error is kept, so the result is never worse than the start, which is the block's range.
    """
    top = np.float32(2**bits - 1)
    low, high = np.minimum(x.min(axis=0), 0), np.maximum(x.max(axis=0), 0)
    inverse = inverse_of(high - low) * top
    zero = np.rint(-low * inverse)
    scale, best = inverse_of(inverse), np.full(x.shape[1], np.inf, np.float32)
    best_scale, best_zero = scale, zero
    for i in range(HQQ_ITERATIONS):
        steps = steps_of(x, inverse, zero, bits)
        error = x - steps * scale
        loss = sum_of_products(error, error)
        better = loss < best
        best, best_scale, best_zero = (
            np.where(better, new, old) for new, old in ((loss, best), (scale, best_scale), (zero, best_zero))
        )
        size = np.abs(error) * inverse + np.float32(1e-8)
        shrunk = np.maximum(size - size ** np.float32(HQQ_NORM - 1) / np.float32(HQQ_BETA * HQQ_KAPPA**i), 0)
        rest = x - np.copysign(shrunk * scale, error)
        scale, zero = _least_squares(rest, steps, scale, zero, top)
        inverse = inverse_of(scale)
    return best_scale, best_zero


def _least_squares(x: np.ndarray, steps: np.ndarray, scale: np.ndarray, zero: np.ndarray, top: np.float32) -> Fit:
    """The scale and the whole zero' with which x ≈ scale · (code - zero') fits best. steps: code - zero, in the shape
    of x, [block, n]. scale, zero: those so far, [n]."""
    mean_x, mean_steps = x.mean(axis=0), steps.mean(axis=0)
    centred = steps - mean_steps
    slope = sum_of_products(centred, x) / np.maximum(sum_of_products(centred, centred), TINY)
    slope = np.where(slope > 0, slope, scale)
    moved = np.clip(np.rint(zero + mean_steps - mean_x * inverse_of(slope)), 0, top)
    steps = steps + (zero - moved)
    dot, norm = sum_of_products(x, steps), sum_of_products(steps, steps)
    return np.where(dot > 0, dot / np.maximum(norm, TINY), slope), moved


def _best_of(
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


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack two 4-bit codes into a byte along axis 1, the even one in the low half; 8-bit codes stay as they are.
    [·, k, N] → [·, ⌈k/2⌉, N]"""
    if bits == 8:
        return codes
    low, high = codes[:, 0::2], codes[:, 1::2]
    packed = low.copy()
    packed[:, : high.shape[1]] |= high << 4
    return packed
