"""Sums of 8-bit products on x86 CPUs without VNNI, emulated: they are exact but with --full_range, which says so."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from common.contract import DECODER, ENCODER
from common.folder import read_manifest
from common.quantize import rounding
from common.quantize.methods import EVERY_CPU, VNNI_ALONE, OptimizeOptions
from common.quantize.rounding import InputMoments, fit_columns, quantize_columns
from common.report.card import CARD
from common.run.genai import GenAI
from common.run.ort import open_session
from tests.helpers import CLIPS, printed_by

RNG = np.random.default_rng(3)
FLAGS = ("--quant_method", "int8", "--decoder_joint_precision", "int8")
INT16 = np.iinfo(np.int16)
ROWS = 24  # of activations, of each product


def pairs_of(x: np.ndarray) -> np.ndarray:
    """[K, N] → [K/2, 2, N]; an odd K is padded."""
    return np.pad(x, ((0, len(x) % 2), (0, 0))).reshape(-1, 2, x.shape[1])


def without_vnni(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """uint8 x [R, K] times int8 codes [K, N] as VPMADDUBSW adds them: each pair of products is cut off at 16 bits."""
    left, right = pairs_of(x.T.astype(np.int32)), pairs_of(codes.astype(np.int32))
    sums = left[:, 0, :, None] * right[:, 0, None] + left[:, 1, :, None] * right[:, 1, None]
    return np.clip(sums, INT16.min, INT16.max).sum(axis=0)


def overflows(codes: np.ndarray) -> bool:
    """Whether some activations make the sum of a pair of products overflow."""
    pairs = 255 * pairs_of(codes.astype(np.int32))
    return np.maximum(pairs, 0).sum(axis=1).max() > INT16.max or np.minimum(pairs, 0).sum(axis=1).min() < INT16.min


def test_the_emulation_cuts_sums_off_in_pairs_of_rows():
    x, codes = np.full((1, 4), 255, np.uint8), np.array([[127, 127], [127, -127], [-1, 64], [0, 64]], np.int8)
    assert without_vnni(x, codes).tolist() == [[32767 - 255, 32640]]
    assert (x.astype(int) @ codes).tolist() == [[2 * 255 * 127 - 255, 32640]]
    assert overflows(codes)
    assert not overflows(codes[1:3])


WEIGHTS = {
    "normal": RNG.standard_normal((256, 40), dtype=np.float32),
    "uniform": RNG.uniform(-1, 1, (256, 40)).astype(np.float32),
    "one sign": np.abs(RNG.standard_normal((256, 40), dtype=np.float32)) + 1,
    "loud rows": RNG.standard_normal((255, 40), dtype=np.float32) * np.logspace(0, 2, 255, dtype=np.float32)[:, None],
    "ternary": np.sign(RNG.standard_normal((256, 40), dtype=np.float32)) * np.float32(0.3),
    "zeros": np.zeros((6, 3), np.float32),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("fitted", [False, True])
def test_no_sum_overflows_but_in_the_full_range(name, fitted):
    weight = WEIGHTS[name]

    def codes_of(**options) -> np.ndarray:
        if not fitted:
            return quantize_columns(weight, 8, **options).codes
        x = np.random.default_rng(0).standard_normal((300, 30)) @ np.random.default_rng(1).standard_normal(
            (30, len(weight))
        )
        inputs = InputMoments((x.T @ x).astype(np.float32), strongest_first=True)
        return fit_columns(weight, 8, inputs, **options)[0].codes

    assert not overflows(codes_of())
    assert overflows(codes_of(full_range=True)) == (name != "zeros")


def test_pairs_that_feedback_puts_beyond_the_limit_are_brought_back(monkeypatch):
    """About one pair in a thousand here, most of them by rounding alone, which may add half a code to each weight."""
    draw = np.random.default_rng(4)
    weight = draw.uniform(-1, 1, (256, 2000)).astype(np.float32)
    x = draw.standard_normal((300, 200)) @ draw.standard_normal((200, 256)) + 0.1 * draw.standard_normal((300, 256))
    inputs = InputMoments((x.T @ x).astype(np.float32), strongest_first=True)
    limited = fit_columns(weight, 8, inputs)[0].codes
    monkeypatch.setattr(rounding, "_limit_pairs", lambda codes: None)
    unlimited = fit_columns(weight, 8, inputs)[0].codes
    assert overflows(unlimited)
    assert not overflows(limited)
    assert 0 < np.count_nonzero(limited != unlimited) < 500
    assert np.abs(limited.astype(int) - unlimited).max() <= 2


def test_the_safe_range_costs_a_third_of_what_a_bit_costs():
    weight = WEIGHTS["normal"]
    safe, full = (quantize_columns(weight, 8, full_range=full).error for full in (False, True))
    assert 0 < 10 * np.log10(safe / full) < 2.5  # dB; a bit is worth 6


def products_of(path: Path, features: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The uint8 activations [R, K], on speech, and the codes [K, N] of each product of an encoder."""
    proto = onnx.load(path)
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    products = [node for node in proto.graph.node if node.op_type == "MatMulIntegerToFloat"]
    names = list(dict.fromkeys(node.input[0] for node in products))
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, TensorProto.UINT8, None) for name in names)
    values = open_session(proto.SerializeToString()).run(
        names, dict(zip((x.name for x in proto.graph.input), (features, np.array([features.shape[2]])), strict=True))
    )
    rows = {name: value.reshape(-1, value.shape[-1])[-ROWS:] for name, value in zip(names, values, strict=True)}
    return [(rows[node.input[0]], numpy_helper.to_array(constants[node.input[1]])) for node in products]


@pytest.mark.parametrize(("flags", "exact"), [((), True), (("--full_range",), False)], ids=["default", "full range"])
def test_a_folder_computes_the_same_without_vnni_unless_it_has_the_full_range(flags, exact, optimized, tiny_export):
    folder = optimized(*FLAGS, *flags)
    genai = GenAI(tiny_export)
    products = products_of(folder / ENCODER.file, genai.features(genai.config.read_audio(CLIPS[0]))[None])
    assert len(products) == 61 + 2 * 5  # with the second terms
    wrong = [(without_vnni(x, codes) != x.astype(np.int32) @ codes).any() for x, codes in products]
    assert (sum(wrong) == 0) if exact else (sum(wrong) > 20)
    unsafe = [overflows(codes) for _, codes in products]
    assert (sum(unsafe) == 0) if exact else (sum(unsafe) > 60)
    lstms = [
        numpy_helper.to_array(tensor)[0]
        for tensor in onnx.load(folder / DECODER.file).graph.initializer
        if tensor.name.endswith(".codes") and len(tensor.dims) == 3
    ]
    assert [overflows(codes) for codes in lstms] == [not exact] * 4


def test_ternary_weights_and_those_beside_them_overflow_nowhere(redux_export, optimized):
    for bits in (("--weight_bits", "2"), ("--weight_bits", "4")):
        proto = onnx.load(optimized("--quant_method", "int8", *bits, source=redux_export) / ENCODER.file)
        constants = {tensor.name: numpy_helper.to_array(tensor).astype(np.int32) for tensor in proto.graph.initializer}
        names = [name.removesuffix(".codes") for name in constants if name.endswith(".codes")]
        assert len(names) == 61
        for name in names:
            codes = constants[f"{name}.codes"] * constants.get(f"{name}.scales.groups", 1)
            assert not overflows(codes.reshape(-1, codes.shape[-1])), name


@pytest.mark.parametrize(("flags", "cpus"), [((), EVERY_CPU), (("--full_range",), VNNI_ALONE)])
def test_the_output_the_card_and_the_report_say_which_cpus_a_folder_is_for(flags, cpus, optimized):
    folder = optimized(*FLAGS, *flags)
    assert read_manifest(folder)["optimize"]["cpus"] == cpus
    assert f"For {cpus}." in (folder / CARD).read_text()
    assert f"for {cpus}" in (folder / "optimization_report.html").read_text()
    warning = f"--full_range makes a folder for {cpus}"
    assert printed_by(folder, "errors").count(f"warning: {warning}") == len(flags)
    assert printed_by(folder).count(warning) == len(flags)  # repeated at the end


def test_only_the_full_range_is_warned_of():
    def warned(**flags) -> bool:
        return any("--full_range" in line for line in OptimizeOptions(**flags).advice("cpu"))

    assert warned(quant_method="int8", full_range=True)
    assert warned(decoder_joint_precision="int8", full_range=True)
    for flags in ({}, {"quant_method": "int8"}, {"skip_quantization": True}):
        assert not warned(**flags)
