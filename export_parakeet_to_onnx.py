"""Export a Parakeet-TDT checkpoint from NeMo to ONNX for ONNX Runtime GenAI, and prove that the export is right.

In: a Hugging Face name or a `.nemo` file of a FastConformer-TDT model.
Out: a folder with encoder.onnx, decoder.onnx and joint.onnx (each with one .data file), genai_config.json,
audio_processor_config.json and manifest.json. Each graph is run in ONNX Runtime against NeMo's own module before the
folder appears. The tokenizer is a step of its own: export_tokenizer.py.

    python export_parakeet_to_onnx.py --output_dir ./onnx_models
"""

import argparse
from pathlib import Path

from common.configs import (
    AUDIO_PROCESSOR_CONFIG,
    GENAI_CONFIG,
    Window,
    audio_processor_config,
    check_genai_supports,
    genai_config,
)
from common.console import Parser, Stages, run, size_text
from common.files import check_output_dir, read_manifest, staged_folder, state_needs, write_json, write_manifest
from common.graphs import DECODER, ENCODER, JOINT
from common.model import DEFAULT_MODEL, ModelSpec, find_checkpoint, load_model, source_record

# Chunks of 60 s encode each second of a long clip 1.2 times, and clips up to 60 s get NeMo's own full context.
CHUNK_SECONDS, LEFT_CONTEXT_SECONDS, RIGHT_CONTEXT_SECONDS = 60, 10, 2
# Peak memory and disk as multiples of the checkpoint's size, measured at 0.6B: the weights, their ONNX Runtime session
# and activations, and NeMo's own code; the unpacked checkpoint and the exported weights.
MEMORY_FACTOR, DISK_FACTOR = 2.1, 2.0
MEMORY_OF_NEMO = 1e9  # bytes


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model_name", default=DEFAULT_MODEL, help="Hugging Face name or .nemo path (%(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("onnx_models"), help="folder to write (./%(default)s)")
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
    checkpoint = find_checkpoint(args.model_name)
    size = checkpoint.stat().st_size
    needs = MEMORY_FACTOR * size + MEMORY_OF_NEMO, DISK_FACTOR * size
    state_needs(f"{checkpoint.name} ({size_text(size)})", *needs, args.output_dir)
    with staged_folder(args.output_dir) as stage:
        _export_to(stage, checkpoint, args)
    tokenizer_flags = f"--model_name {args.model_name} --output_dir {args.output_dir}"
    print(f"wrote {args.output_dir}; next: python export_tokenizer.py {tokenizer_flags}")


def _export_to(stage: Path, checkpoint: Path, args: argparse.Namespace) -> None:
    """Export into the folder `stage`, verified; the checkpoint is unpacked beside it."""
    stages, manifest = Stages(6), read_manifest(args.output_dir)
    spec, window, cases = _export_graphs(stage, checkpoint, args, stages)  # here the model goes: half of the memory

    from common.parity import check_decoder, check_encoder, check_joint

    measured = {}
    for graph, check in ((ENCODER, check_encoder), (DECODER, check_decoder), (JOINT, check_joint)):
        if args.skip_verify:
            stages.report(graph.file, "not verified")
            continue
        parity = check(stage, cases[graph.name])
        measured[graph.file] = {"max_abs": parity.max_abs, "max_rel": parity.max_rel, "cases": parity.cases}
        stages.report(graph.file, str(parity))
    write_json(stage / GENAI_CONFIG, genai_config(spec, window, args.device))
    write_json(stage / AUDIO_PROCESSOR_CONFIG, audio_processor_config(spec))
    flags = {
        "opset_version": args.opset_version,
        "device": args.device,
        "chunk_seconds": args.chunk_seconds,
        "left_context_seconds": args.left_context_seconds,
        "right_context_seconds": args.right_context_seconds,
        "skip_verify": args.skip_verify,
    }
    source = source_record(checkpoint, args.model_name, args.output_dir)
    write_manifest(stage, manifest, "export", {"source": source, "flags": flags, "parity": measured})
    stages.report(GENAI_CONFIG, AUDIO_PROCESSOR_CONFIG, "manifest.json")


def _export_graphs(
    stage: Path, checkpoint: Path, args: argparse.Namespace, stages: Stages
) -> tuple[ModelSpec, Window, dict[str, list]]:
    """Write the three graphs. Also what they are verified with: graph name → cases of common/parity."""
    from common.export import export_graph

    model = load_model(checkpoint, args.device, scratch=stage.parent)
    spec = ModelSpec.of(model)
    check_genai_supports(spec)
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
        export_graph(wrapped, graph, stage, args.opset_version)
        size = sum((stage / name).stat().st_size for name in (graph.file, graph.data_file))
        sizes.append(f"{graph.file} {size_text(size)}")
        if not args.skip_verify:
            cases[graph.name] = cases_of(module, wrapped.example_inputs)
    stages.report("exported", *sizes)
    return spec, window, cases


if __name__ == "__main__":
    raise SystemExit(main())
