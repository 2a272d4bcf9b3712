"""Make an exported encoder small and fast: fuse its graph, then store its weights in 2, 4 or 8 bits.

In: a folder of export_parakeet_to_onnx.py that export_tokenizer.py has completed.
Out: a second folder, complete by itself, whose encoder has fused operators and quantized weights. The configuration is
a copy, and so are the decoder and the joint, unless --decoder_joint_precision is int8. Each new graph and the graph
that it comes from are run on noise, and nothing is written if they do not agree. With --eval_manifest both models also
run on speech, and --max_wer_increase limits the rise of the word error rate. optimization_report.html shows all of it.

A folder for onnx-asr or sherpa-onnx is optimized in the same way. In a folder with subfolders for several runtimes each
is optimized in turn, and weights that turn out equal are shared again.

    python optimize_encoder.py --model_dir ./onnx_models --output_dir ./onnx_models_optimized
    python optimize_encoder.py --quant_method int8 --decoder_joint_precision int8 --output_dir ./onnx_models_int8
    python optimize_encoder.py --eval_manifest samples/manifest.jsonl --max_wer_increase 0.5
    python optimize_encoder.py --eval_manifest samples/manifest.jsonl --stress --max_lost_words 2
"""

import argparse
import sys
from functools import partial
from pathlib import Path

# Imported first, so that a package that is missing below is reported in one line (common/__init__.py).
from common.cli import TEST_COMMAND, Parser, options_of, run

# isort: split

from common.evaluate.stress import StressOptions, add_stress_flags
from common.layouts import LAYOUTS
from common.optimize import optimize
from common.quantize import METHODS
from common.quantize.blocks import BLOCK_SIZES
from common.quantize.methods import TOKEN_PRECISIONS, OptimizeOptions


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    methods = METHODS.values()
    help_of_methods = ". ".join(f"{method.name}: {method.help}" for method in methods)
    in_blocks = ", ".join(method.name for method in methods if method.uses_blocks)
    calibrating = " and ".join(method.name for method in methods if method.calibrates)
    with_bits = " and ".join(method.name for method in methods if method.weight_bits)
    in_one_file = " and ".join(layout.runtime for layout in LAYOUTS.values() if layout.is_view)
    never_fused = " and ".join(method.name for method in methods if not method.fused_on_cpu)
    add("--model_dir", type=Path, default=Path("onnx_models"), help="exported folder (./%(default)s)")
    add("--output_dir", type=Path, default=Path("onnx_models_optimized"), help="folder to write (./%(default)s)")
    add("--block_size", type=int, choices=BLOCK_SIZES, default=OptimizeOptions.block_size,
        help=f"for {in_blocks}: how many weights share a scale; a larger block is smaller, faster and less exact, "
             "as long as it is not larger than the encoder is wide (%(default)s)")  # fmt: skip
    add("--accuracy_level", type=int, choices=range(5), default=OptimizeOptions.accuracy_level,
        help=f"for {in_blocks}: what a product rounds activations to. 4: int8, the fastest and not the most exact; "
             "3: bf16; 2: fp16; 1: fp32; 0: the runtime decides (%(default)s)")  # fmt: skip
    add("--quant_method", choices=tuple(METHODS), default=OptimizeOptions.quant_method,
        help=f"how the encoder's weights are stored. {help_of_methods} (%(default)s)")  # fmt: skip
    add("--decoder_joint_precision", choices=TOKEN_PRECISIONS, default=OptimizeOptions.decoder_joint_precision,
        help="how the weights of the decoder's LSTM and of the joint are stored; int8 makes a token 4.6 times as fast "
             "(%(default)s)")  # fmt: skip
    add("--weight_bits", type=int, choices=sorted({bits for method in methods for bits in method.weight_bits}),
        default=OptimizeOptions.weight_bits,
        help=f"for {with_bits}: bits of a weight in the file. 4 is for int8 alone; it is half the size of 8 and runs "
             "as fast, since the runtime (ONNX Runtime 1.23 or newer) unpacks the weights once, when it loads them. "
             "Give --calibration_manifest as well. 2 is for ternary checkpoints such as parakeet-redux, and an error "
             "for others. It is exact, fast with int8, and small in memory with rtn (ONNX Runtime 1.24 or newer). int8 "
             "stores ternary weights in 2 bits without this flag as well (%(default)s)")  # fmt: skip
    add("--full_range", action="store_true",
        help="int8 weights of the full range of 8 bits: 1 dB more exact and as fast on a CPU with VNNI or on ARM, but "
             "other x86 CPUs (Intel before Ice Lake, AMD before Zen 4) lose words, since sums overflow")  # fmt: skip
    add("--reduce_range", action="store_false", dest="full_range", default=OptimizeOptions.full_range,
        help="int8 weights whose products every CPU sums exactly; the default")  # fmt: skip
    add("--calibration_manifest", type=Path, metavar="FILE",
        help=f"for {calibrating}: clip list (JSON lines with audio_filepath) of a few minutes of speech, of which "
             "up to 5 are used. Weights are rounded so that products with this speech change least, and "
             f"{calibrating} measure on it which weights need 8 bits")  # fmt: skip
    add("--size_budget_mb", type=float, metavar="MB",
        help=f"for {calibrating} with --calibration_manifest: the largest size of encoder.onnx with its data, in MB of "
             "10^6 bytes (the size without calibration)")  # fmt: skip
    add("--eval_manifest", type=Path, metavar="FILE",
        help="clip list with audio_filepath, text and perhaps lang: count the words that float32 and the optimized "
             "model get wrong on these clips")  # fmt: skip
    add("--max_wer_increase", type=float, metavar="POINTS",
        help="percentage points by which the word error rate, without case and punctuation, may be higher than "
             "float32's, over all clips and in each language; if it is exceeded, the script exits with status 1 and "
             "writes nothing (no limit)")  # fmt: skip
    add("--skip_fusion", action="store_true",
        help="leave the graph as it was exported. Fusion merges each residual addition with the normalization after "
             "it, which is faster on a GPU; on a CPU 4-bit encoders are 6 to 10 %% faster without it, and "
             f"{never_fused} is not fused")  # fmt: skip
    add("--skip_quantization", action="store_true", help="leave the weights in float32")
    add("--single_file", action="store_true",
        help="encoder.onnx holds its weights, up to 2 GB of them, instead of having them in a .data file beside it, "
             f"which loads faster but which some programs do not read; quantized encoders for {in_one_file} "
             "always hold theirs")  # fmt: skip
    add_stress_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    command = ["python", Path(__file__).name, *(sys.argv[1:] if argv is None else argv)]
    return run(partial(_optimize, command), parse_args(argv))


def _optimize(command: list[str], args: argparse.Namespace) -> None:
    options = options_of(OptimizeOptions, args)
    stress = options_of(StressOptions, args)
    if stress.stress is not None and options.eval_manifest is None:
        raise ValueError("--stress needs --eval_manifest, the clips to stress the model with")
    tested = optimize(args.model_dir, args.output_dir, options, stress, command, verbose=args.verbose)
    following = "" if tested is None else f"; next: {TEST_COMMAND.format(tested)}"
    print(f"wrote {args.output_dir}{following}")


if __name__ == "__main__":
    raise SystemExit(main())
