"""Ternary weights in the packing `thrush-ternary-v2` of moondream/parakeet-redux (safetensors and ternary.json).

A matrix W [out, in] of −m, 0 and m, with one m for `group_size` columns of a row, is stored as
    <module>.qweight  uint8 [out, ⌈in / 5⌉]: element i of a row is base-3 digit i % 5 of byte i // 5, the least
                      significant digit first. The digits 0, 1, 2 stand for −m, 0, m; unused digits are 0.
    <module>.scales   float16 [out, in / group_size]: m

ternary.json describes every matrix, and config.json lists their names again. Nothing is taken from either that the
other, or the tensors, contradict.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.cli import size_text

if TYPE_CHECKING:
    from torch import Tensor

DESCRIPTION = "ternary.json"
FORMAT = "thrush-ternary-v2"
MODULES_KEY, GROUP_KEY = "ternary_modules", "ternary_group_size"  # in config.json
PACKING = {"base": 3, "elements_per_byte": 5, "code_offset": 1}
DIGITS = PACKING["elements_per_byte"]
LARGEST_BYTE = 3**DIGITS - 1
QWEIGHT, SCALES = ".qweight", ".scales"

Header = Mapping[str, tuple[str, tuple[int, ...]]]  # name → type as safetensors spells it, shape


@dataclass(frozen=True)
class TernaryModule:
    """One matrix as ternary.json describes it."""

    name: str
    rows: int  # outputs
    columns: int  # inputs
    group: int  # columns that share a scale
    is_convolution: bool  # the weight is [out, in, 1]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.rows, self.columns, 1) if self.is_convolution else (self.rows, self.columns)


def read_modules(path: Path, content: Mapping[str, Any], config: Mapping[str, Any]) -> list[TernaryModule]:
    """The matrices of ternary.json at `path`, whose content is given, in its order. config: of config.json.

    Raises ValueError for a packing that is not known, a description that is damaged, or names or a group size that
    config.json contradicts.
    """
    described = content.get("format"), content.get("packing")
    if described != (FORMAT, PACKING):
        raise ValueError(
            f"{path} has the packing {described[0]} {described[1]}, and only {FORMAT} {PACKING} can be read; ask its "
            "publisher for that form, or for the weights in float16"
        )
    try:
        modules = [
            TernaryModule(
                entry["name"], entry["out_features"], entry["in_features"], entry["group_size"],
                is_convolution=bool(entry.get("as_conv1d")),
            )
            for entry in content["quantized_modules"] if not entry.get("has_bias")
        ]  # fmt: skip
        whole = all(module.columns % module.group == 0 and module.rows > 0 for module in modules)
        same_names = sorted(module.name for module in modules) == sorted(config[MODULES_KEY])
    except (AttributeError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); download it again") from None
    if not (whole and same_names and all(module.group == config.get(GROUP_KEY) for module in modules)):
        raise ValueError(
            f"{path} describes other matrices than {MODULES_KEY} of config.json, or other groups of columns than its "
            f"{GROUP_KEY}, which must fill each row; download both again"
        )
    return modules


def note_of(modules: Sequence[TernaryModule]) -> str:
    """What a user should know of the matrices: how large the export makes them, and how to store them small again."""
    weights = sum(module.rows * module.columns for module in modules)
    groups = sum(module.rows * module.columns // module.group for module in modules)
    return (
        f"{len(modules)} matrices are ternary, with a scale for {modules[0].group} columns of a row; the exported "
        f"encoder holds them in float32 ({size_text(4 * weights)}), and optimize_encoder.py --quant_method int8 stores "
        f"them in 2 bits ({size_text(weights // 4 + groups)})"
    )


def without_packing(header: Header, modules: Sequence[TernaryModule], path: Path) -> Header:
    """The header of the weights at `path` as if each matrix were stored unpacked, in float16.

    Raises ValueError where a tensor of a packed matrix is missing or has another type or shape than described, or where
    the matrix is stored unpacked as well.
    """
    plain = dict(header)
    for module in modules:
        stored = {
            f"{module.name}{QWEIGHT}": ("U8", (module.rows, -(-module.columns // DIGITS))),
            f"{module.name}{SCALES}": ("F16", (module.rows, module.columns // module.group)),
            f"{module.name}.weight": None,
        }
        for name, described in stored.items():
            if (found := plain.pop(name, None)) != described:
                raise ValueError(
                    f"expected {name} of type and shape {described} by {DESCRIPTION}, got {found} in {path}; download "
                    "it again"
                )
        plain[f"{module.name}.weight"] = ("F16", module.weight_shape)
    return plain


def unpack(module: TernaryModule, qweight: "Tensor", scales: "Tensor") -> "Tensor":
    """The weight of a matrix in float32, from its tensors of the shapes that `without_packing` checks.

    scales may be in any float type. Raises ValueError for a byte that is not five ternary digits.
    """
    import torch

    largest = int(qweight.max())
    if largest > LARGEST_BYTE:
        raise ValueError(
            f"{module.name}{QWEIGHT} has a byte of {largest}, and {DIGITS} ternary digits are at most {LARGEST_BYTE}; "
            "download it again"
        )
    digits_of_byte = torch.from_numpy(np.arange(256)[:, None] // 3 ** np.arange(DIGITS) % 3)  # [256, 5]
    digits = digits_of_byte.to(qweight.device, torch.float32)[qweight.long()].flatten(1)  # [out, in and unused]
    signs = digits[:, : module.columns] - PACKING["code_offset"]
    groups = signs.reshape(module.rows, -1, module.group)
    weight: Tensor = (groups * scales.float()[..., None]).reshape(module.weight_shape)
    return weight
