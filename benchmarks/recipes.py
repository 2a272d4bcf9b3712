"""Build the encoders that are compared: two other recipes with their own settings, and ours in each mode.

    python -m benchmarks.recipes --model_name build/parakeet-0.6b-random.nemo --work_dir build/bench

Each becomes a folder of the work directory that holds an `encoder.onnx`. An existing folder is left as it is, so delete
a folder to build it again. Each is built in a process of its own. At 0.6B recipe A takes 8 minutes and 12 GB.

A  microsoft/olive-recipes, nvidia-parakeet-tdt-0.6b-v2. NeMo's encoder through the dynamo exporter at opset 21, ONNX
   Runtime's conformer fusions, then 4-bit k-quant in blocks of 32 with zero points and int8 activations. The 1×1
   convolutions stay float32 convolutions. Olive's k-quant pass adapts the one in onnxruntime, which is called here.
   The conformer fusions of onnxruntime 1.32 turn NeMo's attention into a MultiHeadAttention that computes something
   else: the content scores are divided by √d and the position scores are not, and the padding mask is lost. Built like
   this, the recipe is wrong before any quantization (5 dB on the tiny checkpoint; 126 dB with the position scores
   divided as well, and with this fusion off). onnxruntime 1.31 left this attention alone. The recipe to compare with is
   "attention unfused", the one with this fusion off.
S  k2-fsa/sherpa-onnx, scripts/nemo/parakeet-tdt-0.6b-v3. NeMo's own `encoder.export`, then `quantize_dynamic` with
   QUInt8 weights, one scale a tensor; its default operators include the convolutions.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bench import SAMPLES, parse_args, process
from common.cli import size_text
from common.contract import ENCODER
from common.folder import staged_folder

CALIBRATION = SAMPLES / "manifest.jsonl"
INT8 = {"quant_method": "int8"}
# Flags of optimize_encoder.py, one mode per line; None stands for a flag without a value.
OURS = (
    {"quant_method": "rtn", "block_size": 32},
    {"quant_method": "rtn", "block_size": 128},
    {"quant_method": "k_quant_mixed", "block_size": 32},
    {"quant_method": "hqq", "block_size": 32},
    {**INT8, "decoder_joint_precision": "int8"},
    {**INT8, "decoder_joint_precision": "int8", "calibration_manifest": CALIBRATION},
    {"quant_method": "int8", "weight_bits": 4, "decoder_joint_precision": "int8"},
    {"quant_method": "int8", "weight_bits": 4, "decoder_joint_precision": "int8", "calibration_manifest": CALIBRATION},
    # In the size of rtn 32.
    {**INT8, "size_budget_mb": 382, "decoder_joint_precision": "int8", "calibration_manifest": CALIBRATION},
)

# Recipe A's own numbers.
DYNAMO_OPSET = 21
EXAMPLE_FRAMES = 600  # mel frames it traces with
K_QUANT = {"block_size": 32, "accuracy_level": 4}
UNFUSED = "attention unfused"


@dataclass(frozen=True)
class Recipe:
    """An encoder to build: `build(checkpoint, work_dir, folder, *flags)` writes `folder`."""

    name: str
    folder: str
    build: Callable[..., None]
    flags: tuple[str, ...] = ()


def float32(checkpoint: Path, work_dir: Path, folder: Path) -> None:
    """The first two scripts: what ours starts from, and what plain ONNX Runtime runs."""
    import export_parakeet_to_onnx
    import export_tokenizer

    arguments = ["--model_name", str(checkpoint), "--output_dir", str(folder)]
    for script in (export_parakeet_to_onnx, export_tokenizer):
        _run_script(script, arguments)


def float32_in_one_block(checkpoint: Path, work_dir: Path, folder: Path) -> None:
    """The same with attention in one piece, for OpenVINO: a layer of 250 frames takes 11 ms there, in blocks 16."""
    from common.export.wrappers import Encoder

    Encoder.blocks = 1  # in a process of its own
    float32(checkpoint, work_dir, folder)


def ours(checkpoint: Path, work_dir: Path, folder: Path, *flags: str) -> None:
    """The third script, on what the first two wrote; without fusion, which is faster on a CPU."""
    import optimize_encoder

    folders = ("--model_dir", str(work_dir / FLOAT32.folder), "--output_dir", str(folder))
    _run_script(optimize_encoder, [*folders, "--skip_fusion", *flags])


def recipe_a(checkpoint: Path, work_dir: Path, folder: Path, *flags: str) -> None:
    """Dynamo export, conformer fusions (of attention too, unless told otherwise), 4-bit k-quant; see above."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import KQuantWeightOnlyQuantConfig, MatMulNBitsQuantizer
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    with tempfile.TemporaryDirectory(dir=work_dir) as scratch, staged_folder(folder) as staging:
        exported = Path(scratch) / ENCODER.file
        with process() as worker:  # NeMo and torch would stay in memory
            heads, width = worker.submit(_export_dynamo, checkpoint, exported).result()
        options = FusionOptions("conformer")
        options.use_multi_head_attention = False
        options.enable_attention = UNFUSED not in flags
        fused = optimize_model(str(exported), "conformer", heads, width, optimization_options=options, opt_level=0)
        quantizer = MatMulNBitsQuantizer(fused.model, algo_config=KQuantWeightOnlyQuantConfig(), **K_QUANT)
        del fused
        quantizer.process()
        onnx.save(quantizer.model.model, staging / ENCODER.file, save_as_external_data=True, location=ENCODER.data_file)


def _export_dynamo(checkpoint: Path, path: Path) -> tuple[int, int]:
    """Write NeMo's encoder, unchanged, by the dynamo exporter; return its heads and width."""
    import torch

    from common.checkpoint.find import find_checkpoint

    class Untyped(torch.nn.Module):
        """NeMo's encoder behind a plain signature: its own takes keywords only, and optional caches."""

        def __init__(self, encoder):
            super().__init__()
            self.encoder = encoder

        def forward(self, audio_signal, length):
            return self.encoder(audio_signal=audio_signal, length=length)

    encoder = find_checkpoint(str(checkpoint)).load_model().encoder
    features = torch.randn(1, encoder._feat_in, EXAMPLE_FRAMES)
    axes = ENCODER.dynamic_axes()
    torch.onnx.export(
        Untyped(encoder).eval(),
        (features, torch.tensor([EXAMPLE_FRAMES])),
        path,
        dynamo=True,
        opset_version=DYNAMO_OPSET,
        input_names=ENCODER.input_names,
        output_names=ENCODER.output_names,
        dynamic_shapes=tuple(axes[name] for name in ENCODER.input_names),
        external_data=True,
        verbose=False,
    )
    return encoder.layers[0].self_attn.h, encoder.d_model


def recipe_s(checkpoint: Path, work_dir: Path, folder: Path) -> None:
    """NeMo's own export, dynamic quantization to QUInt8; see above."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from common.checkpoint.find import find_checkpoint

    with tempfile.TemporaryDirectory(dir=work_dir) as scratch, staged_folder(folder) as staging:
        with chdir(scratch):  # the exporter leaves one loose file for each weight in the current folder
            find_checkpoint(str(checkpoint)).load_model().encoder.export(ENCODER.file)
        quantize_dynamic(Path(scratch) / ENCODER.file, staging / ENCODER.file, weight_type=QuantType.QUInt8)


def _run_script(script, arguments: list[str]) -> None:
    if script.main(arguments):
        raise RuntimeError(f"{script.__name__} {' '.join(arguments)} failed")


def mode_name(mode: dict) -> str:
    """{"quant_method": "int8", "decoder_joint_precision": "int8"} → "int8 decoder_joint_precision int8" """
    words = {"calibration_manifest": "calibrated"}
    plain = ("quant_method", "block_size")
    return " ".join(
        words.get(key) or (key if v is None else str(v) if key in plain else f"{key} {v}") for key, v in mode.items()
    )


def mode_flags(mode: dict) -> tuple[str, ...]:
    """The mode as words of a command line."""
    words = ((f"--{key}",) if value is None else (f"--{key}", str(value)) for key, value in mode.items())
    return tuple(word for flag in words for word in flag)


FLOAT32 = Recipe("ONNX Runtime float32", "float32", float32)
IN_ONE_BLOCK = Recipe("float32, attention in one block", "float32_in_one_block", float32_in_one_block)
RECIPES = (
    FLOAT32,
    Recipe("recipe A", "recipe_a", recipe_a),
    Recipe(f"recipe A, {UNFUSED}", "recipe_a_attention_unfused", recipe_a, (UNFUSED,)),
    Recipe("recipe S", "recipe_s", recipe_s),
    *(Recipe(f"ours, {mode_name(mode)}", mode_name(mode).replace(" ", "_"), ours, mode_flags(mode)) for mode in OURS),
)


def build(recipe: Recipe, checkpoint: Path, work_dir: Path) -> Path:
    """The recipe's folder, built now if it is missing; it is written atomically. Raises what the build raises."""
    folder = work_dir / recipe.folder
    if not (folder / ENCODER.file).is_file():
        print(f"building {recipe.name}", file=sys.stderr, flush=True)
        with process() as worker:
            worker.submit(recipe.build, checkpoint, work_dir, folder, *recipe.flags).result()
    return folder


def encoder_bytes(folder: Path) -> int:
    """Bytes of the encoder alone: graph and data."""
    return sum(path.stat().st_size for path in folder.glob(f"{ENCODER.file}*"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = parse_args(parser, argv)
    for recipe in RECIPES:
        print(f"{recipe.name}: {size_text(encoder_bytes(build(recipe, args.model_name, args.work_dir)))}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
