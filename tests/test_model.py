"""Reading checkpoints and configs: every number from the checkpoint, refusals by name."""

import contextlib
import json
import shutil

import pytest

from common.configs import NO_SYMBOL_LIMIT, Window, audio_processor_config, check_genai_supports, genai_config
from common.model import ModelSpec, _feature_differences, read_config, require_tdt
from common.runtime import GenAI
from tests.conftest import TINY
from tests.faults import checkpoints


@pytest.fixture(scope="module")
def spec(tiny_model):
    return ModelSpec.of(tiny_model)


def rewrite_config(path, change):
    """Copy the bundled checkpoint to `path` with its config changed by `change(config)`."""
    checkpoints.with_config(path, change)
    return path


def test_spec_of_the_bundled_checkpoint(spec):
    assert (spec.num_mels, spec.encoder_dim, spec.encoder_layers, spec.subsampling_factor) == (128, 128, 5, 8)
    assert (spec.decoder_dim, spec.decoder_layers, spec.vocab_size, spec.blank_id) == (64, 2, 8193, 8192)
    assert spec.durations == (0, 1, 2, 3, 4)
    assert (spec.sample_rate, spec.fft_size, spec.win_length, spec.hop_length) == (16000, 512, 400, 160)
    # Absent from the checkpoint's YAML: NeMo's own defaults.
    assert "preemph" not in read_config(TINY)["preprocessor"]
    assert (spec.preemphasis, spec.log_guard) == (0.97, 2**-24)
    assert spec.unsupported_features == ()


def test_genai_config(spec, tiny_export):
    found = json.loads((tiny_export / "genai_config.json").read_text())
    assert found == genai_config(spec, Window.of_seconds(spec, 60, 10, 2))
    model = found["model"]
    assert (model["chunk_samples"], model["left_context_samples"], model["right_context_samples"]) == (
        960_000, 160_000, 32_000,
    )  # fmt: skip
    assert model["vocab_size"] == 8193
    assert model["blank_id"] == model["eos_token_id"] == 8192
    assert model["decoder"]["num_hidden_layers"] == 2
    assert model["encoder"]["inputs"] == {"audio_features": "audio_signal", "input_lengths": "length"}
    cuda = genai_config(spec, Window(1280, 0, 0), "cuda")["model"]
    provider = {"cudnn_conv_algo_search": "HEURISTIC"}
    assert cuda["encoder"]["session_options"]["provider_options"] == [{"cuda": provider}]
    assert cuda["decoder"]["session_options"]["provider_options"] == [{"cuda": {}}]
    assert "session_options" not in cuda["joiner"]  # it takes the decoder's


@pytest.mark.parametrize(("section", "read"), [("encoder", True), ("decoder", True), ("joiner", False)])
def test_which_sections_genai_reads_providers_from(section, read, tiny_export, tmp_path):
    """The wheel without CUDA refuses a provider that it registers, and takes one that it overlooks."""
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
    assert genai_config(unlimited, Window(1280, 0, 0))["model"]["max_symbols_per_step"] == NO_SYMBOL_LIMIT
    assert genai_config(spec, Window(1280, 0, 0))["model"]["max_symbols_per_step"] == 10


def test_audio_processor_config(spec):
    parameters = audio_processor_config(spec)["audio_params"]
    assert (parameters["n_mels"], parameters["preemphasis"], parameters["log_zero_guard_value"]) == (128, 0.97, 2**-24)


def test_window_in_whole_encoder_frames(spec):
    assert Window.of_seconds(spec, 6, 10, 2) == Window(96_000, 160_000, 32_000)
    assert Window.of_seconds(spec, 0.08, 0, 0) == Window(1280, 0, 0)
    for seconds in ((6.05, 10, 2), (6, 0.5, 2), (6, 10, 0.01), (0, 10, 2), (6, -0.08, 2)):
        with pytest.raises(ValueError, match="whole number of encoder frames of"):
            Window.of_seconds(spec, *seconds)


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
        check_genai_supports(dataclasses.replace(spec, unsupported_features=differences))


@pytest.mark.parametrize("durations", [(1, 2, 3), (0, 1, 0), (0,), (2, 0)])
def test_durations_that_genai_cannot_decode(durations, spec):
    import dataclasses

    with pytest.raises(ValueError, match="durations"):
        check_genai_supports(dataclasses.replace(spec, durations=durations))


def plain_rnnt(config):
    config["joint"]["num_extra_outputs"] = 0


def ctc_only(config):
    del config["joint"], config["decoder"]


def multi_blank(config):
    config["decoding"] = {"strategy": "greedy_batch", "big_blank_durations": [2, 4]}


@pytest.mark.parametrize("change", [plain_rnnt, ctc_only, multi_blank])
def test_other_families_are_refused(change, tmp_path):
    with pytest.raises(ValueError, match="not a TDT model: "):
        require_tdt(rewrite_config(tmp_path / "other.nemo", change))
    require_tdt(TINY)
