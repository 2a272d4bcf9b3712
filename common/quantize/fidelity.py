"""How far an optimized graph is from the exported one: both run on the same noise, and their outputs are compared."""

import math
from pathlib import Path

import numpy as np

from common.cli import CheckError
from common.contract import ENCODER, Graph
from common.run.ort import OrtGraph

# Noise on which two encoders are compared: mel frames of a ragged batch. 4 s and a shorter one of odd length.
NOISE_FRAMES = (400, 267)
# A graph whose output has nothing to do with the exported one's has at most 0 dB (all zeros; -3 dB if it is as large).
# At 3 dB half of the output is error: nobody would use that, and no weight quantization that works is as bad.
MIN_SQNR_DB = 3.0
# Fusion reorders float32 sums: measured 123 dB on the tiny checkpoint. A wrong epsilon or bias falls far below 80.
MIN_FLOAT_SQNR_DB = 80.0


def compare(reference: Path, optimized: Path, floor: float, graph: Graph = ENCODER) -> float:
    """Signal to quantization noise ratio in dB, over the valid frames of noise, of the encoder `graph` in folder
    `optimized` against that in `reference`. Raises CheckError below `floor`.

    Only one session is open at a time, since each holds gigabytes at full size.
    """
    expected, lengths = _encode_noise(reference, graph, mapped=True)
    try:
        # Weights are repacked, as in use: otherwise MatMulNBits takes a float path, which does not round activations.
        output, _ = _encode_noise(optimized, graph, mapped=False)
    except ValueError as error:
        raise CheckError(f"the optimized encoder does not run: {error}") from error
    valid = np.arange(expected.shape[2]) < lengths[:, None]  # [B, S]
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
