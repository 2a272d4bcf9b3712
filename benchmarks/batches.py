"""Plain ONNX Runtime on the clips of a manifest, by batch size: throughput, and whether it says the same.

    python -m benchmarks.batches --model_dir onnx_models --manifest samples/manifest.jsonl

Out: a markdown table. Features are computed before; the encoder and the token loop are timed together and apart. Batch
sizes take turns (1 4 8 16 1 4 8 16 …); a figure is the median over rounds, × the median of the ratios to the first
line in the same round.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import numpy as np
from tqdm import tqdm

from benchmarks.bench import machine, peak_memory
from common.clips import read_clips
from common.console import quiet_libraries, size_text
from common.runtime import GenAI, RawOrt

BATCH_SIZES = (1, 4, 8, 16)  # the first is the baseline
ROUNDS = 5


class TimedRawOrt(RawOrt):
    """Counts the seconds spent in the encoder."""

    encoder_seconds = 0.0

    def encode(self, features):
        start = time.perf_counter()
        encoded = super().encode(features)
        self.encoder_seconds += time.perf_counter() - start
        return encoded


def turn(raw: TimedRawOrt, features: list[np.ndarray], batch_size: int) -> tuple[list[list[int]], float, float]:
    """Tokens of each clip, seconds in all, and seconds in the encoder."""
    raw.encoder_seconds, start = 0.0, time.perf_counter()
    found = raw.transcribe_all(features, batch_size=batch_size)
    return [one.tokens for one in found], time.perf_counter() - start, raw.encoder_seconds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--clips", type=int, help="only as many, the first of the manifest")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="(%(default)s)")
    args = parser.parse_args(argv)
    quiet_libraries(False)
    genai = GenAI(args.model_dir)
    samples = [genai.config.read_clip(clip) for clip in read_clips(args.manifest)[: args.clips]]
    features = [genai.features(one) for one in samples]
    audio = sum(map(len, samples)) / genai.config.sample_rate
    del genai

    raw = TimedRawOrt(args.model_dir)
    said, peaks = {}, {}
    for size in BATCH_SIZES:  # warm-up; memory only grows, so that it is told in this order
        said[size], *_ = turn(raw, features, size)
        peaks[size] = peak_memory()
    times = {size: [] for size in BATCH_SIZES}
    for _ in tqdm(range(args.rounds), unit="round", leave=False, disable=None):
        for size in BATCH_SIZES:
            times[size].append(turn(raw, features, size)[1:])

    print(machine())
    print(f"\n| {len(samples)} clips, {audio:.0f} s | RTFx | × | encoder | token loop | unlike batch 1 | peak memory |")
    print("|---" * 7 + "|")
    for size, turns in times.items():
        seconds, encoder = (median(column) for column in zip(*turns, strict=True))
        loop = median(whole - part for whole, part in turns)
        ratio, encoder_ratio, loop_ratio = (
            median(of(*base) / of(*own) for base, own in zip(times[BATCH_SIZES[0]], turns, strict=True))
            for of in (lambda whole, _: whole, lambda _, part: part, lambda whole, part: whole - part)
        )
        unlike = sum(one != other for one, other in zip(said[BATCH_SIZES[0]], said[size], strict=True))
        print(
            f"| batch {size} | {audio / seconds:.1f} | {ratio:.2f}× | {encoder:.2f} s, {encoder_ratio:.2f}× | "
            f"{loop:.2f} s, {loop_ratio:.2f}× | {unlike} | {size_text(peaks[size])} |"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
