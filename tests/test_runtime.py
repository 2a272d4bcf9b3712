"""Reading audio, and the engines on the trained checkpoint: NeMo, plain ONNX Runtime and GenAI transcribe the same."""

import gc
import json
import shutil
import weakref

import numpy as np
import pytest
import soundfile

from common.run import ort
from common.run.audio import Clip, load_clip
from common.run.decode import BlankZero
from common.run.genai import GenAI
from common.run.ort import OnnxRuntime, windows
from common.run.reference import Nemo
from tests.helpers import CLIPS, ROWS


@pytest.fixture(scope="module")
def genai(tiny_export):
    return GenAI(tiny_export)


@pytest.fixture(scope="module")
def raw(tiny_export):
    return OnnxRuntime(tiny_export)


@pytest.fixture(scope="module")
def nemo(tiny_model):
    return Nemo(tiny_model)


def speech(seconds: float) -> np.ndarray:
    """The sample clips one after the other, repeated until they last `seconds`."""
    clips = np.concatenate([load_clip(Clip(path), 16000, 1) for path in CLIPS])
    return np.resize(clips, int(seconds * 16000))


@pytest.mark.parametrize("clip", CLIPS, ids=lambda path: path.stem)
def test_every_engine_transcribes_the_same(clip, genai, raw, nemo):
    samples = genai.config.read_audio(clip)
    features = nemo.features(samples)
    reference = nemo.transcribe(features)
    tokens, frames = reference.tokens, reference.frames
    assert tokens
    found = raw.transcribe(features, BlankZero.NEMO)
    assert found.tokens == tokens
    assert [step.frame for step in found.emitted] == frames
    np.testing.assert_allclose(genai.features(samples), features, atol=2e-3)
    assert genai.transcribe(samples) == tokens
    assert genai.text(tokens) == reference.text
    traced = nemo.trace(features)
    assert (traced.tokens, traced.frames) == (tokens, frames)


def test_nemo_is_run_as_nemo_runs_itself(nemo):
    samples = speech(6)
    try:
        own = nemo.model.transcribe([samples], verbose=False)[0]
    finally:
        nemo.model.eval()  # transcribe leaves the decoder and the joint in training mode
    found = nemo.transcribe(nemo.features(samples))
    assert (found.tokens, found.text) == (own.y_sequence.tolist(), own.text)


def test_the_transcripts_are_right(genai):
    """The checkpoint was trained: most of the sample sentences are transcribed without an error."""
    transcripts = [genai.text(genai.transcribe(genai.config.read_audio(clip))) for clip in CLIPS]
    assert sum(one == row["text"] for one, row in zip(transcripts, ROWS, strict=True)) >= 9


@pytest.mark.parametrize(("chunk", "left", "right"), [(2.0, 1.0, 0.48), (0.8, 0.0, 0.0), (5.2, 2.4, 0.8)])
def test_windows_as_genai_cuts_them(chunk, left, right, tiny_export, tmp_path):
    folder = tmp_path / "models"
    shutil.copytree(tiny_export, folder)
    config = json.loads((folder / "genai_config.json").read_text())
    samples = {"chunk_samples": chunk, "left_context_samples": left, "right_context_samples": right}
    config["model"] |= {name: round(seconds * 16000) for name, seconds in samples.items()}
    (folder / "genai_config.json").write_text(json.dumps(config))
    genai, raw = GenAI(folder), OnnxRuntime(folder)
    for seconds in (11.237, chunk, chunk + 0.004, 2 * chunk, 2 * chunk + 0.08):
        clip = speech(seconds)
        assert genai.transcribe(clip) == raw.transcribe(genai.features(clip)).tokens


def test_windows_cover_every_frame_once(raw):
    for mel_frames in (2, 5999, 6000, 6001, 20_003):
        decoded = []
        for mels, frames in windows(raw.config, mel_frames):
            assert mels.stop <= mel_frames
            encoder_frames = (mels.stop - mels.start + 7) // 8
            stop = encoder_frames if frames.stop is None else frames.stop
            decoded += range(mels.start // 8 + frames.start, mels.start // 8 + stop)
        assert decoded == list(range((mel_frames + 7) // 8))


def test_a_long_clip_is_decoded_window_by_window_in_bounded_memory(genai, tiny_export, tmp_path, monkeypatch):
    """In a clip of twelve windows, the encoder frames of no more than two windows are in memory at once, and a bar
    counts the windows."""
    folder = tmp_path / "models"
    shutil.copytree(tiny_export, folder)
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"] |= {"chunk_samples": 16000, "left_context_samples": 0, "right_context_samples": 0}
    (folder / "genai_config.json").write_text(json.dumps(config))
    made, most, updates = [], [], []

    class Frames(np.ndarray):
        """An array that weak references can count."""

    class Counting(OnnxRuntime):
        def encode(self, features):
            (frames,) = super().encode(features)
            counted = frames.view(Frames)
            made.append(weakref.ref(counted))
            gc.collect()
            most.append(sum(reference() is not None for reference in made))
            return [counted]

    class Bar:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self):
            updates.append(1)

    monkeypatch.setattr(ort, "progress_bar", lambda **kind: updates.append(kind["total"]) or Bar())
    raw = Counting(folder)
    features = genai.features(speech(12))
    gc.freeze()  # a collection looks at new objects alone, and not at all of NeMo's
    tokens = raw.transcribe(features).tokens
    gc.unfreeze()
    assert updates == [12] + [1] * 12
    assert len(most) == 12
    assert max(most) <= 3  # the last window, the one before, and the one that is being made
    plain = OnnxRuntime(folder)
    assert tokens == plain.transcribe_all([features, features], batch_size=2)[0].tokens
    assert len(tokens) > 5


@pytest.mark.slow
def test_batches_transcribe_what_each_clip_does_alone(genai, raw):
    """Clips of any length in one batch, one of them in two windows."""
    samples = [genai.config.read_audio(path) for path in CLIPS] + [speech(75), speech(0.1)]
    features = [genai.features(one) for one in samples]
    alone = [raw.transcribe(one).tokens for one in features]
    assert len({len(tokens) for tokens in alone}) > 4
    for size in (2, 5, 100):
        assert [found.tokens for found in raw.transcribe_all(features, batch_size=size)] == alone
    for one, other in zip(raw.encode(features[:3]), features, strict=False):
        np.testing.assert_allclose(one, raw.encode([other])[0], atol=1e-4)


def test_a_batch_that_is_not_masked_is_noticed(genai, raw, monkeypatch):
    features = [genai.features(genai.config.read_audio(path)) for path in CLIPS]
    alone = [raw.transcribe(one).tokens for one in features]
    encoder = raw.encoder
    monkeypatch.setattr(raw, "encoder", lambda padded, lengths: encoder(padded, np.full_like(lengths, lengths.max())))
    assert [found.tokens for found in raw.transcribe_all(features, batch_size=100)] != alone


@pytest.mark.slow
def test_three_windows(genai, raw):
    """The checkpoint knows single sentences and loses most words of a long clip, in NeMo as well. What counts here is
    that the engines lose the same words, and that one window of 130 s runs."""
    samples = speech(130)
    features = genai.features(samples)
    tokens = genai.transcribe(samples)
    assert tokens == raw.transcribe(features).tokens
    assert len(tokens) > 100
    assert len(raw.transcribe(features, whole=True).tokens) > 60


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_any_rate_and_channels_become_mono_at_the_models_rate(rate, channels, subtype, tmp_path):
    seconds = np.arange(rate) / rate
    tone = 0.4 * np.sin(2 * np.pi * 440 * seconds)
    path = tmp_path / "tone.wav"
    soundfile.write(path, np.stack([tone, 0.5 * tone], axis=1)[:, :channels], rate, subtype=subtype)
    samples = load_clip(Clip(path), 16000, 320)
    assert samples.dtype == np.float32
    assert samples.shape == (16000,)
    expected = 0.4 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000) * (1 if channels == 1 else 0.75)
    np.testing.assert_allclose(samples[500:-500], expected[500:-500], atol=2e-3)


def test_resampled_speech_is_still_understood(genai, tmp_path):
    import soxr

    samples = genai.config.read_audio(CLIPS[0])
    path = tmp_path / "stereo.flac"
    soundfile.write(path, np.stack([soxr.resample(samples, 16000, 44100)] * 2, axis=1), 44100)
    assert genai.text(genai.transcribe(genai.config.read_audio(path))) == ROWS[0]["text"]
