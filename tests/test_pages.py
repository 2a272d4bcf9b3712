"""The page of clips to listen to, and the verdict and speed in the report of an optimization."""

import base64
import contextlib
import copy
import hashlib
import io
import json
import re
import sys

import numpy as np
import pytest
import soundfile

import test_real_speech
from benchmarks.confidence import bins, calibration_error, words_right
from common.evaluate.blanks import Blank, Flaws, flaws_table
from common.evaluate.speed import measure_speed, why_slower
from common.report.clips_page import (
    audio_uri,
    clips_page,
    lines_of,
    rows_of,
    shown_clip,
    wave_path,
)
from common.report.report import checks, grade, run_record, verdict
from common.run.decode import Confidence, TimedWord
from tests.helpers import CLIPS, ROWS, rejected
from tests.test_report import HOSTILE_TEXT, Page

RATE = 16000


def decoded(uri: str) -> tuple[np.ndarray, int]:
    kind, _, content = uri.partition(",")
    assert kind == "data:audio/ogg;base64"
    return soundfile.read(io.BytesIO(base64.b64decode(content)), dtype="float32")


def flat(page: Page) -> str:
    return " ".join(page.text.split())


# ---- confidences


def test_words_right_by_an_alignment_without_case_and_punctuation():
    assert words_right("The cat, sat.", ["the", "Cat", "sad"]) == [True, True, False]
    assert words_right("a b", ["x", "a", "b"]) == [False, True, True]
    assert words_right("", ["x"]) == [False]
    assert words_right("a b", []) == []
    assert words_right("one two", ["one", "–", "two", ""]) == [True, False, True, False]


def test_bins_and_calibration_error_by_hand():
    made = bins([(0.92, True), (0.94, False), (1.0, True), (0.99, True), (0.2, False), (0.9, True)])
    assert [(each.low, each.high, each.words, each.right) for each in made] == [
        (0.0, 0.5, 1, 0),
        (0.9, 0.95, 3, 2),
        (0.99, 1.0, 2, 2),
    ]
    # |0 - 0.2|, 3 |2/3 - 0.92|, 2 |1 - 0.995| over 6 words
    assert calibration_error(made) == pytest.approx((0.2 + 3 * (0.92 - 2 / 3) + 2 * 0.005) / 6)


# ---- the page


def words_of(row, *, own: bool = True):
    """The words from the first cell to the last; own: those of the row itself."""
    return [word for cell in row.cells for word in cell if not own or word.mark != "lost"]


def test_differing_words_are_marked():
    timed = [TimedWord(word, i, i + 1, None) for i, word in enumerate(["And", "so,", "my", "friends", "ask"])]
    texts = {"text": "and so my fellow Americans ask", "ONNX": "And so, my friends ask"}
    _, row = rows_of(texts, {"ONNX": timed}, with_errors=True)
    assert [word.text for word in words_of(row) if not word.mark] == ["And", "so,", "my", "ask"]
    (lost,) = [word.text for word in words_of(row, own=False) if word.mark == "lost"]
    assert lost in ("fellow", "Americans")
    assert [word.text for word in words_of(row) if word.mark == "other"] == ["friends"]  # in place of the other one
    assert [len(cell) for cell in row.cells] == [1] * 6
    assert row.errors == (2, 6)
    assert [word.timed.start for word in words_of(row)] == [0, 1, 2, 3, 4]


def rows(*texts: str):
    return rows_of({str(number): text for number, text in enumerate(texts)}, {}, with_errors=False)


def test_rows_line_up_with_the_first_row():
    expected = "one two three four"
    made = ["zero one two three four", "one two four", "one two three four five six", "", "two"]
    shown = rows(expected, *made)
    own = [" ".join(word.text for word in words_of(row)) for row in shown]
    assert own == [row.text for row in shown] == [expected, *made]  # every word of each engine, in its order
    cells = [[" ".join(word.text for word in cell if word.mark != "lost") for cell in row.cells] for row in shown]
    assert cells[1] == ["zero one", "two", "three", "four"]
    assert cells[2] == ["one", "two", "", "four"]
    assert cells[3] == ["one", "two", "three", "four five six"]
    assert cells[5] == ["", "two", "", ""]
    assert [row.differences for row in shown] == [0, 1, 1, 2, 4, 3]
    lines = lines_of(rows("word " * 20, "word " * 20))
    assert [(line.start, line.stop) for line in lines] == [(0, 7), (7, 14), (14, 20)]
    (only,) = lines_of(rows("", "word " * 20))
    assert (only.start, only.stop) == (0, 1)


def test_a_blank_stretch_is_marked_in_the_waveform():
    flaws = {"onnx": Flaws([Blank(2.0, 6.0, 4.0, reference_has_words=True)], ["no"]), "genai": Flaws(None, [])}
    clip = shown_clip("clip", np.zeros(8 * RATE, np.float32), RATE, rows("one", "one", "one"), flaws)
    text = clips_page("page", "about", [clip], flaws=flaws_table([("clip", flaws)], "NeMo"))
    assert '<article id="clip-1">' in text  # not of the class that the switch hides
    page = Page(text)
    assert page.tags.count("rect") == 1
    assert {("x", "100.0"), ("width", "200.0")} <= set(page.attributes)
    assert "onnx: blank 2.0 to 6.0 s, 4.0 s of it speech; the reference has words there" in flat(page)
    assert "onnxrepeated 'no'–" in flat(page)


def test_audio_is_the_clip_and_small():
    samples, _ = soundfile.read(CLIPS[0], dtype="float32")
    uri = audio_uri(samples, RATE)
    shown, rate = decoded(uri)
    assert rate == RATE
    assert abs(len(shown) - len(samples)) <= RATE // 50
    size = min(len(shown), len(samples))
    assert np.corrcoef(shown[:size], samples[:size])[0, 1] > 0.9
    assert len(uri) < 8000 * len(samples) / RATE + 4000  # 20 clips of a minute: 10 MB
    loud, _ = decoded(audio_uri(samples * 1e6, RATE))
    assert np.abs(loud).max() < 1.5


def test_a_waveform_follows_the_samples():
    samples = np.zeros(4000, np.float32)
    samples[2000:] = np.tile([0.5, -0.25], 1000)
    heights = [tuple(map(float, pair)) for pair in re.findall(r"M\d+ ([\d.]+)V([\d.]+)", wave_path(samples))]
    assert len(heights) == 400
    assert set(heights[:200]) == {(1.0, 1.01)}
    assert set(heights[200:]) == {(0.0, 1.51)}
    assert "nan" not in wave_path(np.zeros(10, np.float32))


def test_hostile_text_is_text_and_no_other_script_runs():
    samples = np.zeros(RATE, np.float32)
    words = [TimedWord(word, 0, 5, Confidence(0.4, 0.4)) for word in HOSTILE_TEXT.split()]
    texts = {"text": "none of it", HOSTILE_TEXT: HOSTILE_TEXT}
    clip = shown_clip(HOSTILE_TEXT, samples, RATE, rows_of(texts, {HOSTILE_TEXT: words}, with_errors=False), {})
    text = clips_page(HOSTILE_TEXT, HOSTILE_TEXT, [clip], frame_seconds=0.08)
    page = Page(text)
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    script = re.search("<script>(.*?)</script>", text, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(v for n, v in page.attributes if "default-src" in (v or ""))
    assert f"script-src 'sha256-{digest}'" in policy
    assert HOSTILE_TEXT in page.text
    assert "below 0.5" in page.text


@pytest.fixture(scope="module")
def speech_page(tiny_export, tmp_path_factory) -> Page:
    """The page of three clips with texts, the last one with an error, transcribed by GenAI and plain ONNX Runtime."""
    place = tmp_path_factory.mktemp("page")
    manifest = place / "speech.jsonl"
    rows = [{**row, "audio_filepath": str(clip)} for row, clip in zip(ROWS, CLIPS, strict=True)][3:6]
    manifest.write_text("\n".join(map(json.dumps, rows)))
    argv = ["--model_dir", tiny_export, "--skip_nemo", "--manifest", manifest, "--html", place / "page.html"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert test_real_speech.main([*map(str, argv), "--json", str(place / "all.json")]) == 0
    page = Page((place / "page.html").read_text())
    page.printed = printed.getvalue()
    page.clips = json.loads((place / "all.json").read_text())["clips"]
    return page


def test_a_page_has_every_clip_with_its_words_and_times(speech_page):
    assert speech_page.tags.count("article") == speech_page.tags.count("audio") == len(speech_page.clips) == 3
    timed = [word for clip in speech_page.clips for made in clip["engines"].values() for word in made["words"] or ()]
    starts = [float(value) for name, value in speech_page.attributes if name == "data-start"]
    assert sorted(starts) == [pytest.approx(start, abs=0.006) for start in sorted(word["start"] for word in timed)]
    text = flat(speech_page)
    for clip in speech_page.clips:
        assert clip["text"] in text
    for name, value in speech_page.attributes:
        if name in ("src", "href"):
            assert value.startswith(("data:audio/ogg", "#clip-"))


def test_clips_that_differ_come_first_and_have_the_columns_of_the_terminal(speech_page):
    words = [int(number) for number in re.findall(r"(\d+) words differ", speech_page.text)]
    without = speech_page.text.count("no difference")
    assert words == sorted(words, reverse=True)
    assert words
    assert len(words) + without == 3
    assert speech_page.text.index(speech_page.clips[-1]["text"]) < speech_page.text.index(speech_page.clips[0]["text"])
    links = [value for name, value in speech_page.attributes if name == "href"]
    assert links == [f"#clip-{number}" for number in (1, 2, 3)]
    assert ("id", "only") in speech_page.attributes
    titles = {value for name, value in speech_page.attributes if name == "data-title"}
    assert titles == {"RTFx", "without features", "WER", "normalised WER"}
    for title in titles:
        assert title in speech_page.printed


def test_a_page_of_a_stress_test_has_its_table(tiny_export, tmp_path):
    page = tmp_path / "stress.html"
    argv = ["--model_dir", tiny_export, "--skip_nemo", "--audio", CLIPS[0], "--stress", "level", "--html", page]
    assert test_real_speech.main([*map(str, argv)]) == 0
    text = flat(Page(page.read_text()))
    assert "Where speech is hard" in text
    assert "as it isfloat320000000.00" in text  # nothing lost, added or changed, against either


def test_the_page_is_not_written_over_a_clip(tiny_export, tmp_path, capsys):
    clip = tmp_path / "clip.flac"
    clip.write_bytes(CLIPS[0].read_bytes())
    argv = ["--model_dir", tiny_export, "--skip_nemo", "--audio", clip, "--html", clip]
    assert "is read, so" in rejected(capsys, test_real_speech, *argv)
    assert clip.read_bytes() == CLIPS[0].read_bytes()


# ---- the verdict


REPORT = {
    "encoder": "encoder",
    "tensors": [{"graph": "encoder", "bits": 4}],
    "sqnr_db_on_noise": {"encoder": 17.0, "joint": 31.0},
    "evaluation": {
        "max_wer_increase": 0.5,
        "normalised": [{"words": 100, "increase": {"percent": 0.1}}, {"words": 10, "increase": {"percent": 0.4}}],
    },
    "stress": [
        {"engine": "float32", "points": None, "alone": None},
        {"engine": "optimized", "points": 1.0, "alone": 0},
        {"engine": "optimized", "points": -2.0, "alone": 0},
    ],
    "max_lost_words": 1.5,
}


@pytest.mark.parametrize(
    ("change", "passed", "text"),
    [
        ({}, True, "every limit"),
        ({"sqnr_db_on_noise": {"encoder": 2.9}}, False, "encoder on noise"),
        ({"sqnr_db_on_noise": {"encoder": 17.0, "joint": 19.9}}, False, "joint on noise"),
        ({"tensors": []}, False, "encoder on noise"),  # float32: 80 dB
        ({"max_lost_words": 0.9}, False, "speech is hard"),
        ({"max_lost_words": None}, True, "not judged: words where speech is hard, speech without a word"),
        ({"stress": [{"engine": "optimized", "points": 0.0, "alone": 1}]}, False, "speech without a word"),
        ({"evaluation": None, "stress": [], "max_lost_words": None}, None, "not decided"),
    ],
)
def test_a_verdict_follows_the_limits(change, passed, text):
    found, reason = judged({**copy.deepcopy(REPORT), **change})
    assert found is passed
    assert text in reason.lower()


def judged(report):
    return verdict({**report, "verdict": {"checks": checks(report)}})


def test_a_language_beyond_the_limit_fails():
    report = copy.deepcopy(REPORT)
    report["evaluation"]["normalised"][1]["increase"]["percent"] = 0.6
    assert judged(report)[0] is False
    assert [check["measured"] for check in checks(report) if check["met"] is False] == ["+0.60 points"]


@pytest.mark.parametrize(
    ("ratio", "word"), [(None, "good"), (30.0, "good"), (29.9, "fair"), (20.0, "fair"), (17.3, "low")]
)
def test_decibels_are_called_good_or_bad(ratio, word):
    assert grade(ratio) == word


def test_a_command_has_no_folders_of_the_user():
    record = run_record(["python", "optimize_encoder.py", "--model_dir", "/home/me/my models", "--output_dir", "out"])
    assert record["command"] == "python optimize_encoder.py --model_dir '…/my models' --output_dir out"
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d", record["date"])


# ---- speed


@pytest.mark.parametrize(
    ("optimized", "encoder_bytes", "reason"),
    [
        (12.0, 8_400_000, None),
        (9.0, 8_400_000, "slower than float32, since preparing a quantized product takes longer"),
        (9.0, 2_400_000_000, "slower than float32 on this CPU"),
    ],
)
def test_a_slower_encoder_is_explained(optimized, encoder_bytes, reason):
    found = why_slower(10.0, optimized, encoder_bytes)
    assert (found is None) if reason is None else (reason in found)


def test_speed_and_memory_of_two_encoders(tiny_export):
    both = measure_speed([tiny_export / "encoder.onnx"] * 2)
    assert all(each.rtfx > 1 for each in both)
    if sys.platform == "linux":
        assert all(20e6 < each.peak_memory < 1e9 for each in both)  # whether or not this process holds NeMo's gigabytes


def test_speed_is_not_measured_where_a_process_ends(tmp_path):
    (tmp_path / "encoder.onnx").write_bytes(b"no model")
    assert measure_speed([tmp_path / "encoder.onnx"] * 2) is None
