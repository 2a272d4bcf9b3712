"""Weights of 2, 4 and 8 bits in blocks, for ONNX Runtime's MatMulNBits: the methods rtn, k_quant_mixed and hqq.

A weight W [K, N] is cut along K into blocks that share a scale and a zero point; W ≈ scale · (code - zero point).
In the functions here each block is a column of x [block, n], so a sum over every block adds long rows, which is fast.

A method differs from the others in how it finds scales and zero points: by a Fitter, a function that fits one slab of
blocks, x [block, n]. Rounding with these then gives the codes. Weights that are ternary in groups need no Fitter: the
codes 1, 2 and 3 of 2 bits are exact.
"""

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from common.contract import MICROSOFT, EncoderWeight, Role
from common.onnx_io import add_initializer, input_of, load, shape_of
from common.quantize.calibration import Product, SizeModel, smallest_plan, spend, visit_products
from common.quantize.methods import TERNARY_BITS, Calibrated, Format, OptimizeOptions, Plan, QuantMethod, Replace
from common.quantize.rewrite import plan_encoder, quantizable
from common.quantize.rounding import (
    TINY,
    Fit,
    Fitter,
    InputMoments,
    Packed,
    best_of,
    ceil_div,
    inverse_of,
    power_of,
    relative_error,
    round_rows,
    steps_of,
    sum_of_products,
    symmetric_scales,
)
from common.quantize.ternary import signs_and_sizes

LOW, HIGH = BITS = (4, 8)
BLOCK_SIZES = (16, 32, 64, 128, 256)  # weights; those that ONNX Runtime's CPU kernels support (1.32)
# Number of weights fitted at a time: 1 MB, so that temporaries stay in cache and threads seldom wait for Python's lock.
SLAB = 1 << 18
# By how many codes the scales that are tried are narrower than the block's range, or wider if the number is negative:
# the range is then stretched over fewer codes. More scales, beyond these ends or between these points, would improve a
# Gaussian or Laplacian matrix by less than 0.1 dB.
RTN_STEPS = (-2.0, -1.2, -0.6, 0.0, 0.5)
K_QUANT_STEPS = tuple(np.linspace(-3.0, 0.9, 14))
# Badri & Shaji's constants (mobiusml/hqq, `optimize_weights_proximal`, where 20 iterations use them and stop early).
HQQ_NORM, HQQ_BETA, HQQ_KAPPA = 0.7, 10.0, 1.01
HQQ_ITERATIONS = 10  # 20 gain 0.06 dB at block 128, less at 32


def quantize_blocks(weight: np.ndarray, bits: int, block: int, fit: Fitter) -> Packed:
    """Quantize weight [K, N] in blocks along K, the last one padded with zeros.

    Raises ValueError for bits or a block size that is not supported.
    """
    if bits not in BITS or block not in BLOCK_SIZES:
        raise ValueError(f"blocks have {BITS} bits and {BLOCK_SIZES} weights, not {bits} and {block}")
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


def ternary_blocks(weight: np.ndarray, group: int) -> Packed:
    """A weight [K, N] that is ternary in groups of `group` rows, without loss: a block is a group."""
    signs, sizes = signs_and_sizes(weight, group)
    codes = (signs + 2 ** (TERNARY_BITS - 1)).astype(np.uint8)
    return _packed(codes, sizes.astype(np.float32), None, TERNARY_BITS, 0.0)


def _packed(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, bits: int, error: float) -> Packed:
    """Put codes [blocks, block, N], scales and zero points [blocks, N] into the layout of MatMulNBits."""
    return Packed(
        codes=np.ascontiguousarray(_pack(codes, bits).transpose(2, 0, 1)),
        scales=np.ascontiguousarray(scales.T),
        zero_points=None if zeros is None else np.ascontiguousarray(_pack(zeros[None], bits)[0].T),
        error=error,
    )


def fit_blocks(
    weight: np.ndarray,
    bits: int,
    block: int,
    fit: Fitter,
    inputs: InputMoments,
    factors: np.ndarray | float = 1.0,
) -> tuple[Packed, np.ndarray]:
    """Like `quantize_blocks`, but rows are multiplied by `factors` [K, 1] and then rounded such that products with
    these inputs, `InputMoments.in_order`, change least. Also returns the rounded weight [K, N], divided by the factors
    again."""
    K, N = weight.shape
    feedback = np.asfortranarray(inputs.feedback[::-1, ::-1])  # in another layout sums would be rounded otherwise
    rounded = round_rows(weight * factors, bits, block, fit, feedback, last_first=False)
    codes = np.zeros((len(rounded.zeros) * block, N), np.uint8)
    codes[:K] = rounded.steps + np.repeat(rounded.zeros, block, axis=0)[:K]
    zeros = None if np.all(rounded.zeros == 2 ** (bits - 1)) else rounded.zeros.astype(np.uint8)
    became = weight - rounded.errors / factors
    return _packed(codes.reshape(-1, block, N), rounded.scales, zeros, bits, relative_error(weight, became)), became


def rtn(x: np.ndarray, bits: int) -> Fit:
    """Symmetric round to nearest that tries five scales and keeps the best: 0.3 to 0.5 dB better than the plain form.

    As in ONNX Runtime and llama.cpp's Q4_0, the weight of largest magnitude gets code 0, whatever its sign. Code 0
    stands for -8, which is further from zero than 7, the other end of the range.
    """
    return symmetric_scales(x, bits, RTN_STEPS), None


def k_quant(x: np.ndarray, bits: int) -> Fit:
    """Search for scale and zero point with llama.cpp's weights, rms + |x| (`make_qkx2_quants` in ggml-quants.c).

    llama.cpp's offset is a float. Here it is rounded before a candidate is judged, not after the search.
    """
    low, high = np.minimum(x.min(axis=0), 0), np.maximum(x.max(axis=0), 0)
    top, per_range = 2**bits - 1, inverse_of(high - low)
    inverses = (np.float32(top + step) * per_range for step in K_QUANT_STEPS)
    candidates = ((inverse, np.clip(np.rint(-low * inverse), 0, top)) for inverse in inverses)
    return best_of(x, np.abs(x) + np.sqrt(np.mean(x * x, axis=0)), candidates, bits)


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


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes of 2 or 4 bits into bytes along axis 1, the first code in the lowest bits; 8-bit codes stay as they
    are. [·, k, N] → [·, ⌈k·bits/8⌉, N]"""
    per_byte = 8 // bits
    packed = codes[:, 0::per_byte].copy()
    for place in range(1, per_byte):
        later = codes[:, place::per_byte]
        packed[:, : later.shape[1]] |= later << (bits * place)
    return packed


# The roles where 8 bits gain most per byte. On speech through the tiny checkpoint (k_quant, block 32, the ends of the
# graph always at 8 bits), 4 bits elsewhere give 23.1 dB, and 8 bits for these roles 31.2 dB at 13 % more bytes. Values
# and feed-forward outputs of some layers, llama.cpp's choice for language models, give 23.6 dB at 8 %; values,
# attention and feed-forward outputs of all layers give 24.1 dB at 24 %.
EIGHT_BIT_ROLES = (
    Role.ATTENTION_VALUE,
    Role.ATTENTION_OUT,
    Role.CONVOLUTION_EXPAND,
    Role.CONVOLUTION_PROJECT,
)


@dataclass(frozen=True, kw_only=True)
class BlockMethod(QuantMethod):
    """4 bits for every weight; the codes of a block are found by `fit`. Where the user says that weights are ternary,
    they have 2 bits, and the few others 8, so that as little as possible is lost."""

    fit: Fitter
    uses_blocks: bool = True
    unfused_gain_on_cpu: str = "6 to 10 %"  # of the time of an encoder in 4 bits: see rewrite.fuse

    def plan(self, weights: Mapping[str, EncoderWeight], options: OptimizeOptions) -> Plan:
        return dict.fromkeys(weights, Format(HIGH if options.insists_on_ternary else LOW, options.block_size))

    def ternary_format(self, group: int, options: OptimizeOptions) -> Format | None:
        return Format(TERNARY_BITS, group) if options.insists_on_ternary else None

    def pack(self, weight: np.ndarray, form: Format) -> Packed:
        if form.bits == TERNARY_BITS:
            return ternary_blocks(weight, block_of(form))
        return quantize_blocks(weight, form.bits, block_of(form), self.fit)

    def replace(self, model: ir.Model, options: OptimizeOptions) -> Replace:
        def put(nodes: Sequence[ir.Node], name: str, packed: Packed, form: Format) -> None:
            tensors = (ir.tensor(array, name=f"{name}.{part}") for part, array in packed.tensors())
            constants = [add_initializer(model.graph, tensor) for tensor in tensors]
            for node in nodes:
                _replace_node(model.graph, node, constants, form, options.accuracy_level)

        return put

    def stored_bytes(self, shape: tuple[int, ...], form: Format) -> tuple[int, ...]:
        (K, N), block = shape, block_of(form)
        blocks = ceil_div(K, block)
        return N * blocks * block * form.bits // 8, 4 * N * blocks, N * ceil_div(blocks * form.bits, 8)

    def runs_as(self, bits: Collection[int]) -> str:
        return "ternary weights, exact in 2 bits, which products read as they are" if TERNARY_BITS in bits else ""


def block_of(form: Format) -> int:
    """The block size of a format that has one."""
    if form.block is None:
        raise ValueError(f"a weight of {form.bits} bits for MatMulNBits needs a block size")
    return form.block


def _replace_node(graph: ir.Graph, node: ir.Node, constants: list[ir.Value], form: Format, accuracy_level: int) -> None:
    K, N = shape_of(input_of(node, 1))
    numbers = {"K": K, "N": N, "bits": form.bits, "block_size": block_of(form), "accuracy_level": accuracy_level}
    new = ir.Node(
        MICROSOFT,
        "MatMulNBits",
        [node.inputs[0], *constants],
        [ir.AttrInt64(name, number) for name, number in numbers.items()],
        name=node.name,
    )
    ir.convenience.replace_nodes_and_values(graph, node, [node], [new], node.outputs, new.outputs)


@dataclass(frozen=True, kw_only=True)
class MixedBlockMethod(BlockMethod):
    """4 bits, and 8 where a rule, or a measurement on speech, says that they help most."""

    calibrates: bool = True

    def plan(self, weights: Mapping[str, EncoderWeight], options: OptimizeOptions) -> Plan:
        """8 bits for EIGHT_BIT_ROLES, and for the first and last matrix, through which everything passes."""
        ends = (next(iter(weights)), next(reversed(list(weights))))
        eight = {name for name, weight in weights.items() if weight.role in EIGHT_BIT_ROLES or name in ends}
        return {name: Format(HIGH if name in eight else LOW, options.block_size) for name in weights}

    def calibrate(self, encoder: Path, batches: Sequence[np.ndarray], options: OptimizeOptions) -> Calibrated:
        """Spend the size budget, or as many bytes as `plan` needs, where they help most. Raises ValueError for a budget
        that is exceeded even with 4 bits for every weight."""
        model = load(encoder)
        low, high = (Format(bits, options.block_size) for bits in BITS)
        sizes = SizeModel(model, encoder.stat().st_size, self)
        rule = plan_encoder(model, self, options)
        budget = sizes.total(rule) if options.size_budget_mb is None else options.size_budget_mb * 1e6
        smallest_plan(sizes, rule, low, budget)  # raises ValueError before the long work begins
        fitted = fit_widths(encoder, batches, options.block_size)
        plan = spend(sizes, fitted.sensitivity, rule, low, high, budget)
        weights = {name: fitted.packed[name][form.bits] for name, form in plan.items()}
        return Calibrated(plan, weights, fitted.factors, fitted.sensitivity)


@dataclass(frozen=True)
class FittedWidths:
    """Each quantizable weight in both widths, fitted to speech; by name, in graph order, and then by bits."""

    packed: dict[str, dict[int, Packed]] = field(default_factory=dict)
    sensitivity: dict[str, dict[int, float]] = field(default_factory=dict)
    factors: dict[str, np.ndarray] = field(default_factory=dict)  # of the rows of scaled weights, [K, 1]


def fit_widths(encoder: Path, batches: Sequence[np.ndarray], block: int) -> FittedWidths:
    """Fit the weights of the float32 graph at `encoder` to features [B, M, T] of speech, each by itself."""
    fitted = FittedWidths()

    def visit(product: Product) -> None:
        inputs = InputMoments.in_order(product.moments)

        def fit(bits: int) -> tuple[Packed, np.ndarray]:
            return fit_blocks(product.weight, bits, block, k_quant, inputs, product.factors)

        with ThreadPoolExecutor(len(BITS)) as pool:
            packed, became = zip(*pool.map(fit, BITS), strict=True)
        fitted.packed[product.name] = dict(zip(BITS, packed, strict=True))
        fitted.sensitivity[product.name] = product.damages(dict(zip(BITS, became, strict=True)))

    scaled = quantizable(load(encoder))
    fitted.factors.update(visit_products(encoder, batches, visit, scaled=scaled, measures=True))
    return fitted


RTN = BlockMethod(
    name="rtn",
    fit=rtn,
    weight_bits=(TERNARY_BITS,),
    help="4 bits, rounded to nearest with a searched scale",
)
K_QUANT_MIXED = MixedBlockMethod(
    name="k_quant_mixed",
    fit=k_quant,
    help="4 bits with zero points by llama.cpp's search, and 8 bits where they matter most",
)
HQQ = BlockMethod(
    name="hqq",
    fit=hqq,
    help="4 bits with whole zero points by half-quadratic optimization; the slowest to make",
)
