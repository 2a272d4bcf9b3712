"""Calibration: codes with error feedback, damages compared with plain runs of the exported graph, and size budgets."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

import optimize_encoder
from common.contract import ENCODER
from common.folder import MANIFEST
from common.onnx_io import load, save_model
from common.quantize import K_QUANT_MIXED, int8, rewrite
from common.quantize.blocks import fit_blocks, k_quant, quantize_blocks
from common.quantize.calibration import (
    BATCH_SECONDS,
    CutEncoder,
    SizeModel,
    fit_widths,
    read_speech,
    speech_batches,
    spend,
)
from common.quantize.fidelity import sqnr_db
from common.quantize.methods import Format, OptimizeOptions, Plan
from common.quantize.rewrite import fuse, plan_encoder, quantizable, quantize_weights
from common.quantize.rounding import InputMoments, round_rows
from common.run.audio import read_clips
from common.run.genai import GenAI
from common.run.ort import OrtGraph
from tests.helpers import MATRICES, SAMPLES, dequantize

BLOCK = 32
CLIPS = SAMPLES / "manifest.jsonl"
FORMS = (Format(4, BLOCK), Format(8, BLOCK))
RNG = np.random.default_rng(11)


@pytest.fixture(scope="module")
def speech(tiny_export):
    return read_speech(tiny_export, read_clips(CLIPS)[1:])[0]  # the first is kept to look at the result


@pytest.fixture(scope="module")
def calibration(tiny_export, speech) -> tuple:
    """All weights in both widths, their damages, and the row factors."""
    path = tiny_export / ENCODER.file
    return fit_widths(CutEncoder(path, quantizable(load(path))), speech, K_QUANT_MIXED, FORMS)


@pytest.fixture(scope="module")
def unseen(tiny_export) -> np.ndarray:
    """A clip that no calibration has used, [1, M, T]."""
    genai = GenAI(tiny_export)
    return genai.features(genai.config.read_audio(read_clips(CLIPS)[0].path))[None]


def encode(folder: Path, batch: np.ndarray) -> np.ndarray:
    """Equal lengths, so every frame counts. [B, M, T] → [B, D, S]"""
    return OrtGraph(folder, ENCODER)(batch, np.full(len(batch), batch.shape[2]))[0]


def quantized(tiny_export: Path, folder: Path, plan: Plan, calibration: tuple | None) -> Path:
    """A folder with only the encoder, its weights of `plan` replaced, inputs not rounded."""
    model, fitted = load(tiny_export / ENCODER.file), {}
    if calibration:
        packed, _, factors = calibration
        rewrite.fold(model, factors)
        fitted = {name: packed[name][form.bits] for name, form in plan.items()}
    quantize_weights(model, plan, K_QUANT_MIXED, OptimizeOptions(accuracy_level=1), fitted)
    folder.mkdir(exist_ok=True)
    save_model(model, folder / ENCODER.file)
    return folder


def correlated_rows(K: int, count: int = 400) -> np.ndarray:
    return (RNG.standard_normal((count, K // 8)) @ RNG.standard_normal((K // 8, K))).astype(np.float32)


def moments_of(x: np.ndarray) -> InputMoments:
    return InputMoments(x.T @ x, strongest_first=False)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("name", MATRICES)
def test_feedback_undoes_errors_in_the_product(name, block, bits):
    weight = MATRICES[name][:200]  # no multiple of the blocks
    x = correlated_rows(len(weight))
    packed, became = fit_blocks(weight, bits, block, k_quant, moments_of(x))
    np.testing.assert_allclose(became, dequantize(packed, len(weight), bits), atol=1e-6)
    plain = dequantize(quantize_blocks(weight, bits, block, k_quant), len(weight), bits)
    assert 4 * np.sum((x @ (weight - became)) ** 2) < np.sum((x @ (weight - plain)) ** 2)


@pytest.mark.parametrize("last_first", [False, True])
def test_each_row_is_moved_by_the_errors_of_all_rows_before_it(last_first):
    weight = MATRICES["gaussian"][:50].astype(np.float64)  # no multiple of the blocks
    K, scale = len(weight), 0.01
    feedback = np.tril(RNG.standard_normal((K, K)) * 0.2, -1) + np.eye(K)
    feedback = feedback[::-1, ::-1] if last_first else feedback
    expected, errors = np.zeros_like(weight), np.zeros_like(weight)
    for k in reversed(range(K)) if last_first else range(K):
        target = weight[k] + feedback[k] @ errors
        expected[k] = np.clip(np.rint(target / scale), -8, 7)
        errors[k] = weight[k] - expected[k] * scale
    scales = np.full(weight.shape[1], scale, np.float32)
    arrays = weight.astype(np.float32), feedback.astype(np.float32)
    steps, *_, found = round_rows(arrays[0], 4, 16, lambda *_: (scales, 8), arrays[1], last_first=last_first)
    assert np.mean(steps == expected) > 0.999  # a sum that is half a step may be rounded to either side
    np.testing.assert_allclose(found, weight - steps * scale, atol=1e-6)


def test_row_factors_leave_the_fitted_weight():
    weight = MATRICES["gaussian"][:96]
    factors = RNG.uniform(0.1, 1, (len(weight), 1)).astype(np.float32)
    packed, became = fit_blocks(weight, 8, BLOCK, k_quant, moments_of(correlated_rows(len(weight))), factors)
    np.testing.assert_allclose(became * factors, dequantize(packed, len(weight), 8), atol=1e-6)
    assert packed.error == pytest.approx(np.sum((became - weight) ** 2) / np.sum(weight**2), rel=1e-3)


def test_without_correlations_there_is_nothing_to_feed_back():
    weight = MATRICES["gaussian"]
    inputs = moments_of(np.eye(len(weight), dtype=np.float32))
    np.testing.assert_allclose(inputs.feedback, np.eye(len(weight)), atol=1e-6)
    plain = quantize_blocks(weight, 4, BLOCK, k_quant)
    packed, _ = fit_blocks(weight, 4, BLOCK, k_quant, inputs)
    for one, other in zip(packed.tensors(), plain.tensors(), strict=True):
        np.testing.assert_array_equal(one[1], other[1])


def test_inputs_that_are_always_zero_or_few():
    weight = MATRICES["gaussian"]
    for rows in (np.zeros((5, len(weight)), np.float32), correlated_rows(len(weight))[:1]):
        _, became = fit_blocks(weight, 4, BLOCK, k_quant, moments_of(rows))
        assert np.sum((weight - became) ** 2) < 0.02 * np.sum(weight**2)


def test_batches_hold_no_padding_and_nearly_all_speech():
    clips = [np.full((3, T), T, np.float32) for T in (150, 5000, 210, 30, 700, 160, 900)]
    batches = speech_batches(clips, 100)
    assert all(batch.shape[0] * batch.shape[2] <= BATCH_SECONDS * 100 for batch in batches)
    assert all(len(batch) == 1 or np.all(batch[:, :, -1] >= batch.shape[2]) for batch in batches)
    kept = sum(batch.shape[0] * batch.shape[2] for batch in batches)
    assert 0.7 < kept / sum(clip.shape[1] for clip in clips) <= 1


@pytest.mark.slow
def test_damage_is_what_the_exported_graph_shows(tiny_export, tmp_path, speech, calibration):
    """Quantize one weight alone, in MatMulNBits with smoothed inputs: on the batch that damage is measured on, and on
    all speech."""
    weights = list(quantizable(load(tiny_export / ENCODER.file)))
    packed, found, _ = calibration
    assert list(packed) == weights
    part = speech[len(speech) // 2]
    checked = weights[::9]
    everywhere = []
    for name in checked:
        for bits, tolerance in ((4, 1.02), (8, 3.0)):  # 8 bits move the output by 1e-8, where float32 rounds too
            folder = quantized(tiny_export, tmp_path / "one", {name: Format(bits, BLOCK)}, calibration)
            exact = 10 ** (-sqnr_db(encode(tiny_export, part), encode(folder, part)) / 10)
            assert 1 / tolerance < found[name][bits] / exact < tolerance, (name, bits)
            if bits == 4:
                expected, output = (
                    np.concatenate([encode(where, batch).ravel() for batch in speech])
                    for where in (tiny_export, folder)
                )
                everywhere.append(-sqnr_db(expected, output))
    ranks = [np.argsort(np.argsort(values)) for values in (everywhere, [found[name][4] for name in checked])]
    assert np.corrcoef(*ranks)[0, 1] > 0.9


def test_a_budget_goes_where_the_damage_per_byte_is(tiny_export, tmp_path, calibration, unseen):
    """In no more bytes, a plan from the true damages beats the rule of thumb, and a plan from swapped damages."""
    model = load(tiny_export / ENCODER.file)
    sizes = SizeModel(model, (tiny_export / ENCODER.file).stat().st_size, K_QUANT_MIXED)
    _, true, _ = calibration
    rule = plan_encoder(model, K_QUANT_MIXED, OptimizeOptions(block_size=BLOCK))
    budget = sizes.total(rule)
    order = sorted(true, key=lambda name: true[name][4])
    swapped = {name: true[other] for name, other in zip(order, order[::-1], strict=True)}
    ratios = []
    for damage in (swapped, true):
        plan = spend(sizes, damage, rule, *FORMS, budget)
        assert 0.95 * budget < sizes.total(plan) <= budget
        folder = quantized(tiny_export, tmp_path / "out", plan, calibration)
        assert sum(path.stat().st_size for path in folder.iterdir()) <= budget
        ratios.append(sqnr_db(encode(tiny_export, unseen), encode(folder, unseen)))
    assert plan != rule
    by_rule = quantized(tiny_export, tmp_path / "out", rule, None)
    ratios.insert(1, sqnr_db(encode(tiny_export, unseen), encode(by_rule, unseen)))
    assert ratios[0] + 3 < ratios[1] < ratios[2] - 2


def record_of(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text())["optimize"]


def optimize(tiny_export: Path, target: Path, *flags: str) -> dict:
    assert optimize_encoder.main(["--model_dir", str(tiny_export), "--output_dir", str(target), *flags]) == 0
    return record_of(target)


@pytest.mark.slow
def test_calibrated_is_more_exact_than_rtn_and_no_larger(tiny_export, tiny_optimized, tmp_path, unseen):
    size = json.loads((tiny_optimized / MANIFEST).read_text())["optimize"]["encoder_bytes"]["optimized"]
    flags = ("--quant_method", "k_quant_mixed", "--block_size", "64", "--calibration_manifest", str(CLIPS))
    record = optimize(tiny_export, tmp_path / "out", *flags, "--size_budget_mb", f"{size / 1e6}")
    assert 0.95 * size < record["encoder_bytes"]["optimized"] <= size
    assert record["calibration"]["bytes"] == CLIPS.stat().st_size
    exact = encode(tiny_export, unseen)
    rtn, calibrated = (sqnr_db(exact, encode(folder, unseen)) for folder in (tiny_optimized, tmp_path / "out"))
    assert calibrated > rtn + 2  # 2.8 dB measured, fitted to 30 s of other clips


@pytest.mark.slow
def test_calibrated_int8_has_no_second_term_and_is_more_exact_without(
    tiny_export, optimized, tmp_path, unseen, monkeypatch
):
    flags = ("--quant_method", "int8")
    fit = (*flags, "--calibration_manifest", str(CLIPS))
    fitted, two_terms = optimized(*fit), optimized(*flags)
    assert record_of(fitted)["weights_by_bits"] == {"8": 61}
    monkeypatch.setattr(int8, "TWO_TERM_ROLES", ())
    optimize(tiny_export, tmp_path / "one_term", *flags)
    folders = [tmp_path / "one_term", fitted, two_terms]
    graphs = [onnx.load(folder / ENCODER.file).graph for folder in folders]
    counts = [Counter(node.op_type for node in graph.node) for graph in graphs]
    assert [count["MatMulIntegerToFloat"] for count in counts] == [61, 61, 61 + 2 * 5]
    assert counts[0] == counts[1]
    ratios = [sqnr_db(encode(tiny_export, unseen), encode(folder, unseen)) for folder in folders]
    assert ratios[1] > ratios[0]


@pytest.mark.parametrize("fused", [False, True])
def test_smoothed_inputs_change_nothing_until_they_are_rounded(fused, tiny_export, tmp_path, calibration, unseen):
    """With folded factors and weights times factors the function stays the same, also in a fused graph."""
    path = tiny_export / ENCODER.file
    model = fuse(path)[0] if fused else load(path)
    *_, factors = calibration
    assert {name.split(".", 2)[-1] for name in factors} == {
        *(f"attention.{role}.weight" for role in ("query", "key", "value")),
        *(f"{module}.expand.weight" for module in ("feed_forward1", "feed_forward2", "convolution")),
    }
    assert all(factor.max() == 1 and factor.min() < 0.7 for factor in factors.values())
    rewrite.fold(model, factors)
    (tmp_path / "out").mkdir()
    save_model(model, tmp_path / "out" / ENCODER.file)
    assert sqnr_db(encode(tiny_export, unseen), encode(tmp_path / "out", unseen)) > 100


def test_smoothing_is_rejected_where_no_normalization_is_before(tiny_export):
    model = load(tiny_export / ENCODER.file)
    with pytest.raises(ValueError, match=r"layers.0.attention.out.weight has no normalization before it"):
        rewrite.fold(model, {"layers.0.attention.out.weight": np.ones((128, 1), np.float32)})


def test_row_factors_are_between_a_hundredth_and_one():
    factors = rewrite.row_factors(np.array([0.0, 1e-12, 1.0, 16.0]), np.ones(4))
    np.testing.assert_allclose(factors[:, 0], [0.01, 0.01, 0.5, 1])
    np.testing.assert_allclose(rewrite.row_factors(np.zeros(3), np.ones(3))[:, 0], 0.01)
    assert np.isfinite(rewrite.row_factors(np.ones(3), np.array([0.0, 1.0, 2.0]))).all()  # a row of zeros


MIXED = ("--quant_method", "k_quant_mixed")
REJECTED = {
    "another method": (("--calibration_manifest", CLIPS), "needs --quant_method k_quant_mixed or int8, not rtn"),
    "no quantization": (
        (*MIXED, "--skip_quantization", "--calibration_manifest", CLIPS),
        "needs --quant_method k_quant_mixed or int8, not --skip_quantization",
    ),
    "a budget alone": ((*MIXED, "--size_budget_mb", "2"), "--size_budget_mb needs --calibration_manifest"),
    "a budget for rtn": (
        ("--size_budget_mb", "2"),
        "--size_budget_mb needs --quant_method k_quant_mixed or int8, not rtn",
    ),
    "too small a budget for int8": (
        ("--quant_method", "int8", "--calibration_manifest", CLIPS, "--size_budget_mb", "1"),
        " MB; give a larger --size_budget_mb\n",
    ),
    "too small a budget": (
        (*MIXED, "--calibration_manifest", CLIPS, "--size_budget_mb", "1"),
        "--size_budget_mb 1 is too small: 4 bits for every weight take 1.6",
    ),
    "no number": (
        (*MIXED, "--calibration_manifest", CLIPS, "--size_budget_mb", "nan"),
        "--size_budget_mb nan is too small",
    ),
    "no manifest there": (
        (*MIXED, "--calibration_manifest", "none.jsonl"),
        "there is nothing at none.jsonl; give the path of a clip list",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_refusals_are_one_line_and_leave_nothing(case, tiny_export, tmp_path, capsys):
    flags, message = REJECTED[case]
    argv = ["--model_dir", tiny_export, "--output_dir", tmp_path / "out", *flags]
    assert optimize_encoder.main([str(argument) for argument in argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_too_little_speech_is_rejected(tiny_export, tmp_path, capsys):
    lines = [json.loads(line) for line in CLIPS.read_text().splitlines()[:2]]
    for line in lines:
        line["audio_filepath"] = str(SAMPLES / line["audio_filepath"])
    manifest = tmp_path / "few.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["--model_dir", tiny_export, "--output_dir", tmp_path / "out", *MIXED, "--calibration_manifest", manifest]
    assert optimize_encoder.main([str(argument) for argument in argv]) == 2
    assert "calibration needs at least 10 s of speech, not 3.8 s" in capsys.readouterr().err
