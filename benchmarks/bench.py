"""What the benchmarks share: their arguments, processes of their own, speech of any length, the machine's name."""

import argparse
import multiprocessing
import os
import platform
import resource
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np

from common.cli import quiet_libraries
from common.evaluate.engines import timed
from common.run.audio import Clip, load_clip
from common.run.ort import OnnxRuntime

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
CORES = os.cpu_count()


def parse_args(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse the two arguments of every comparison, and those that the caller has added to `parser`."""
    parser.add_argument("--model_name", type=Path, required=True, help=".nemo file of a full-size model")
    parser.add_argument("--work_dir", type=Path, default=Path("build/bench"), help="where to build (%(default)s)")
    args = parser.parse_args(argv)
    args.model_name, args.work_dir = args.model_name.resolve(), args.work_dir.resolve()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    return args


def process(initializer: Callable | None = None, *arguments) -> ProcessPoolExecutor:
    """A fresh process that runs submitted calls one after the other and sleeps in between. It begins with
    `initializer(*arguments)`, and its memory is released when the `with` block ends."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (initializer, arguments))


def _begin(initializer: Callable | None, arguments: tuple) -> None:
    quiet_libraries()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what scripts and libraries print is not part of the report
    if initializer:
        initializer(*arguments)


def peak_memory() -> int:
    """Peak resident bytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class ObservedBaseline(OnnxRuntime):
    """Plain ONNX Runtime; `observe` is called after each run of the encoder, with its outputs [S, D] of each clip and
    the seconds that the run took."""

    def __init__(self, folder: Path, observe: Callable[[list[np.ndarray], float], None]) -> None:
        super().__init__(folder)
        self.observe = observe

    def encode(self, features: Sequence[np.ndarray]) -> list[np.ndarray]:
        encoded, seconds = timed(super().encode, features)
        self.observe(encoded, seconds)
        return encoded


def speech(seconds: float, sample_rate: int) -> np.ndarray:
    """The bundled clips one after the other, repeated until they last `seconds`. [samples]"""
    paths = [SAMPLES / "jfk.wav", *sorted((SAMPLES / "clips").glob("*.flac"))]
    return np.resize(
        np.concatenate([load_clip(Clip(path), sample_rate, 0) for path in paths]), int(seconds * sample_rate)
    )


def machine() -> str:
    """Processor, cores, load and versions, in one line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    versions = ", ".join(f"{package} {version(package)}" for package in ("onnxruntime", "onnxruntime-genai", "torch"))
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return f"{models[0] if models else platform.processor()}, {CORES} cores, load {load}; {versions}"
