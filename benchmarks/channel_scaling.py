"""What channel scaling without speech gains: each method with and without it, on a checkpoint and its loud variants.

    python -m benchmarks.channel_scaling --model_name samples/parakeet-tdt-tiny.nemo --manifest eval.jsonl

Out: a markdown table of the SQNR of the encoder's output, over all frames of the manifest's clips. The variants are
those of benchmarks/loud_channels.py. Integer products are computed in float32, where their sums are exact: x86 CPUs
without VNNI cut off large sums, and only the effect of rounding is compared here.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape
from tqdm import tqdm

from benchmarks.bench import machine, parse_args
from benchmarks.loud_channels import KINDS, write_loud
from benchmarks.recipes import FLOAT32, build
from common.contract import ENCODER
from common.onnx_io import load, save_model
from common.quantize import METHODS
from common.quantize.fidelity import sqnr_db
from common.quantize.methods import OptimizeOptions
from common.quantize.rewrite import factors_without_speech, fold, plan_encoder, quantize_weights
from common.run.audio import read_clips
from common.run.genai import GenAI
from common.run.ort import OrtGraph

PLAIN = "plain"


def float32_folder(checkpoint: Path, kind: str, work_dir: Path) -> Path:
    """The exported folder of the checkpoint, or of its variant of this kind."""
    folder = work_dir / kind
    folder.mkdir(parents=True, exist_ok=True)
    if kind in KINDS and not (folder / FLOAT32.folder).is_dir():
        ratio = write_loud(checkpoint, folder / "loud.nemo", kind)
        print(f"{kind}: {ratio:.1f} dB from {checkpoint.name}", flush=True)
        checkpoint = folder / "loud.nemo"
    return build(FLOAT32, checkpoint, folder)


def quantized(encoder: Path, method_name: str, *, scales_channels: bool) -> ir.Model:
    """The encoder with weights quantized by the method, and with exact integer products."""
    model, method, options = load(encoder), METHODS[method_name], OptimizeOptions()
    plan = plan_encoder(model, method, options)
    if scales_channels:
        fold(model, factors_without_speech(model, plan))
    quantize_weights(model, plan, method, options, {})
    for node in list(model.graph):
        if node.op_type == "MatMulIntegerToFloat":
            _make_exact(model.graph, node)
    return model


def _make_exact(graph: ir.Graph, node: ir.Node) -> None:
    """Sums of up to 2^24 are whole numbers in float32: 255 · 127 · 512 is just under."""
    x, weight, x_scale, scales, zero = node.inputs[:5]
    tape = Tape()
    x, weight, zero = (tape.op("Cast", [value], {"to": ir.DataType.FLOAT.value}) for value in (x, weight, zero))
    y = tape.op("MatMul", [tape.op("Sub", [x, zero]), weight])
    y = tape.op("Mul", [tape.op("Mul", [y, x_scale]), scales])
    ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, node.outputs, [y])


def encode(folder: Path, features: list[np.ndarray]) -> np.ndarray:
    """The outputs of the folder's encoder for all clips, run one at a time, as one vector."""
    encoder = OrtGraph(folder, ENCODER)
    return np.concatenate([encoder(clip[None], np.array([clip.shape[1]]))[0].ravel() for clip in features])


def measure(folder: Path, features: list[np.ndarray]) -> dict[str, tuple[float, float]]:
    """Method → SQNR in dB without channel scaling and with it, against the float32 encoder of `folder`."""
    expected = encode(folder, features)
    ratios_of: dict[str, tuple[float, float]] = {}
    for name in tqdm(METHODS, desc=folder.parent.name, unit="method", leave=False, disable=None):
        ratios = []
        for scales_channels in (False, True):
            with tempfile.TemporaryDirectory() as scratch:
                model = quantized(folder / ENCODER.file, name, scales_channels=scales_channels)
                save_model(model, Path(scratch) / ENCODER.file)
                ratios.append(sqnr_db(expected, encode(Path(scratch), features)))
        ratios_of[name] = (ratios[0], ratios[1])
    return ratios_of


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, required=True, help="clips to measure on")
    args = parse_args(parser, argv)
    clips = read_clips(args.manifest)
    print(f"{machine()}\n{len(clips)} clips\n\n| checkpoint | {' | '.join(METHODS)} |\n|---{'|---' * len(METHODS)}|")
    for kind in (PLAIN, *KINDS):
        folder = float32_folder(args.model_name, kind, args.work_dir)
        genai = GenAI(folder)
        features = [genai.features(genai.config.read_clip(clip)) for clip in clips]
        cells = (f"{before:.1f} → {after:.1f}" for before, after in measure(folder, features).values())
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
