"""The token loop, and ONNX Runtime GenAI end to end on a long clip, for each way of cutting it into chunks.

    python -m benchmarks.decoding --model_name build/parakeet-0.6b-random.nemo --work_dir build/bench

Out: three markdown tables, and decoding.json in the work directory.
1. Decoder + joint per token in plain ONNX Runtime, with several session options.
2. GenAI end to end with several session options.
3. GenAI end to end with a float32 encoder, on a clip of 10 minutes, for several chunks and contexts. Expect an hour.

A random model either never emits a token or always does. So the joint is changed in a copy of the model: its encoder
projection takes frames centred and scaled to unit size, so that it can tell them apart, and its blank logit gets a bias
that is found by bisection, so that 3 to 5 tokens a second are emitted. The rate is printed with each result. No
operator is added. Candidates take turns (A B C A B C …). A figure is the median over rounds; × is the median of the
ratios to the first line in the same round.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
from tqdm import tqdm

from benchmarks.bench import machine, parse_args, peak_memory, process, speech
from benchmarks.recipes import FLOAT32, RECIPES, build
from common.cli import size_text
from common.contract import DECODER, ENCODER, GENAI_CONFIG, JOINT, Graph
from common.folder import staged_folder, write_json
from common.layouts.genai import ENCODER_SESSION, TOKEN_SESSION
from common.run.config import RuntimeConfig
from common.run.decode import BlankZero, greedy_tdt_decode
from common.run.genai import GenAI
from common.run.ort import OnnxRuntime

# Chunk, left and right context in seconds; the first is the baseline.
CHUNKS = ((6, 10, 2), (30, 10, 2), (60, 10, 2), (60, 2, 2), (120, 10, 2))
CLIP_SECONDS = 600
# Session options in the form of genai_config.json; the first of each is the baseline.
TOKEN_OPTIONS = {"all cores": ENCODER_SESSION, "two, no spinning": TOKEN_SESSION, "one": {"intra_op_num_threads": 1}}
# Of the encoder, and of the decoder and the joint.
GENAI_OPTIONS = {
    "GenAI's own": ({}, {}),
    "encoder: all cores": (ENCODER_SESSION, {}),
    **{f"encoder: all cores; tokens: {name}": (ENCODER_SESSION, own) for name, own in TOKEN_OPTIONS.items()},
}
OPTIONS_CLIP_SECONDS = 60
ROUNDS = 3
OPTIONS_ROUNDS = 5
TOKENS = 100  # a turn of the token loop
RATE = (3.0, 5.0)  # tokens a second, as in speech
RATE_CLIP_SECONDS = 20
MAX_BIAS = 64.0  # logits; beyond ± this a model emits nothing, or never stops
TALKATIVE = "talkative"  # folder of the copy


class TokenLoop:
    """The decoder and joint of a folder in sessions of their own, with their own options."""

    def __init__(self, folder: Path, options: dict):
        self.config = RuntimeConfig.read(folder)
        self.decoder, self.joint = (_session(folder, graph, options) for graph in (DECODER, JOINT))
        width = self.joint.get_inputs()[0].shape[-1]
        self.frames = np.random.default_rng(0).standard_normal((TOKENS, 1, 1, width), dtype=np.float32)

    def seconds(self) -> dict[str, float]:
        """Seconds of the decoder and of the joint over `TOKENS` tokens, run in turns as a recognizer runs them."""
        config, spent = self.config, {"decoder": 0.0, "joint": 0.0}
        h = c = np.zeros((config.decoder_layers, 1, config.decoder_dim), dtype=np.float32)
        one = np.ones(1, dtype=np.int64)
        for frame in self.frames:
            token = np.array([[int(frame[0, 0, 0] * 1000) % config.blank_id]])
            start = time.perf_counter()
            predicted, _, h, c = _call(self.decoder, DECODER, token, one, h, c)
            middle = time.perf_counter()
            _call(self.joint, JOINT, frame, predicted.transpose(0, 2, 1))
            spent["decoder"] += middle - start
            spent["joint"] += time.perf_counter() - middle
        return spent


def _session(folder: Path, graph: Graph, options: dict):
    import onnxruntime as ort

    session_options = ort.SessionOptions()
    session_options.log_severity_level = 3
    for key, value in options.items():
        if "." in key:
            session_options.add_session_config_entry(key, value)
        else:
            setattr(session_options, key, value)
    return ort.InferenceSession(folder / graph.file, session_options, providers=["CPUExecutionProvider"])


def _call(session, graph: Graph, *inputs: np.ndarray) -> list[np.ndarray]:
    return session.run(graph.output_names, dict(zip(graph.input_names, inputs, strict=True)))


def time_tokens(folders: list[Path], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Time `TOKENS` tokens in each folder with each of the options; one entry for each round."""
    loops = {
        f"{folder.name}, {name}": TokenLoop(folder, own) for folder in folders for name, own in TOKEN_OPTIONS.items()
    }
    for loop in loops.values():
        loop.seconds()
    times = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            times[name].append(loop.seconds())
    return times


def make_talkative(source: Path, target: Path) -> None:
    """Copy a model folder, and change the joint of the copy as described at the top of this file."""
    genai = GenAI(source)
    features = genai.features(speech(RATE_CLIP_SECONDS, genai.config.sample_rate))
    del genai
    raw = OnnxRuntime(source)
    (encoded,) = raw.encode([features])  # [S, D]
    mean, scale = encoded.mean(axis=0), (encoded - encoded.mean(axis=0)).std()
    bias, rate = find_blank_bias(raw, (encoded - mean) / scale)
    if not RATE[0] <= rate <= RATE[1]:
        raise RuntimeError(f"expected {RATE[0]:g} to {RATE[1]:g} tokens a second, got {rate:.1f} at a bias of {bias}")
    with staged_folder(target) as staging:
        shutil.copytree(source, staging, dirs_exist_ok=True)
        change_joint(staging, mean, scale, raw.config.blank_id, bias)


def find_blank_bias(raw: OnnxRuntime, encoded: np.ndarray) -> tuple[float, float]:
    """Find by bisection what to add to the blank logit for a rate within `RATE`; also the rate, in tokens a second."""
    config = raw.config

    def rate(bias: float) -> float:
        def join(frames: np.ndarray, predicted: Sequence[np.ndarray]) -> np.ndarray:
            logits = raw.join(frames, predicted).copy()
            logits[:, config.blank_id] += bias
            return logits

        (found,) = greedy_tdt_decode(
            [[encoded]],
            raw.predict,
            join,
            blank_id=config.blank_id,
            durations=config.durations,
            max_symbols=config.max_symbols,
            rule=BlankZero.GENAI,
        )
        return len(found.tokens) / RATE_CLIP_SECONDS

    low, high = -MAX_BIAS, MAX_BIAS  # too many tokens, too few
    for _ in range(20):
        middle = (low + high) / 2
        found = rate(middle)
        if RATE[0] <= found <= RATE[1]:
            break
        low, high = (low, middle) if found < RATE[0] else (middle, high)
    return middle, found


def change_joint(folder: Path, mean: np.ndarray, scale: float, blank_id: int, bias: float) -> None:
    """Rewrite the float32 joint of `folder` to take (frame - mean) / scale, and to add `bias` to its blank logit."""
    import onnx_ir as ir

    from common.onnx_io import save_model

    model = ir.load(folder / JOINT.file)
    ir.external_data.load_to_model(model)
    frame, (logits,) = model.graph.inputs[0], model.graph.outputs
    product = next(node for node, _ in frame.uses())
    shift, last = next(node for node, _ in product.outputs[0].uses()), logits.producer()

    def constant(node: ir.Node) -> ir.Value:
        return next(value for value in node.inputs if value.is_initializer())

    weight, offset, biases = (constant(node).const_value.numpy() for node in (product, shift, last))
    biases = biases.copy()
    biases[blank_id] += bias
    for node, array in ((product, weight / scale), (shift, offset - mean @ weight / scale), (last, biases)):
        constant(node).const_value = ir.tensor(array.astype(np.float32))
    save_model(model, folder / JOINT.file)


def transcribe(folder: Path, seconds: float) -> dict[str, float]:
    """Run GenAI end to end on speech in this process; the seconds it took without loading, tokens, peak bytes."""
    genai = GenAI(folder)
    samples = speech(seconds, genai.config.sample_rate)
    genai.transcribe(samples[: 2 * genai.config.sample_rate])
    start = time.perf_counter()
    tokens = genai.transcribe(samples)
    return {"seconds": time.perf_counter() - start, "tokens": len(tokens), "peak_bytes": peak_memory()}


def time_genai(
    folder: Path, source: Path, settings: dict[str, Callable[[dict], None]], seconds: float, rounds: int
) -> dict[str, list[dict]]:
    """Run `transcribe` in `folder` under each setting, a change of the genai_config.json of `source`. Every run has a
    fresh process, since only one float32 encoder at a time fits in memory."""
    results = {name: [] for name in settings}
    progress = tqdm(total=rounds * len(settings), unit="run", leave=False, disable=None)
    for _ in range(rounds):
        for name, change in settings.items():
            config = json.loads((source / GENAI_CONFIG).read_text(encoding="utf-8"))
            change(config["model"])
            write_json(folder / GENAI_CONFIG, config)
            with process() as worker:
                results[name].append(worker.submit(transcribe, folder, seconds).result())
            progress.update()
    progress.close()
    return results


def cut(chunk: float, left: float, right: float) -> Callable[[dict], None]:
    """A setting of `time_genai`: windows of these lengths in seconds."""

    def change(model: dict) -> None:
        names = ("chunk_samples", "left_context_samples", "right_context_samples")
        model |= {name: round(s * model["sample_rate"]) for name, s in zip(names, (chunk, left, right), strict=True)}

    return change


def with_options(encoder: dict, tokens: dict) -> Callable[[dict], None]:
    """A setting of `time_genai`: session options of the encoder, and of the decoder and the joint."""

    def change(model: dict) -> None:
        for graph, options in ((ENCODER, encoder), (DECODER, tokens), (JOINT, tokens)):
            model[graph.genai_section]["session_options"] = options

    return change


def print_genai(results: dict[str, list[dict]], seconds: float) -> None:
    """A table of what `time_genai` found."""
    print(f"\n| GenAI, {seconds:g} s of audio | seconds | RTFx | × | tokens a second | peak memory |")
    print("|---" * 6 + "|")
    baseline = next(iter(results.values()))
    for name, runs in results.items():
        taken = median(run["seconds"] for run in runs)
        ratio = median(base["seconds"] / run["seconds"] for base, run in zip(baseline, runs, strict=True))
        rate, peak = runs[0]["tokens"] / seconds, max(run["peak_bytes"] for run in runs)
        print(f"| {name} | {taken:.1f} | {seconds / taken:.1f} | {ratio:.2f}× | {rate:.1f} | {size_text(peak)} |")


def print_tokens(times: dict[str, list[dict[str, float]]]) -> None:
    """A table of what `time_tokens` found."""
    print("\n| decoder and joint | ms per token | decoder | joint | × |\n|---|---|---|---|---|")
    totals = {name: [sum(turn.values()) for turn in turns] for name, turns in times.items()}
    baseline = next(iter(totals.values()))
    for name, turns in times.items():
        ms = {part: 1000 / TOKENS * median(turn[part] for turn in turns) for part in turns[0]}
        ratio = median(base / own for base, own in zip(baseline, totals[name], strict=True))
        total = 1000 / TOKENS * median(totals[name])
        print(f"| {name} | {total:.2f} | {ms['decoder']:.2f} | {ms['joint']:.2f} | {ratio:.2f}× |", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="runs of each chunk configuration (%(default)s)")
    parser.add_argument("--seconds", type=float, default=CLIP_SECONDS, help="length of the clip (%(default)s)")
    args = parse_args(parser, argv)
    # Every precision of the decoder and the joint that a mode of ours makes.
    recipes = (FLOAT32, *(recipe for recipe in RECIPES if "--decoder_joint_precision" in recipe.flags))
    folders = [build(recipe, args.model_name, args.work_dir) for recipe in recipes]
    talkative = args.work_dir / TALKATIVE
    if not (talkative / JOINT.file).is_file():
        with process() as worker:
            worker.submit(make_talkative, folders[0], talkative).result()

    print(machine())
    with process() as worker:
        tokens = worker.submit(time_tokens, folders, 3 * OPTIONS_ROUNDS).result()
    print_tokens(tokens)
    options = {name: with_options(*own) for name, own in GENAI_OPTIONS.items()}
    by_options = time_genai(talkative, folders[0], options, OPTIONS_CLIP_SECONDS, OPTIONS_ROUNDS)
    print_genai(by_options, OPTIONS_CLIP_SECONDS)
    chunks = {f"chunk {chunk:g} s, context {left:g} + {right:g} s": cut(chunk, left, right)
              for chunk, left, right in CHUNKS}  # fmt: skip
    by_chunk = time_genai(talkative, folders[0], chunks, args.seconds, args.rounds)
    print_genai(by_chunk, args.seconds)
    found = {"machine": machine(), "tokens": tokens, "genai_options": by_options, "genai_chunks": by_chunk}
    write_json(args.work_dir / "decoding.json", found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
