"""Export a Parakeet-TDT checkpoint from NeMo to ONNX for ONNX Runtime GenAI and others, verified against NeMo.

In: a FastConformer-TDT model, as a Hugging Face name, a `.nemo` file or a folder of transformers' ParakeetForTDT.
Out: a folder with encoder.onnx (and its weights, encoder.onnx.data), decoder.onnx, joint.onnx, genai_config.json,
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
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

# Imported first, so that a package that is missing below is reported in one line (common/__init__.py).
from common.cli import OPTIMIZE_COMMAND, Parser, Stages, options_of, run, seconds, size_text

# isort: split

from common.checkpoint.find import add_checkpoint_flags, find_checkpoint
from common.export.pipeline import FP32, OPSETS, PRECISIONS, ExportOptions, export_checkpoint
from common.folder import MANIFEST, staged_folder, state_needs, write_locations
from common.layouts import ALL, LAYOUTS, former_manifests, layouts_for
from common.layouts.genai import GENAI
from common.layouts.layout import Layout, tokenizer_command
from common.report.card import CARD, FEATURES, finish_folder

RUNTIME_HELP = """the runtime to write for: genai is written into the folder itself, any other choice into a subfolder
for each runtime, and the subfolders share the encoder's weights by hard links (%(default)s)"""
CHUNK_HELP = "audio decoded by each run of the encoder, in whole encoder frames (%(default)s)"
LEFT_HELP = "audio before the chunk that the encoder is given as context (%(default)s)"
RIGHT_HELP = "audio after the chunk that the encoder is given as context (%(default)s)"
DEVICE_HELP = "where to export and verify, and the provider that GenAI is configured for (%(default)s)"
PRECISION_HELP = """fp16 stores weights and computes in float16, for GPU and WebGPU; inputs, outputs and operators whose
values on speech come near the largest float16 stay in float32 (%(default)s)"""
SCRIPTS_HELP = """writing systems that the text may be in, such as latin or latin,greek: tokens with letters of others
are never emitted (any)"""
SINGLE_FILE_HELP = """encoder.onnx holds its weights, up to 2 GB of them, instead of having them in a .data file beside
it, which loads faster but which some programs do not read; the other graphs always hold theirs"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_checkpoint_flags(parser)
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("onnx_models"), help="folder to write (./%(default)s)")
    add("--runtime", choices=(*LAYOUTS, ALL), default=GENAI.runtime, help=RUNTIME_HELP)
    add("--opset_version", type=int, choices=OPSETS, default=OPSETS[0], help="ONNX opset (%(default)s)")
    add("--chunk_seconds", type=seconds, default=ExportOptions.chunk_seconds, help=CHUNK_HELP)
    add("--left_context_seconds", type=seconds, default=ExportOptions.left_context_seconds, help=LEFT_HELP)
    add("--right_context_seconds", type=seconds, default=ExportOptions.right_context_seconds, help=RIGHT_HELP)
    add("--device", choices=("cpu", "cuda"), default="cpu", help=DEVICE_HELP)
    add("--precision", choices=PRECISIONS, default=FP32, help=PRECISION_HELP)
    add("--scripts", help=SCRIPTS_HELP)
    add("--single_file", action="store_true", help=SINGLE_FILE_HELP)
    add("--skip_verify", action="store_true", help="do not compare the graphs with NeMo")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return run(_export, parse_args(argv))


def _export(args: argparse.Namespace) -> None:
    options = options_of(ExportOptions, args)
    layouts = layouts_for(options.runtime)
    output_dir: Path = args.output_dir
    former = former_manifests(output_dir, layouts)

    checkpoint = find_checkpoint(args.model_name, args.revision, args.checkpoint_format)
    for note in checkpoint.notes:
        print(f"{checkpoint.name or checkpoint.path.name}: {note}", flush=True)
    source = checkpoint.record()
    kept = {name: layout.kept_by_export(former[name], source) for name, layout in layouts.items()}
    removed = [str(Path(name) / file) for name, (_, files) in kept.items() for file in sorted(files)]
    present = [name for name in removed if (output_dir / name).is_file()]
    memory, disk = options.needs(checkpoint.loaded_bytes, len(layouts))
    state_needs(f"{checkpoint.path.name} ({size_text(checkpoint.size)})", memory, disk, output_dir)

    stages = Stages(options.stages + len(layouts), verbose=args.verbose)
    with staged_folder(output_dir, removed) as staging:
        exported = export_checkpoint(checkpoint, layouts, options, staging.parent, stages)
        features = {field: getattr(exported.spec, field) for field in FEATURES}
        section = {"source": source, "flags": asdict(options), **features, **exported.measured}
        for name, layout in layouts.items():
            stages.begin(f"{name or layout.runtime}: configuration and manifest")
            folder = staging / name
            layout.write(folder, exported.graphs, exported.spec, exported.files[name])
            # A checkpoint of the Hub needs no path, since it is found again by its name and commit.
            write_locations(folder, output_dir / name, checkpoint=None if checkpoint.name else checkpoint.path)
            finish_folder(folder, output_dir / name, layout, kept[name][0], "export", section)
            stages.end(*layout.config_files, MANIFEST, CARD)
    if gone := [name for name in present if not (output_dir / name).exists()]:
        print(f"removed from {output_dir}, since they belonged to the former graphs: {', '.join(gone)}")
    print(f"wrote {output_dir}; {next_step(output_dir, layouts, is_float16=options.is_float16)}")


def next_step(output_dir: Path, layouts: Mapping[str, Layout], *, is_float16: bool) -> str:
    """What to do with the exported folder."""
    for name, layout in layouts.items():
        if not layout.is_view:
            return f"next: {tokenizer_command(output_dir / name)}"
    if is_float16:  # which is not optimized further
        return f"how to use it: {output_dir / Path(*layouts) / CARD}"
    return f"next: {OPTIMIZE_COMMAND.format(output_dir)}"


if __name__ == "__main__":
    raise SystemExit(main())
