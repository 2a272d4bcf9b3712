"""Checkpoints in the published forms of moondream/parakeet-ultra and moondream/parakeet-redux, as stand-ins for tests.

    python -m benchmarks.published_forms --form redux --model_name samples/parakeet-tdt-tiny.nemo --output_dir build/r

Neither form has any file but those written here: no feature extractor, no generation config, no tokenizer config. Both
come from what is published about the two repositories, not from the code that reads them: at the full topology the file
sizes are the published ones to the byte (tests/test_published_forms.py).

    ultra   float16 for every tensor of two or more dimensions, for both position biases and for all of `vad_head`;
            float32 for the other vectors; int64 counters; the tensors of ParakeetForTDT and six of `vad_head`
    redux   the same, but each of eleven matrices a layer is `<module>.qweight`, uint8 with five ternary digits a byte,
            and `<module>.scales`, float16, one for 128 columns of a row; described again in ternary.json
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.transformers_checkpoint import convert
from common.cli import quiet_libraries

GROUP = 128  # columns of a row that share a scale
DIGITS = 5  # ternary digits in a byte
MODULES = (
    "feed_forward1.linear1", "feed_forward1.linear2", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.o_proj", "self_attn.relative_k_proj", "conv.pointwise_conv1", "conv.pointwise_conv2",
    "feed_forward2.linear1", "feed_forward2.linear2",
)  # fmt: skip
VAD_SHARE = 8  # the encoder is this many times as wide as the voice activity head
FILES = {"ultra": {"config.json", "tokenizer.json", "model.safetensors"}}
FILES["redux"] = FILES["ultra"] | {"ternary.json"}
THRESHOLD = 0.7  # of the mean magnitude of a group: smaller weights become 0


def write_form(form: str, source: Path, folder: Path) -> Path:
    """Write the checkpoint that transformers saved in the folder `source` in the form `ultra` or `redux` into `folder`.

    Matrices that are not ternary yet are made so for `redux`. The voice activity head is random. Returns `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    state = load_file(source / "model.safetensors")
    state |= vad_head(state["encoder.subsampling.linear.weight"].shape[0])
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    config["encoder_config"].pop("dtype", None)
    config["dtype"] = "float32"
    if form == "redux":
        layers = config["encoder_config"]["num_hidden_layers"]
        names = [f"encoder.layers.{i}.{name}" for i in range(layers) for name in MODULES]
        for key in ("architectures", "transformers_version"):
            config.pop(key, None)
        config |= {"ternary_group_size": GROUP, "ternary_modules": names}
        described = []
        for name in names:
            weight = state.pop(f"{name}.weight")
            codes, scales = ternary(weight.float().flatten(1))
            state[f"{name}.qweight"] = packed(codes)
            state[f"{name}.scales"] = scales
            described.append(description(name, codes, as_conv1d=weight.dim() == 3))
        write_json(folder / "ternary.json", ternary_json(described))
    write_json(folder / "config.json", config)
    save_file({name: stored(name, tensor) for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


def vad_head(width: int) -> dict[str, Tensor]:
    """A voice activity head with random weights, which reads the subsampling's output of this width."""
    draw = torch.Generator().manual_seed(0)
    inner = width // VAD_SHARE
    shapes = {
        "proj.weight": (inner, width, 1),
        "proj.bias": (inner,),
        "ctx.weight": (inner, inner, 5),
        "ctx.bias": (inner,),
        "out.weight": (1, inner, 1),
        "out.bias": (1,),
    }
    return {f"vad_head.{name}": 0.02 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def stored(name: str, tensor: Tensor) -> Tensor:
    """The tensor in the type in which it is published."""
    if not tensor.is_floating_point() or tensor.dtype == torch.float16:
        return tensor.contiguous()
    is_half = tensor.dim() >= 2 or name.startswith("vad_head.")
    return tensor.to(torch.float16 if is_half else torch.float32).contiguous()


def ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out, in] → codes −1, 0, 1 [out, in] int8, scales [out, in / 128] float16.

    A ternary weight stays as it is.
    """
    groups = weight.reshape(len(weight), -1, GROUP)
    size = groups.abs()
    kept = size > THRESHOLD * size.mean(-1, keepdim=True)
    scales = (size * kept).sum(-1) / kept.sum(-1).clamp_min(1)
    return (groups.sign() * kept).to(torch.int8).reshape(weight.shape), scales.half()


def packed(codes: Tensor) -> Tensor:
    """codes −1, 0, 1 [out, in] → uint8 [out, ⌈in / 5⌉]: base-3 digits code + 1, the first one least significant. The
    unused digits of a row's last byte are 0."""
    digits = (codes.numpy() + 1).astype(np.uint8)
    digits = np.pad(digits, ((0, 0), (0, -digits.shape[1] % DIGITS))).reshape(len(digits), -1, DIGITS)
    return torch.from_numpy((digits * 3 ** np.arange(DIGITS, dtype=np.uint8)).sum(-1, dtype=np.uint8))


def description(name: str, codes: Tensor, *, as_conv1d: bool) -> dict[str, Any]:
    """The entry of a module in ternary.json."""
    return {
        "name": name,
        "out_features": codes.shape[0],
        "in_features": codes.shape[1],
        "group_size": GROUP,
        "as_conv1d": as_conv1d,
        "has_bias": False,
        "zero_fraction": round(float((codes == 0).float().mean()), 6),
    }


def ternary_json(modules: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "format": "thrush-ternary-v2",
        "names": "hf",
        "quant": {"mode": "ternary", "group_size": GROUP},
        "packing": {"base": 3, "elements_per_byte": DIGITS, "code_offset": 1},
        "weight_rule": "weight[o,i] = scales[o, i // group_size] * (code[o,i] - code_offset)",
        "quantized_modules": modules,
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=FILES, required=True)
    parser.add_argument("--model_name", type=Path, required=True, help=".nemo file, or folder that transformers saved")
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to write")
    args = parser.parse_args(argv)
    quiet_libraries()
    source = args.model_name
    if source.is_file():
        source = convert(source, args.output_dir.with_name(f"{args.output_dir.name}.transformers"))
    write_form(args.form, source, args.output_dir)


if __name__ == "__main__":
    main()
