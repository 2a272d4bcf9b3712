"""Every method and block size on a small checkpoint: words lost, error on speech, size, speed.

    python -m benchmarks.methods --model_name samples/parakeet-tdt-tiny.nemo --work_dir build/methods \
        --calibration_manifest calibration.jsonl --manifest eval.jsonl

Both manifests are JSON lines with `audio_filepath` and `text`, of different clips. Out: a markdown table, and in the
work directory methods.json with every transcript and methods.png, the Pareto front of size and error.

Everything runs in plain ONNX Runtime on the features of GenAI's processor. SQNR is of the encoder's output, over all
frames of all clips. "Against" columns are differences of word error rates in points, with a bootstrap interval over
clips that are the same for both; "unlike float32" is how many words differ, right or wrong. RTFx is that of the encoder
alone, on clips that last seconds, one at a time.

On 200 clips 0.3 points of word error rate are five words, so the figures in the README come from more clips: new
sentences in the bundled checkpoint's language, made by `benchmarks/synthesize.py`.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.bench import ObservedBaseline, machine, parse_args
from benchmarks.recipes import FLOAT32, INT8, Recipe, build, encoder_bytes, mode_name, ours
from common.evaluate.words import WordErrorRate, word_error_rate
from common.folder import write_json
from common.quantize import METHODS
from common.quantize.fidelity import sqnr_db
from common.run.audio import read_clips
from common.run.genai import GenAI

BLOCKS = (32, 64, 128)
RTN = f"rtn {BLOCKS[0]}"
BUDGETS = (0.1, 0.25, 0.5, 0.75)  # of the way from 4 to 8 bits for every weight
IN_SIZE_OF = ", in the size of "


@dataclass
class Result:
    """One encoder on all clips."""

    bytes: int
    texts: list[str]
    sqnr_db: float
    rtfx: float


def recipes(checkpoint: Path, work_dir: Path, calibration: Path) -> list[Recipe]:
    """Float32, each method by itself, and calibrated in two sizes: the rule of thumb's, and that of the first `rtn`,
    for which blocks have to be larger, since zero points take room."""

    def recipe(name: str, method: str, block: int, *flags: str) -> Recipe:
        flags = ("--quant_method", method, "--block_size", str(block), *flags)
        return Recipe(name, name.replace(" ", "_").replace(",", ""), ours, flags)

    mixed, calibrated = "k_quant_mixed", ("--calibration_manifest", str(calibration.resolve()))
    int8 = mode_name(INT8)
    found = [FLOAT32, recipe(int8, "int8", 32), recipe(f"{int8}, calibrated", "int8", 32, *calibrated)]
    for block in BLOCKS:
        methods = [recipe(f"{method} {block}", method, block) for method, kind in METHODS.items() if kind.uses_blocks]
        found += [*methods, recipe(f"{mixed} {block}, calibrated", mixed, block, *calibrated)]
    rtn = next(one for one in found if one.name == RTN)
    build(FLOAT32, checkpoint, work_dir)  # from which the others are made
    budget = ("--size_budget_mb", str(encoder_bytes(build(rtn, checkpoint, work_dir)) / 1e6))
    names = ((f"{mixed} {block}, calibrated{IN_SIZE_OF}{RTN}", block) for block in BLOCKS[1:])
    found += [recipe(name, mixed, block, *calibrated, *budget) for name, block in names]
    return found + sweep(recipe, checkpoint, work_dir, calibrated)


def sweep(recipe: Callable[..., Recipe], checkpoint: Path, work_dir: Path, calibrated: tuple[str, ...]) -> list[Recipe]:
    """int8 in 4 bits, with and without calibration, and in budgets between 4 and 8 bits for every weight."""
    int8 = mode_name(INT8)
    low, high = (
        recipe("int8 weight_bits 4, calibrated", "int8", 32, "--weight_bits", "4", *calibrated),
        recipe(f"{int8}, calibrated", "int8", 32, *calibrated),
    )
    ends = [encoder_bytes(build(one, checkpoint, work_dir)) / 1e6 for one in (low, high)]
    found = [recipe("int8 weight_bits 4", "int8", 32, "--weight_bits", "4"), low]
    for share in BUDGETS:
        # The estimate that a budget is held against may be a per cent more than what the file takes.
        budget = 1.02 * ends[0] + share * (ends[1] - 1.02 * ends[0])
        name = f"{int8}, calibrated, {budget:.3g} MB"
        found.append(recipe(name, "int8", 32, "--size_budget_mb", f"{budget:.4f}", *calibrated))
    return found


def measure(
    folder: Path, features: list[np.ndarray], expected: list[np.ndarray] | None
) -> tuple[Result, list[np.ndarray]]:
    """The encoder of `folder` on clips of one window, against float32 outputs; also its own outputs [S, D]."""
    encoded: list[np.ndarray] = []
    times: list[float] = []  # of the encoder's runs, in seconds

    def observe(outputs: list[np.ndarray], seconds: float) -> None:
        encoded.extend(outputs)
        times.append(seconds)

    raw, genai, texts = ObservedBaseline(folder, observe), GenAI(folder), []
    raw.encode(features[:1])  # warm-up: the first run allocates
    encoded.clear()
    times.clear()
    for clip in tqdm(features, desc=folder.name, unit="clip", leave=False, disable=None):
        texts.append(genai.text(raw.transcribe(clip, whole=True).tokens))
    audio = sum(clip.shape[1] for clip in features) * raw.config.hop_length / raw.config.sample_rate
    ratio = sqnr_db(np.concatenate(expected), np.concatenate(encoded)) if expected else float("inf")
    return Result(encoder_bytes(folder), texts, ratio, audio / sum(times)), encoded


def with_noise(samples: np.ndarray, snr_db: float, seed: int) -> np.ndarray:
    """The clip with white noise added, whose power is `snr_db` below the clip's."""
    noise = np.random.default_rng(seed).standard_normal(len(samples), dtype=np.float32)
    return samples + noise * np.float32(np.sqrt(np.mean(np.square(samples)) * 10 ** (-snr_db / 10)))


def points(rate: WordErrorRate) -> str:
    """A difference of word error rates."""
    return f"{rate.percent:+.2f} [{rate.low:+.2f}, {rate.high:+.2f}]"


def row(name: str, results: dict[str, Result], texts: list[str]) -> list[str]:
    """One line of the table; for a calibrated encoder in the size of an `rtn` one, also the difference between them."""
    own, float32, rtn = results[name], results[FLOAT32.name], results.get(name.partition(IN_SIZE_OF)[2])
    size, wer = f"{own.bytes / 1e6:.2f} MB", str(word_error_rate(texts, own.texts))
    if own is float32:
        return [name, size, wer, "", "", "", "", f"{own.rtfx:.0f}"]
    against = [points(word_error_rate(texts, own.texts, one.texts)) if one else "" for one in (float32, rtn)]
    unlike = str(word_error_rate(float32.texts, own.texts))
    return [name, size, wer, *against, unlike, f"{own.sqnr_db:.1f} dB", f"{own.rtfx:.0f}"]


def front(results: dict[str, Result]) -> list[str]:
    """The encoders for which no other one is both smaller and more exact, smallest first."""
    found, best = [], -np.inf
    for name in sorted(results, key=lambda name: (results[name].bytes, -results[name].sqnr_db)):
        if results[name].sqnr_db > best:
            best = results[name].sqnr_db
            found.append(name)
    return found


def plot(results: dict[str, Result], path: Path) -> None:
    """Size against SQNR, the front as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 5.5), layout="constrained")
    axes.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
    for name, result in results.items():
        marker = "*" if "calibrated" in name else "o"
        axes.scatter(result.bytes / 1e6, result.sqnr_db, s=90, marker=marker, label=name)
    best = [results[name] for name in front(results)]
    axes.plot([one.bytes / 1e6 for one in best], [one.sqnr_db for one in best], color="grey", zorder=0)
    axes.set(xlabel="encoder, MB", ylabel="SQNR on speech, dB")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration_manifest", type=Path, required=True, help="clips to calibrate on")
    parser.add_argument("--manifest", type=Path, required=True, help="other clips, with text, to measure on")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only encoders with one of these in their name")
    parser.add_argument("--snr_db", type=float, help="add white noise to the clips (none)")
    args = parse_args(parser, argv)
    clips = read_clips(args.manifest)
    shared = {clip.path.resolve() for clip in clips} & {
        clip.path.resolve() for clip in read_clips(args.calibration_manifest)
    }
    if shared:
        raise SystemExit(f"error: {len(shared)} clips are in both manifests, {min(shared).name} is one")

    found = recipes(args.model_name, args.work_dir, args.calibration_manifest)
    if args.only:
        found = [one for one in found if one is FLOAT32 or any(word in one.name for word in args.only)]
    folders = {recipe.name: build(recipe, args.model_name, args.work_dir) for recipe in found}
    genai = GenAI(folders[FLOAT32.name])
    features = []
    for i, clip in enumerate(tqdm(clips, leave=False, disable=None)):
        samples = genai.config.read_clip(clip)
        samples = samples if args.snr_db is None else with_noise(samples, args.snr_db, i)
        features.append(genai.features(samples))
    texts = [clip.text for clip in clips]
    before, expected, results = machine(), None, {}
    for name, folder in folders.items():
        results[name], encoded = measure(folder, features, expected)
        expected = expected or encoded

    seconds = sum(clip.shape[1] for clip in features) * genai.config.hop_length / genai.config.sample_rate
    print(f"{before}\n{len(clips)} clips, {seconds:.0f} s, {sum(len(text.split()) for text in texts)} words\n")
    columns = (
        "encoder",
        "size",
        "WER",
        "against float32",
        "against rtn of that size",
        "unlike float32",
        "SQNR",
        "RTFx",
    )
    for cells in (columns, ["---"] * len(columns), *(row(name, results, texts) for name in results)):
        print("| " + " | ".join(cells) + " |")
    del results[FLOAT32.name]
    print(f"\nPareto front of size and SQNR: {', '.join(front(results))}")
    plot(results, args.work_dir / "methods.png")
    write_json(args.work_dir / "methods.json", {name: asdict(result) for name, result in results.items()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
