"""Make an exported encoder small and fast: fuse its graph, then store its weights in 4 bits, or multiply in 8.

In: a folder of export_parakeet_to_onnx.py that export_tokenizer.py has completed.
Out: a second folder, complete by itself, whose encoder has MatMulNBits weights and fused operators, or int8 products;
the decoder, the joint (unless --decoder_joint_precision is int8) and the configuration are copies. Each new graph and
the one that it comes from are run on noise, and nothing is written if they do not agree; with --eval_manifest on
speech as well, and --max_wer_increase says how many words it may cost. optimization_report.html shows all of it.

A folder for onnx-asr or sherpa-onnx is optimized in the same way, and one with subfolders for several runtimes each in
its turn, weights that come out equal being shared again.

    python optimize_encoder.py --model_dir ./onnx_models --output_dir ./onnx_models_optimized
    python optimize_encoder.py --quant_method int8 --decoder_joint_precision int8 --output_dir ./onnx_models_int8
    python optimize_encoder.py --eval_manifest samples/manifest.jsonl --max_wer_increase 0.5
"""

import argparse
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

# First of all, since a package that is missing below is then reported in one line (common/__init__.py).
from common.console import Command, Parser, Stages, run, size_text, warn

# isort: split

import numpy as np
import onnx_ir as ir
from tqdm import tqdm

from common import gate
from common.calibrate import calibrate, calibrate_int8, read_speech
from common.card import write_card
from common.clips import Clip, read_clips, shared_clips
from common.files import (
    CHECKPOINT,
    check_output_dir,
    fingerprint,
    is_float16,
    of_one_name,
    read_location,
    read_manifest,
    save_model,
    share_equal_data,
    staged_folder,
    state_needs,
    verify_files,
    write_locations,
    write_manifest,
)
from common.identity import check_one_checkpoint
from common.int8 import Columns
from common.layouts import GENAI, Layout, check_same_shape, layouts_in
from common.optimize import (
    INT8,
    K_QUANT_MIXED,
    MIN_FLOAT_SQNR_DB,
    MIN_SQNR_DB,
    QUANT_METHODS,
    Plan,
    Sensitivity,
    check_budget,
    compare,
    file_bytes,
    fuse,
    load,
    make_plan,
    quantizable,
    quantize_token_graphs,
    quantize_weights,
    spend,
)
from common.quantize import BLOCK_SIZES, Packed
from common.report import (
    REPORT_HTML,
    PageWriter,
    make_evaluation,
    make_report,
    page_writer,
    write_report,
)
from common.runtime import EXPORT_COMMAND, TOKENIZER_COMMAND, RuntimeConfig
from common.smooth import fold
from common.transcripts import normalize

# Peak memory as a multiple of the exported encoder, measured at 0.6B: one float32 session, when they are compared.
MEMORY_FACTOR = 1.3
CALIBRATION_MEMORY_FACTOR = 2.25
# What the libraries take, measured on the tiny checkpoint; those that read and transcribe speech apart.
MEMORY_OF_IMPORTS, MEMORY_OF_SPEECH = 160e6, 80e6  # bytes

BLOCK_SIZE_HELP = """weights that share a scale; a larger block is smaller and faster and less exact; int8 has one
scale a column whatever this says (%(default)s)"""
ACCURACY_LEVEL_HELP = """what activations are rounded to in a quantized product: 4 int8, which is the fastest and not
the most exact; 3 bf16, 2 fp16, 1 fp32, 0 left to the runtime (%(default)s)"""
QUANT_METHOD_HELP = """rtn: 4 bits, symmetric, the smallest. k_quant_mixed: 4 bits with zero points by llama.cpp's
search, 8 bits where they matter most. hqq: 4 bits with whole zero points by half-quadratic optimisation, the slowest
to make. Those run on the same kernels, and --accuracy_level applies to them. int8: integer products, the fastest and
the most exact, 1.6 times the size of 4 bits (%(default)s)"""
DECODER_JOINT_HELP = (
    "weights of the decoder's LSTM and of the joint; int8 makes a token three times as fast (%(default)s)"
)
SKIP_FUSION_HELP = """leave the graph as exported, as quantized encoders for a CPU always are: the fused operator is
slower there"""
EVAL_HELP = """NeMo manifest (JSON lines with audio_filepath, text and perhaps lang, offset and duration): count the
words that float32 and the optimized model get wrong on these clips"""
INCREASE_HELP = """points of word error rate, normalised, by which the optimized model may be worse than float32, over
all clips and in each language; beyond, nothing is written (no limit)"""
REDUCE_RANGE_HELP = """int8 with weights of 7 bits, for a CPU without VNNI (AVX2 before 2021), where sums of larger
products are cut off"""

CALIBRATION_MANIFEST_HELP = """NeMo manifest (JSON lines with audio_filepath) of a few minutes of speech, which
k_quant_mixed and int8 fit their codes to; k_quant_mixed also measures on it what each weight does to the encoder's
output when it is quantized, to spend 8 bits where they help most. Up to 5 minutes are used"""
SIZE_BUDGET_HELP = """for k_quant_mixed with --calibration_manifest, the largest encoder.onnx and its data, in MB of
10^6 bytes (what k_quant_mixed takes without a manifest)"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model_dir", type=Path, default=Path("onnx_models"), help="exported folder (./%(default)s)")
    add("--output_dir", type=Path, default=Path("onnx_models_optimized"), help="folder to write (./%(default)s)")
    add("--block_size", type=int, choices=BLOCK_SIZES, default=32, help=BLOCK_SIZE_HELP)
    add("--accuracy_level", type=int, choices=range(5), default=4, help=ACCURACY_LEVEL_HELP)
    add("--quant_method", choices=QUANT_METHODS, default="rtn", help=QUANT_METHOD_HELP)
    add("--decoder_joint_precision", choices=("fp32", "int8"), default="fp32", help=DECODER_JOINT_HELP)
    add("--reduce_range", action="store_true", help=REDUCE_RANGE_HELP)
    add("--calibration_manifest", type=Path, metavar="FILE", help=CALIBRATION_MANIFEST_HELP)
    add("--size_budget_mb", type=float, metavar="MB", help=SIZE_BUDGET_HELP)
    add("--eval_manifest", type=Path, metavar="FILE", help=EVAL_HELP)
    add("--max_wer_increase", type=float, metavar="POINTS", help=INCREASE_HELP)
    add("--skip_fusion", action="store_true", help=SKIP_FUSION_HELP)
    add("--skip_quantization", action="store_true", help="leave the weights float32")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return run(_optimize, parse_args(argv))


def _optimize(args: argparse.Namespace) -> None:
    layouts = layouts_in(args.model_dir)
    _check_folders(args.model_dir, args.output_dir, layouts)
    if args.reduce_range and not (_int8_encoder(args) or args.decoder_joint_precision == INT8):
        raise ValueError("--reduce_range wants --quant_method int8 or --decoder_joint_precision int8, found neither")
    speech = Speech(_calibration_clips(args), _read_eval_manifest(args))
    genai = next((name for name, layout in layouts.items() if layout is GENAI), None)
    if genai is None and (speech.calibration or speech.evaluation):
        raise ValueError(
            "--calibration_manifest and --eval_manifest want a folder for ONNX Runtime GenAI, which computes their "
            f"features, found none in {args.model_dir}; export with --runtime all"
        )
    if genai is not None:
        _check_speech(speech, RuntimeConfig.read(args.model_dir / genai))
    write_page = page_writer()
    before = max(_bytes(args.model_dir / name, layout.encoder.files) for name, layout in layouts.items())
    # As much as the sources, though less comes out: a copy of one whose weights are shared is read, then removed.
    disk = sum(_bytes(args.model_dir / name, layout.files) for name, layout in layouts.items())
    memory = MEMORY_OF_IMPORTS + (CALIBRATION_MEMORY_FACTOR if speech.calibration else MEMORY_FACTOR) * before
    memory += MEMORY_OF_SPEECH if speech.calibration or speech.evaluation else 0
    state_needs(f"encoder.onnx ({size_text(before)})", memory, disk, args.output_dir)
    with staged_folder(args.output_dir) as stage:
        for name, layout in layouts.items():
            (stage / name).mkdir(exist_ok=True)
            if name:
                print(f"{name}:")
            with tempfile.TemporaryDirectory(dir=stage.parent) as scratch:
                readable = of_one_name(args.model_dir / name, layout.graph_files, Path(scratch) / "copies")
                paths = Paths(args.model_dir / name, readable, args.output_dir / name, stage / name)
                _optimize_folder(paths, layout, args, speech, write_page)
        share_equal_data([stage / name for name in layouts])
    command = Command("python test_e2e.py --model_dir {}")
    following = "" if genai is None else f"; next: {command.format(args.output_dir / genai)}"
    print(f"wrote {args.output_dir}{following}")


@dataclass(frozen=True)
class Paths:
    """One model folder: where it is, where it will be and is being written; `readable` is the first, or has copies of
    its graphs."""

    source: Path
    readable: Path
    target: Path
    stage: Path


@dataclass
class Speech:
    """The clips of both manifests. What the folder for GenAI, the first, was fitted to serves the others as well."""

    calibration: list[Clip]
    evaluation: list[Clip]
    plan: Plan | None = None
    fitted: dict[str, Packed] | dict[str, Columns] = field(default_factory=dict)
    factors: dict[str, np.ndarray] = field(default_factory=dict)
    sensitivity: Sensitivity | None = None


def _optimize_folder(
    paths: Paths, layout: Layout, args: argparse.Namespace, speech: Speech, write_page: PageWriter
) -> None:
    """Optimize a model folder that lies as `layout` says."""
    source, stage, encoder = paths.source, paths.stage, layout.encoder
    manifest, exported = read_manifest(source), paths.readable / encoder.file
    before, int8_tokens = _bytes(source, encoder.files), args.decoder_joint_precision == INT8
    calibrated, evaluated = (layout is GENAI and bool(clips) for clips in (speech.calibration, speech.evaluation))
    stages = Stages(5 + int8_tokens + calibrated + evaluated)
    stored, heard, evaluation, wer = {}, [], None, {}
    skip_fusion = args.skip_fusion or fusion_slows(manifest, args.skip_quantization)
    model, fused = (load(exported), Counter()) if skip_fusion else fuse(exported)
    found = "  ".join(f"{count} {operator}" for operator, count in fused.items()) or "nothing fused"
    skipped = "skipped" if args.skip_fusion else "left out, it would be slower on a CPU"
    stages.report("fusion", skipped if skip_fusion else found, f"{len(model.graph)} nodes")

    names = [] if args.skip_quantization else quantizable(model)
    plan = {} if args.skip_quantization else make_plan(names, args.quant_method, args.block_size, args.reduce_range)
    if calibrated:
        _fit_to_speech(args, paths, model, plan, speech, stages)
    plan = speech.plan or plan
    fold(model, speech.factors)
    left = sum(value.const_value.nbytes for name, value in model.graph.initializers.items() if name not in plan)
    if plan:
        how = (args.quant_method, args.accuracy_level, _progress_bar, speech.fitted)
        stored[encoder.name] = quantize_weights(model, plan, *how)
    widths = Counter(form.bits for form in plan.values())
    counts = "  ".join(f"{widths[bits]} weights at {bits} bits" for bits in sorted(widths))
    method = args.quant_method if _int8_encoder(args) else f"{args.quant_method}, block {args.block_size}"
    method = method if plan else "quantization"
    stages.report(method, counts or "skipped", f"{size_text(left)} left float32")

    save_model(model, stage / encoder.file)
    after = _bytes(stage, encoder.files)
    stages.report("encoder", f"{size_text(before)} → {size_text(after)}", f"{before / after:.1f} times smaller")

    sqnr = compare(source, stage, MIN_SQNR_DB if plan else MIN_FLOAT_SQNR_DB, encoder)
    found = f"SQNR {sqnr:.1f} dB" if math.isfinite(sqnr) else "identical"
    stages.report("against the exported encoder, on noise", found)
    token_sqnr = {}
    if int8_tokens:
        tokens = layout.vocabulary_size(source)
        how = (layout.token_graphs, tokens, args.reduce_range)
        token_sqnr, token_weights = quantize_token_graphs(paths.readable, stage, *how)
        stored |= token_weights
        found = (f"{name} SQNR {ratio:.1f} dB" for name, ratio in token_sqnr.items())
        stages.report("decoder and joint, int8", *found)
    for file in layout.files:
        if not (stage / file).exists():
            shutil.copyfile(source / file, stage / file)
    if evaluated:
        heard, table = _count_words(args, paths, speech.evaluation, stages)
        evaluation = make_evaluation(args.eval_manifest, heard, table, args.max_wer_increase)
        wer = {side: asdict(getattr(table[0], side)) for side in ("float32", "optimized")}
    record = {
        "flags": {
            "quant_method": args.quant_method,
            "block_size": args.block_size,
            "accuracy_level": args.accuracy_level,
            "decoder_joint_precision": args.decoder_joint_precision,
            "reduce_range": args.reduce_range,
            "skip_fusion": args.skip_fusion,
            "skip_quantization": args.skip_quantization,
            "size_budget_mb": args.size_budget_mb,
        },
        "calibration": fingerprint(args.calibration_manifest) if speech.calibration else None,
        "fused": dict(fused),
        "weights_by_bits": {str(bits): count for bits, count in sorted(widths.items())},
        "encoder_bytes": {"exported": before, "optimized": after},
        "sqnr_db_on_noise": round(sqnr, 2) if math.isfinite(sqnr) else None,
        "token_sqnr_db_on_noise": {name: round(ratio, 2) for name, ratio in token_sqnr.items()},
        **({"wer": wer} if wer else {}),
    }
    report = make_report(paths.readable, stage, layout.graphs, manifest, record, stored, speech.sensitivity, evaluation)
    write_report(stage, report, heard, write_page)
    write_manifest(stage, manifest, "optimize", record)
    write_card(stage, paths.target, layout)
    write_locations(stage, paths.target, checkpoint=read_location(source, CHECKPOINT), exported=source)
    if read_manifest(source) != manifest:
        raise ValueError(f"{source} was written anew while it was read; run this again")
    stages.report("report", str(paths.target / REPORT_HTML))


def _int8_encoder(args: argparse.Namespace) -> bool:
    return args.quant_method == INT8 and not args.skip_quantization


def fusion_slows(manifest: dict, skip_quantization: bool) -> bool:
    """SkipLayerNormalization takes 0.7 to 1 ms longer than Add and LayerNormalization on the CPU (onnxruntime 1.32,
    [250, 1024]; 96 of them: 6 to 10 % of a 4-bit encoder, more of an int8 one), so there only a run that asks for
    nothing else fuses. On CUDA it saves kernel launches."""
    device = manifest.get("export", {}).get("flags", {}).get("device", "cpu")
    return device == "cpu" and not skip_quantization


def _calibration_clips(args: argparse.Namespace) -> list[Clip]:
    """The clips to calibrate on, none without a manifest. Raises ValueError for flags that do not go together."""
    method = "--skip_quantization" if args.skip_quantization else args.quant_method
    if args.calibration_manifest is None:
        if args.size_budget_mb is not None:
            raise ValueError("--size_budget_mb wants a --calibration_manifest to decide by, found none")
        return []
    if method not in (K_QUANT_MIXED, INT8):
        raise ValueError(f"--calibration_manifest wants --quant_method {K_QUANT_MIXED} or {INT8}, found {method}")
    if method == INT8 and args.size_budget_mb is not None:
        raise ValueError(f"--size_budget_mb wants --quant_method {K_QUANT_MIXED}, found {INT8}, which has one size")
    return read_clips(args.calibration_manifest)


def _fit_to_speech(
    args: argparse.Namespace, paths: Paths, model: ir.Model, plan: Plan, speech: Speech, stages: Stages
) -> None:
    """Calibrate, with a progress bar, and spend the budget, or what `plan` takes, where it helps most: fill in what
    `speech` has of plan, weights, row factors and damages."""
    exported, found = paths.readable / GENAI.encoder.file, []
    with tqdm(desc="calibrating", unit="run", smoothing=0, leave=False, disable=None) as bar:  # none in a pipe
        if args.quant_method == INT8:
            heard = read_speech(paths.source, speech.calibration)
            calibration = calibrate_int8(exported, heard.batches, plan[next(iter(plan))].bits, bar)
            speech.fitted = calibration.weights
        else:
            graph_bytes = exported.stat().st_size
            budget = file_bytes(model, graph_bytes, plan) if args.size_budget_mb is None else args.size_budget_mb * 1e6
            check_budget(model, graph_bytes, plan, args.block_size, budget)
            heard = read_speech(paths.source, speech.calibration)
            calibration = calibrate(exported, heard.batches, args.block_size, bar)
            damage = speech.sensitivity = calibration.damages
            speech.plan = spend(model, graph_bytes, damage, args.block_size, budget)
            speech.fitted = {name: calibration.weights[name][form.bits].packed for name, form in speech.plan.items()}
            low = {name: widths[min(widths)] for name, widths in damage.items()}
            worst = max(low, key=low.get)
            share = 100 * low[worst] / max(sum(low.values()), 1e-30)
            found.append(f"{worst} does {share:.0f} % of the damage of 4 bits")
    speech.factors = calibration.factors
    found.append(f"inputs of {len(speech.factors)} weights smoothed")
    stages.report("calibration", f"{heard.clips} clips  {heard.seconds:.0f} s of speech", *found)


def _check_folders(source: Path, target: Path, layouts: dict[str, Layout]) -> None:
    """Raise FileNotFoundError naming the command that makes what `source` lacks, or ValueError if `target` is it,
    a file of `source` is not the one that its manifest lists, its weights are float16, or its parts are of different
    checkpoints."""
    check_output_dir(target)
    if target.resolve() == source.resolve():
        raise ValueError(
            f"wanted another --output_dir than --model_dir, found {target} twice; the source stays as it is"
        )
    check_same_shape(target, layouts)
    for name, layout in layouts.items():
        folder = source / name
        exported = (*layout.graph_files, *layout.config_files)
        tokenizer_command = TOKENIZER_COMMAND if layout is GENAI else EXPORT_COMMAND
        for files, command in ((exported, EXPORT_COMMAND), (layout.vocabulary, tokenizer_command)):
            missing = [file for file in files if not (folder / file).is_file()]
            if missing:
                names = ", ".join(missing)
                raise FileNotFoundError(f"wanted {names} in {folder}, found none; first run: {command.format(folder)}")
        if is_float16(read_manifest(folder)):
            raise ValueError(
                f"wanted float32 weights to quantize, found {folder}, exported with --precision fp16; export it without"
            )
        verify_files(folder, (*layout.graph_files, *layout.vocabulary))
        check_one_checkpoint(folder, layout)


def _read_eval_manifest(args: argparse.Namespace) -> list[Clip]:
    """The clips to judge by, none without --eval_manifest. Raises ValueError for a limit that cannot be one, and as
    read_clips does."""
    if args.eval_manifest is None:
        if args.max_wer_increase is not None:
            raise ValueError("--max_wer_increase wants --eval_manifest, the clips to count words on, found none")
        return []
    if args.max_wer_increase is not None and not 0 <= args.max_wer_increase < math.inf:
        raise ValueError(f"wanted --max_wer_increase in points of 0 and more, found {args.max_wer_increase}")
    clips = read_clips(args.eval_manifest, with_text=True)
    if not any(normalize(clip.text) for clip in clips):
        raise ValueError(f"expected words in the texts of {args.eval_manifest}, got none; without, nothing is counted")
    return clips


def _check_speech(speech: Speech, config: RuntimeConfig) -> None:
    """Look at the files of both manifests before the work and not during it; raises as check_clips does. Warn where one
    clip is in both: a model does better on what it was fitted to."""
    config.check_clips((*speech.calibration, *speech.evaluation))
    if shared := shared_clips(speech.evaluation, speech.calibration):
        warn(
            f"{len(shared)} of {len(speech.evaluation)} clips of --eval_manifest are in --calibration_manifest too, "
            f"such as {shared[0].path}{shared[0].segment}; the word error rate on them is better than on other speech"
        )


def _count_words(
    args: argparse.Namespace, paths: Paths, clips: list[Clip], stages: Stages
) -> tuple[list[gate.Heard], list[gate.Words]]:
    """What both folders made of the clips, and the table of it; raises as gate.judge."""
    heard = gate.listen(paths.source, paths.stage, args.eval_manifest, clips, _clip_bar)
    table = gate.word_table(heard)
    stages.report(f"{len(clips)} clips", str(table[0]))
    gate.print_words(table, heard)
    if args.max_wer_increase is not None:
        gate.judge(table, args.max_wer_increase)
    return heard, table


def _bytes(folder: Path, files: Iterable[str]) -> int:
    return sum((folder / file).stat().st_size for file in files)


def _progress_bar(items: Iterator, total: int) -> Iterable:
    return tqdm(items, total=total, desc="quantizing", unit="weight", leave=False, disable=None)  # none in a pipe


def _clip_bar(clips: list[Clip]) -> Iterable[Clip]:
    return tqdm(clips, desc="transcribing", unit="clip", leave=False, disable=None)


if __name__ == "__main__":
    raise SystemExit(main())
