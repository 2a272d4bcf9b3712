"""How far an optimized graph is from the exported one: both run on the same noise, and their outputs are compared."""

import math
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from common.cli import CheckError
from common.contract import ENCODER, Graph
from common.quantize.methods import OptimizeOptions
from common.run.ort import OrtGraph, open_session

# Noise on which two encoders are compared: mel frames of a ragged batch. 4 s and a shorter one of odd length.
NOISE_FRAMES = (400, 267)
# A graph whose output has nothing to do with the exported one's has at most 0 dB (all zeros; -3 dB if it is as large).
# At 3 dB half of the output is error: nobody would use that, and no weight quantization that works is as bad.
MIN_SQNR_DB = 3.0
# Fusion reorders float32 sums: measured 123 dB on the tiny checkpoint. A wrong epsilon or bias falls far below 80.
MIN_FLOAT_SQNR_DB = 80.0
LARGEST_UINT8, LARGEST_INT8 = 255, 127
# Summands of the sums that `exact_bits` looks at: more than any vector register holds, so that no slower code for a
# remainder runs.
SUMMANDS = 64


def compare(reference: Path, optimized: Path, floor: float, graph: Graph = ENCODER) -> float:
    """Signal to quantization noise ratio in dB, over the valid frames of noise, of the encoder `graph` in folder
    `optimized` against that in `reference`. Raises CheckError below `floor`, and if shapes or lengths differ.

    Only one session is open at a time, since each holds gigabytes at full size.
    """
    expected, expected_lengths = _encode_noise(reference, graph, mapped=True)
    try:
        # Weights are repacked, as in use: otherwise MatMulNBits takes a float path, which does not round activations.
        output, lengths = _encode_noise(optimized, graph, mapped=False)
    except ValueError as error:
        raise CheckError(f"the optimized encoder does not run: {error}") from error
    if output.shape != expected.shape or lengths.tolist() != expected_lengths.tolist():
        raise CheckError(
            f"the optimized encoder gives {output.shape} and lengths {lengths.tolist()}, but the exported one "
            f"{expected.shape} and {expected_lengths.tolist()}"
        )
    valid = np.arange(expected.shape[2]) < expected_lengths[:, None]  # [B, S]
    ratio = sqnr_db(expected.transpose(0, 2, 1)[valid], output.transpose(0, 2, 1)[valid])
    if not ratio >= floor:
        raise CheckError(
            f"the optimized encoder is broken: on noise it has an SQNR of {ratio:.1f} dB, and needs {floor:.0f} dB or "
            "more"
        )
    return ratio


def _encode_noise(folder: Path, graph: Graph, *, mapped: bool) -> list[np.ndarray]:
    encoder = OrtGraph(folder, graph, mapped=mapped)
    mels = encoder.session.get_inputs()[0].shape[1]
    shape = (len(NOISE_FRAMES), mels, max(NOISE_FRAMES))
    return encoder(np.random.default_rng(0).standard_normal(shape, dtype=np.float32), np.array(NOISE_FRAMES))


def token_sqnr(source: Path, target: Path, graph: Graph, vocabulary: int) -> float:
    """SQNR in dB of the first output for a batch of 16 random tokens, or frames and decoder outputs.

    What is the same for all of them is left out of the signal: otherwise the biases of -30 of pieces that a joint never
    emits would hide any error in the other pieces.
    """
    exported, quantized = OrtGraph(source, graph), OrtGraph(target, graph)
    inputs = exported.noise(vocabulary, B=16, S=1, U=1)
    expected = exported(*inputs)[0]
    constant = expected.mean(axis=0)
    return sqnr_db(expected - constant, quantized(*inputs)[0] - constant)


def sqnr_db(expected: np.ndarray, output: np.ndarray) -> float:
    """10 log10(Σ expected² / Σ (expected - output)²); infinite where both are equal, NaN if a value is not finite."""
    signal = float(np.sum(np.square(expected, dtype=np.float64)))
    noise = float(np.sum(np.square(expected.astype(np.float64) - output)))
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if np.isfinite(noise) else math.nan


def exact_bits() -> int:
    """How many bits int8 weights may have so that this CPU sums their products exactly: 8, or 7 without VNNI.

    ONNX Runtime multiplies uint8 activations by int8 weights. On x86 without VNNI it uses VPMADDUBSW, which adds each
    pair of products in 16 bits and cuts larger sums off at 32767: 2 · 255 · 127 is 64770, with 7 bits 2 · 255 · 63 is
    32130, and sums with 4 bits, 2 · 255 · 8, are far below. One product of the largest numbers tells which it is.
    """
    weight = numpy_helper.from_array(np.full((SUMMANDS, SUMMANDS), LARGEST_INT8, np.int8), "w")
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [8, SUMMANDS])
    y = helper.make_tensor_value_info("y", TensorProto.INT32, [8, SUMMANDS])
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "sums", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = open_session(model.SerializeToString())
    sums = session.run(None, {"x": np.full((8, SUMMANDS), LARGEST_UINT8, np.uint8)})[0]
    return 8 if (sums == SUMMANDS * LARGEST_UINT8 * LARGEST_INT8).all() else 7


def reduce_range_advice(options: OptimizeOptions) -> str | None:
    """A line for the user where 8-bit weights are asked for and this CPU does not sum their products exactly."""
    if not options.has_8_bit_products or options.reduce_range or exact_bits() == 8:
        return None
    return (
        "this CPU has no VNNI, so sums of 8-bit products overflow, which makes the model less exact here: add "
        "--reduce_range if it is to run on such a CPU; CPUs with VNNI are exact without"
    )
