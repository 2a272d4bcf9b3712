"""The runtimes that a user might take instead, each in a process of another Python environment.

    python -m venv build/peers && build/peers/bin/pip install -r benchmarks/requirements-peers.txt

OpenVINO starts from our float32 export, with attention in one piece. transcribe.cpp starts from a .gguf file, which
only its own tools can make; they know the checkpoint by the name of the file's folder, parakeet-tdt-0.6b-v3:

    git clone --recursive https://github.com/handy-computer/transcribe.cpp build/transcribe.cpp
    cmake -S build/transcribe.cpp -B build/transcribe.cpp/build -D TRANSCRIBE_BUILD_TOOLS=ON
    cmake --build build/transcribe.cpp/build --target transcribe-quantize
    pip install gguf
    mkdir -p build/gguf/parakeet-tdt-0.6b-v3
    python build/transcribe.cpp/scripts/convert-parakeet.py build/parakeet-0.6b-random.nemo \
        build/gguf/parakeet-tdt-0.6b-v3/float32.gguf
    build/transcribe.cpp/build/bin/transcribe-quantize build/gguf/parakeet-tdt-0.6b-v3/float32.gguf \
        build/gguf/Q4_K_M.gguf --quant Q4_K_M
"""

import pickle
import subprocess
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.bench import CORES
from benchmarks.recipes import IN_ONE_BLOCK, build
from common.contract import ENCODER

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = "benchmarks/requirements-peers.txt"
PYTHON = Path("build/peers/bin/python")
GGUF = Path("build/gguf/Q4_K_M.gguf")
FEATURES, SAMPLES = "features", "samples"  # what an encoder is given


class PeerProcess:
    """A fresh process of benchmarks/peer_worker.py, with the part of ProcessPoolExecutor's interface that is used."""

    def __init__(self, python: Path, load: str = "", *arguments) -> None:
        """Start by calling the function `load`. Raises RuntimeError if that fails, OSError if `python` cannot run."""
        command = [python, "-m", "benchmarks.peer_worker"]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
        if load:
            try:
                self._call(load, arguments)
            except RuntimeError:
                self.shutdown()
                raise

    def submit(self, function: Callable, *arguments) -> Future:
        """The result of the function of that name in the process."""
        future: Future = Future()
        try:
            future.set_result(self._call(function.__name__, arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def _call(self, name: str, arguments: tuple):
        try:
            pickle.dump((name, arguments), self._child.stdin)
            self._child.stdin.flush()
            result, failure = pickle.load(self._child.stdout)
        except (OSError, EOFError) as error:
            raise RuntimeError(f"{name}: the process ended with status {self._child.wait()}") from error
        if failure:
            raise RuntimeError(f"{name}: {failure}")
        return result

    def shutdown(self) -> None:
        self._child.stdin.close()
        self._child.wait()
        self._child.stdout.close()


@dataclass(frozen=True)
class Peer:
    """An encoder of another runtime: `load` and its arguments follow the path of the model and the threads."""

    name: str
    takes: str  # FEATURES or SAMPLES
    load: str  # a function of benchmarks/peer_worker.py
    arguments: tuple[str, ...] = ()
    folder: str = ""  # of the work directory, where `build` writes
    build: str = ""  # a function of benchmarks/peer_worker.py; without one the model is given


PEERS = (
    Peer("OpenVINO int8, bf16", FEATURES, "load_openvino", ("bf16",), "openvino_int8", "quantize_openvino"),
    Peer("OpenVINO int8, float32", FEATURES, "load_openvino", ("f32",), "openvino_int8", "quantize_openvino"),
    Peer("OpenVINO int8 weights", FEATURES, "load_openvino", ("bf16",), "openvino_weights", "compress_openvino"),
    Peer("transcribe.cpp Q4_K_M", SAMPLES, "load_transcribe_cpp"),
)


def missing(peer: Peer, python: Path, gguf: Path) -> str:
    """One line that says what `peer` needs and is missing, and how to get it; empty if nothing is missing."""
    if not python.is_file():
        return (
            f"expected the peers' environment at {python}, got nothing there; make it with: python -m venv "
            f"{python.parents[1]} && {python.parent / 'pip'} install -r {REQUIREMENTS}"
        )
    if not peer.build and not gguf.is_file():
        return (
            f"expected a .gguf file at {gguf}, got nothing there; the head of benchmarks/peers.py says how to make it"
        )
    return ""


def model(peer: Peer, python: Path, checkpoint: Path, work_dir: Path, features: np.ndarray) -> Path:
    """The file that `peer` makes of `checkpoint`, built now if it is not there: features [1, M, T]."""
    path = work_dir / peer.folder / f"{ENCODER.name}.xml"
    if not path.is_file():
        float32 = build(IN_ONE_BLOCK, checkpoint, work_dir)
        partial = path.with_name(f"partial.{path.name}")  # its .bin is found by the name of the .xml
        path.parent.mkdir(exist_ok=True)
        PeerProcess(python, peer.build, str(float32 / ENCODER.file), str(partial), features).shutdown()
        partial.with_suffix(".bin").rename(path.with_suffix(".bin"))
        partial.rename(path)
    return path


def loader(peer: Peer, path: Path) -> tuple:
    """The arguments with which a PeerProcess loads the encoder at `path`."""
    return peer.load, str(path), CORES, *peer.arguments
