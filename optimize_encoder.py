"""Make an exported encoder small and fast: fuse its graph, then store its weights in 4 or 8 bits.

In: a folder of export_parakeet_to_onnx.py that export_tokenizer.py has completed.
Out: a second folder, complete by itself, whose encoder has fused operators and quantized weights; the decoder, the
joint (unless --decoder_joint_precision is int8) and the configuration are copies. Each new graph and the one that it
comes from are run on noise, and nothing is written if they do not agree; with --eval_manifest on speech as well, and
--max_wer_increase says by how much the word error rate may rise. optimization_report.html shows all of it.

A folder for onnx-asr or sherpa-onnx is optimized in the same way, and one with subfolders for several runtimes each in
its turn; weights that turn out equal are shared again.

    python optimize_encoder.py --model_dir ./onnx_models --output_dir ./onnx_models_optimized
    python optimize_encoder.py --quant_method int8 --decoder_joint_precision int8 --output_dir ./onnx_models_int8
    python optimize_encoder.py --eval_manifest samples/manifest.jsonl --max_wer_increase 0.5
"""

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path

# First of all, since a package that is missing below is then reported in one line (common/__init__.py).
from common.cli import Command, Parser, Stages, run, size_text, warn

# isort: split

from common.evaluate.wer import normalize
from common.folder.onnx_files import share_equal_data
from common.folder.staging import staged_folder, state_needs
from common.layouts.layout import LAYOUTS, Layout, layouts_in
from common.quantize import METHODS
from common.quantize.blocks import BLOCK_SIZES
from common.quantize.calibration import read_speech
from common.quantize.method import Calibrated, P, QuantMethod
from common.quantize.options import TOKEN_PRECISIONS, OptimizeOptions
from common.quantize.rewrite import optimize_graph
from common.report.optimized_folder import ModelFolder, Report, check_folders, finish_folder, open_folder
from common.report.report import page_writer
from common.run.clips import Clip, read_clips, shared_clips
from common.run.config import RuntimeConfig

# Peak memory as a multiple of the exported encoder, measured at 0.6B: one float32 session, when they are compared.
MEMORY_FACTOR = 1.3
CALIBRATION_MEMORY_FACTOR = 2.25
# What the libraries take, measured on the tiny checkpoint, and those that read and transcribe speech in addition.
MEMORY_OF_IMPORTS = 160e6  # bytes
MEMORY_OF_SPEECH = 80e6  # bytes
STAGES = 5  # of each folder: fusion, quantization, size, comparison, report


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    methods = METHODS.values()
    help_of_methods = ". ".join(f"{method.name}: {method.help}" for method in methods)
    in_blocks = " and ".join(method.name for method in methods if method.uses_blocks)
    calibrating = " and ".join(method.name for method in methods if method.calibrates)
    with_budget = " and ".join(method.name for method in methods if method.has_size_budget)
    with_bits = " and ".join(method.name for method in methods if method.weight_bits)
    never_fused = " and ".join(method.name for method in methods if not method.fused_on_cpu)
    add("--model_dir", type=Path, default=Path("onnx_models"), help="exported folder (./%(default)s)")
    add("--output_dir", type=Path, default=Path("onnx_models_optimized"), help="folder to write (./%(default)s)")
    add("--block_size", type=int, choices=BLOCK_SIZES, default=OptimizeOptions.block_size,
        help=f"for {in_blocks}: weights that share a scale; a larger block is smaller, faster and less exact "
             "(%(default)s)")  # fmt: skip
    add("--accuracy_level", type=int, choices=range(5), default=OptimizeOptions.accuracy_level,
        help=f"for {in_blocks}: what a product rounds activations to. 4: int8, the fastest and not the most exact; "
             "3: bf16; 2: fp16; 1: fp32; 0: the runtime decides (%(default)s)")  # fmt: skip
    add("--quant_method", choices=tuple(METHODS), default=OptimizeOptions.quant_method,
        help=f"how the encoder's weights are stored. {help_of_methods} (%(default)s)")  # fmt: skip
    add("--decoder_joint_precision", choices=TOKEN_PRECISIONS, default=OptimizeOptions.decoder_joint_precision,
        help="weights of the decoder's LSTM and of the joint; int8 makes a token three times as fast "
             "(%(default)s)")  # fmt: skip
    add("--weight_bits", type=int, choices=sorted({bits for method in methods for bits in method.weight_bits}),
        default=OptimizeOptions.weight_bits,
        help=f"for {with_bits}: bits of a weight in the file. 4 is half the size of 8 and runs as fast: the runtime "
             "unpacks the weights once, when it loads them (ONNX Runtime 1.23 or newer). Give "
             "--calibration_manifest as well (%(default)s)")  # fmt: skip
    add("--reduce_range", action="store_true",
        help="int8 with weights of 7 bits, for a CPU without VNNI (AVX2 before 2021), where sums of larger products "
             "overflow")  # fmt: skip
    add("--calibration_manifest", type=Path, metavar="FILE",
        help=f"for {calibrating}: NeMo manifest (JSON lines with audio_filepath) of a few minutes of speech, of which "
             "up to 5 are used. Weights are rounded so that products with this speech change least, and "
             f"{with_budget} measures on it which weights need 8 bits")  # fmt: skip
    add("--size_budget_mb", type=float, metavar="MB",
        help=f"for {with_budget} with --calibration_manifest: the largest encoder.onnx and its data, in MB of 10^6 "
             "bytes (what it takes without a manifest)")  # fmt: skip
    add("--eval_manifest", type=Path, metavar="FILE",
        help="JSON lines with audio_filepath, text and perhaps lang: count the words that float32 and the optimized "
             "model get wrong on these clips")  # fmt: skip
    add("--max_wer_increase", type=float, metavar="POINTS",
        help="percentage points by which the word error rate, without case and punctuation, may be higher than "
             "float32's, over all clips and in each language; beyond, nothing is written (no limit)")  # fmt: skip
    add("--skip_fusion", action="store_true",
        help="leave the graph as exported. Fusion makes one operator of a residual addition and the normalization "
             "after it, which is faster on a GPU; on a CPU 4-bit encoders are 6 to 10 %% faster without it, and "
             f"{never_fused} is not fused")  # fmt: skip
    add("--skip_quantization", action="store_true", help="leave the weights float32")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return run(_optimize, parse_args(argv))


def _optimize(args: argparse.Namespace) -> None:
    options = OptimizeOptions(**{field.name: getattr(args, field.name) for field in fields(OptimizeOptions)})
    options.validate()
    source, target = args.model_dir, args.output_dir
    layouts = layouts_in(source)
    check_folders(source, target, layouts)
    speech_folder = next((name for name, layout in layouts.items() if layout.measures_speech), None)
    calibration, evaluation = read_speech_manifests(options, source, speech_folder)
    write_page = page_writer()
    memory = memory_needs(source, layouts, calibrates=bool(calibration), evaluates=bool(evaluation))
    print_needs(source, target, layouts, memory)

    per_folder = STAGES + options.int8_tokens
    report = Stages(bool(calibration) + len(layouts) * per_folder + bool(evaluation)).report
    with staged_folder(target) as stage:
        calibrated = None
        if options.method and calibration and speech_folder is not None:
            with open_folder(layouts[speech_folder], speech_folder, source, target, stage) as folder:
                calibrated = calibrate(folder, options.method, options, calibration, report)
        for name, layout in layouts.items():
            if name:
                print(f"{name}:")
            with open_folder(layout, name, source, target, stage) as folder:
                encoder = optimize_graph(folder.encoder, options, folder.device, calibrated, report)
                clips = evaluation if layout.measures_speech else []
                finish_folder(folder, encoder, options, clips, write_page, report)
        share_equal_data([stage / name for name in layouts])
    for advice in filter(None, (options.fusion_advice(folder.device), options.calibration_advice())):
        print(advice)
    command = Command("python test_e2e.py --model_dir {}")
    following = "" if speech_folder is None else f"; next: {command.format(target / speech_folder)}"
    print(f"wrote {target}{following}")


def calibrate(
    folder: ModelFolder, method: QuantMethod[P], options: OptimizeOptions, clips: list[Clip], report: Report
) -> Calibrated[P]:
    """Fit the encoder's weights to speech, once for the folders of all runtimes."""
    speech = read_speech(folder.source, clips)
    calibrated = method.calibrate(folder.encoder, speech.batches, options)
    report("calibration", f"{speech.clips} clips", f"{speech.seconds:.0f} s of speech", *calibrated.summary())
    return calibrated


def read_speech_manifests(
    options: OptimizeOptions, source: Path, speech_folder: str | None
) -> tuple[list[Clip], list[Clip]]:
    """The clips of --calibration_manifest and of --eval_manifest, none where there is no manifest.

    Raises ValueError where no folder's runtime computes their features, or no text has a word, and as read_clips and
    check_clips do, before the work. Warns of clips in both: a model does better on what it was fitted to.
    """
    if speech_folder is None and (options.calibration_manifest or options.eval_manifest):
        able = " or ".join(layout.runtime for layout in LAYOUTS.values() if layout.measures_speech)
        raise ValueError(
            f"--calibration_manifest and --eval_manifest expect a folder for {able}, which computes their features, "
            f"got none in {source}; export with --runtime all"
        )
    calibration = read_clips(options.calibration_manifest) if options.calibration_manifest else []
    evaluation = read_clips(options.eval_manifest, with_text=True) if options.eval_manifest else []
    if evaluation and not any(normalize(clip.text or "") for clip in evaluation):
        raise ValueError(f"expected words in the texts of {options.eval_manifest}, got none; add texts")
    if speech_folder is not None:
        RuntimeConfig.read(source / speech_folder).check_clips((*calibration, *evaluation))
    if shared := shared_clips(evaluation, calibration):
        warn(
            f"{len(shared)} of {len(evaluation)} clips of --eval_manifest are in --calibration_manifest too, such as "
            f"{shared[0].path}{shared[0].segment}; the word error rate on them is better than on other speech"
        )
    return calibration, evaluation


def memory_needs(source: Path, layouts: Mapping[str, Layout], *, calibrates: bool, evaluates: bool) -> float:
    """Peak memory of the run, in bytes."""
    factor = CALIBRATION_MEMORY_FACTOR if calibrates else MEMORY_FACTOR
    speech = MEMORY_OF_SPEECH if calibrates or evaluates else 0
    return MEMORY_OF_IMPORTS + speech + factor * largest_encoder(source, layouts)


def print_needs(source: Path, target: Path, layouts: Mapping[str, Layout], memory: float) -> None:
    """Say what the run takes; raises as state_needs does."""
    # As much as the sources, though the result is smaller: one whose weights are shared is copied, and then removed.
    disk = sum(bytes_of(source / name, layout.files) for name, layout in layouts.items())
    state_needs(f"encoder.onnx ({size_text(largest_encoder(source, layouts))})", memory, disk, target)


def largest_encoder(source: Path, layouts: Mapping[str, Layout]) -> int:
    """Bytes of the largest encoder of the folders."""
    return max(bytes_of(source / name, layout.encoder.files) for name, layout in layouts.items())


def bytes_of(folder: Path, files: Iterable[str]) -> int:
    return sum((folder / file).stat().st_size for file in files)


if __name__ == "__main__":
    raise SystemExit(main())
