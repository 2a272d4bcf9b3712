"""Wall time and peak memory of each script on one checkpoint, as a table: what a user waits for.

    python -m benchmarks.random_checkpoint --topology 0.6b --output build/parakeet-0.6b-random.nemo
    python -m benchmarks.pipeline --model_name build/parakeet-0.6b-random.nemo --work_dir build/pipeline

Each script runs once as a process of its own, under the kernel's accounting (getrusage).
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from common.cli import size_text

ROOT = Path(__file__).resolve().parents[1]
METHODS = (("rtn", 32), ("rtn", 128), ("k_quant_mixed", 32), ("hqq", 32), ("int8", 32))


def commands(checkpoint: str, folder: Path) -> list[list[str]]:
    """The scripts in the order of the README, with every quantization method."""
    exported = str(folder / "exported")
    source = ["--model_name", checkpoint, "--output_dir", exported]
    steps = [["export_parakeet_to_onnx.py", *source], ["export_tokenizer.py", *source]]
    for method, block in METHODS:
        target = str(folder / f"{method}_{block}")
        flags = ["--quant_method", method, "--block_size", str(block)]
        steps.append(["optimize_encoder.py", "--model_dir", exported, "--output_dir", target, *flags])
    steps.append(["test_e2e.py", "--model_dir", str(folder / "rtn_32")])
    return steps


def measure(command: list[str]) -> tuple[float, int, int]:
    """Seconds, peak resident bytes and exit status of one script."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return time.perf_counter() - start, usage.ru_maxrss * 1024, process.returncode


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", required=True, help="checkpoint to run the scripts on")
    parser.add_argument("--work_dir", type=Path, default=Path("build/pipeline"), help="where to write (%(default)s)")
    args = parser.parse_args(argv)
    folder = args.work_dir.resolve()
    checkpoint = args.model_name if "/" in args.model_name and not Path(args.model_name).exists() else None
    checkpoint = checkpoint or str(Path(args.model_name).resolve())
    print("| script | seconds | peak memory | encoder |\n|---|---|---|---|")
    failed = 0
    for command in commands(checkpoint, folder):
        seconds, peak, status = measure(command)
        failed |= status
        written = Path(command[command.index("--output_dir") + 1]) if "--output_dir" in command else None
        encoder = written / "encoder.onnx.data" if written else None
        size = size_text(encoder.stat().st_size) if encoder and encoder.is_file() else "–"
        method = " ".join(
            command[i + 1] for i, word in enumerate(command) if word in ("--quant_method", "--block_size")
        )
        print(f"| {command[0]} {method} | {seconds:.0f} | {size_text(peak)} | {size} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
