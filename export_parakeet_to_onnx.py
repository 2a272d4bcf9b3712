"""Export a Parakeet-TDT checkpoint from NeMo to ONNX for ONNX Runtime GenAI and others, and prove that it is right.

In: a Hugging Face name or a `.nemo` file of a FastConformer-TDT model.
Out: a folder with encoder.onnx, decoder.onnx and joint.onnx (each with one .data file), genai_config.json,
audio_processor_config.json and manifest.json. Each graph is run in ONNX Runtime against NeMo's own module before the
folder appears. The tokenizer is a step of its own: export_tokenizer.py.
With --runtime: the same weights as onnx-asr or sherpa-onnx expect them, vocabulary included, in a subfolder for each.

    python export_parakeet_to_onnx.py --output_dir ./onnx_models
    python export_parakeet_to_onnx.py --output_dir ./onnx_models --runtime all
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

from common.configs import (
    AUDIO_PROCESSOR_CONFIG,
    GENAI_CONFIG,
    Window,
    audio_processor_config,
    genai_config,
)
from common.console import Parser, Stages, run, size_text
from common.files import check_output_dir, read_manifest, staged_folder, state_needs, write_json, write_manifest
from common.graphs import DECODER, ENCODER, JOINT
from common.layouts import GENAI, LAYOUTS, Layout, check_same_shape, check_supports, write_layout
from common.model import DEFAULT_MODEL, ModelSpec, find_checkpoint, load_model, read_tokenizer, source_record
from common.tokenizer import parse_model, tokens_text

# Chunks of 60 s encode each second of a long clip 1.2 times, and clips up to 60 s get NeMo's own full context.
CHUNK_SECONDS, LEFT_CONTEXT_SECONDS, RIGHT_CONTEXT_SECONDS = 60, 10, 2
# Peak memory and disk as multiples of the checkpoint's size, measured at 0.6B: the weights, their ONNX Runtime session
# and activations, and NeMo's own code; the unpacked checkpoint and the exported weights.
MEMORY_FACTOR, DISK_FACTOR = 2.1, 2.0
MEMORY_OF_NEMO = 1e9  # bytes

RUNTIME_HELP = """whose names, axes and files to write: genai into the folder itself, any other choice into a subfolder
for each runtime, weights shared by hard link (%(default)s)"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model_name", default=DEFAULT_MODEL, help="Hugging Face name or .nemo path (%(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("onnx_models"), help="folder to write (./%(default)s)")
    runtimes = (*LAYOUTS, "all")
    parser.add_argument("--runtime", choices=runtimes, default=GENAI.runtime, help=RUNTIME_HELP)
    parser.add_argument("--opset_version", type=int, default=17, help="ONNX opset, 17 to 21 (%(default)s)")
    for name, help_text, default in (
        ("chunk", "audio decoded per encoder run, in whole encoder frames", CHUNK_SECONDS),
        ("left_context", "audio before the chunk that the encoder sees again", LEFT_CONTEXT_SECONDS),
        ("right_context", "audio after the chunk that the encoder sees already", RIGHT_CONTEXT_SECONDS),
    ):
        parser.add_argument(f"--{name}_seconds", type=float, default=default, help=f"{help_text} (%(default)s)")
    device_help = "where to export and verify, and the provider that GenAI is told to use (%(default)s)"
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help=device_help)
    parser.add_argument("--skip_verify", action="store_true", help="do not run the graphs against NeMo")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return run(_export, parse_args(argv))


def _export(args: argparse.Namespace) -> None:
    from common.export import check_opset  # torch takes seconds to import; --help should not

    check_opset(args.opset_version)
    check_output_dir(args.output_dir)
    layouts = tuple(LAYOUTS.values()) if args.runtime == "all" else (LAYOUTS[args.runtime],)
    folders = {layout: "" if args.runtime == GENAI.runtime else layout.runtime for layout in layouts}
    check_same_shape(args.output_dir, {name: layout for layout, name in folders.items()})
    checkpoint = find_checkpoint(args.model_name)
    size = checkpoint.stat().st_size
    needs = MEMORY_FACTOR * size + MEMORY_OF_NEMO, DISK_FACTOR * size
    state_needs(f"{checkpoint.name} ({size_text(size)})", *needs, args.output_dir)
    with staged_folder(args.output_dir) as stage:
        _export_to(stage, folders, checkpoint, args)
    if GENAI in folders:
        tokenizer_flags = f"--model_name {args.model_name} --output_dir {args.output_dir / folders[GENAI]}"
        following = f"python export_tokenizer.py {tokenizer_flags}"
    else:
        following = f"python optimize_encoder.py --model_dir {args.output_dir}"
    print(f"wrote {args.output_dir}; next: {following}")


def _export_to(stage: Path, folders: dict[Layout, str], checkpoint: Path, args: argparse.Namespace) -> None:
    """Export into the folder `stage`, verified, each layout in its subfolder; the checkpoint is unpacked beside it."""
    others = [layout for layout in folders if layout is not GENAI]
    tokens = tokens_text(parse_model(read_tokenizer(checkpoint))) if others else ""
    base = stage / folders[GENAI] if GENAI in folders else stage.parent / "base"  # the graphs that others are views of
    base.mkdir(exist_ok=True)
    stages = Stages(5 + len(folders))
    # When this returns the model goes, half of the memory.
    spec, window, cases = _export_graphs(base, stage.parent, folders, checkpoint, args, stages)

    from common.parity import check_decoder, check_encoder, check_joint

    measured = {}
    for graph, check in ((ENCODER, check_encoder), (DECODER, check_decoder), (JOINT, check_joint)):
        if args.skip_verify:
            stages.report(graph.file, "not verified")
            continue
        parity = check(base, cases[graph.name])
        measured[graph.file] = {"max_abs": parity.max_abs, "max_rel": parity.max_rel, "cases": parity.cases}
        stages.report(graph.file, str(parity))
    flags = {
        "runtime": args.runtime,
        "opset_version": args.opset_version,
        "device": args.device,
        "chunk_seconds": args.chunk_seconds,
        "left_context_seconds": args.left_context_seconds,
        "right_context_seconds": args.right_context_seconds,
        "skip_verify": args.skip_verify,
    }
    for layout, name in folders.items():
        if layout is GENAI:
            write_json(base / GENAI_CONFIG, genai_config(spec, window, args.device))
            write_json(base / AUDIO_PROCESSOR_CONFIG, audio_processor_config(spec))
        else:
            write_layout(layout, base, stage / name, spec, tokens)
        source = source_record(checkpoint, args.model_name, args.output_dir / name)
        record = {"source": source, "flags": flags, "parity": measured}
        write_manifest(stage / name, read_manifest(args.output_dir / name), "export", record)
        stages.report(*([name] if name else []), *layout.config_files, "manifest.json")


def _export_graphs(
    base: Path, scratch: Path, layouts: Iterable[Layout], checkpoint: Path, args: argparse.Namespace, stages: Stages
) -> tuple[ModelSpec, Window, dict[str, list]]:
    """Write the three graphs, which all `layouts` can run, into the folder `base`. Also what they are verified with:
    graph name → cases of common/parity."""
    from common.export import export_graph

    model = load_model(checkpoint, args.device, scratch=scratch)
    spec = ModelSpec.of(model)
    for layout in layouts:
        check_supports(spec, layout.runtime)
    window = Window.of_seconds(spec, args.chunk_seconds, args.left_context_seconds, args.right_context_seconds)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    stages.report(
        checkpoint.name,
        f"{parameters / 1e6:.1f} M parameters",
        f"{spec.encoder_layers} layers × {spec.encoder_dim}, {spec.num_mels} mels, {spec.vocab_size} tokens, "
        f"durations {list(spec.durations)}",
    )

    from common.parity import decoder_cases, encoder_cases, joint_cases
    from common.wrappers import Encoder, StatefulDecoder, TdtJoint

    cases, sizes = {}, []
    for graph, wrapper, module, cases_of in (
        (ENCODER, Encoder, model.encoder, encoder_cases),
        (DECODER, StatefulDecoder, model.decoder, decoder_cases),
        (JOINT, TdtJoint, model.joint, joint_cases),
    ):
        wrapped = wrapper(module)
        export_graph(wrapped, graph, base, args.opset_version)
        size = sum((base / name).stat().st_size for name in graph.files)
        sizes.append(f"{graph.file} {size_text(size)}")
        if not args.skip_verify:
            cases[graph.name] = cases_of(module, wrapped.example_inputs)
    stages.report("exported", *sizes)
    return spec, window, cases


if __name__ == "__main__":
    raise SystemExit(main())
