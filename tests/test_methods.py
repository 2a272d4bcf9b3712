"""The registry of quantization methods, the flags as one value, and the roles of the encoder's weights."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import optimize_encoder
import test_e2e
from common.contract import ENCODER, ROLES_OUTSIDE_LAYERS, EncoderWeight, Role, encoder_weight
from common.evaluate.stress import StressOptions
from common.folder import MANIFEST
from common.onnx_io import load
from common.quantize import METHODS, RTN
from common.quantize.methods import Format, OptimizeOptions, Plan, QuantMethod, Weight, register
from common.quantize.rewrite import plan_encoder, quantizable
from common.quantize.rounding import Packed, relative_error
from common.report.report import REPORT_HTML
from tests.helpers import SAMPLES

CLIPS = SAMPLES / "manifest.jsonl"


def bfloat16(weight: np.ndarray) -> np.ndarray:
    """Cut to the 8 bits of a bfloat16's mantissa, as float32."""
    return (np.ascontiguousarray(weight).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


@dataclass(frozen=True, kw_only=True)
class RoundedMethod(QuantMethod):
    """A new kind of method, which needs no new operator and makes nothing smaller."""

    def plan(self, weights: Mapping[str, EncoderWeight], options: OptimizeOptions) -> Plan:
        return {name: Format(16) for name, weight in weights.items() if weight.role != Role.ATTENTION_POSITION_SINE}

    def pack(self, weight: np.ndarray, form: Format) -> Packed:
        rounded = bfloat16(weight)
        return Packed(rounded, np.ones(1, np.float32), error=relative_error(weight, rounded))

    def replace(self, model: ir.Model, options: OptimizeOptions):
        def put(weight: Weight, packed: Packed, form: Format) -> None:
            weight.value.const_value = ir.tensor(packed.codes, name=weight.name)

        return put


@pytest.fixture
def toy() -> Iterator[QuantMethod]:
    yield register(RoundedMethod(name="rounded", help="float32 weights that bfloat16 has too"))
    del METHODS["rounded"]


def optimize(source: Path, target: Path, *flags: object) -> int:
    return optimize_encoder.main(["--model_dir", str(source), "--output_dir", str(target), *map(str, flags)])


def test_a_method_of_its_own_kind_needs_nothing_but_its_registration(toy, tiny_export, tmp_path, capsys):
    assert optimize(tiny_export, tmp_path / "out", "--quant_method", "rounded", "--eval_manifest", CLIPS) == 0
    printed = capsys.readouterr().out
    assert "quantization (rounded)" in printed
    assert "56 weights at 16 bits" in printed  # 12 matrices in 5 layers and the subsampling's, 5 left out
    assert "20 SkipLayerNormalization" in printed
    record = json.loads((tmp_path / "out" / MANIFEST).read_text())["optimize"]
    assert (record["method"], record["weights_by_bits"]) == ("rounded", {"16": 56})
    assert 25 < record["sqnr_db_on_noise"] < 60
    assert "rounded" in (tmp_path / "out" / REPORT_HTML).read_text()
    exported, made = (load(folder / ENCODER.file) for folder in (tiny_export, tmp_path / "out"))
    for name in quantizable(exported):
        before, after = (model.graph.initializers[name].const_value.numpy() for model in (exported, made))
        if name.endswith("attention.position_sine.weight"):
            np.testing.assert_array_equal(after, before)
            continue
        np.testing.assert_array_equal(after, bfloat16(after))
        # Behind a normalization its rows have factors; elsewhere these are 1.
        factors = np.linalg.norm(after, axis=1, keepdims=True) / np.linalg.norm(before, axis=1, keepdims=True)
        np.testing.assert_allclose(after, before * factors, rtol=2**-6)
    assert test_e2e.main(["--model_dir", str(tmp_path / "out")]) == 0


def test_help_and_checks_know_a_new_method(toy, tiny_export, tmp_path, capsys):
    with pytest.raises(SystemExit):
        optimize_encoder.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "{rtn,k_quant_mixed,hqq,int8,rounded}" in printed
    assert "rounded: float32 weights that bfloat16 has too" in printed
    assert optimize(tiny_export, tmp_path / "out", "--quant_method", "rounded", "--calibration_manifest", CLIPS) == 2
    assert "needs --quant_method k_quant_mixed or int8, not rounded" in capsys.readouterr().err


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="called rtn already"):
        register(RTN)


def test_every_flag_but_the_folders_is_an_option():
    args = vars(optimize_encoder.parse_args([]))
    options = {
        field.name: field.default for kind in (OptimizeOptions, StressOptions) for field in dataclasses.fields(kind)
    }
    assert args == {"verbose": False, "model_dir": Path("onnx_models"),
                    "output_dir": Path("onnx_models_optimized"), **options}  # fmt: skip


def test_options_record_the_flags_that_decide_the_files_and_no_path():
    record = OptimizeOptions(
        quant_method="int8", calibration_manifest=Path("/home/me/a"), eval_manifest=Path("b")
    ).record()
    assert json.loads(json.dumps(record)) == record
    assert record == {
        "quant_method": "int8", "block_size": 32, "accuracy_level": 4, "decoder_joint_precision": "fp32",
        "weight_bits": 8, "full_range": False, "skip_fusion": False, "skip_quantization": False, "single_file": False,
        "size_budget_mb": None,
    }  # fmt: skip


def test_options_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        OptimizeOptions().block_size = 64


CLASHES = [
    ({"full_range": True}, "--full_range needs --quant_method int8 or"),
    ({"full_range": True, "quant_method": "int8", "skip_quantization": True}, "--full_range needs"),
    ({"calibration_manifest": CLIPS}, "needs --quant_method k_quant_mixed or int8, not rtn"),
    ({"calibration_manifest": CLIPS, "quant_method": "int8", "skip_quantization": True}, "not --skip_quantization"),
    ({"size_budget_mb": 2.0, "quant_method": "hqq"}, "needs --quant_method k_quant_mixed or int8, not hqq"),
    ({"size_budget_mb": 2.0, "quant_method": "int8"}, "needs --calibration_manifest"),
    (
        {"size_budget_mb": 2.0, "quant_method": "int8", "weight_bits": 4, "calibration_manifest": CLIPS},
        "--weight_bits 4 does not go with --size_budget_mb",
    ),
    ({"weight_bits": 4}, "--weight_bits 4 needs --quant_method int8, not rtn"),
    ({"weight_bits": 4, "quant_method": "int8", "skip_quantization": True}, "not --skip_quantization"),
    ({"weight_bits": 5, "quant_method": "int8"}, "--weight_bits 5 needs"),
    (
        {"weight_bits": 4, "quant_method": "int8", "full_range": True},
        "--weight_bits 4 is exact without",
    ),
    ({"size_budget_mb": 2.0, "quant_method": "k_quant_mixed"}, "needs --calibration_manifest"),
    (
        {"block_size": 128, "quant_method": "int8"},
        "--block_size 128 needs --quant_method rtn or k_quant_mixed or hqq, not int8",
    ),
    ({"accuracy_level": 0, "quant_method": "int8"}, "--accuracy_level 0 needs --quant_method rtn"),
    ({"max_wer_increase": 1.0}, "needs --eval_manifest"),
    ({"max_wer_increase": float("nan"), "eval_manifest": CLIPS}, "not nan"),
    ({"max_wer_increase": float("inf"), "eval_manifest": CLIPS}, "not inf"),
]


@pytest.mark.parametrize(("flags", "message"), CLASHES)
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(ValueError, match=message):
        OptimizeOptions(**flags)


@pytest.mark.parametrize("name", METHODS)
def test_each_method_takes_the_flags_that_it_declares(name):
    kind = METHODS[name]
    OptimizeOptions(quant_method=name)
    for ability, flags in (
        (kind.uses_blocks, {"block_size": 64}),
        (kind.has_range, {"full_range": True}),
        (4 in kind.weight_bits, {"weight_bits": 4}),
        (kind.calibrates, {"calibration_manifest": CLIPS}),
        (kind.calibrates, {"calibration_manifest": CLIPS, "size_budget_mb": 2.0}),
    ):
        if ability:
            OptimizeOptions(quant_method=name, **flags)
        else:
            with pytest.raises(ValueError, match=f"--{list(flags)[-1]} (4 |64 )?needs|--calibration_manifest needs"):
                OptimizeOptions(quant_method=name, **flags)


def linear_names(encoder) -> list[str]:
    """Names of the weight matrices of a wrapped encoder, one for every module that multiplies by a matrix."""
    from torch import nn

    from common.export.wrappers import Linear

    return [f"{name}.weight" for name, module in encoder.named_modules() if isinstance(module, Linear | nn.Linear)]


@pytest.mark.parametrize("width_out", [-1, 24], ids=["without projection", "with projection"])
def test_every_matrix_of_the_wrapped_encoder_has_a_role_and_every_role_a_matrix(width_out):
    from nemo.collections.asr.modules import ConformerEncoder

    from common.export.wrappers import Encoder

    encoder = Encoder(ConformerEncoder(
        feat_in=80, n_layers=2, d_model=32, n_heads=2, subsampling="dw_striding", subsampling_factor=8,
        subsampling_conv_channels=8, feat_out=width_out, self_attention_model="rel_pos",
    ).eval())  # fmt: skip
    weights = {name: encoder_weight(name) for name in linear_names(encoder)}
    in_layers = set(Role) - set(ROLES_OUTSIDE_LAYERS)
    expected = {EncoderWeight(role, layer) for role in in_layers for layer in range(2)}
    expected |= {EncoderWeight(Role.SUBSAMPLING_OUT)}
    expected |= {EncoderWeight(Role.PROJECTION)} if width_out > 0 else set()
    assert set(weights.values()) == expected
    assert len(weights) == len(expected)


def test_the_matrices_of_the_exported_graph_are_those_of_the_wrapped_encoder(tiny_model, tiny_export):
    from common.export.wrappers import Encoder

    assert set(quantizable(load(tiny_export / ENCODER.file))) == set(linear_names(Encoder(tiny_model.encoder)))


@pytest.mark.parametrize(
    "name",
    ["layers.0.attention.keys.weight", "attention.key.weight", "layers.0.projection.weight", "onnx::MatMul_7", "w"],
)
def test_a_weight_without_a_role_is_named(name):
    with pytest.raises(ValueError, match=f"the encoder weight {name} has no role"):
        encoder_weight(name)


def renamed(tiny_export: Path, folder: Path, old: str, new: str) -> Path:
    """A copy of the exported folder whose encoder calls a module of every layer something else."""
    folder.mkdir()
    for path in tiny_export.iterdir():
        if path.is_file() and path.name != MANIFEST:  # which would notice the change
            (folder / path.name).write_bytes(path.read_bytes())
    proto = onnx.load(folder / ENCODER.file, load_external_data=False)
    for node in proto.graph.node:
        node.input[:] = [value.replace(old, new) for value in node.input]
    for tensor in proto.graph.initializer:
        tensor.name = tensor.name.replace(old, new)
    onnx.save(proto, folder / ENCODER.file)
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_a_renamed_module_is_an_error_and_not_a_loss_of_quality(name, tiny_export, tmp_path, capsys):
    source = renamed(tiny_export, tmp_path / "in", ".attention.value.", ".attention.values.")
    assert optimize(source, tmp_path / "out", "--quant_method", name) == 2
    assert "the encoder weight layers.0.attention.values.weight has no role" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_small_matrices_stay_float32(tiny_export, monkeypatch):
    model = load(tiny_export / ENCODER.file)
    monkeypatch.setattr("common.quantize.rewrite.MIN_WEIGHTS", 128 * 129)
    plan = plan_encoder(model, RTN, OptimizeOptions())
    roles = Counter(encoder_weight(name).role for name in plan)
    assert Role.ATTENTION_QUERY not in roles
    assert roles[Role.FEED_FORWARD1_EXPAND] == 5
