"""The graph of the features against NeMo's own preprocessor, and onnx-asr's own command line on the folder."""

import dataclasses
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import soundfile

from common.checkpoint.spec import ModelSpec
from common.cli import CheckError
from common.folder import FILES, read_manifest
from common.layouts.log_mel import FEATURES_TOLERANCE, check_features, log_mel_graph
from common.layouts.onnx_asr import ONNX_ASR
from common.run.audio import Clip, load_clip
from common.run.reference import Nemo, features_of
from tests.helpers import CLIPS, SAMPLES, check_runtime


@pytest.fixture(scope="module")
def spec(tiny_model) -> ModelSpec:
    return ModelSpec.of(tiny_model)


NUMBERS = {
    "128 mels": {},
    "80 mels": {"num_mels": 80},
    "other lengths": {"num_mels": 64, "fft_size": 1024, "win_length": 512, "hop_length": 320},
}


def preprocessor(spec: ModelSpec) -> Any:
    """NeMo's own, with these numbers."""
    from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor

    return AudioToMelSpectrogramPreprocessor(
        sample_rate=spec.sample_rate,
        features=spec.num_mels,
        n_fft=spec.fft_size,
        n_window_size=spec.win_length,
        window_size=None,
        n_window_stride=spec.hop_length,
        window_stride=None,
        preemph=spec.preemphasis or None,
        log_zero_guard_value=spec.log_guard,
        dither=1e-5,
        pad_to=0,
    ).eval()


@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)
def test_the_graph_computes_nemos_features(numbers, spec):
    """A ragged batch of speech, speech before silence, and a clip of five frames less one sample.

    Bands whose energy is below the guard of the logarithm are left out: their features are rounding errors of the
    logarithm, divided by a deviation that is nearly 0.
    """
    import torch

    spec = dataclasses.replace(spec, **numbers)
    clips = [load_clip(Clip(clip), 16000, 0) for clip in CLIPS[:3]]
    clips += [np.concatenate([clips[0][:24000], np.zeros(8000, np.float32)]), clips[1][: 5 * spec.hop_length - 1]]
    lengths = np.array([len(clip) for clip in clips])
    waveforms = np.zeros((len(clips), lengths.max()), np.float32)
    for row, clip in zip(waveforms, clips, strict=True):
        row[: len(clip)] = clip
    session = ort.InferenceSession(log_mel_graph(spec))
    made, made_lengths = session.run(["features", "features_lens"], {"waveforms": waveforms, "waveforms_lens": lengths})
    with torch.inference_mode():
        expected, expected_lengths = preprocessor(spec)(
            input_signal=torch.from_numpy(waveforms), length=torch.from_numpy(lengths)
        )
    assert made.dtype == np.float32
    assert made.shape[1] == spec.num_mels
    assert made_lengths.tolist() == expected_lengths.tolist()
    for actual, reference, length in zip(made, expected.numpy(), made_lengths, strict=True):
        np.testing.assert_allclose(actual[:, :length], reference[:, :length], rtol=0, atol=FEATURES_TOLERANCE)
        assert not actual[:, length:].any()


def test_rows_without_a_frame_and_what_lies_behind_the_end_of_a_row(spec):
    """Rows of each small length are those of NeMo, zeros where there is no frame, and nothing behind the end of a row
    reaches it. Without any sample, where NeMo stops with an IndexError, there is one frame, which is not valid."""
    import torch

    session, nemo = ort.InferenceSession(log_mel_graph(spec)), preprocessor(spec)

    def features(waveforms: np.ndarray, lengths: list[int]) -> list[np.ndarray]:
        return session.run(None, {"waveforms": waveforms, "waveforms_lens": np.array(lengths)})

    speech = load_clip(Clip(CLIPS[0]), 16000, 0)[8000:12000]
    for samples in (1, 2, 100, 159, 160, 161, 319, 320, 500):
        made, lengths = features(speech[None, :samples], [samples])
        with torch.inference_mode():
            expected, _ = nemo(input_signal=torch.from_numpy(speech[None, :samples]), length=torch.tensor([samples]))
        assert made.shape == expected.shape == (1, 128, 1 + samples // 160)
        assert lengths.tolist() == [samples // 160]
        np.testing.assert_allclose(made, expected.numpy(), rtol=0, atol=FEATURES_TOLERANCE)

    ends = [0, 1, 159, 160, 1000, 4000]
    batch = np.tile(speech, (len(ends), 1))
    with torch.inference_mode():
        expected, _ = nemo(input_signal=torch.from_numpy(batch), length=torch.tensor(ends))
    for behind in (0, np.nan, np.inf, -np.inf, 3e38):
        for row, end in zip(batch, ends, strict=True):
            row[end:] = behind
        made, lengths = features(batch, ends)
        assert lengths.tolist() == [end // 160 for end in ends]
        np.testing.assert_allclose(made, expected.numpy(), rtol=0, atol=FEATURES_TOLERANCE)

    made, lengths = features(np.zeros((2, 0), np.float32), [0, 0])
    assert (made.shape, lengths.tolist()) == ((2, 128, 1), [0, 0])
    assert not made.any()


def test_features_that_differ_are_an_error(spec, tiny_model):
    features = partial(features_of, tiny_model)
    check_runtime(ONNX_ASR, spec, features)
    for wrong in ({"preemphasis": 0.95}, {"log_guard": 2.0**-20}, {"norm_eps": 0.1}, {"hop_length": 161}):
        graph = log_mel_graph(dataclasses.replace(spec, **wrong))
        with pytest.raises(
            CheckError, match=r"nemo128.onnx differs from the checkpoint's own features by .*, more than 1e-03;"
        ):
            check_features("nemo128.onnx", graph, spec, features)


@pytest.mark.slow
class TestOnnxAsr:
    def command_line(self, clip: Path, *argv) -> str:
        """What `onnx-asr` prints, run as a user runs it."""
        command = [str(Path(sys.executable).with_name("onnx-asr")), "nemo-conformer-tdt", str(clip), *map(str, argv)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def test_its_command_line_finds_the_float32_and_the_int8_graphs(
        self, tiny_runtimes, optimized, tiny_model, tmp_path
    ):
        exported = tiny_runtimes / ONNX_ASR.runtime
        clip = tmp_path / "clip.wav"
        samples, rate = soundfile.read(SAMPLES / "clips" / "123_joe.flac")
        soundfile.write(clip, samples, rate, subtype="PCM_16")
        nemo = Nemo(tiny_model)
        expected = nemo.transcribe(nemo.features(load_clip(Clip(clip), 16000, 0))).text.strip()
        assert self.command_line(clip, "-p", exported) == expected
        folder = optimized("--quant_method", "int8", source=exported)
        assert self.command_line(clip, "-p", folder, "-q", "int8") == expected
        # Under that name alone, as onnx-asr downloads it.
        alone = tmp_path / "alone"
        alone.mkdir()
        names = [f"{graph.name}.int8.onnx" for graph in ONNX_ASR.graphs]
        for name in (*names, "config.json", "vocab.txt"):
            (alone / name).write_bytes((folder / name).read_bytes())
        assert self.command_line(clip, "-p", alone, "-q", "int8") == expected
        listed = read_manifest(folder)[FILES]
        assert {*names, "nemo128.onnx"} <= listed.keys()
        for graph in ONNX_ASR.graphs:
            assert (folder / graph.file).samefile(folder / f"{graph.name}.int8.onnx")
        assert (folder / "nemo128.onnx").read_bytes() == (exported / "nemo128.onnx").read_bytes()
        assert json.loads((exported / "config.json").read_text())["features_size"] == 128
