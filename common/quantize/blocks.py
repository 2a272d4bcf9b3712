"""Weights of 2, 4 and 8 bits in blocks, for ONNX Runtime's MatMulNBits: the methods rtn, k_quant_mixed and hqq.

A weight W [K, N] is cut along K into blocks that share a scale and a zero point; W ≈ scale · (code - zero point).
In the functions here each block is a column of x [block, n], so a sum over every block adds long rows, which is fast.

A method differs from the others in its Fitter, which finds scales and zero points; rounding with these gives the codes.
Weights that are ternary in groups need no Fitter: the codes 1, 2 and 3 of 2 bits are exact.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from common.contract import MICROSOFT, EncoderWeight, Role
from common.quantize.methods import FittingMethod, Format, OptimizeOptions, Plan, Replace, Weight
from common.quantize.rounding import (
    HIGH_BITS,
    LOW_BITS,
    TERNARY_BITS,
    TINY,
    Fit,
    Fitter,
    InputMoments,
    Packed,
    best_of,
    ceil_div,
    inverse_of,
    pack_bits,
    power_of,
    relative_error,
    round_rows,
    signs_and_sizes,
    steps_of,
    sum_of_products,
    symmetric_scales,
)

BLOCK_SIZES = (16, 32, 64, 128, 256)  # weights; those that ONNX Runtime's CPU kernels support (1.32)
# By how many codes the scales that are tried are narrower than the block's range, or wider if the number is negative.
# More scales would improve a Gaussian or Laplacian matrix by less than 0.1 dB.
RTN_STEPS = (-2.0, -1.2, -0.6, 0.0, 0.5)
K_QUANT_STEPS = tuple(np.linspace(-3.0, 0.9, 14))
# Badri & Shaji's constants (mobiusml/hqq, `optimize_weights_proximal`, where 20 iterations use them and stop early).
HQQ_NORM, HQQ_BETA, HQQ_KAPPA = 0.7, 10.0, 1.01
HQQ_ITERATIONS = 10  # 20 gain 0.06 dB at block 128, less at 32


def quantize_blocks(weight: np.ndarray, bits: int, block: int, fit: Fitter) -> Packed:
    """Round a weight [K, N] to nearest in blocks along K, the last one padded with zeros."""
    K, N = weight.shape
    blocks = ceil_div(K, block)
    padded = np.zeros((blocks, block, N), np.float32)
    padded.reshape(-1, N)[:K] = weight
    codes = np.empty(padded.shape, np.uint8)
    scales, zeros = np.empty((blocks, N), np.float32), np.empty((blocks, N), np.uint8)
    noise, power = 0.0, power_of(weight)
    for i, x in enumerate(padded):
        scales[i], zeros[i] = fit(x, bits)
        steps = steps_of(x, inverse_of(scales[i]), zeros[i], bits)
        codes[i] = steps + zeros[i]
        noise += power_of(x - steps * scales[i])
    return _packed(codes, scales, zeros, bits, noise / power if power else 0.0)


def ternary_blocks(weight: np.ndarray, group: int) -> Packed:
    """A weight [K, N] that is ternary in groups of `group` rows, without loss: a block is a group."""
    signs, sizes = signs_and_sizes(weight, group)
    zeros = np.full(sizes.shape, 2 ** (TERNARY_BITS - 1), np.uint8)
    return _packed((signs + zeros[:, None]).astype(np.uint8), sizes.astype(np.float32), zeros, TERNARY_BITS, 0.0)


def _packed(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, bits: int, error: float) -> Packed:
    """Put codes [blocks, block, N], scales and zero points [blocks, N] into the layout of MatMulNBits, which takes the
    middle code for granted where no zero points are stored."""
    stored = None if np.all(zeros == 2 ** (bits - 1)) else pack_bits(zeros[None].astype(np.uint8), bits)[0]
    return Packed(
        codes=np.ascontiguousarray(pack_bits(codes, bits).transpose(2, 0, 1)),
        scales=np.ascontiguousarray(scales.T),
        zero_points=None if stored is None else np.ascontiguousarray(stored.T),
        error=error,
    )


def fit_blocks(
    weight: np.ndarray, bits: int, block: int, fit: Fitter, inputs: InputMoments, factors: np.ndarray | float = 1.0
) -> tuple[Packed, np.ndarray]:
    """Like `quantize_blocks`, but rows are multiplied by `factors` [K, 1] and then rounded such that products with
    these inputs change least. Also returns the rounded weight [K, N], divided by the factors again."""
    K, N = weight.shape
    feedback = np.asfortranarray(inputs.feedback[::-1, ::-1])  # in another layout sums would be rounded otherwise
    steps, scales, zeros, errors = round_rows(weight * factors, bits, block, fit, feedback, last_first=False)
    codes = np.zeros((len(zeros) * block, N), np.uint8)
    codes[:K] = steps + np.repeat(zeros, block, axis=0)[:K]
    became = weight - errors / factors
    return _packed(codes.reshape(-1, block, N), scales, zeros, bits, relative_error(weight, became)), became


def rtn(x: np.ndarray, bits: int) -> Fit:
    """Symmetric round to nearest that tries five scales and keeps the best: 0.3 to 0.5 dB better than the plain form.

    As in ONNX Runtime and llama.cpp's Q4_0, the weight of largest magnitude gets code 0, whatever its sign. Code 0
    stands for -8, which is further from zero than 7, the other end of the range.
    """
    return symmetric_scales(x, bits, RTN_STEPS), 2 ** (bits - 1)


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
        # The scale and the whole zero' with which rest ≈ scale · (code - zero') fits best.
        centred = steps - steps.mean(axis=0)
        slope = sum_of_products(centred, rest) / np.maximum(sum_of_products(centred, centred), TINY)
        slope = np.where(slope > 0, slope, scale)
        moved = np.clip(np.rint(zero + steps.mean(axis=0) - rest.mean(axis=0) * inverse_of(slope)), 0, top)
        steps = steps + (zero - moved)
        dot, norm = sum_of_products(rest, steps), sum_of_products(steps, steps)
        scale, zero = np.where(dot > 0, dot / np.maximum(norm, TINY), slope), moved
        inverse = inverse_of(scale)
    return best_scale, best_zero


# The roles where 8 bits gain most per byte: on speech through the tiny checkpoint 31.2 dB at 13 % more bytes, 23.1 dB
# without. Values and feed-forward outputs of some layers, llama.cpp's choice for language models, give 23.6 dB at 8 %.
EIGHT_BIT_ROLES = (Role.ATTENTION_VALUE, Role.ATTENTION_OUT, Role.CONVOLUTION_EXPAND, Role.CONVOLUTION_PROJECT)


@dataclass(frozen=True, kw_only=True)
class BlockMethod(FittingMethod):
    """4 bits for every weight; the codes of a block are found by `fit_block`. A method that calibrates has 8 bits as
    well, where a rule, or a measurement on speech, says that they help most. Where the user says that weights are
    ternary, they have 2 bits, and the few others 8, so that as little as possible is lost."""

    fit_block: Fitter
    uses_blocks: bool = True

    def plan(self, weights: Mapping[str, EncoderWeight], options: OptimizeOptions) -> Plan:
        """The rule: 8 bits for EIGHT_BIT_ROLES, and for the first and last matrix, through which everything passes."""
        low, high = self.widths(options)
        if not self.calibrates:
            return dict.fromkeys(weights, high if options.insists_on_ternary else low)
        ends = (next(iter(weights)), next(reversed(list(weights))))
        return {
            name: high if weight.role in EIGHT_BIT_ROLES or name in ends else low for name, weight in weights.items()
        }

    def ternary_format(self, group: int, options: OptimizeOptions) -> Format | None:
        return Format(TERNARY_BITS, group) if options.insists_on_ternary else None

    def pack(self, weight: np.ndarray, form: Format) -> Packed:
        if form.bits == TERNARY_BITS:
            return ternary_blocks(weight, form.block)
        return quantize_blocks(weight, form.bits, form.block, self.fit_block)

    def replace(self, model: ir.Model, options: OptimizeOptions) -> Replace:
        def put(weight: Weight, packed: Packed, form: Format) -> None:
            K, N = weight.shape
            level = options.accuracy_level
            numbers = {"K": K, "N": N, "bits": form.bits, "block_size": form.block, "accuracy_level": level}
            attributes = [ir.AttrInt64(key, number) for key, number in numbers.items()]
            tensors = (ir.tensor(array, name=f"{weight.name}.{part}") for part, array in packed.tensors())
            constants = [Tape(model.graph).initializer(tensor) for tensor in tensors]
            for node in weight.products:
                inputs = [node.inputs[0], *constants]
                new = ir.Node(MICROSOFT, "MatMulNBits", inputs, attributes, name=node.name)
                ir.convenience.replace_nodes_and_values(model.graph, node, [node], [new], node.outputs, new.outputs)

        return put

    def widths(self, options: OptimizeOptions) -> tuple[Format, Format]:
        return Format(LOW_BITS, options.block_size), Format(HIGH_BITS, options.block_size)

    def fit(
        self, weight: np.ndarray, form: Format, inputs: InputMoments, factors: np.ndarray, missing: np.ndarray | None
    ) -> tuple[Packed, np.ndarray]:
        assert missing is None, "each weight is fitted by itself"
        return fit_blocks(weight, form.bits, form.block, self.fit_block, inputs, factors)

    def stored_bytes(self, shape: tuple[int, ...], form: Format) -> tuple[int, ...]:
        (K, N), block = shape, form.block
        blocks = ceil_div(K, block)
        return N * blocks * block * form.bits // 8, 4 * N * blocks, N * ceil_div(blocks * form.bits, 8)

    def runs_as(self, bits: Collection[int]) -> str:
        return "ternary weights, exact in 2 bits, which products read as they are" if TERNARY_BITS in bits else ""


RTN = BlockMethod(
    name="rtn",
    fit_block=rtn,
    weight_bits=(TERNARY_BITS,),
    help="4 bits, rounded to nearest with a searched scale",
)
K_QUANT_MIXED = BlockMethod(
    name="k_quant_mixed",
    fit_block=k_quant,
    calibrates=True,
    help="4 bits with zero points by llama.cpp's search, and 8 bits where they matter most",
)
HQQ = BlockMethod(
    name="hqq",
    fit_block=hqq,
    help="4 bits with whole zero points by half-quadratic optimization; the slowest to make",
)
