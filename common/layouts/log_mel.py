"""Features: what runtimes compute whatever their configuration says, and an ONNX graph of a checkpoint's own.

The graph has the names of onnx-asr's own preprocessors. It computes what NeMo's FilterbankFeatures computes without
dither (nemo/collections/asr/parts/preprocessing/features.py 3.0.0): emphasis, Hann window, power spectrum, Slaney mels,
logarithm, normalisation over the valid frames. The spectrum is a convolution with the windowed sines and cosines: every
runtime has convolutions, but WebGPU has no STFT operator.
"""

import math
from collections.abc import Mapping

import numpy as np

from common.checkpoint.spec import ModelSpec
from common.cli import CheckError
from common.layouts.layout import Features
from common.run.ort import open_session

# The features that onnx-asr (preprocessors/nemo.py) and sherpa-onnx (csrc/features.h) compute.
# sherpa-onnx's differ a little from every NeMo model's: see docs/runtimes.md.
FIXED_FEATURES: Mapping[str, tuple[float, ...]] = {
    "sample_rate": (16000,),
    "fft_size": (512,),
    "win_length": (400,),
    "hop_length": (160,),
    "preemphasis": (0.97,),
    "log_guard": (2.0**-24,),
}
# The largest difference allowed from the library's features; float32 and another order of sums make it 3e-4.
FEATURES_TOLERANCE = 1e-3

# N samples, M mel bins, T frames. What lies behind the end of a row may be NaN, so it is replaced, not multiplied by 0.
# A row of one frame, or of none, is divided by 1.
GRAPH = """
<ir_version: 8, opset_import: ["" : 17]>
log_mel (float[batch, samples] waveforms, int64[batch] waveforms_lens)
    => (float[batch, {mels}, frames] features, int64[batch] features_lens)
{{
    padded = Pad(waveforms, edges)
    rows = Unsqueeze(padded, axis1)
    emphasised = Conv(rows, emphasis)
    samples_shape = Shape<start = 2, end = 3>(emphasised)
    samples = Squeeze(samples_shape)
    sample_places = Range(zero, samples, one)
    ends = Add(waveforms_lens, edge)
    sample_ends = Unsqueeze(ends, axes12)
    sample_valid = Less(sample_places, sample_ends)
    signal = Where(sample_valid, emphasised, zero_float)
    spectrum = Conv<strides = [{hop}]>(signal, sinusoids)
    squares = Mul(spectrum, spectrum)
    energies = MatMul(mels, squares)
    guarded = Add(energies, guard)
    logarithms = Log(guarded)
    features_lens = Div(waveforms_lens, hop)
    frames_shape = Shape<start = 2, end = 3>(logarithms)
    frames = Squeeze(frames_shape)
    frame_places = Range(zero, frames, one)
    frame_ends = Unsqueeze(features_lens, axes12)
    frame_valid = Less(frame_places, frame_ends)
    kept = Where(frame_valid, logarithms, zero_float)
    sums = ReduceSum(kept, axis2)
    valid_frames = Cast<to = 1>(frame_ends)
    count = Max(valid_frames, one_float)
    means = Div(sums, count)
    distances = Sub(logarithms, means)
    centred = Where(frame_valid, distances, zero_float)
    distances2 = Mul(centred, centred)
    sums2 = ReduceSum(distances2, axis2)
    less_one = Sub(count, one_float)
    degrees = Max(less_one, one_float)
    variances = Div(sums2, degrees)
    deviations = Sqrt(variances)
    divisors = Add(deviations, epsilon)
    features = Div(centred, divisors)
}}
"""


def check_fixed(spec: ModelSpec, runtime: str, features: Mapping[str, tuple[float, ...]] = FIXED_FEATURES) -> None:
    """Raise ValueError naming what a runtime with fixed features, and durations by index, cannot compute of `spec`.

    features: field of ModelSpec → the values that the runtime can compute with.
    """
    if spec.durations != tuple(range(len(spec.durations))):
        raise ValueError(
            f"durations {list(spec.durations)}: {runtime} takes a duration's index for its frames, so they must be "
            f"{list(range(len(spec.durations)))}"
        )
    different = [
        f"{name} is {getattr(spec, name):g}, not {' or '.join(f'{value:g}' for value in values)}"
        for name, values in features.items()
        if not any(math.isclose(getattr(spec, name), value, rel_tol=1e-6) for value in values)
    ]
    check_log_mel(runtime, (*spec.unsupported_features, *different))


def check_log_mel(runtime: str, different: tuple[str, ...]) -> None:
    """Raise ValueError if a checkpoint's features differ, in the ways listed, from the log-mel ones of `runtime`."""
    if different:
        raise ValueError(
            f"{runtime} computes log-mel features one way only, and this checkpoint's differ: " + "; ".join(different)
        )


def check_features(file: str, graph: bytes, spec: ModelSpec, features: Features) -> None:
    """Compare the graph of the features that becomes `file` with the library of the checkpoint.

    Raises CheckError for differences beyond FEATURES_TOLERANCE.
    """
    samples = np.random.default_rng(0).normal(0, 0.1, 2 * spec.sample_rate).astype(np.float32)
    samples[: spec.sample_rate // 2] *= 1e-3  # quiet, where the guard of the logarithm matters
    inputs = {"waveforms": samples[None], "waveforms_lens": np.array([len(samples)])}
    made, lengths = open_session(graph).run(["features", "features_lens"], inputs)
    expected, actual = features(samples), made[0, :, : lengths[0]]
    error = float(np.max(np.abs(actual - expected))) if actual.shape == expected.shape else np.inf
    if not error <= FEATURES_TOLERANCE:
        raise CheckError(
            f"{file} differs from the checkpoint's own features by {error:.1e}, more than {FEATURES_TOLERANCE:.0e}; "
            f"its shape is {actual.shape}, and theirs {expected.shape}; please report it"
        )


def log_mel_graph(spec: ModelSpec) -> bytes:
    """An ONNX model: waveforms [B, N] float32, waveforms_lens [B] → features [B, M, T] float32, features_lens [B].

    T is 1 + N // hop, also for N = 0, and features after features_lens are 0. The checkpoint's features must not differ
    in any of the ways that ModelSpec.unsupported_features lists.
    """
    from librosa.filters import mel  # these are not needed by readers of a folder
    from onnx import numpy_helper, parser

    bins = mel(sr=spec.sample_rate, n_fft=spec.fft_size, n_mels=spec.num_mels)  # [M, F]
    # Cosines and sines of each frequency under a symmetric Hann window: [2F, 1, win_length]. The transform has the
    # window in its middle, with zeros around it. They are left out here: a shift changes no magnitude.
    angles = 2 * np.pi / spec.fft_size * np.outer(np.arange(spec.fft_size // 2 + 1), np.arange(spec.win_length))
    sinusoids = np.concatenate([np.cos(angles), np.sin(angles)]) * np.hanning(spec.win_length)
    edge = spec.win_length // 2  # zeros before and after the samples; one more before them for the emphasis
    tensors = {
        "emphasis": np.array([[[-spec.preemphasis, 1]]], np.float32),
        "sinusoids": sinusoids.astype(np.float32)[:, None],
        "mels": np.concatenate([bins, bins], axis=1).astype(np.float32),  # of the squares of cosines, and of sines
        "guard": np.float32(spec.log_guard),
        "epsilon": np.float32(spec.norm_eps),
        "hop": np.int64(spec.hop_length),
        "edges": np.array([0, edge + 1, 0, edge]),
        "edge": np.int64(edge),
        "zero": np.int64(0),
        "one": np.int64(1),
        "zero_float": np.float32(0),
        "one_float": np.float32(1),
        "axis1": np.array([1]),
        "axis2": np.array([2]),
        "axes12": np.array([1, 2]),
    }
    text = GRAPH.format(mels=spec.num_mels, hop=spec.hop_length)
    model = parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items())
    return bytes(model.SerializeToString())
