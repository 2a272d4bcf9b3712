"""How fast two encoders run on this machine, and how much memory each takes.

Each runs in a process of its own that holds nothing else. They take turns, so that other work on the machine slows both
alike.

    python -m common.evaluate.speed ENCODER.onnx    (a line of the standard input for each run)
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.run.ort import open_session

AUDIO_SECONDS = 10
FRAMES_PER_SECOND = 100  # mel frames; the hop of every published Parakeet is 10 ms
MIN_ROUNDS, MAX_ROUNDS = 2, 20
SECONDS = 2  # of runs, after which no further round begins
PAUSE = 0.1  # seconds before a run, in which the threads of the other process stop busy-waiting
# Memory of both processes as a multiple of the float32 file: that file, its repacked copy, and the optimized model.
MEMORY_FACTOR = 3.0
SMALL_ENCODER = 100e6  # bytes in float32; the smallest published one has 400 MB


@dataclass(frozen=True)
class Speed:
    """The speed of one encoder. The names of the fields are keys of the report's JSON."""

    rtfx: float  # seconds of audio encoded in one second, by the fastest run, the one least disturbed
    peak_memory: int | None  # bytes of its process; None where the kernel does not report it, as in some sandboxes


def machine() -> dict[str, Any]:
    """The name of the CPU, and the number of cores that this process may use."""
    name = _fields(Path("/proc/cpuinfo")).get("model name") or platform.machine()  # ARM has no name there
    return {"cpu": name, "cores": len(os.sched_getaffinity(0))}


def measure_speed(graphs: Sequence[Path]) -> list[Speed] | None:
    """The speeds of the encoders in these .onnx files, of which the first is the largest; takes a few seconds.

    None where too little memory is free, or where a process ends early, for example stopped by the system for the
    memory that it takes.
    """
    largest = sum(path.stat().st_size for path in graphs[0].parent.glob(f"{graphs[0].name}*"))
    free = _fields(Path("/proc/meminfo")).get("MemAvailable")
    if free and int(free.split()[0]) * 1024 < MEMORY_FACTOR * largest:
        return None
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "common.evaluate.speed", str(path.absolute())],
            cwd=Path(__file__).resolve().parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )
        for path in graphs
    ]  # fmt: skip
    answers: list[list[dict[str, Any]]] = [[] for _ in graphs]
    total = 0.0  # seconds
    try:
        while len(answers[0]) <= MIN_ROUNDS or (total < SECONDS and len(answers[0]) <= MAX_ROUNDS):
            for process, own in zip(processes, answers, strict=True):
                assert process.stdin, "a pipe"
                assert process.stdout, "a pipe"
                process.stdin.write("\n")
                process.stdin.flush()
                own.append(json.loads(process.stdout.readline()))
                total += own[-1]["seconds"] if own[1:] else 0.0
    except (OSError, ValueError):
        return None
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    fastest = [min(each["seconds"] for each in own[1:]) for own in answers]  # the first run allocates memory
    return [
        Speed(round(AUDIO_SECONDS / seconds, 2), own[-1]["peak_memory"])
        for seconds, own in zip(fastest, answers, strict=True)
    ]


def why_slower(exported: float, optimized: float, encoder_bytes: int) -> str | None:
    """Why an optimized encoder is slower than float32, in a sentence; None where its RTFx is not below the exported
    one's.

    encoder_bytes: size of the exported encoder.
    """
    if optimized >= exported:
        return None
    why = " on this CPU"
    if encoder_bytes < SMALL_ENCODER:
        why = ", since preparing a quantized product takes longer than the product saves in so small a model"
    return (
        f"The optimized encoder is slower than float32{why}. Where speed counts, use the exported folder, or "
        "another method, which docs/benchmarks.md compares."
    )


def _serve(path: Path) -> None:
    """In the process of an encoder: run it once for each line, and print how long that took."""
    session = open_session(path)
    features, length = session.get_inputs()
    shape = (1, features.shape[1], AUDIO_SECONDS * FRAMES_PER_SECOND)
    noise = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    inputs = {features.name: noise, length.name: np.array([shape[2]])}
    for _ in sys.stdin:
        time.sleep(PAUSE)
        start = time.perf_counter()
        session.run(None, inputs)
        seconds = time.perf_counter() - start
        # Not getrusage: the peak that it reports includes the peak of the process from which this one was forked.
        peak = _fields(Path("/proc/self/status")).get("VmHWM")
        answer = {"seconds": seconds, "peak_memory": int(peak.split()[0]) * 1024 if peak else None}
        print(json.dumps(answer), flush=True)


def _fields(path: Path) -> dict[str, str]:
    """The `name: value` lines of a file of the kernel."""
    pairs = (line.partition(":") for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
