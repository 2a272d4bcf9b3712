"""Export a Parakeet-TDT checkpoint from NeMo to ONNX for ONNX Runtime GenAI and others, and prove that it is right.

In: a Hugging Face name or a `.nemo` file of a FastConformer-TDT model.
Out: a folder with encoder.onnx, decoder.onnx and joint.onnx (each with one .data file), genai_config.json,
audio_processor_config.json, manifest.json and README.md, the model card. Each graph is run in ONNX Runtime against
NeMo's own module before the folder appears, with --precision fp16 twice: before the weights become float16, and after.
The tokenizer is a step of its own: export_tokenizer.py.
With --runtime: the same weights as onnx-asr or sherpa-onnx expect them, vocabulary included, in a subfolder for each.

    python export_parakeet_to_onnx.py --output_dir ./onnx_models
    python export_parakeet_to_onnx.py --output_dir ./onnx_models --runtime all
    python export_parakeet_to_onnx.py --precision fp16 --device cuda --output_dir ./onnx_models_fp16
"""

import argparse
import gc
import math
import shlex
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

# First of all, since a package that is missing below is then reported in one line (common/__init__.py).
from common.console import Parser, Stages, run, size_text

# isort: split

import numpy as np

from common.card import CARD, write_card
from common.configs import (
    AUDIO_PROCESSOR_CONFIG,
    GENAI_CONFIG,
    Window,
    audio_processor_config,
    genai_config,
)
from common.download import DEFAULT_MODEL, REVISION_HELP, find_checkpoint
from common.files import (
    check_output_dir,
    staged_folder,
    state_needs,
    write_json,
    write_locations,
    write_manifest,
)
from common.graphs import DECODER, ENCODER, JOINT, Graph
from common.identity import kept_by_export
from common.layouts import GENAI, LAYOUTS, Layout, check_same_shape, check_supports, write_layout
from common.model import ModelSpec, load_model, read_tokenizer, require_device, source_record
from common.runtime import MAPPED, Nemo, RuntimeConfig
from common.tokenizer import parse_model, tokens_text

FP32, FP16 = "fp32", "fp16"

# Chunks of 60 s encode each second of a long clip 1.2 times, and clips up to 60 s get NeMo's own full context.
CHUNK_SECONDS, LEFT_CONTEXT_SECONDS, RIGHT_CONTEXT_SECONDS = 60, 10, 2
# Peak memory and disk as multiples of the checkpoint's size, measured at 0.6B: the weights, NeMo's or those of the
# ONNX Runtime session, activations, and NeMo's own code; the unpacked checkpoint and the exported weights.
MEMORY_FACTOR, DISK_FACTOR = 1.3, 2.0
MEMORY_OF_NEMO = 1e9  # bytes
MEMORY_OF_LONG_CASE = 2.8e9  # bytes; a clip past 400 s, on which small encoders are verified; measured with 4 heads
FLOAT16_DISK_FACTOR = 0.5  # more, the float16 weights beside the float32 ones
SPEECH = Path(__file__).resolve().parent / "samples"  # 40 s of it, on which --precision fp16 is measured
PRECISION_HELP = """fp16: float16 weights and compute for GPU and WebGPU, inputs and outputs float32; operators whose
values on speech come near what float16 holds stay float32 (%(default)s)"""

RUNTIME_HELP = """whose names, axes and files to write: genai into the folder itself, any other choice into a subfolder
for each runtime, weights shared by hard link (%(default)s)"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model_name", default=DEFAULT_MODEL, help="Hugging Face name or .nemo path (%(default)s)")
    parser.add_argument("--revision", help=REVISION_HELP)
    parser.add_argument("--output_dir", type=Path, default=Path("onnx_models"), help="folder to write (./%(default)s)")
    runtimes = (*LAYOUTS, "all")
    parser.add_argument("--runtime", choices=runtimes, default=GENAI.runtime, help=RUNTIME_HELP)
    parser.add_argument("--opset_version", type=int, default=17, help="ONNX opset, 17 to 21 (%(default)s)")
    for name, help_text, default in (
        ("chunk", "audio decoded per encoder run, in whole encoder frames", CHUNK_SECONDS),
        ("left_context", "audio before the chunk that the encoder sees again", LEFT_CONTEXT_SECONDS),
        ("right_context", "audio after the chunk that the encoder sees already", RIGHT_CONTEXT_SECONDS),
    ):
        parser.add_argument(f"--{name}_seconds", type=_seconds, default=default, help=f"{help_text} (%(default)s)")
    device_help = "where to export and verify, and the provider that GenAI is told to use (%(default)s)"
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help=device_help)
    parser.add_argument("--precision", choices=(FP32, FP16), default=FP32, help=PRECISION_HELP)
    parser.add_argument("--skip_verify", action="store_true", help="do not run the graphs against NeMo")
    args = parser.parse_args(argv)
    if args.chunk_seconds == 0:
        parser.error("argument --chunk_seconds: expected more than 0, got 0")
    return args


def _seconds(text: str) -> float:
    """What can be a length before the checkpoint says how long a frame is."""
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds, 0 or more, got {text}")
    return float(text)


def main(argv: list[str] | None = None) -> int:
    return run(_export, parse_args(argv))


def _export(args: argparse.Namespace) -> None:
    from common.export import check_opset  # torch takes seconds to import; --help should not
    from common.parity import LONG_CASE_MAX_PARAMETERS

    check_opset(args.opset_version)
    check_output_dir(args.output_dir)
    if args.precision == FP16 and args.runtime != GENAI.runtime:
        raise ValueError(f"--precision fp16 is for --runtime {GENAI.runtime}, found {args.runtime}; export it apart")
    layouts = tuple(LAYOUTS.values()) if args.runtime == "all" else (LAYOUTS[args.runtime],)
    folders = {layout: "" if args.runtime == GENAI.runtime else layout.runtime for layout in layouts}
    check_same_shape(args.output_dir, {name: layout for layout, name in folders.items()})
    require_device(args.device)
    checkpoint = find_checkpoint(args.model_name, args.revision)
    size = checkpoint.stat().st_size
    disk_factor = DISK_FACTOR + (FLOAT16_DISK_FACTOR if args.precision == FP16 else 0)
    memory = MEMORY_FACTOR * size + MEMORY_OF_NEMO
    if not args.skip_verify and size <= LONG_CASE_MAX_PARAMETERS * np.float32().nbytes:
        memory += MEMORY_OF_LONG_CASE
    state_needs(f"{checkpoint.name} ({size_text(size)})", memory, disk_factor * size, args.output_dir)
    source = source_record(checkpoint, args.model_name, revision=args.revision)
    kept = {name: kept_by_export(args.output_dir / name, source, layout) for layout, name in folders.items()}
    removed = [str(Path(name) / file) for name, (_, files) in kept.items() for file in files]
    with staged_folder(args.output_dir, removed) as stage:
        manifests = {name: manifest for name, (manifest, _) in kept.items()}
        _export_to(stage, folders, checkpoint, source, manifests, args)
    if removed:
        print(f"removed from {args.output_dir}, since they belonged to the former graphs: {', '.join(removed)}")
    if GENAI in folders:
        folder = args.output_dir / folders[GENAI]
        following = ["export_tokenizer.py", "--model_name", args.model_name]
        following += ["--revision", args.revision] if args.revision else []
        following += ["--output_dir", str(folder)]
    else:
        following = ["optimize_encoder.py", "--model_dir", str(args.output_dir)]
    print(f"wrote {args.output_dir}; next: python {shlex.join(following)}")


def _export_to(
    stage: Path,
    folders: dict[Layout, str],
    checkpoint: Path,
    source: dict,
    manifests: dict[str, dict],
    args: argparse.Namespace,
) -> None:
    """Export into the folder `stage`, verified, each layout in its subfolder; the checkpoint is unpacked beside it.

    source: of the checkpoint, for the manifests. manifests: by subfolder, what its manifest says already.
    """
    others, float16 = [layout for layout in folders if layout is not GENAI], args.precision == FP16
    tokens = tokens_text(parse_model(read_tokenizer(checkpoint))) if others else ""
    base = stage / folders[GENAI] if GENAI in folders else stage.parent / "base"  # the graphs that others are views of
    exported = stage.parent / FP32 if float16 else base
    for folder in (base, exported):
        folder.mkdir(exist_ok=True)
    stages = Stages((9 if float16 else 5) + len(folders))
    spec, cases, speech = _export_graphs(exported, stage.parent, folders, checkpoint, args, stages)
    gc.collect()  # the model, half of the memory: its modules refer to each other
    content = {"parity": {}}
    for graph, check in _checks().items():
        parity = None if args.skip_verify else check(exported, cases[graph.name])
        content["parity"] |= {graph.file: parity.record()} if parity else {}
        stages.report(graph.file, str(parity or "not verified"))
    if float16:
        content = _to_float16(exported, base, cases, speech, stages) | {"float32_parity": content["parity"]}
        shutil.copyfile(exported / GENAI_CONFIG, base / GENAI_CONFIG)
    write_json(base / AUDIO_PROCESSOR_CONFIG, audio_processor_config(spec))
    flags = {
        "runtime": args.runtime,
        "opset_version": args.opset_version,
        "precision": args.precision,
        "device": args.device,
        "chunk_seconds": args.chunk_seconds,
        "left_context_seconds": args.left_context_seconds,
        "right_context_seconds": args.right_context_seconds,
        "skip_verify": args.skip_verify,
    }
    for layout, name in folders.items():
        if layout is not GENAI:
            write_layout(layout, base, stage / name, spec, tokens)
        location = checkpoint if "file" in source else None  # the other is found by its name and commit
        write_locations(stage / name, args.output_dir / name, checkpoint=location)
        write_manifest(stage / name, manifests[name], "export", {"source": source, "flags": flags, **content})
        write_card(stage / name, args.output_dir / name, layout)
        stages.report(*([name] if name else []), *layout.config_files, "manifest.json", CARD)


def _checks() -> dict[Graph, Callable]:
    from common.parity import check_decoder, check_encoder, check_joint

    return {ENCODER: check_encoder, DECODER: check_decoder, JOINT: check_joint}


def _export_graphs(
    folder: Path, scratch: Path, layouts: Iterable[Layout], checkpoint: Path, args: argparse.Namespace, stages: Stages
) -> tuple[ModelSpec, dict[str, list], list[np.ndarray]]:
    """Write the three graphs, which all `layouts` can run, and genai_config.json into `folder`. Also what they are
    verified with, graph name → cases of common/parity, and for float16 features of speech, [M, T] each."""
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
        export_graph(wrapped, graph, folder, args.opset_version)
        sizes.append(f"{graph.file} {_size_text(folder, graph)}")
        if not args.skip_verify:
            cases[graph.name] = cases_of(module, wrapped.example_inputs)
    write_json(folder / GENAI_CONFIG, genai_config(spec, window, args.device))
    speech = _speech(Nemo(model), folder) if args.precision == FP16 else []
    stages.report("exported", *sizes)
    return spec, cases, speech


def _speech(nemo: Nemo, folder: Path) -> list[np.ndarray]:
    """The features of the bundled clips, [M, T] each."""
    clips = sorted(path for path in SPEECH.rglob("*") if path.suffix in (".flac", ".wav"))
    if not clips:
        raise FileNotFoundError(f"wanted speech in {SPEECH} to measure what may be float16, found none; get it again")
    config = RuntimeConfig.read(folder)
    return [nemo.features(config.read_audio(path)) for path in clips]


def _to_float16(source: Path, stage: Path, cases: dict, speech: list[np.ndarray], stages: Stages) -> dict:
    """Convert the float32 folder `source` into `stage` and verify that, as ONNX Runtime's CPU runs it and as a device
    that rounds each result would; what the manifest says of it."""
    from common.float16 import LIMIT, Emulated, convert, record

    largest = record(source, speech)
    peak = max(max(values.values()) for values in largest.values())
    stages.report(f"{len(speech)} clips heard", f"largest value {peak:.0f}", f"float16 below {LIMIT:.0f}")
    content = {"parity": {}, "float16": {}}
    for graph, check in _checks().items():
        converted = convert(source, stage, graph, largest[graph.name])
        content["float16"][graph.file] = converted.record()
        found = f"{len(converted.overflowing) + len(converted.exact)} operators float32", _size_text(stage, graph)
        if graph.name not in cases:
            stages.report(graph.file, *found, "not verified")
            continue
        content["parity"][graph.file] = check(stage, cases[graph.name], MAPPED, float16=True).record()
        rounded = check(stage, cases[graph.name], Emulated, float16=True)
        content["float16"][graph.file]["rounded_parity"] = rounded.record()
        stages.report(graph.file, *found, str(rounded))
    return content


def _size_text(folder: Path, graph: Graph) -> str:
    return size_text(sum((folder / name).stat().st_size for name in graph.files))


if __name__ == "__main__":
    raise SystemExit(main())
