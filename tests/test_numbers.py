"""Numbers, through every runtime and every check: digits that a transcript loses must not go unnoticed."""

import base64
import io
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

import optimize_encoder
import test_e2e
import test_real_speech
from common import optimize
from common.checkpoint.tokenizer import ModelProto
from common.cli import EXIT_CHECK, CheckError
from common.evaluate.word_limit import EvaluatedClip, compare_words, judge, word_table
from common.evaluate.words import normalize, word_errors
from common.layouts.genai import GENAI
from common.layouts.onnx_asr import ONNX_ASR
from common.layouts.sherpa_onnx import SHERPA_ONNX
from common.run.audio import Clip, load_clip
from common.run.genai import GenAI
from common.run.ort import OnnxRuntime
from common.run.reference import Nemo
from tests.helpers import SAMPLES, SHERPA_PROGRAM, config_of, export_for_every_runtime, load_model, run_python
from tests.number_checkpoint import CONFIG, v3_tokenizer, write_number_checkpoint

pytestmark = pytest.mark.slow  # the fixture exports a checkpoint of its own for every runtime

CLIP = SAMPLES / "clips" / "029_hibari.flac"


@pytest.fixture(scope="module")
def samples() -> np.ndarray:
    """A clip of a whole number of hops, for which every runtime computes the same features."""
    loaded = load_clip(Clip(CLIP), 16000, 0)
    return loaded[: len(loaded) // 160 * 160]


@pytest.fixture(scope="module")
def clip(samples, tmp_path_factory) -> Path:
    import soundfile

    path = tmp_path_factory.mktemp("clip") / "clip.wav"
    soundfile.write(path, samples, 16000, subtype="FLOAT")
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("numbers") / "numbers.nemo"
    write_number_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> Path:
    """The checkpoint of numbers, exported for every runtime."""
    return export_for_every_runtime(checkpoint, tmp_path_factory.mktemp("numbers") / "onnx_models")


@pytest.fixture(scope="module")
def nemo_model(checkpoint):
    return load_model(checkpoint)


@pytest.fixture(scope="module")
def nemo_text(nemo_model, clip) -> str:
    """The text that NeMo itself shows, by its own transcribe() and its own tokenizer."""
    try:
        return nemo_model.transcribe([str(clip)], verbose=False)[0].text
    finally:
        nemo_model.eval()  # NeMo's transcribe leaves the decoder and the joint in training mode


def test_the_checkpoint_has_the_keys_of_v3(checkpoint):
    def keys(config: dict, prefix: str = "") -> set[str]:
        nested = (keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
                  for key, value in config.items())  # fmt: skip
        return set(itertools.chain.from_iterable(nested))

    published = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config = config_of(checkpoint)
    assert keys(config) == keys(published) | {"labels", "joint.vocabulary"}
    assert config["decoder"]["vocab_size"] == len(config["labels"]) == 8192


def test_nemo_writes_numbers(nemo_text):
    assert re.fullmatch(r"[0-9]+( [0-9]+)+", nemo_text)
    assert len(set(nemo_text) - {" "}) >= 4


def test_genai_writes_the_same_numbers(exported, samples, nemo_text):
    genai = GenAI(exported / GENAI.runtime)
    tokens = genai.transcribe(samples)
    assert genai.text(tokens) == nemo_text
    assert genai.processor.decode(np.array(tokens, np.int32)).strip() == nemo_text


def test_raw_onnx_writes_the_same_numbers(exported, samples, nemo_model, nemo_text):
    tokens = OnnxRuntime(exported / GENAI.runtime).transcribe(Nemo(nemo_model).features(samples)).tokens
    assert SentencePieceProcessor(model_proto=v3_tokenizer()).decode(tokens) == nemo_text


def test_onnx_asr_writes_the_same_numbers(exported, samples, nemo_text):
    import onnx_asr

    model = onnx_asr.load_model("nemo-conformer-tdt", exported / ONNX_ASR.runtime)
    assert model.recognize(samples, sample_rate=16000).strip() == nemo_text


def test_sherpa_onnx_writes_the_same_numbers(exported, clip, nemo_text):
    done = run_python(SHERPA_PROGRAM, exported / SHERPA_ONNX.runtime, clip)
    assert done.returncode == 0, done.stderr
    assert [text.strip() for text in json.loads(done.stdout)] == [nemo_text]


def test_timestamps_and_subtitles_have_the_same_numbers(exported, clip, nemo_text, tmp_path, capsys):
    outputs = ["--timestamps", "--srt", str(tmp_path / "clip.srt"), "--json", str(tmp_path / "clip.json")]
    assert test_real_speech.main(["--model_dir", str(exported), "--audio", str(clip), *outputs]) == 0
    printed = re.findall(r"^ +\d+\.\d\d +\d+\.\d\d +\d+ %  (\S+)$", capsys.readouterr().out, re.MULTILINE)
    assert printed == nemo_text.split()
    lines = (tmp_path / "clip.srt").read_text(encoding="utf-8").splitlines()
    subtitles = [line for line in lines if line and "-->" not in line][1::2]
    assert " ".join(subtitles).split() == nemo_text.split()
    (found,) = json.loads((tmp_path / "clip.json").read_text(encoding="utf-8"))["clips"]
    for engine in found["engines"].values():
        assert engine["text"] == nemo_text


# Digits that get lost


def hide(folder: Path, pieces: str) -> None:
    """Mark these pieces special in tokenizer.json, as an export once did with all digits."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    names = [entry[0] for entry in content["model"]["vocab"]]
    flags = content["added_tokens"][0]
    content["added_tokens"] += [{**flags, "id": names.index(piece), "content": piece} for piece in pieces]
    path.write_text(json.dumps(content), encoding="utf-8")
    (folder / "manifest.json").unlink()  # its checksum would show the change


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported / GENAI.runtime, tmp_path / "copy"))


def test_end_to_end_accepts_numbers(exported, clip):
    assert test_e2e.main(["--model_dir", str(exported), "--audio", str(clip)]) == 0


def test_end_to_end_fails_where_digits_are_hidden(folder, clip, nemo_text, capsys):
    hide(folder, nemo_text[0])
    assert test_e2e.main(["--model_dir", str(folder), "--audio", str(clip)]) == EXIT_CHECK
    assert f", and vocab.txt as {nemo_text!r}; export the tokenizer again" in capsys.readouterr().err


def test_end_to_end_fails_where_the_text_is_empty(folder, clip, capsys):
    hide(folder, "0123456789")
    assert test_e2e.main(["--model_dir", str(folder), "--audio", str(clip)]) == EXIT_CHECK
    assert "] is empty; export the tokenizer again" in capsys.readouterr().err


@pytest.mark.parametrize("sentence", ["It costs  $19.99 , 50 % off.", "Il dit : « Oui » à 3 h 30.", "1 2  3"])
def test_the_round_trip_accepts_several_spaces(exported, sentence):
    """GenAI's encoder merges several spaces, which is no fault of the folder."""
    genai = GenAI(exported / GENAI.runtime)
    test_e2e.check_tokenizer(
        genai, exported / GENAI.runtime, SentencePieceProcessor(model_proto=v3_tokenizer()).encode(sentence)
    )


def test_the_round_trip_catches_another_normalisation(folder):
    """With a character map that folds case, text decodes correctly but encodes to pieces in lower case."""
    tokens = SentencePieceProcessor(model_proto=v3_tokenizer()).encode("It costs 50% off.")
    other = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(["a b"]), model_writer=other, vocab_size=6, minloglevel=2,
                               normalization_rule_name="nmt_nfkc_cf")  # fmt: skip
    charsmap = ModelProto.FromString(other.getvalue()).normalizer_spec.precompiled_charsmap
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["normalizer"]["normalizers"][0]["precompiled_charsmap"] = base64.b64encode(charsmap).decode()
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckError, match=r"'It costs 50% off\.' encodes to .*, which decodes to 'it costs 50% off\.'"):
        test_e2e.check_tokenizer(GenAI(folder), folder, tokens)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90%", "90"),
        ("$19.99", "19 99"),
        ("3:30 p.m.", "3 30 p m"),
        ("1st", "1st"),
        ("12/31/2024", "12 31 2024"),
        ("1.234,56 €", "1 234 56"),
        ("(555) 123-4567", "555 123 4567"),
        ("½ x² №5", "1 2 x2 no5"),
        ("٣ ३", "٣ ३"),
        ("[noise] 7 <unk>", "7"),
    ],
)
def test_normalised_words_keep_every_digit(text, expected):
    assert normalize(text) == expected


@pytest.mark.parametrize("text", ["Paid $19.99.", "Up 90%.", "At 3:30.", "On the 1st.", "Call (555) 0142."])
def test_a_lost_digit_is_a_word_error(text):
    for digit in re.findall(r"\d", text):
        assert word_errors(normalize(text), normalize(text.replace(digit, "", 1)))[0] >= 1
    clips = [EvaluatedClip("clip", None, 1.0, text, text, re.sub(r"\d", "", text), 20.0)]
    with pytest.raises(CheckError, match="the word error rate rises"):
        judge(word_table(clips), 0.5)


def test_the_gate_counts_digits_that_optimizing_loses(exported, clip, nemo_text, tmp_path, monkeypatch, capsys):
    """The tokenizer of the optimized folder hides digits, and that of the exported folder does not."""
    manifest = tmp_path / "numbers.jsonl"
    manifest.write_text(json.dumps({"audio_filepath": str(clip), "text": nemo_text}), encoding="utf-8")

    def words_with_hidden_digits(source, stage, *clips):
        shutil.copytree(stage, tmp_path / "stage")
        (tmp_path / "stage" / "manifest.json").write_text("{}")
        hide(tmp_path / "stage", "0123456789")
        return compare_words(source, tmp_path / "stage", *clips)

    argv = ["--model_dir", str(exported / GENAI.runtime), "--output_dir", str(tmp_path / "out"), "--skip_quantization",
            "--eval_manifest", str(manifest), "--max_wer_increase", "0"]  # fmt: skip
    assert optimize_encoder.main(argv) == 0, capsys.readouterr().err
    assert "WER 0.00 %" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(optimize, "compare_words", words_with_hidden_digits)
    assert optimize_encoder.main(argv) == EXIT_CHECK
    assert "the word error rate rises by +100.00 points" in capsys.readouterr().err
