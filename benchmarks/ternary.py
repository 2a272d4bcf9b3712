"""Size, exactness, speed and memory of an encoder with ternary weights, in every form in which it can be stored.

    python -m benchmarks.random_checkpoint --topology 0.6b --output build/random.nemo
    python -m benchmarks.published_forms --form redux --model_name build/random.nemo --output_dir build/redux
    python export_parakeet_to_onnx.py --model_name build/redux --output_dir build/redux_onnx --skip_verify
    python export_tokenizer.py --model_name build/redux --output_dir build/redux_onnx
    python -m benchmarks.ternary --model_dir build/redux_onnx --work_dir build/ternary

In: an exported folder. Out: a table on the standard output, and ternary.json in the work directory with every figure.
Each form is written first (FORMS); a folder that is there is used again. Expect 15 minutes, 10 GB of disk and 6 GB of
memory at 0.6B. With --rounds 0 nothing is timed but loading, and one encoder at a time is in memory.

- "bits equal" compares the output with that of the same integers stored in 8 bits: the same scales, the same operators.
- SQNR is in dB against float32 on the same noise. "weights alone" is float32 with the weights that the integers stand
  for, so that activations are not rounded; its size, speed and memory are those of float32. Both are there for
  multipliers that are safe on every CPU and for those of --full_range.
- Encoders of one length of clip take turns in processes of their own (A B C A B C …). A speed is the median over rounds
  of the ratio to the 8-bit form in the same round.
- Load times and memory are medians over fresh processes; files are in the page cache. Memory is what the session adds:
  at its peak while loading, when it is loaded, and after glibc's `malloc_trim(0)` returned what is free.
"""

import argparse
import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import onnx_ir as ir
from tqdm import tqdm

import optimize_encoder
from benchmarks.bench import machine, process
from benchmarks.encoder import load_onnx, output, seconds
from common import optimize
from common.cli import size_text
from common.contract import ENCODER
from common.folder import write_json
from common.onnx_io import load, save_model
from common.quantize import INT8
from common.quantize.fidelity import sqnr_db
from common.quantize.methods import TERNARY_BITS, Format, OptimizeOptions
from common.quantize.rewrite import plan_encoder, quantizable, quantize_weights
from common.run.ort import open_session

CLIP_SECONDS = (10, 20, 60)
FRAMES_PER_SECOND = 100
ROUNDS, LOADS = 7, 3
FLOAT32, EIGHT = "float32", "the same integers in 8 bits"
TERNARY, FOUR, BLOCKS = "int8, ternary in 2 bits", "int8 --weight_bits 4, not ternary", "rtn --weight_bits 2"
ALONE, ALONE_FULL = "weights alone, float32", "weights alone of --full_range, float32"
BASELINE = EIGHT


def optimized(source: Path, target: Path, flags: Sequence[str]) -> None:
    """The whole folder that step 3 makes; its own measurement of speed is left out."""
    optimize.measure_speed = lambda graphs: None
    argv = ["--model_dir", str(source), "--output_dir", str(target), "--decoder_joint_precision", "int8", *flags]
    assert optimize_encoder.main(argv) == 0


def integers(source: Path, target: Path, bits: int | None) -> None:
    """Every weight as a plain matrix of integers of so many bits; None: of those that TERNARY multiplies by."""
    model, options = load(source / ENCODER.file), OptimizeOptions(quant_method=INT8.name)
    ternary = plan_encoder(model, INT8, options)
    plan = dict.fromkeys(ternary, Format(bits or 8))
    weights = quantizable(model)
    packed = {} if bits else {name: weights[name].read(partial(INT8.pack, form=form)) for name, form in ternary.items()}
    quantize_weights(model, plan, INT8, options, packed)
    target.mkdir(parents=True)
    save_model(model, target / ENCODER.file)


def weights_alone(source: Path, target: Path, *, full_range: bool) -> None:
    """The float32 encoder, but its ternary weights are those that int8's integers stand for."""
    model, options = load(source / ENCODER.file), OptimizeOptions(quant_method=INT8.name, full_range=full_range)
    plan, weights = plan_encoder(model, INT8, options), quantizable(model)

    def became(weight: np.ndarray, form: Format) -> np.ndarray:
        packed = INT8.pack(weight, form)
        return (packed.codes * packed.scales).astype(np.float32)

    for name, form in plan.items():
        if form.bits == TERNARY_BITS:
            weights[name].value.const_value = ir.tensor(weights[name].read(partial(became, form=form)), name=name)
    target.mkdir(parents=True)
    save_model(model, target / ENCODER.file)


IN_BLOCKS = ("--weight_bits", "2", "--skip_fusion")
FORMS: dict[str, Callable[[Path, Path], None]] = {
    TERNARY: partial(optimized, flags=("--quant_method", "int8")),
    f"{TERNARY}, --full_range": partial(optimized, flags=("--quant_method", "int8", "--full_range")),
    EIGHT: partial(integers, bits=None),
    FOUR: partial(integers, bits=4),
    BLOCKS: partial(optimized, flags=IN_BLOCKS),
    f"{BLOCKS} --accuracy_level 0": partial(optimized, flags=(*IN_BLOCKS, "--accuracy_level", "0")),
    ALONE: partial(weights_alone, full_range=False),
    ALONE_FULL: partial(weights_alone, full_range=True),
}


def build(source: Path, work_dir: Path) -> dict[str, Path]:
    """Form → its folder, written if it is not there."""
    folders = {FLOAT32: source}
    for number, (name, write) in enumerate(FORMS.items()):
        target = work_dir / f"{number}"
        if not (target / ENCODER.file).is_file():
            work_dir.mkdir(parents=True, exist_ok=True)
            with process() as worker:
                worker.submit(write, source, target).result()
        folders[name] = target
    return folders


def status(field: str) -> int:
    """Bytes of this process by the kernel: VmRSS, what it holds; VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def load_figures(folder: Path) -> dict[str, float]:
    """Seconds and bytes that a session of the encoder takes in this process."""
    import onnxruntime  # noqa: F401

    gc.collect()
    before = status("VmRSS")
    start = time.perf_counter()
    session = open_session(folder / ENCODER.file)
    loaded = time.perf_counter() - start
    peak, held = status("VmHWM"), status("VmRSS")
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    assert session.get_inputs()
    return {"load_seconds": loaded, "peak": peak - before, "held": held - before, "trimmed": status("VmRSS") - before}


def noise(folder: Path, length: int) -> np.ndarray:
    """Features [1, M, T] of so many seconds."""
    mels = load(folder / ENCODER.file).graph.inputs[0].shape[1]
    return np.random.default_rng(0).standard_normal((1, int(mels), length * FRAMES_PER_SECOND), dtype=np.float32)


def compare(folders: dict[str, Path], lengths: Sequence[int], rounds: int) -> dict[str, dict]:
    """Outputs of the forms, of which one at a time is in memory, and then times of all but the weights alone."""
    results: dict[str, dict] = {name: {"sqnr_db": {}, "bits_equal": {}, "seconds": {}} for name in folders}
    for length in lengths:
        features = noise(folders[FLOAT32], length)
        outputs = {}
        for name, folder in folders.items():
            with process(load_onnx, folder) as worker:
                outputs[name] = worker.submit(output, features).result()
        timed = {name: folder for name, folder in folders.items() if name not in (ALONE, ALONE_FULL)}
        workers = {name: process(load_onnx, folder) for name, folder in timed.items()}
        try:
            for _ in tqdm(range(rounds), desc=f"{length} s", leave=False, disable=None):
                for name, worker in workers.items():
                    taken = worker.submit(seconds, features).result()
                    results[name]["seconds"].setdefault(length, []).append(taken)
        finally:
            for worker in workers.values():
                worker.shutdown()
        for name, found in outputs.items():
            results[name]["sqnr_db"][length] = sqnr_db(outputs[FLOAT32], found)
            results[name]["bits_equal"][length] = bool(np.array_equal(found, outputs[BASELINE]))
    return results


def row(name: str, result: dict, baseline: dict) -> str:
    """One line of the table."""
    speeds = []
    for length, times in result["seconds"].items():
        ratio = median(base / own for base, own in zip(baseline["seconds"][length], times, strict=True))
        speeds.append(f"{length / median(times):.1f} ({ratio:.2f}×)")
    ratios = " / ".join(f"{value:.1f}" for value in result["sqnr_db"].values())
    equal = "yes" if all(result["bits_equal"].values()) else "no"
    memory = [size_text(round(result[key])) for key in ("peak", "held", "trimmed")]
    sizes = size_text(result["encoder_bytes"]), size_text(result["folder_bytes"])
    cells = (name, *sizes, f"{result['load_seconds']:.2f} s", *memory, " / ".join(speeds) or "–", ratios, equal)
    return f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True, help="exported folder of a ternary checkpoint")
    parser.add_argument("--work_dir", type=Path, default=Path("build/ternary"), help="where to build (%(default)s)")
    parser.add_argument("--seconds", type=int, nargs="+", default=CLIP_SECONDS, help="lengths of the clips %(default)s")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns that each encoder takes (%(default)s)")
    args = parser.parse_args(argv)
    folders = build(args.model_dir.resolve(), args.work_dir.resolve())
    before = machine()
    results = compare(folders, args.seconds, args.rounds)
    for name, folder in folders.items():
        loads = []
        for _ in range(LOADS):
            with process() as worker:
                loads.append(worker.submit(load_figures, folder).result())
        results[name] |= {key: median(load[key] for load in loads) for key in loads[0]}
        results[name]["encoder_bytes"] = sum(path.stat().st_size for path in folder.glob(f"{ENCODER.file}*"))
        results[name]["folder_bytes"] = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    lengths = ", ".join(map(str, args.seconds))
    print(f"{before}; {args.rounds} rounds\n")
    print(f"| form | encoder | folder | load | peak | held | trimmed | RTFx at {lengths} s | SQNR dB | bits equal |")
    print("|---" * 10 + "|")
    for name, result in results.items():
        print(row(name, result, results[BASELINE]))
    for result in results.values():
        result["sqnr_db"] = {length: ratio for length, ratio in result["sqnr_db"].items() if np.isfinite(ratio)}
    write_json(args.work_dir / "ternary.json", {"machine": [before, machine()], "results": results})


if __name__ == "__main__":
    main()
