"""Size, speed, load time, memory and error of encoders side by side: NeMo, ONNX Runtime, two recipes, ours, peers.

    python -m benchmarks.encoder --model_name build/parakeet-0.6b-random.nemo --work_dir build/bench

Out: a markdown table, and in the work directory encoder.json with every single time and encoder.png, size against
speed. What is not built yet is built first (benchmarks/recipes.py). Exit status 1 if one of them fails; the others are
still measured. A peer (benchmarks/peers.py) that is not installed is left out, with a line that says how to install it.
Expect 35 minutes and 12 GB beside the builds.

Every encoder lives in a process of its own, and they take turns on the same features (A B C A B C …), so that a busy
machine slows all of them. A figure is the median over rounds; × is the median of the ratios to ONNX Runtime float32 in
the same round. SQNR is in dB, against ONNX Runtime float32 on the same clip. All ONNX encoders run with the same
options: CPU provider, as many threads as there are cores; NeMo's PyTorch and the peers have as many. The clip of 72 s
has the length of the window that GenAI gives the encoder: 10 s of context, 60 s, 2 s of context.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from tqdm import tqdm

from benchmarks import peers
from benchmarks.bench import CORES, machine, parse_args, peak_memory, process, speech
from benchmarks.peers import FEATURES, SAMPLES, Peer, PeerProcess
from benchmarks.recipes import FLOAT32, RECIPES, build, encoder_bytes
from common.cli import size_text
from common.contract import ENCODER
from common.folder import write_json

CLIP_SECONDS = (10, 20, 60, 72)
PLOT_SECONDS = 20
CALIBRATION_SECONDS = 20  # of OpenVINO's static scales
ROUNDS = 5
LOADS = 3  # fresh processes; files are in the page cache
NEMO = "NeMo, PyTorch float32"

# In a process of an encoder: features [1, M, T] → [1, D, S], and the bytes of the encoder.
_encode, _size, _load_seconds = None, 0, 0.0


def load_nemo(checkpoint: Path) -> None:
    """Load NeMo's encoder into this process. Weights are mapped from disk, as in the export."""
    global _encode, _size, _load_seconds
    import torch

    from common.checkpoint.find import find_checkpoint

    torch.set_num_threads(CORES)
    torch.set_grad_enabled(False)
    start = time.perf_counter()
    encoder = find_checkpoint(str(checkpoint)).load_model().encoder
    _load_seconds = time.perf_counter() - start

    def encode(features: np.ndarray) -> np.ndarray:
        length = torch.tensor([features.shape[2]])
        return encoder(audio_signal=torch.from_numpy(features), length=length)[0].numpy()

    _encode = encode
    _size = sum(parameter.numel() * parameter.element_size() for parameter in encoder.parameters())


def load_onnx(folder: Path) -> None:
    """Load the encoder of `folder` into this process."""
    global _encode, _size, _load_seconds
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = CORES
    options.log_severity_level = 3
    start = time.perf_counter()
    session = ort.InferenceSession(folder / ENCODER.file, options, providers=["CPUExecutionProvider"])
    _load_seconds = time.perf_counter() - start

    def encode(features: np.ndarray) -> np.ndarray:
        inputs = dict(zip(ENCODER.input_names, (features, np.array([features.shape[2]])), strict=True))
        return session.run(ENCODER.output_names[:1], inputs)[0]

    _encode, _size = encode, encoder_bytes(folder)


def facts() -> dict:
    return {"bytes": _size, "load_seconds": _load_seconds, "peak_bytes": peak_memory()}


def output(features: np.ndarray) -> np.ndarray:
    return _encode(features)


def seconds(features: np.ndarray) -> float:
    start = time.perf_counter()
    _encode(features)
    return time.perf_counter() - start


def load_clips(checkpoint: Path, lengths: Iterable[int]) -> dict[str, dict[int, np.ndarray]]:
    """Speech of these lengths in seconds, by what an encoder takes: NeMo's FEATURES [1, M, T] or SAMPLES [n] → seconds
    → clip."""
    from common.checkpoint.find import find_checkpoint
    from common.checkpoint.spec import ModelSpec
    from common.run.reference import Nemo

    model = find_checkpoint(str(checkpoint)).load_model()
    rate = ModelSpec.of(model).sample_rate
    samples = {length: speech(length, rate) for length in lengths}
    features = {length: Nemo(model).features(clip)[None] for length, clip in samples.items()}
    return {FEATURES: features, SAMPLES: samples}


@dataclass
class Candidate:
    """An encoder in a process of its own, and its measurements; `failed` among them says why it stopped."""

    name: str
    start: Callable[[], ProcessPoolExecutor | PeerProcess]  # a fresh process
    result: dict = field(default_factory=lambda: {"loads": [], "sqnr_db": {}, "seconds": {}})
    worker: ProcessPoolExecutor | PeerProcess | None = None
    takes: str = FEATURES  # or SAMPLES

    @classmethod
    def failed(cls, name: str, error: Exception) -> "Candidate":
        """A candidate that could not be built."""
        return cls(name, process, {"failed": f"build: {' '.join(str(error).split())}"})

    def ask(self, function: Callable, *arguments):
        """What `function` returns in the process; None when it fails, now or earlier."""
        if "failed" in self.result:
            return None
        try:
            return self.worker.submit(function, *arguments).result()
        except Exception as error:
            self.result["failed"] = f"{function.__name__}: {' '.join(str(error).split())}"

    def restart(self) -> None:
        """Load the encoder in a fresh process."""
        self.stop()
        self.worker = None
        try:
            self.worker = self.start()
        except Exception as error:  # of a peer; a process of our own fails when it is asked
            self.result["failed"] = " ".join(str(error).split())
        if (found := self.ask(facts)) is not None:
            self.result["loads"].append(found["load_seconds"])

    def stop(self) -> None:
        if self.worker:
            self.worker.shutdown()


def candidates(checkpoint: Path, work_dir: Path, is_selected: Callable[[str], bool]) -> list[Candidate]:
    """The encoders to compare, the baseline first, built if needed; a failed build gives a failed candidate."""
    found = []
    for recipe in filter(lambda recipe: is_selected(recipe.name), RECIPES):
        try:
            found.append(Candidate(recipe.name, partial(process, load_onnx, build(recipe, checkpoint, work_dir))))
        except Exception as error:
            found.append(Candidate.failed(recipe.name, error))
    return found + ([Candidate(NEMO, partial(process, load_nemo, checkpoint))] if is_selected(NEMO) else [])


def peer_candidates(
    chosen: list[Peer], python: Path, gguf: Path, checkpoint: Path, work_dir: Path, features: np.ndarray
) -> list[Candidate]:
    """The peers that are installed, built if needed; OpenVINO's static scales are fitted to `features` [1, M, T]."""
    found, reasons = [], {}
    for peer in chosen:
        if reason := peers.missing(peer, python, gguf):
            reasons.setdefault(reason, []).append(peer.name)
            continue
        try:
            path = peers.model(peer, python, checkpoint, work_dir, features) if peer.build else gguf
            start = partial(PeerProcess, python, *peers.loader(peer, path))
            found.append(Candidate(peer.name, start, takes=peer.takes))
        except Exception as error:
            found.append(Candidate.failed(peer.name, error))
    for reason, names in reasons.items():
        print(f"left out: {', '.join(names)}: {reason}", file=sys.stderr, flush=True)
    return found


def measure(
    candidates: list[Candidate], clips: dict[str, dict[int, np.ndarray]], lengths: Sequence[int], rounds: int
) -> None:
    """Fill in the results: load times, then errors and times with every encoder in memory, then sizes."""
    from common.quantize.fidelity import sqnr_db

    running = [candidate for candidate in candidates if "failed" not in candidate.result]
    progress = tqdm(total=len(running) * (LOADS + len(lengths) * (rounds + 1)), leave=False, disable=None)
    for _ in range(LOADS):
        for candidate in running:
            candidate.restart()
            progress.update()
    for length in lengths:
        outputs = []  # of the first turn, which also warms up; the baseline's comes first
        for turn in range(rounds + 1):
            for candidate in running:
                progress.update()
                found = candidate.ask(seconds if turn else output, clips[candidate.takes][length])
                if turn:
                    candidate.result["seconds"].setdefault(length, []).append(found)
                elif found is not None:
                    outputs.append(found)
                    candidate.result["sqnr_db"][length] = sqnr_db(outputs[0], found)
                elif candidate is running[0]:
                    raise RuntimeError(f"{candidate.name}, which the others are compared with: {candidate.result}")
    progress.close()
    for candidate in running:
        candidate.result |= candidate.ask(facts) or {}


def row(name: str, result: dict, baseline: dict) -> str:
    """One line of the table; a failure says so in its place."""
    if "failed" in result:
        return f"| {name} | **failed**, {result['failed'][:200]} |"
    speeds = []
    for length, times in result["seconds"].items():
        ratio = median(base / own for base, own in zip(baseline["seconds"][length], times, strict=True))
        speeds.append(f"{length / median(times):.1f} ({ratio:.2f}×)")
    errors = [result["sqnr_db"].get(length, np.inf) for length in result["seconds"]]
    errors = " / ".join(f"{error:.1f}" if np.isfinite(error) else "–" for error in errors)
    facts = (size_text(result["bytes"]), f"{median(result['loads']):.1f} s", size_text(result["peak_bytes"]))
    return "| " + " | ".join((name, *facts, *speeds, errors)) + " |"


def plot(results: dict[str, dict], seconds: int, path: Path) -> None:
    """Size of the encoder against its speed on a clip of so many seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for name, result in results.items():
        if "failed" not in result:
            speed = seconds / median(result["seconds"][seconds])
            axes.scatter(result["bytes"] / 1e6, speed, s=60, marker="o" if name.startswith("ours") else "s", label=name)
    axes.set(xscale="log", xlabel="encoder, MB", ylabel=f"RTFx at {seconds} s", ylim=(0, None))
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 4, 6)))
    axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns that each encoder takes (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only encoders with one of these in their name")
    parser.add_argument("--seconds", type=int, nargs="+", default=CLIP_SECONDS, help="lengths of the clips %(default)s")
    parser.add_argument("--peers_python", type=Path, default=peers.PYTHON, help="Python of the peers (%(default)s)")
    parser.add_argument("--gguf", type=Path, default=peers.GGUF, help="transcribe.cpp's model file (%(default)s)")
    args = parse_args(parser, argv)

    def is_selected(name: str) -> bool:
        return not args.only or name == FLOAT32.name or any(word in name for word in args.only)

    with process() as worker:
        clips = worker.submit(load_clips, args.model_name, {*args.seconds, CALIBRATION_SECONDS}).result()
    compared = candidates(args.model_name, args.work_dir, is_selected)
    chosen = [peer for peer in peers.PEERS if is_selected(peer.name)]
    environment = (args.peers_python.absolute(), args.gguf.absolute())
    features = clips[FEATURES][CALIBRATION_SECONDS]
    compared += peer_candidates(chosen, *environment, args.model_name, args.work_dir, features)
    before = machine()
    try:
        measure(compared, clips, args.seconds, args.rounds)
    finally:
        for candidate in compared:
            candidate.stop()

    results = {candidate.name: candidate.result for candidate in compared}
    plot(results, PLOT_SECONDS if PLOT_SECONDS in args.seconds else args.seconds[0], args.work_dir / "encoder.png")
    print(f"{before}; {args.rounds} rounds\n")
    columns = " | ".join(f"RTFx at {length} s" for length in args.seconds)
    lengths = ", ".join(str(length) for length in args.seconds)
    print(f"| encoder | size | load | peak memory | {columns} | SQNR dB at {lengths} s |")
    print("|---" * (5 + len(args.seconds)) + "|")
    for name, result in results.items():
        print(row(name, result, results[FLOAT32.name]))
    del results[FLOAT32.name]["sqnr_db"]  # infinite, which JSON cannot express
    write_json(args.work_dir / "encoder.json", {"machine": [before, machine()], "results": results})
    return 1 if any("failed" in result for result in results.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
