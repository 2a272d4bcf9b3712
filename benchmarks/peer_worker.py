"""One encoder of another runtime, in the environment of benchmarks/requirements-peers.txt.

    python -m benchmarks.peer_worker

It answers benchmarks/peers.py: pickles of (name of a function below, arguments) come in, and pickles of (its result,
"") or (None, why it failed) go out. It imports nothing that this environment does not have.
"""

import os
import pickle
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from common.contract import ENCODER

# Of the encoder of this process: input → output, or None where the runtime does not show it; input → seconds.
_output: Callable = None
_seconds: Callable = None
_size, _load_seconds = 0, 0.0


def quantize_openvino(source: str, target: str, features: np.ndarray) -> None:
    """Full int8 quantization of the ONNX file `source`, with static scales from `features` [1, M, T]."""
    import nncf
    import openvino

    inputs = dict(zip(ENCODER.input_names, (features, np.array([features.shape[2]])), strict=True))
    model = nncf.quantize(
        openvino.Core().read_model(source),
        nncf.Dataset([inputs]),
        subset_size=1,
        model_type=nncf.ModelType.TRANSFORMER,
        # quantized convolutions fail at other lengths than that of `features`
        ignored_scope=nncf.IgnoredScope(types=["Convolution", "GroupConvolution"]),
    )
    openvino.save_model(model, target, compress_to_fp16=False)


def compress_openvino(source: str, target: str, features: np.ndarray) -> None:
    """Int8 weights, which are unpacked when they are multiplied; `features` are not needed."""
    import nncf
    import openvino

    model = nncf.compress_weights(openvino.Core().read_model(source), mode=nncf.CompressWeightsMode.INT8_ASYM)
    openvino.save_model(model, target, compress_to_fp16=False)


def load_openvino(path: str, threads: int, precision: str) -> None:
    """Load the encoder at `path` into this process; what is not quantized is computed in `precision`, bf16 or f32."""
    global _output, _seconds, _size, _load_seconds
    import openvino

    start = time.perf_counter()
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
    compiled = openvino.Core().compile_model(path, "CPU", hints)
    request = compiled.create_infer_request()
    _load_seconds = time.perf_counter() - start

    def output(features: np.ndarray) -> np.ndarray:
        inputs = dict(zip(ENCODER.input_names, (features, np.array([features.shape[2]])), strict=True))
        return request.infer(inputs)[compiled.output(ENCODER.output_names[0])].copy()

    def seconds(features: np.ndarray) -> float:
        start = time.perf_counter()
        output(features)
        return time.perf_counter() - start

    _output, _seconds = output, seconds
    _size = sum(file.stat().st_size for file in (Path(path), Path(path).with_suffix(".bin")))


def load_transcribe_cpp(path: str, threads: int) -> None:
    """Load the model at `path`, a .gguf file, into this process: it takes samples, and reports its encoder's time."""
    global _output, _seconds, _size, _load_seconds
    import transcribe_cpp

    start = time.perf_counter()
    session = transcribe_cpp.Model(path, backend="cpu").session(n_threads=threads)
    _load_seconds = time.perf_counter() - start
    _output = lambda samples: session.run(samples) and None  # noqa: E731
    _seconds = lambda samples: session.run(samples).timings.encode_ms / 1000  # noqa: E731
    _size = Path(path).stat().st_size


def facts() -> dict:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"bytes": _size, "load_seconds": _load_seconds, "peak_bytes": peak}


def output(clip: np.ndarray) -> np.ndarray | None:
    return _output(clip)


def seconds(clip: np.ndarray) -> float:
    return _seconds(clip)


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the runtimes print is no answer
    while True:
        try:
            name, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = globals()[name](*arguments), ""
        except Exception as error:
            answer = None, f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
