"""Model folders with one fault each: functions that damage a folder, by what is wrong with it afterwards."""

import os
from collections.abc import Callable
from pathlib import Path

from common.folder import MANIFEST, read_json, write_json


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def swap(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def without_setting(folder: Path) -> None:
    config = read_json(folder / "genai_config.json", "")
    del config["model"]["hop_length"]
    write_json(folder / "genai_config.json", config)


def endless(folder: Path) -> None:
    config = read_json(folder / "genai_config.json", "")
    config["model"]["chunk_samples"] = 0
    write_json(folder / "genai_config.json", config)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "encoder.onnx.data cut in half": lambda folder: truncate(folder / "encoder.onnx.data"),
    "encoder.onnx.data empty": lambda folder: (folder / "encoder.onnx.data").write_bytes(b""),
    "encoder.onnx.data gone": lambda folder: (folder / "encoder.onnx.data").unlink(),
    "decoder and joint swapped": lambda folder: swap(folder / "decoder.onnx", folder / "joint.onnx"),
    "one bit of joint.onnx": lambda folder: flip(folder / "joint.onnx"),
    "encoder.onnx of another export": lambda folder: flip(folder / "encoder.onnx"),
    "tokenizer.json cut in half": lambda folder: truncate(folder / "tokenizer.json"),
    "manifest.json not JSON": lambda folder: (folder / MANIFEST).write_text("{"),
    "manifest.json a list": lambda folder: (folder / MANIFEST).write_text("[]"),
    "manifest.json with a list for a section": lambda folder: (folder / MANIFEST).write_text('{"export": []}'),
    "manifest.json with a number for its files": lambda folder: (folder / MANIFEST).write_text('{"files": 3}'),
    "genai_config.json with chunk_samples of 0": endless,
    "genai_config.json not JSON": lambda folder: (folder / "genai_config.json").write_text("{"),
    "genai_config.json without hop_length": without_setting,
    "genai_config.json a folder": lambda folder: (
        (folder / "genai_config.json").unlink(), (folder / "genai_config.json").mkdir(),
    ),
    "decoder.onnx gone": lambda folder: (folder / "decoder.onnx").unlink(),
}  # fmt: skip
