"""Plain ONNX Runtime on the clips of a manifest, by batch size: throughput, and whether the transcripts are the same.

    python -m benchmarks.batches --model_dir onnx_models --manifest samples/manifest.jsonl

Out: a markdown table. Features are computed beforehand; the encoder and the token loop are timed together and apart.
Batch sizes take turns (1 4 8 16 1 4 8 16 …). A figure is the median over rounds; × is the median of the ratios to the
first line in the same round.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import numpy as np
from tqdm import tqdm

from benchmarks.bench import ObservedBaseline, machine, peak_memory
from common.cli import quiet_libraries, size_text
from common.run.audio import read_clips
from common.run.genai import GenAI

BATCH_SIZES = (1, 4, 8, 16)  # the first is the baseline
ROUNDS = 5


class TimedBaseline:
    """Plain ONNX Runtime, with the seconds that each run of the encoder took."""

    def __init__(self, folder: Path) -> None:
        self.encoder_seconds: list[float] = []
        self.raw = ObservedBaseline(folder, lambda _, seconds: self.encoder_seconds.append(seconds))


def turn(timed: TimedBaseline, features: list[np.ndarray], batch_size: int) -> tuple[list[list[int]], float, float]:
    """Tokens of each clip, seconds in all, and seconds in the encoder."""
    timed.encoder_seconds.clear()
    start = time.perf_counter()
    hypotheses = timed.raw.transcribe_all(features, batch_size=batch_size)
    seconds = time.perf_counter() - start
    return [one.tokens for one in hypotheses], seconds, sum(timed.encoder_seconds)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--clips", type=int, help="only as many, the first of the manifest")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="(%(default)s)")
    args = parser.parse_args(argv)
    quiet_libraries()
    genai = GenAI(args.model_dir)
    samples = [genai.config.read_clip(clip) for clip in read_clips(args.manifest)[: args.clips]]
    features = [genai.features(one) for one in samples]
    audio = sum(map(len, samples)) / genai.config.sample_rate
    del genai

    timed = TimedBaseline(args.model_dir)
    transcribed, peaks = {}, {}
    for size in BATCH_SIZES:  # warm-up; peak memory only grows, so it is measured in this order
        transcribed[size], *_ = turn(timed, features, size)
        peaks[size] = peak_memory()
    times = {size: [] for size in BATCH_SIZES}
    for _ in tqdm(range(args.rounds), unit="round", leave=False, disable=None):
        for size in BATCH_SIZES:
            times[size].append(turn(timed, features, size)[1:])

    print(machine())
    print(f"\n| {len(samples)} clips, {audio:.0f} s | RTFx | × | encoder | token loop | differing | peak memory |")
    print("|---" * 7 + "|")
    for size, turns in times.items():
        seconds, encoder = (median(column) for column in zip(*turns, strict=True))
        loop = median(whole - part for whole, part in turns)
        ratio, encoder_ratio, loop_ratio = (
            median(of(*base) / of(*own) for base, own in zip(times[BATCH_SIZES[0]], turns, strict=True))
            for of in (lambda whole, _: whole, lambda _, part: part, lambda whole, part: whole - part)
        )
        differing = sum(one != other for one, other in zip(transcribed[BATCH_SIZES[0]], transcribed[size], strict=True))
        print(
            f"| batch {size} | {audio / seconds:.1f} | {ratio:.2f}× | {encoder:.2f} s, {encoder_ratio:.2f}× | "
            f"{loop:.2f} s, {loop_ratio:.2f}× | {differing} | {size_text(peaks[size])} |"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
