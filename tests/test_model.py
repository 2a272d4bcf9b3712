"""Reading checkpoints and configs: every number comes from the checkpoint, and errors name what is not supported."""

import contextlib
import hashlib
import json
import shutil

import pytest

from common.checkpoint.find import find_checkpoint
from common.checkpoint.spec import ModelSpec, _feature_differences
from common.export.pipeline import ExportOptions
from common.layouts.genai import GENAI, audio_processor_config, genai_config
from common.layouts.layout import NO_SYMBOL_LIMIT
from common.run.audio import Clip, load_clip
from common.run.genai import GenAI
from common.run.reference import Nemo
from tests.helpers import (
    CLIPS,
    TINY,
    check_runtime,
    config_of,
    ctc_only,
    load_model,
    plain_rnnt,
    rewrite_config,
    rewrite_weights,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def spec(tiny_model):
    return ModelSpec.of(tiny_model)


def window(spec, chunk: float, left: float, right: float) -> dict[str, int]:
    options = ExportOptions(
        runtime="genai", chunk_seconds=chunk, left_context_seconds=left, right_context_seconds=right
    )
    return options.window(spec)


def test_spec_of_the_bundled_checkpoint(spec):
    assert (spec.num_mels, spec.encoder_dim, spec.encoder_layers, spec.subsampling_factor) == (128, 128, 5, 8)
    assert (spec.decoder_dim, spec.decoder_layers, spec.vocab_size, spec.blank_id) == (64, 2, 8193, 8192)
    assert spec.durations == (0, 1, 2, 3, 4)
    assert (spec.sample_rate, spec.fft_size, spec.win_length, spec.hop_length) == (16000, 512, 400, 160)
    # Absent from the checkpoint's YAML: NeMo's own defaults.
    assert "preemph" not in config_of(TINY)["preprocessor"]
    assert (spec.preemphasis, spec.log_guard) == (0.97, 2**-24)
    assert spec.unsupported_features == ()


def test_genai_config(spec, tiny_export):
    found = json.loads((tiny_export / "genai_config.json").read_text())
    assert found == genai_config(spec, window(spec, 60, 10, 2))
    model = found["model"]
    assert (model["chunk_samples"], model["left_context_samples"], model["right_context_samples"]) == (
        960_000, 160_000, 32_000,
    )  # fmt: skip
    assert model["vocab_size"] == 8193
    assert model["blank_id"] == model["eos_token_id"] == 8192
    assert model["decoder"]["num_hidden_layers"] == 2
    assert model["encoder"]["inputs"] == {"audio_features": "audio_signal", "input_lengths": "length"}
    cuda = genai_config(spec, {}, "cuda")["model"]
    provider = {"cudnn_conv_algo_search": "HEURISTIC"}
    assert cuda["encoder"]["session_options"]["provider_options"] == [{"cuda": provider}]
    assert cuda["decoder"]["session_options"]["provider_options"] == [{"cuda": {}}]
    assert "session_options" not in cuda["joiner"]  # it takes the decoder's


@pytest.mark.parametrize(("section", "read"), [("encoder", True), ("decoder", True), ("joiner", False)])
def test_which_sections_genai_reads_providers_from(section, read, tiny_export, tmp_path):
    """The wheel without CUDA rejects a CUDA provider in a section that it reads, and overlooks one elsewhere."""
    shutil.copytree(tiny_export, tmp_path / "models")
    path = tmp_path / "models" / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"][section]["session_options"] = {"provider_options": [{"cuda": {}}]}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"(?i)cuda") if read else contextlib.nullcontext():
        GenAI(tmp_path / "models")


def test_no_symbol_limit_is_not_zero(spec):
    import dataclasses

    unlimited = dataclasses.replace(spec, max_symbols=None)
    assert genai_config(unlimited, {})["model"]["max_symbols_per_step"] == NO_SYMBOL_LIMIT
    assert genai_config(spec, {})["model"]["max_symbols_per_step"] == 10


def test_audio_processor_config(spec):
    parameters = audio_processor_config(spec)["audio_params"]
    assert (parameters["n_mels"], parameters["preemphasis"], parameters["log_zero_guard_value"]) == (128, 0.97, 2**-24)


def test_window_in_whole_encoder_frames(spec):
    assert list(window(spec, 6, 10, 2).values()) == [96_000, 160_000, 32_000]
    assert list(window(spec, 0.08, 0, 0).values()) == [1280, 0, 0]
    for flag, seconds in (
        ("chunk_seconds", (6.05, 10, 2)), ("left_context_seconds", (6, 0.5, 2)),
        ("right_context_seconds", (6, 10, 0.01)),
        ("chunk_seconds", (1e-9, 10, 2)), ("left_context_seconds", (6, -0.08, 2)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"--{flag} must be a whole number of encoder frames of 0.08 s"):
            window(spec, *seconds)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"normalize": "all_features"}, "normalize is 'all_features'"),
        ({"mag_power": 1.0}, "mag_power is 1.0"),
        ({"log": False}, "log is False"),
        ({"log_zero_guard_type": "clamp"}, "log_zero_guard_type is 'clamp'"),
        ({"frame_splicing": 3}, "frame_splicing is 3"),
        ({"exact_pad": True}, "exact_pad is True"),
        ({"window": "hamming"}, "window"),
        ({"window": "none"}, "window"),
        ({"lowfreq": 60}, "mel filterbank"),
        ({"highfreq": 7000}, "mel filterbank"),
        ({"mel_norm": None}, "mel filterbank"),
    ],
    ids=str,
)
def test_features_that_genai_cannot_compute_are_named(option, named, spec):
    import dataclasses

    from nemo.collections.asr.parts.preprocessing.features import FilterbankFeatures

    common = {"sample_rate": 16000, "n_window_size": 400, "n_window_stride": 160, "n_fft": 512, "nfilt": 80}
    assert not list(_feature_differences(FilterbankFeatures(**common)))
    differences = tuple(_feature_differences(FilterbankFeatures(**{**common, **option})))
    assert len(differences) == 1
    assert named in differences[0]
    with pytest.raises(ValueError, match=r"differ: .*" + named.split()[0]):
        check_runtime(GENAI, dataclasses.replace(spec, unsupported_features=differences))


@pytest.mark.parametrize("durations", [(1, 2, 3), (0, 1, 0), (0,), (2, 0)])
def test_durations_that_genai_cannot_decode(durations, spec):
    import dataclasses

    with pytest.raises(ValueError, match="durations"):
        check_runtime(GENAI, dataclasses.replace(spec, durations=durations))


WINDOW, FILTER_BANK = "preprocessor.featurizer.window", "preprocessor.featurizer.fb"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("saved_as", ["half", "float32 again"])
def test_a_checkpoint_saved_in_half_precision_has_the_features_of_its_config(
    dtype, saved_as, random_checkpoint, tmp_path
):
    """`model.half()` rounds window and filter bank, and they stay rounded in a float32 checkpoint made from it."""
    import numpy as np
    import torch

    half, whole = getattr(torch, dtype), load_model(random_checkpoint)

    def to_half(weights):
        for name, tensor in weights.items():
            rounded = tensor.to(half) if tensor.is_floating_point() else tensor
            weights[name] = rounded.float() if saved_as != "half" and tensor.is_floating_point() else rounded
        exact = whole.preprocessor.featurizer.window
        assert not torch.equal(weights[WINDOW].float(), exact)  # so that there is something to put right

    model = load_model(rewrite_weights(tmp_path / "half.nemo", to_half, random_checkpoint))
    assert ModelSpec.of(model).unsupported_features == ()
    samples = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
    np.testing.assert_array_equal(Nemo(model).features(samples), Nemo(whole).features(samples))
    # The weights are those stored, not those of the float32 checkpoint.
    name, parameter = next(iter(model.named_parameters()))
    assert torch.equal(parameter, dict(whole.named_parameters())[name].to(half).float())


def another_window(weights):
    import torch

    weights[WINDOW] = torch.hann_window(400, periodic=True)


def a_rounded_hamming_window(weights):
    import torch

    weights[WINDOW] = torch.hamming_window(400, periodic=False).half()


def a_filter_bank_of_other_values(weights):
    weights[FILTER_BANK] = (weights[FILTER_BANK].float() * 1.05).half()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (another_window, "window"),
        (a_rounded_hamming_window, "window"),
        (a_filter_bank_of_other_values, "filterbank"),
    ],
)
def test_what_rounding_does_not_explain_is_named(change, named, random_checkpoint, tmp_path):
    checkpoint = rewrite_weights(tmp_path / "odd.nemo", change, random_checkpoint)
    found = ModelSpec.of(load_model(checkpoint)).unsupported_features
    assert len(found) == 1
    assert named in found[0]


def test_the_model_is_what_nemo_restores_by_itself(restore_with_nemo, random_checkpoint, tmp_path):
    """Its config even has the labels, long lists that are left out while the model is restored."""
    import torch
    from nemo.collections.asr.models import ASRModel
    from omegaconf import OmegaConf

    own, model = (
        ASRModel.restore_from(str(random_checkpoint), map_location="cpu"),
        restore_with_nemo(random_checkpoint, config_of(random_checkpoint), "cpu", tmp_path),
    )
    assert len(own.cfg.labels) == len(own.joint.vocabulary) == 40
    assert list(model.joint.vocabulary) == list(own.joint.vocabulary)
    assert OmegaConf.to_container(model.cfg) == OmegaConf.to_container(own.cfg)
    expected, actual = own.state_dict(), model.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name].to(tensor.dtype)) for name, tensor in actual.items())


@pytest.mark.parametrize("strategy", ["beam", "maes"])
def test_a_checkpoint_saved_with_beam_search_decodes_greedily(strategy, random_checkpoint, tmp_path):
    """NeMo's beam searches have no limit of symbols on a frame, and no runtime here searches so."""

    def search(config):
        config["decoding"].update(strategy=strategy)

    model = load_model(rewrite_config(tmp_path / "beam.nemo", search, random_checkpoint))
    greedy = load_model(random_checkpoint)
    assert ModelSpec.of(model) == ModelSpec.of(greedy)
    features = Nemo(greedy).features(load_clip(Clip(CLIPS[0]), 16000, 0))
    made, expected = Nemo(model).transcribe(features), Nemo(greedy).transcribe(features)
    assert expected.tokens
    assert (made.tokens, made.frames) == (expected.tokens, expected.frames)


def test_a_checkpoint_is_unpacked_where_there_is_room(monkeypatch, tmp_path, random_checkpoint, restore_with_nemo):
    """First only the disk of temporary files is full, then that of the working directory as well."""
    import tempfile
    from collections import namedtuple

    from nemo.core.connectors.save_restore_connector import SaveRestoreConnector

    temporary, work = tmp_path / "temporary", tmp_path / "work"
    for folder in (temporary, work):
        folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.chdir(work)
    usage = namedtuple("usage", "total used free")
    free = {temporary: 1000, work: 10**9}
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, free[path]))
    monkeypatch.setattr("common.checkpoint.nemo.load_model", restore_with_nemo)
    unpacked, real = [], SaveRestoreConnector._unpack_nemo_file
    spy = lambda path2file, out_folder, *a, **k: unpacked.append(out_folder) or real(path2file, out_folder, *a, **k)  # noqa: E731
    monkeypatch.setattr(SaveRestoreConnector, "_unpack_nemo_file", staticmethod(spy))
    load_model(random_checkpoint)
    assert unpacked
    assert all(folder.startswith(str(work)) for folder in unpacked)
    free[work] = 1000
    with pytest.raises(OSError, match=r"work needs 1.1 MB of free disk, and 1.0 kB are free"):
        load_model(random_checkpoint)


def multi_blank(config):
    config["decoding"] = {"strategy": "greedy_batch", "big_blank_durations": [2, 4]}


@pytest.mark.parametrize("change", [plain_rnnt, ctc_only, multi_blank])
def test_other_families_are_rejected(change, tmp_path):
    with pytest.raises(ValueError, match=r"other\.nemo is not a TDT model: "):
        find_checkpoint(str(rewrite_config(tmp_path / "other.nemo", change)))


class TestFormats:
    def test_a_folder_without_a_checkpoint_is_named(self, tmp_path):
        shutil.copy(TINY, tmp_path / "one.nemo")
        assert find_checkpoint(str(tmp_path)).path == tmp_path / "one.nemo"
        shutil.copy(TINY, tmp_path / "two.nemo")
        with pytest.raises(ValueError, match=r"has one\.nemo, two\.nemo; pass the path of one of them"):
            find_checkpoint(str(tmp_path))
        with pytest.raises(FileNotFoundError, match="there is nothing at"):
            find_checkpoint(str(tmp_path / "three.nemo"))

    def test_all_files_are_in_the_size_and_in_the_digest(self, tiny_transformers):
        """The digest is that of what `sha256sum config.json … model.safetensors` prints."""
        names = ("config.json", "processor_config.json", "tokenizer.json", "model.safetensors")
        digests = {name: hashlib.sha256((tiny_transformers / name).read_bytes()).hexdigest() for name in names}
        printed = "".join(f"{digests[name]}  {name}\n" for name in names)
        converted, bundled = find_checkpoint(str(tiny_transformers)), find_checkpoint(str(TINY))
        assert converted.record() == {
            "file": tiny_transformers.name,
            "sha256": hashlib.sha256(printed.encode()).hexdigest(),
            "format": "transformers",
        }
        assert converted.size == sum((tiny_transformers / name).stat().st_size for name in names)
        assert bundled.size == TINY.stat().st_size
        assert bundled.record() == {
            "file": TINY.name,
            "sha256": hashlib.sha256(TINY.read_bytes()).hexdigest(),
            "format": "nemo",
        }
