"""Ternary weights in the packing `thrush-ternary-v2` of moondream/parakeet-redux (safetensors and ternary.json).

A matrix W [out, in] of −m, 0 and m, with one m for `group_size` columns of a row, is stored as
    <module>.qweight  uint8 [out, ⌈in / 5⌉]: element i of a row is base-3 digit i % 5 of byte i // 5, the least
                      significant digit first. The digits 0, 1, 2 stand for −m, 0, m; unused digits are 0.
    <module>.scales   float16 [out, in / group_size]: m

ternary.json describes every matrix, and config.json lists their names again. Nothing is taken from either that the
other, or the tensors, contradict.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.checkpoint import NOT_LOADED
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

    def stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name → type and shape of the two tensors that stand for the weight."""
        return {
            f"{self.name}{QWEIGHT}": ("U8", (self.rows, math.ceil(self.columns / DIGITS))),
            f"{self.name}{SCALES}": ("F16", (self.rows, self.columns // self.group)),
        }


def read_modules(path: Path, content: Mapping[str, Any], config: Mapping[str, Any]) -> list[TernaryModule]:
    """The matrices of ternary.json at `path`, whose content is given, in its order. config: of config.json.

    Raises ValueError for a packing that is not known, a description that is damaged, or names or a group size that
    config.json contradicts.
    """
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path} describes the packing {content.get('format')!r}, and only {FORMAT} can be read; ask its publisher "
            "for that form, or for the weights in float16"
        )
    if content.get("packing") != PACKING:
        raise ValueError(f"expected the packing {PACKING} in {path}, got {content.get('packing')!r}; {NOT_LOADED}")
    listed = content.get("quantized_modules")
    if not isinstance(listed, list):
        raise ValueError(f"expected a list as quantized_modules in {path}, got {listed!r}; download it again")
    modules = [_module(path, entry) for entry in listed]
    expected = config.get(MODULES_KEY)
    if sorted(module.name for module in modules) != sorted(expected if isinstance(expected, list) else []):
        raise ValueError(
            f"{path} describes other matrices than {MODULES_KEY} of config.json lists; download both again"
        )
    for module in modules:
        if module.group != config.get(GROUP_KEY):
            raise ValueError(
                f"{path} gives {module.name} groups of {module.group} columns, but {GROUP_KEY} of config.json is "
                f"{config.get(GROUP_KEY)!r}; download both again"
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


def _module(path: Path, entry: object) -> TernaryModule:
    if not isinstance(entry, dict):
        raise ValueError(f"expected a mapping for each matrix of {path}, got {entry!r}; download it again")
    name = entry.get("name")
    sizes = {key: entry.get(key) for key in ("out_features", "in_features", "group_size")}
    if not isinstance(name, str) or not all(isinstance(size, int) and size > 0 for size in sizes.values()):
        raise ValueError(f"expected a name and sizes for each matrix of {path}, got {entry!r}; download it again")
    module = TernaryModule(
        name,
        rows=int(entry["out_features"]),
        columns=int(entry["in_features"]),
        group=int(entry["group_size"]),
        is_convolution=bool(entry.get("as_conv1d")),
    )
    if entry.get("has_bias") or module.columns % module.group:
        raise ValueError(
            f"expected {name} of {path} without a bias and with whole groups of columns, got {entry!r}; {NOT_LOADED}"
        )
    return module


def without_packing(
    header: Mapping[str, tuple[str, tuple[int, ...]]], modules: Sequence[TernaryModule], path: Path
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The header of the weights at `path` as if each matrix were stored unpacked, in float16.

    Raises ValueError where a tensor of a packed matrix is missing or has another type or shape than described, or where
    the matrix is stored unpacked as well.
    """
    plain = dict(header)
    for module in modules:
        for name, described in module.stored().items():
            if name not in plain:
                raise ValueError(f"{path} lacks {name}, which {DESCRIPTION} describes; download it again")
            if plain[name] != described:
                kind, shape = described
                raise ValueError(
                    f"expected {name} of type {kind} and shape {shape} by {DESCRIPTION}, got {plain[name][0]} and "
                    f"{plain[name][1]} in {path}; download it again"
                )
            del plain[name]
        weight = f"{module.name}.weight"
        if weight in plain:
            raise ValueError(f"{path} holds {weight} packed and unpacked; {NOT_LOADED}")
        plain[weight] = ("F16", module.weight_shape)
    return plain


def unpack(module: TernaryModule, qweight: "Tensor", scales: "Tensor") -> "Tensor":
    """The weight of a matrix in float32, from its tensors of the shapes that `stored` gives.

    scales may be in any float type. Raises ValueError for a byte that is not five ternary digits, or a scale that is
    not finite.
    """
    import torch

    largest = int(qweight.max())
    if largest > LARGEST_BYTE:
        raise ValueError(
            f"{module.name}{QWEIGHT} has a byte of {largest}, and {DIGITS} ternary digits are at most {LARGEST_BYTE}; "
            "download it again"
        )
    if not torch.isfinite(scales).all():
        raise ValueError(f"{module.name}{SCALES} has values that are not finite; download it again")
    digits_of_byte = torch.from_numpy(np.arange(256)[:, None] // 3 ** np.arange(DIGITS) % 3)  # [256, 5]
    digits = digits_of_byte.to(qweight.device, torch.float32)[qweight.long()].flatten(1)  # [out, in and unused]
    signs = digits[:, : module.columns] - PACKING["code_offset"]
    groups = signs.reshape(module.rows, -1, module.group)
    weight: Tensor = (groups * scales.float()[..., None]).reshape(module.weight_shape)
    return weight
