"""Export a Parakeet-TDT checkpoint from NeMo to ONNX for ONNX Runtime GenAI and others, verified against NeMo.

In: a FastConformer-TDT model, as a Hugging Face name, a `.nemo` file or a folder of transformers' ParakeetForTDT.
Out: a folder with encoder.onnx, decoder.onnx and joint.onnx (each with one .data file), genai_config.json,
audio_processor_config.json, manifest.json and README.md, the model card. Before the folder appears, each graph is run
in ONNX Runtime and compared with NeMo's own module; with --precision fp16 twice: in float32, and again in float16.
export_tokenizer.py exports the tokenizer separately.
With --runtime the same weights are written in the form that onnx-asr or sherpa-onnx expects, with the vocabulary, in a
subfolder for each runtime.

    python export_parakeet_to_onnx.py --output_dir ./onnx_models
    python export_parakeet_to_onnx.py --output_dir ./onnx_models --runtime all
    python export_parakeet_to_onnx.py --precision fp16 --device cuda --output_dir ./onnx_models_fp16
"""

import argparse
import shlex
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

# Imported first, so that a package that is missing below is reported in one line (common/__init__.py).
from common.cli import OPTIMIZE_COMMAND, Parser, Stages, checked_options, run, seconds, size_text

# isort: split

from common.checkpoint import require_device
from common.checkpoint.find import (
    FORMAT_HELP,
    FORMAT_NAMES,
    MODEL_NAME_HELP,
    checkpoint_bytes,
    find_checkpoint,
    format_of,
    source_record,
)
from common.checkpoint.hub import DEFAULT_MODEL, REVISION_HELP
from common.checkpoint.spec import ModelSpec
from common.export.options import FP16, FP32, MAX_OPSET, MIN_OPSET, PRECISIONS, ExportOptions
from common.export.pipeline import Features, export_checkpoint, find_clips
from common.folder import MANIFEST, check_output_dir, staged_folder, state_needs, write_locations, write_manifest
from common.layouts import LAYOUTS, Layout, Window
from common.layouts.folders import ALL, read_vocabulary, subfolders_of, write_layout
from common.layouts.genai import GENAI
from common.layouts.identity import kept_by_export
from common.layouts.layout import check_feature_graphs, check_same_layouts, write_configs
from common.onnx_io import MINIMUM_RUNTIME, minimum_runtime
from common.report.card import CARD, write_card

SPEECH = Path(__file__).resolve().parent / "samples"  # 40 s of speech, on which --precision fp16 measures values

RUNTIME_HELP = """the runtime whose names, axes and files to write: genai into the folder itself, any other choice into
a subfolder for each runtime, which share their weights by hard links (%(default)s)"""
OPSET_HELP = f"ONNX opset, {MIN_OPSET} to {MAX_OPSET} (%(default)s)"
CHUNK_HELP = "audio decoded by each run of the encoder, in whole encoder frames (%(default)s)"
LEFT_HELP = "audio before the chunk that the encoder is given as context (%(default)s)"
RIGHT_HELP = "audio after the chunk that the encoder is given as context (%(default)s)"
DEVICE_HELP = "where to export and verify, and the provider that GenAI is configured for (%(default)s)"
PRECISION_HELP = """fp16: float16 weights and arithmetic for GPU and WebGPU, inputs and outputs float32; operators whose
values on speech come near the largest float16 stay float32 (%(default)s)"""
SCRIPTS_HELP = """writing systems that the text may be in, such as latin or latin,greek: tokens with letters of others
are never emitted (any)"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model_name", default=DEFAULT_MODEL, help=MODEL_NAME_HELP)
    add("--revision", help=REVISION_HELP)
    add("--checkpoint_format", choices=FORMAT_NAMES, help=FORMAT_HELP)
    add("--output_dir", type=Path, default=Path("onnx_models"), help="folder to write (./%(default)s)")
    add("--runtime", choices=(*LAYOUTS, ALL), default=GENAI.runtime, help=RUNTIME_HELP)
    add("--opset_version", type=int, default=MIN_OPSET, help=OPSET_HELP)
    add("--chunk_seconds", type=seconds, default=ExportOptions.chunk_seconds, help=CHUNK_HELP)
    add("--left_context_seconds", type=seconds, default=ExportOptions.left_context_seconds, help=LEFT_HELP)
    add("--right_context_seconds", type=seconds, default=ExportOptions.right_context_seconds, help=RIGHT_HELP)
    add("--device", choices=("cpu", "cuda"), default="cpu", help=DEVICE_HELP)
    add("--precision", choices=PRECISIONS, default=FP32, help=PRECISION_HELP)
    add("--scripts", help=SCRIPTS_HELP)
    add("--skip_verify", action="store_true", help="do not compare the graphs with NeMo")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return run(_export, parse_args(argv))


def _export(args: argparse.Namespace) -> None:
    options = checked_options(ExportOptions, args)
    check_output_dir(args.output_dir)
    subfolders = subfolders_of(options.runtime)
    check_same_layouts(args.output_dir, {name: layout for layout, name in subfolders.items()})
    clips = find_clips(SPEECH) if options.is_float16 else []
    require_device(options.device)
    checkpoint = find_checkpoint(args.model_name, args.revision, args.checkpoint_format)
    title = f"{checkpoint.name} ({size_text(checkpoint_bytes(checkpoint))})"
    loaded = format_of(checkpoint).loaded_bytes(checkpoint)
    state_needs(title, options.memory_bytes(loaded), options.disk_bytes(loaded), args.output_dir)
    vocabulary = read_vocabulary(checkpoint, subfolders)
    source = source_record(checkpoint, args.model_name, revision=args.revision)
    kept = {name: kept_by_export(args.output_dir / name, source, layout) for layout, name in subfolders.items()}
    removed = [str(Path(name) / file) for name, (_, files) in kept.items() for file in files]
    stages = Stages(options.stages + len(subfolders), verbose=args.verbose)
    with staged_folder(args.output_dir, removed) as staging:
        # The folder of the graphs that every layout shares: GenAI's own folder, where GenAI is among the layouts.
        base = staging / subfolders[GENAI] if GENAI in subfolders else staging.parent / GENAI.runtime
        base.mkdir(exist_ok=True)
        configure = partial(_configure, layouts=subfolders, options=options)
        spec, results = export_checkpoint(checkpoint, base, options, staging.parent, clips, configure, stages)
        record = {"source": source, "flags": options.record(), **results}
        for layout, name in subfolders.items():
            stages.begin(f"{name or layout.runtime}: configuration and manifest")
            folder = staging / name
            write_layout(layout, base, folder, spec, _window(spec, options), options.device, vocabulary)
            # A checkpoint of the Hub needs no path, since it is found again by its name and commit.
            write_locations(folder, args.output_dir / name, checkpoint=checkpoint if "file" in source else None)
            manifest, _ = kept[name]
            oldest = minimum_runtime(folder / graph.file for graph in layout.graphs)
            write_manifest(folder, manifest, "export", {**record, MINIMUM_RUNTIME: oldest})
            write_card(folder, args.output_dir / name, layout)
            stages.end(*layout.config_files, MANIFEST, CARD)
    if removed:
        print(f"removed from {args.output_dir}, since they belonged to the former graphs: {', '.join(removed)}")
    print(f"wrote {args.output_dir}; {_next_step(args, subfolders)}")


def _configure(
    spec: ModelSpec, folder: Path, features: Features, layouts: Iterable[Layout], options: ExportOptions
) -> None:
    """Check that every runtime can run the checkpoint, and write into `folder` what the measurements read."""
    for layout in layouts:
        layout.check(spec)
        check_feature_graphs(layout, spec, features)
    write_configs(GENAI, folder, spec, _window(spec, options), options.device)


def _window(spec: ModelSpec, options: ExportOptions) -> Window:
    """The window of these options. Raises ValueError where a length is not a whole number of encoder frames."""
    return Window.of_seconds(spec, options.chunk_seconds, options.left_context_seconds, options.right_context_seconds)


def _next_step(args: argparse.Namespace, subfolders: Mapping[Layout, str]) -> str:
    for layout, name in subfolders.items():
        if not layout.vocabulary_texts:
            command = ["python", "export_tokenizer.py", "--model_name", args.model_name]
            for flag in ("revision", "checkpoint_format"):
                command += [f"--{flag}", getattr(args, flag)] if getattr(args, flag) else []
            return "next: " + shlex.join([*command, "--output_dir", str(args.output_dir / name)])
    if args.precision == FP16:  # which is not optimized further
        return f"how to use it: {args.output_dir / Path(*subfolders.values()) / CARD}"
    return f"next: {OPTIMIZE_COMMAND.format(args.output_dir)}"


if __name__ == "__main__":
    raise SystemExit(main())
