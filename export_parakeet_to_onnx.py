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
import gc
import shlex
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Imported first, so that a package that is missing below is reported in one line (common/__init__.py).
from common.cli import OPTIMIZE_COMMAND, Parser, Stages, options_of, run, seconds, size_text

# isort: split

from common.checkpoint import Checkpoint, require_device
from common.checkpoint.find import add_checkpoint_flags, find_checkpoint
from common.checkpoint.spec import ModelSpec
from common.contract import GRAPHS
from common.export import pipeline
from common.export.pipeline import FP32, MAX_OPSET, MIN_OPSET, PRECISIONS, ExportOptions
from common.export.scripts import SUPPRESSED, suppress, suppressed_ids
from common.folder import MANIFEST, check_output_dir, staged_folder, state_needs, write_locations, write_manifest
from common.layouts import ALL, LAYOUTS, check_same_layouts, exported_vocabularies, layouts_for
from common.layouts.genai import GENAI
from common.layouts.layout import Layout
from common.onnx_io import MINIMUM_RUNTIME, minimum_runtime
from common.report.card import CARD, FEATURES, write_card
from common.run.config import RuntimeConfig
from common.run.reference import features_of

SPEECH = Path(__file__).resolve().parent / "samples"  # 40 s of speech, on which --precision fp16 measures values

RUNTIME_HELP = """the runtime whose names, axes and files to write: genai into the folder itself, any other choice into
a subfolder for each runtime, which share the encoder's weights by hard links (%(default)s)"""
OPSET_HELP = f"ONNX opset, {MIN_OPSET} to {MAX_OPSET} (%(default)s)"
CHUNK_HELP = "audio decoded by each run of the encoder, in whole encoder frames (%(default)s)"
LEFT_HELP = "audio before the chunk that the encoder is given as context (%(default)s)"
RIGHT_HELP = "audio after the chunk that the encoder is given as context (%(default)s)"
DEVICE_HELP = "where to export and verify, and the provider that GenAI is configured for (%(default)s)"
PRECISION_HELP = """fp16: float16 weights and arithmetic for GPU and WebGPU, inputs and outputs float32; operators whose
values on speech come near the largest float16 stay float32 (%(default)s)"""
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
    add("--opset_version", type=int, default=MIN_OPSET, help=OPSET_HELP)
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
    output_dir: Path = args.output_dir
    layouts = layouts_for(options.runtime)
    check_output_dir(output_dir)
    check_same_layouts(output_dir, layouts)
    clips = pipeline.find_clips(SPEECH) if options.is_float16 else []
    require_device(options.device)
    checkpoint = find_checkpoint(args.model_name, args.revision, args.checkpoint_format)
    for note in checkpoint.notes:
        print(f"{checkpoint.name or checkpoint.path.name}: {note}", flush=True)
    title = f"{checkpoint.path.name} ({size_text(checkpoint.size)})"
    loaded = checkpoint.loaded_bytes
    state_needs(title, options.memory_bytes(loaded), options.disk_bytes(loaded, len(layouts)), output_dir)
    if note := options.memory_note(loaded):
        print(note)
    vocabularies = exported_vocabularies(checkpoint, layouts.values())
    source = checkpoint.record()
    kept = {name: layout.kept_by_export(output_dir / name, source) for name, layout in layouts.items()}
    removed = [str(Path(name) / file) for name, (_, files) in kept.items() for file in files]
    stages = Stages(options.stages + len(layouts), verbose=args.verbose)
    with staged_folder(output_dir, removed) as staging:
        # The exported graphs go into the folder of the layout that has them as they are, where it is asked for.
        own = [staging / name for name, layout in layouts.items() if layout.graphs == GRAPHS]
        scratch = staging.parent
        graphs = own[0] if own else scratch / "graphs"
        graphs.mkdir(exist_ok=True)
        spec, results = _export_graphs(checkpoint, layouts.values(), options, graphs, scratch, clips, stages)
        window = options.window(spec)
        for name, layout in layouts.items():
            stages.begin(f"{name or layout.runtime}: configuration and manifest")
            folder = staging / name
            layout.write(folder, graphs, spec, window, options.device, vocabularies.get(layout.runtime, {}))
            # A checkpoint of the Hub needs no path, since it is found again by its name and commit.
            write_locations(folder, output_dir / name, checkpoint=None if checkpoint.name else checkpoint.path)
            oldest = minimum_runtime(folder / graph.file for graph in layout.graphs)
            features = {field: getattr(spec, field) for field in FEATURES}
            section = {"source": source, "flags": options.record(), **features, **results, MINIMUM_RUNTIME: oldest}
            manifest, _ = kept[name]
            write_manifest(folder, manifest, "export", section)
            write_card(folder, output_dir / name, layout)
            stages.end(*layout.config_files, MANIFEST, CARD)
    if gone := [name for name in removed if not (output_dir / name).exists()]:
        print(f"removed from {output_dir}, since they belonged to the former graphs: {', '.join(gone)}")
    named = {
        "--model_name": args.model_name,
        "--revision": args.revision,
        "--checkpoint_format": args.checkpoint_format,
    }
    print(f"wrote {output_dir}; {next_step(output_dir, layouts, named, is_float16=options.is_float16)}")


def _export_graphs(
    checkpoint: Checkpoint,
    layouts: Collection[Layout],
    options: ExportOptions,
    graphs: Path,
    scratch: Path,
    clips: Sequence[Path],
    stages: Stages,
) -> tuple[ModelSpec, dict[str, Any]]:
    """Export the checkpoint into the folder `graphs` and verify it; float16 graphs are made of others in `scratch`.

    clips: speech on which the values of float16 graphs are measured. Returns the numbers of the checkpoint, and what
    was measured, for the manifest.
    """
    float32 = scratch / "float32" if options.is_float16 else graphs
    float32.mkdir(exist_ok=True)
    suppressed = suppressed_ids(checkpoint, options.scripts)
    stages.begin(f"checkpoint {checkpoint.path.name}")
    model = checkpoint.load_model(options.device, scratch)
    suppress(model.joint, suppressed)
    spec = ModelSpec.of(model)
    window = options.window(spec)
    for layout in layouts:
        layout.check(spec, partial(features_of, model))
    stages.end(*pipeline.model_summary(model, spec))

    stages.begin("export")
    references = pipeline.export_graphs(model, float32, options)
    speech = []
    if options.is_float16:  # values are measured on speech, which is read and transcribed by GenAI's configuration
        GENAI.write_configs(float32, spec, window, options.device)
        config = RuntimeConfig.read(float32)
        speech = [features_of(model, config.read_audio(clip)) for clip in clips]
    stages.end(*pipeline.graph_sizes(float32))
    del model
    gc.collect()  # NeMo's modules refer to each other; the model is half of the memory in use

    parity = pipeline.verify_graphs(float32, references, stages)
    results: dict[str, Any] = {"parity": parity}
    if options.is_float16:
        converted = pipeline.convert_to_float16(
            float32, graphs, references, speech, stages, single_file=options.single_file
        )
        results = {**converted, "float32_parity": parity}
    if options.scripts:
        results[SUPPRESSED] = len(suppressed)
    return spec, results


def next_step(
    output_dir: Path, layouts: Mapping[str, Layout], named: Mapping[str, str | None], *, is_float16: bool
) -> str:
    """What to do with the exported folder. named: the flags, and their values, that name the checkpoint."""
    for name, layout in layouts.items():
        if not layout.exports_vocabulary:
            flags = [part for flag, value in named.items() if value for part in (flag, value)]
            command = ["python", "export_tokenizer.py", *flags, "--output_dir", str(output_dir / name)]
            return f"next: {shlex.join(command)}"
    if is_float16:  # which is not optimized further
        return f"how to use it: {output_dir / Path(*layouts) / CARD}"
    return f"next: {OPTIMIZE_COMMAND.format(output_dir)}"


if __name__ == "__main__":
    raise SystemExit(main())
