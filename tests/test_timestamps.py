"""Words with the times that NeMo gives them, and subtitles."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import soundfile
import srt as srt_parser
import webvtt
from tokenizers import Tokenizer, decoders, models

import test_real_speech
from benchmarks.confidence import METHODS, nemo_confidences
from common.evaluate.words import (
    LINE_CHARACTERS,
    MAX_CUE_SECONDS,
    PAUSE_SECONDS,
    Pieces,
    cues,
    furthest_apart,
    srt,
    timed_words,
    vtt,
)
from common.run.audio import Clip, load_clip
from common.run.decode import BlankZero, Step, TimedWord, confidence_of
from common.run.genai import GenAI
from common.run.ort import OnnxRuntime
from common.run.reference import Nemo
from tests.helpers import CLIPS, ROWS, TINY

FRAME = 0.08


@pytest.fixture(scope="module")
def raw(tiny_export):
    return OnnxRuntime(tiny_export)


@pytest.fixture(scope="module")
def pieces(tiny_export):
    return Pieces.read(tiny_export)


def test_words_and_times_are_nemos_own(raw, pieces, tiny_model):
    """The reference is NeMo's own model.transcribe(timestamps=True), one clip at a time."""
    nemo = Nemo(tiny_model)
    samples = [raw.config.read_audio(path) for path in CLIPS]
    features = [nemo.features(one) for one in samples]
    found = [timed_words(one.emitted, pieces) for one in raw.transcribe_all(features, BlankZero.NEMO, batch_size=4)]
    decoding = tiny_model.cfg.decoding.copy()
    try:
        hypotheses = tiny_model.transcribe(samples, batch_size=1, timestamps=True, verbose=False)
    finally:
        tiny_model.change_decoding_strategy(decoding, verbose=False)
        tiny_model.eval()  # NeMo's transcribe leaves the decoder and the joint in training mode
    count = 0
    for clip, mine, theirs in zip(features, found, hypotheses, strict=True):
        expected = [(word["word"], word["start_offset"], word["end_offset"]) for word in theirs.timestamp["word"]]
        assert [(word.text, word.start, word.end) for word in nemo.words(clip)] == expected
        assert [(word.text, word.start, word.end) for word in mine] == expected
        seconds = [(word["start"], word["end"]) for word in theirs.timestamp["word"]]
        np.testing.assert_allclose(
            [(word.start * raw.config.frame_seconds, word.end * raw.config.frame_seconds) for word in mine], seconds
        )
        count += len(expected)
    assert count == 65


VOCABULARY = ["<unk>", "<|en|>", "▁he", "llo", ",", "▁", "▁wor", "ld", ".", "▁'", "'", "t", "▁caf", "<0xC3>", "<0xA9>"]


@pytest.fixture
def handmade(tmp_path):
    vocabulary = [(name, 0.0) for name in [*VOCABULARY, "<blank>"]]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<|en|>", "<blank>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return Pieces.read(tmp_path)


def steps_of(text: str) -> list[Step]:
    """Steps of the pieces in `text`, as `piece@frame+duration`."""
    found = (re.fullmatch(r"(.+)@(\d+)\+(\d+)", entry).groups() for entry in text.split())
    return [Step(int(frame), VOCABULARY.index(piece), int(duration), 9.0, False) for piece, frame, duration in found]


CASES = {
    "pieces of one word": ("▁he@1+2 llo@4+3", [("hello", 1, 7)]),
    "a mark ends where the word did": ("▁he@1+2 ,@9+4 ▁wor@14+1", [("he,", 1, 3), ("wor", 14, 15)]),
    "letters after a mark": ("▁he@1+2 '@5+1 t@6+2", [("he't", 1, 8)]),
    "a quote that opens joins the word before it": ("▁he@0+1 ▁'@2+1 t@4+1", [("he 't", 0, 5)]),
    "a lone space begins a word": ("▁he@0+1 ▁@3+1 t@5+2", [("he", 0, 1), ("t", 3, 7)]),
    "a mark after a lone space": ("▁he@0+1 ▁@3+1 .@5+2", [("he", 0, 1), (".", 3, 4)]),
    "no space at the beginning": ("llo@2+1 ▁he@3+1", [("llo", 2, 3), ("he", 3, 4)]),
    "a mark at the beginning": (".@2+1 ,@4+1 ▁he@6+0", [(".,", 2, 3), ("he", 6, 6)]),
}


@pytest.mark.parametrize("case", CASES)
def test_words_as_nemo_makes_them(case, handmade):
    """Each case is checked by hand, and by NeMo's own functions."""
    from nemo.collections.asr.parts.submodules.rnnt_decoding import AbstractRNNTDecoding
    from nemo.collections.asr.parts.utils.timestamp_utils import get_words_offsets
    from nemo.collections.asr.parts.utils.tokenizer_utils import extract_punctuation_from_vocab

    def decode(names: list[str]) -> str:  # as SentencePiece does, for pieces without bytes and special ones
        return "".join(names).replace("▁", " ").removeprefix(" ")

    marks = extract_punctuation_from_vocab(VOCABULARY)
    assert marks == handmade.marks
    steps, expected = steps_of(CASES[case][0]), CASES[case][1]
    assert [(word.text, word.start, word.end) for word in timed_words(steps, handmade)] == expected
    offsets = [{"start_offset": step.frame, "end_offset": step.frame + step.duration} for step in steps]
    encoded = [{"char": [VOCABULARY[step.token]], **own} for step, own in zip(steps, offsets, strict=True)]
    shown = [{"char": [decode([VOCABULARY[step.token]])], **own} for step, own in zip(steps, offsets, strict=True)]
    encoded, shown = AbstractRNNTDecoding._refine_timestamps_tdt(encoded, shown, marks)
    found = get_words_offsets(shown, encoded, decode, supported_punctuation=marks)
    assert [(word["word"], word["start_offset"], word["end_offset"]) for word in found] == expected


PAUSES = {
    "half of a number in another sentence": (
        "▁he@1+2 .@9+1 llo@40+2 ▁wor@45+1",
        [("he.", 1, 3), ("llo", 40, 42), ("wor", 45, 46)],
    ),
    "a pause of a second, 12.5 frames": ("▁he@1+2 llo@15+1 t@29+1", [("hello", 1, 16), ("t", 29, 30)]),
    "a lone space long before its word": ("▁he@0+1 ▁@3+1 t@40+2", [("he", 0, 1), ("t", 40, 42)]),
    "a mark long after its word": ("▁he@0+1 ▁'@40+1 t@41+1", [("he '", 0, 1), ("t", 41, 42)]),
    "a word of more than 7 s, 87.5 frames": (
        " ".join(f"{'t' if frame else '▁he'}@{frame}+4" for frame in range(0, 160, 4)),
        [("he" + 20 * "t", 0, 84), (19 * "t", 84, 160)],
    ),
}


@pytest.mark.parametrize("case", PAUSES)
def test_words_that_are_shown_end_before_a_pause_and_within_seven_seconds(case, handmade):
    steps, expected = steps_of(PAUSES[case][0]), PAUSES[case][1]
    assert [(word.text, word.start, word.end) for word in timed_words(steps, handmade, FRAME)] == expected


def test_bytes_become_characters_and_special_tokens_nothing(handmade):
    steps = steps_of("<|en|>@0+1 ▁caf@1+1 <0xC3>@3+1 <0xA9>@4+2 .@8+1 <unk>@9+1 ▁he@12+1")
    assert timed_words(steps, handmade) == [TimedWord("café.", 1, 6), TimedWord("he", 12, 13)]
    assert timed_words(steps_of("▁he@0+1 <0xC3>@1+1"), handmade) == [TimedWord("he\ufffd", 0, 2)]
    assert timed_words([], handmade) == []


def test_words_are_those_of_the_transcript(raw, pieces, tiny_export):
    genai = GenAI(tiny_export)
    for path in CLIPS[:4]:
        found = raw.transcribe(genai.features(genai.config.read_audio(path)))
        assert " ".join(word.text for word in timed_words(found.emitted, pieces)) == genai.text(found.tokens)


def test_windows_tell_the_time_of_the_whole_clip(raw, pieces, tiny_export, monkeypatch):
    """A sentence with the same transcript in windows of 0.72 s: its words have the times that one window gives them."""
    window_seconds = 0.72  # 9 encoder frames
    genai = GenAI(tiny_export)
    clip = next(path for path, row in zip(CLIPS, ROWS, strict=True) if "June" in row["text"])
    features = genai.features(genai.config.read_audio(clip))
    whole = timed_words(raw.transcribe(features).emitted, pieces)
    monkeypatch.setattr(
        raw, "config", dataclasses.replace(raw.config, chunk=round(window_seconds * raw.config.sample_rate))
    )
    cut = timed_words(raw.transcribe(features).emitted, pieces)
    assert [word.text for word in cut] == [word.text for word in whole]
    assert max(abs(one.start - other.start) for one, other in zip(cut, whole, strict=True)) <= 1
    assert cut[-1].start * raw.config.frame_seconds > 2 * window_seconds


def sentence(text: str, start: int = 0, step: int = 5) -> list[TimedWord]:
    return [TimedWord(word, start + step * i, start + step * i + 4) for i, word in enumerate(text.split())]


def test_cues():
    def texts(found):
        return [" ".join(word.text for word in cue) for cue in cues(found, FRAME)]

    assert texts(sentence("Yes, he said. No, they say.")) == ["Yes, he said.", "No, they say."]
    assert texts(sentence("before") + sentence("after", start=4 + 13)) == ["before", "after"]  # 1.04 s of silence
    assert texts(sentence("before") + sentence("after", start=4 + 12)) == ["before after"]
    long = sentence("word " * 60, step=3)
    assert all(cue[-1].end - cue[0].start <= MAX_CUE_SECONDS / FRAME for cue in cues(long, FRAME))
    wide = sentence("extraordinarily " * 30, step=1)
    for block in srt(wide, FRAME).strip().split("\n\n"):
        lines = block.split("\n")[2:]
        assert len(lines) <= 2
        assert all(len(line) <= LINE_CHARACTERS for line in lines)
    assert texts([]) == []


def test_srt_as_a_player_reads_it():
    hour = round(3600 / FRAME)
    words = [
        TimedWord("One.", 0, 1),
        TimedWord("Two", 5, 9),
        TimedWord("lines.", 9, 12),
        *sentence("An hour on.", start=hour),
    ]
    assert srt(words, FRAME) == (
        "1\n00:00:00,000 --> 00:00:00,400\nOne.\n\n"
        "2\n00:00:00,400 --> 00:00:01,233\nTwo lines.\n\n"
        "3\n01:00:00,000 --> 01:00:01,120\nAn hour on.\n"
    )
    assert srt([], FRAME) == ""
    assert vtt([*words[:1], TimedWord("<R&D>", 5, 9)], FRAME) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:00.400\nOne.\n\n00:00:00.400 --> 00:00:01.233\n&lt;R&amp;D&gt;\n"
    )
    assert vtt([], FRAME) == "WEBVTT\n"


def number_with_a_pause() -> list[np.ndarray]:
    """A number with 20 s of silence in the middle, which a word of NeMo's spans: in parts."""
    number, _ = soundfile.read(CLIPS[4], dtype="float32")
    middle = len(number) * 7 // 10
    return [number[:middle], np.zeros(20 * 16000, np.float32), number[middle:]]


def test_nemos_words_are_compared_with_words_that_no_pause_divides(tiny_export, tmp_path, capsys):
    soundfile.write(tmp_path / "pause.wav", np.concatenate(number_with_a_pause()), 16000)
    argv = ["--model_dir", str(tiny_export), "--model_name", str(TINY), "--audio", str(tmp_path / "pause.wav")]
    assert test_real_speech.main([*argv, "--timestamps", "--json", str(tmp_path / "found.json")]) == 0
    engines = json.loads((tmp_path / "found.json").read_text())["clips"][0]["engines"]
    nemo, onnx = (engines[name]["words"] for name in ("NeMo", "ONNX Runtime onnx_models"))
    assert f"the times of {len(nemo)} words differ from NeMo's by at most 0 " in capsys.readouterr().out
    assert len(onnx) > len(nemo)
    assert "".join(word["text"] for word in onnx) == "".join(word["text"] for word in nemo)


def test_subtitles_of_long_audio_are_read_by_other_libraries(tiny_export, tmp_path, capsys):
    """A number with 20 s of silence in the middle, which a word of NeMo's spans, and clips without a pause. A subtitle
    lasts 7 s or less, ends within a second of its last token, and does not overlap the next; all words are there."""
    clips = [soundfile.read(path, dtype="float32")[0] for path in CLIPS]
    audio = tmp_path / "long.wav"
    soundfile.write(audio, np.concatenate([*number_with_a_pause(), *clips, *reversed(clips)]), 16000)
    argv = ["--model_dir", str(tiny_export), "--model_name", str(TINY), "--folders", "exported", "--audio", str(audio)]
    for suffix in ("srt", "vtt", "json"):
        argv += [f"--{suffix}", str(audio.with_suffix(f".{suffix}"))]
    assert test_real_speech.main(argv) == 0, capsys.readouterr().err
    engines = json.loads(audio.with_suffix(".json").read_text())["clips"][0]["engines"]
    assert max(word["end"] - word["start"] for word in engines["NeMo"]["words"]) > 20
    words = engines["ONNX Runtime onnx_models"]["words"]
    parsed = [*srt_parser.parse(audio.with_suffix(".srt").read_text(), ignore_errors=False)]
    assert [(cue.start, cue.end, cue.text) for cue in webvtt.read(audio.with_suffix(".vtt"))] == [
        (*(srt_parser.timedelta_to_srt_timestamp(time).replace(",", ".") for time in (cue.start, cue.end)), cue.content)
        for cue in parsed
    ]
    shown = [(cue.start.total_seconds(), cue.end.total_seconds(), cue.content) for cue in parsed]
    starts = [start for start, _, _ in shown]
    for (start, end, text), following in zip(shown, [*starts[1:], math.inf], strict=True):
        own = [words.pop(0) for _ in text.split()]
        assert [word["text"] for word in own] == text.split()
        assert start == pytest.approx(own[0]["start"], abs=1e-3)
        assert end - start <= MAX_CUE_SECONDS
        assert end <= min(own[-1]["end"] + PAUSE_SECONDS, following)
        assert all(word["end"] - word["start"] < MAX_CUE_SECONDS for word in own)
    assert not words


def test_furthest_apart():
    assert furthest_apart([TimedWord("a", 0, 3)], [TimedWord("a", 1, 5)]) == 2
    assert furthest_apart([TimedWord("a", 0, 3)], [TimedWord("b", 0, 3)]) == float("inf")
    assert furthest_apart([], []) == 0


def test_script_writes_words_and_subtitles(tiny_export, tmp_path, capsys):
    target, results = tmp_path / "clip.srt", tmp_path / "results.json"
    argv = ["--model_dir", str(tiny_export), "--audio", str(CLIPS[0]), "--timestamps", "--srt", str(target)]
    assert test_real_speech.main([*argv, "--json", str(results)]) == 0
    output = capsys.readouterr().out
    words = len(ROWS[0]["text"].split())
    assert f"ONNX Runtime onnx_models: the times of {words} words differ from NeMo's by at most 0 " in output
    found = json.loads(results.read_text())["clips"][0]["engines"]
    words = found["ONNX Runtime onnx_models"]["words"]
    times = [{key: word[key] for key in ("text", "start", "end")} for word in words]
    assert times == found["NeMo"]["words"]
    assert all(0 < word["max_prob"] <= 1 and 0 < word["entropy"] <= 1 for word in words)
    assert found["GenAI onnx_models"]["words"] is None
    assert [word["text"] for word in words] == ROWS[0]["text"].split()
    assert re.findall(r"^ +([\d.]+) +([\d.]+) +(\d+) %  (\S+)$", output, re.M) == [
        (f"{word['start']:.2f}", f"{word['end']:.2f}", f"{100 * word['max_prob']:.0f}", word["text"]) for word in words
    ]
    assert " ".join(target.read_text().split("\n")[2:]).split() == ROWS[0]["text"].split()


@pytest.mark.slow
@pytest.mark.parametrize("field", METHODS)
def test_confidences_are_nemos_own(field, tiny_model, tiny_export):
    """The confidence of each token and each word is NeMo's, on every clip that has the same tokens."""
    nemo, raw, pieces = Nemo(tiny_model), OnnxRuntime(tiny_export), Pieces.read(tiny_export)
    decode = nemo_confidences(tiny_model, METHODS[field])
    compared = 0
    for path in CLIPS:
        features = nemo.features(load_clip(Clip(path), 16000, 1))
        expected = decode(features)
        found = raw.transcribe(features, BlankZero.NEMO)
        if found.tokens != [int(token) for token in expected.y_sequence]:
            continue
        tokens = [getattr(step.confidence, field) for step in found.emitted]
        np.testing.assert_allclose(tokens, expected.token_confidence, atol=1e-3)
        words = [getattr(word.confidence, field) for word in timed_words(found.emitted, pieces)]
        np.testing.assert_allclose(words, expected.word_confidence, atol=1e-3)
        compared += len(words)
    assert compared > 40


def test_confidences_of_large_even_and_certain_logits():
    assert confidence_of(np.array([1000.0, 1000.0, -1000.0], np.float32)).max_prob == pytest.approx(0.25)  # of 1/2
    even = confidence_of(np.zeros(8))
    assert even.max_prob == pytest.approx(0)
    assert even.entropy == pytest.approx(0)
    certain = confidence_of(np.array([0.0] * 7 + [500]))
    assert certain.max_prob == pytest.approx(1)
    assert certain.entropy == pytest.approx(1)


def test_script_notices_times_that_are_not_nemos(tiny_export, capsys, monkeypatch):
    monkeypatch.setattr(
        "common.evaluate.verdict.timed_words",
        lambda *given: [TimedWord(word.text, word.start + 2, word.end) for word in timed_words(*given)],
    )
    argv = ["--model_dir", str(tiny_export), "--model_name", str(TINY), "--audio", str(CLIPS[0]), "--timestamps"]
    assert test_real_speech.main(argv) == 1
    assert "words begin or end 2 encoder frames from NeMo's, and the limit is 1: [" in capsys.readouterr().err
