"""What an optimization costs in words, and the report of it."""

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnx
import pytest

import optimize_encoder
from common import optimize
from common.cli import CheckError
from common.contract import GRAPHS
from common.evaluate import word_limit
from common.evaluate.engines import WARM_UP_FRAMES
from common.evaluate.word_limit import EvaluatedClip, judge, print_word_errors, word_table
from common.evaluate.words import marked_changes
from common.folder import verify_files
from common.quantize import blocks
from common.quantize.methods import Format
from common.quantize.rewrite import Stored
from common.report.card import CARD
from common.report.report import REPORT_HTML, REPORT_JSON, make_evaluation, make_report, write_page
from common.run.audio import read_clips
from common.run.ort import OnnxRuntime
from tests.helpers import ROOT, SAMPLES, WITHOUT_SPEED

MANIFEST = SAMPLES / "manifest.jsonl"
HOSTILE_TEXT = "<script>alert(1)</script> & \"quoted\" </p><img src=x onerror='alert(2)'>"
HOSTILE_LANG = "<b onclick=alert(3)>$x^$"


def optimize_tiny(tiny_export: Path, target: Path, *flags: str) -> int:
    return optimize_encoder.main(["--model_dir", str(tiny_export), "--output_dir", str(target), *map(str, flags)])


def test_an_optimized_model_without_numbers_fails_the_check_of_words(tiny_export, tmp_path, monkeypatch):
    """NaN logits are a failed check and not an input that cannot be used."""
    transcribe = OnnxRuntime.transcribe_all

    def without_numbers(self, features, *args, **kwargs):
        if features[0].shape[1] != WARM_UP_FRAMES and next(times) == 1:  # float32 is the first
            monkeypatch.setattr(self, "join", lambda *of: np.full((1, 8198), np.nan))
        return transcribe(self, features, *args, **kwargs)

    times = itertools.count()
    manifest = tmp_path / "one.jsonl"
    manifest.write_text(json.dumps({"audio_filepath": str(SAMPLES / "jfk.wav"), "text": "ask not"}))
    monkeypatch.setattr(OnnxRuntime, "transcribe_all", without_numbers)
    with pytest.raises(CheckError, match=r"the optimized model fails on speech .* NaN"):
        word_limit.compare_words(tiny_export, tiny_export, manifest, read_clips(manifest))


@pytest.fixture(scope="module")
def folder(tiny_export, tmp_path_factory) -> Path:
    """A mixed encoder and 8-bit decoder and joint, on the sample clips in two languages, one clip with hostile text."""
    place = tmp_path_factory.mktemp("report")
    rows = [json.loads(line) for line in MANIFEST.read_text().splitlines()]
    for i, row in enumerate(rows):
        row |= {"audio_filepath": str(SAMPLES / row["audio_filepath"]), "lang": ("en", "de")[i % 2]}
    rows[0] |= {"text": HOSTILE_TEXT, "lang": HOSTILE_LANG}
    (place / "speech.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ("--quant_method", "k_quant_mixed", "--decoder_joint_precision", "int8", "--max_wer_increase", "50")
    assert optimize_tiny(tiny_export, place / "out", *flags, "--eval_manifest", place / "speech.jsonl") == 0
    return place / "out"


@pytest.fixture(scope="module")
def report(folder) -> dict:
    def no_constants(name: str):
        raise AssertionError(f"{name} is not JSON")

    return json.loads((folder / REPORT_JSON).read_text(), parse_constant=no_constants)


def test_every_byte_is_accounted_for(report, folder, tiny_export, tmp_path):
    for side, key, source in (("exported", "bytes_before", tiny_export), ("optimized", "bytes_after", folder)):
        place = shutil.copytree(source, tmp_path / side)  # onnx reads no file with several names
        for graph in GRAPHS:
            component = report["components"][graph.name][side]
            on_disk = graph.bytes_in(place)
            assert sum(component.values()) == on_disk
            proto = onnx.load(place / graph.file)
            tensors = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in proto.graph.initializer)
            rows = [row for row in report["tensors"] if row["graph"] == graph.name]
            assert sum(row[key] for row in rows) == tensors == on_disk - component["graph"] - component["padding"]
            assert component["padding"] >= 0
            assert 0 < component["graph"] <= (place / graph.file).stat().st_size
        assert report["bytes"][side] == sum(sum(pair[side].values()) for pair in report["components"].values())


def test_tensors_say_how_they_are_stored(report):
    quantized = [row for row in report["tensors"] if row["bits"]]
    assert [sum(row["graph"] == graph.name for row in quantized) for graph in GRAPHS] == [61, 5, 3]
    for row in quantized:
        floor = {4: (1e-3, 0.02), 8: (1e-7, 1e-4)}[row["bits"]]
        assert floor[0] < row["weight_error"] < floor[1], row
        rows = row["shape"][0]  # 128 or 64 in the joint: no block is longer
        assert row["block"] == {"encoder": 32, "decoder": None, "joint": rows}[row["graph"]]
        # Codes, and at most a byte and a half for 4 bits of scale and zero point in a block of 32.
        assert 1 < row["bytes_after"] / (math.prod(row["shape"]) * row["bits"] / 8) < 1.35
        assert row["output_sensitivity"] is None
    for row in report["tensors"]:
        if not row["bits"] and row["bytes_before"]:
            assert row["bytes_after"] == row["bytes_before"]
            assert row["weight_error"] is None
    assert report["sqnr_db_on_noise"].keys() == {"encoder", "decoder", "joint"}


def test_words_are_counted_for_all_and_by_language(report):
    evaluation = report["evaluation"]
    table = evaluation["normalised"]
    assert [row["lang"] for row in table] == [None, HOSTILE_LANG, "de", "en"]
    for row in table:
        assert row["float32"]["low"] <= row["float32"]["percent"] <= row["float32"]["high"]
        clips = [clip for clip in evaluation["clips"] if row["lang"] in (None, clip["lang"])]
        errors = [sum(side) for side in zip(*(clip["errors"] for clip in clips), strict=True)]
        assert errors == [row["float32"]["errors"], row["optimized"]["errors"]]
        assert row["increase"]["errors"] == errors[1] - errors[0]
    for key in ("clips", "words"):
        assert table[0][key] == sum(row[key] for row in table[1:])
    assert all(15 < clip["sqnr_db"] < 60 and 1 < clip["seconds"] < 6 for clip in evaluation["clips"])
    assert evaluation["clips"][3]["float32"] == "We have 13 black fans."
    assert str(SAMPLES) not in json.dumps(report)  # names of clips, not the folder that holds them


def test_report_files_are_part_of_the_folder(folder, report, tiny_export):
    assert verify_files(folder, [REPORT_JSON, REPORT_HTML]) == 2
    exported = json.loads((tiny_export / "manifest.json").read_text())
    assert report["source"]["files"] == {
        name: listed["sha256"] for name, listed in exported["files"].items() if name != CARD
    }
    assert report["source"]["sha256"] == exported["export"]["source"]["sha256"]
    assert report["source"]["checkpoint"] == "parakeet-tdt-tiny.nemo"


class Page(HTMLParser):
    """Elements, their attributes, and text; every element that is opened must be closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.ids = [], [], [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in {"meta", "br", "img", "link", "input", "wbr"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_whole_and_loads_nothing(folder):
    text = (folder / REPORT_HTML).read_text()
    page = Page(text)
    assert page.tags.count("svg") == 4  # the change of the word error rate of all clips and of each language
    assert len(page.ids) == len(set(page.ids))
    assert not {"script", "link", "img", "iframe", "object", "image", "b0"} & set(page.tags)
    for name, value in page.attributes:
        if name in ("href", "xlink:href", "src", "srcset", "data", "action"):
            assert value.startswith("#"), (name, value)
            assert value[1:] in page.ids
        for target in re.findall(r"url\((.*?)\)", value or ""):
            assert target[1:] in page.ids
    assert not re.search(r"@import|url\((?!#)", text)
    hosts = set(re.findall(r"https?://[^\s\"'<>]*", text))
    assert hosts <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # namespaces, which nobody loads
    headings = [int(tag[1]) for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(headings))
    for expected in (
        "Words that changed",
        "k_quant_mixed, block 32",
        "feed_forward1.expand",
        "limit was +50",
        "Passed",
        "at most +50 points",
        "encoder, weights",
        "python optimize_encoder.py --model_dir",
    ):
        assert expected in page.text


def test_page_shows_hostile_text_as_text(folder, report):
    clip = report["evaluation"]["clips"][0]
    fields = {name: value for name, value in clip.items() if name != "errors"}
    clips = [EvaluatedClip(**fields | {"optimized": HOSTILE_TEXT, "flaws": {}})]
    report = {**report, "evaluation": make_evaluation(MANIFEST, clips, word_table(clips), None)}
    path = folder.parent / "hostile.html"
    write_page(path, report, clips)
    page = Page(path.read_text())
    assert {"del", "ins"} <= set(page.tags)
    assert not {"script", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert f"text of the clip: {HOSTILE_TEXT}" in page.text
    assert HOSTILE_LANG in page.text


def test_a_language_whose_clips_are_silent_has_no_rate(folder, report, tmp_path):
    clips = [evaluated("a b", "a b", "a", "en"), evaluated("", "", "x", "fr"), evaluated("c", "c", "c", "de")]
    evaluation = make_evaluation(MANIFEST, clips, word_table(clips), None)
    silent = next(row for row in evaluation["normalised"] if row["lang"] == "fr")
    assert silent["optimized"] == {"errors": 1, "percent": 100.0, "low": None, "high": None}
    write_page(tmp_path / "page.html", {**report, "evaluation": evaluation}, clips)
    text = " ".join(Page((tmp_path / "page.html").read_text()).text.split())
    assert "fr–– 0 inserted– 1 inserted01" in text
    assert "en+50.00" in text


def test_sensitivity_is_shown_where_it_was_measured(folder, report, tiny_export, tmp_path):
    name = "layers.1.attention.key.weight"
    manifest = json.loads((folder / "manifest.json").read_text())
    stored = {"encoder": {name: Stored(Format(4, 32), 0.01)}}
    sensitivity = {name: {8: 1.23456e-6, 4: 0.001}}
    found = make_report(tiny_export, folder, GRAPHS, manifest, manifest["optimize"], stored, sensitivity)
    sensitive = {row["name"]: row["output_sensitivity"] for row in found["tensors"] if row["output_sensitivity"]}
    assert sensitive == {name: {"4": 0.001, "8": 1.235e-6}}
    write_page(tmp_path / "page.html", {**report, **found, "evaluation": None}, [])
    page = Page((tmp_path / "page.html").read_text())
    assert f"{name}128 × 128432" in page.text
    assert "20.030.0" in page.text  # dB of the weight, and of the output at the 4 bits it has
    assert "No speech was evaluated" in page.text


def test_without_quantization_there_is_a_report_too(optimized):
    folder = optimized("--skip_quantization", "--skip_fusion")
    found = json.loads((folder / REPORT_JSON).read_text())
    assert found["evaluation"] is None
    assert found["sqnr_db_on_noise"] == {"encoder": None}
    assert not any(row["bits"] for row in found["tensors"])
    page = Page((folder / REPORT_HTML).read_text())
    assert "float32, as exported" in page.text


def two_bits(real):
    """Only four levels, stored as 4-bit codes, where a product has more outputs than inputs: 5.0 dB on noise, which is
    over the floor of 3."""

    def round_to_nearest(x, bits):
        scale = np.abs(x).max(axis=0) / 1.5
        x[:] = np.clip(np.rint(x / np.where(scale, scale, 1)), -2, 1) * scale
        return blocks.rtn(x, bits)

    def quantize_wide(weight, bits, block, method):
        return real(weight, bits, block, round_to_nearest if weight.shape[0] < weight.shape[1] else method)

    return quantize_wide


def shuffled_scales(real):
    """Move the scales of the square matrices to other columns: overall of the right size, but in the wrong places."""

    def quantize_and_shuffle(weight, bits, block, method):
        packed = real(weight, bits, block, method)
        if weight.shape[0] == weight.shape[1]:
            np.random.default_rng(0).shuffle(packed.scales, axis=0)
        return packed

    return quantize_and_shuffle


@pytest.mark.slow
@pytest.mark.parametrize("ruin", [two_bits, shuffled_scales])
def test_a_ruined_encoder_fails_on_words(ruin, tiny_export, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(blocks, "quantize_blocks", ruin(blocks.quantize_blocks))
    flags = ("--eval_manifest", MANIFEST, "--max_wer_increase", "0.5")
    if ruin is shuffled_scales:  # the check on noise finds it already; the check on words must do so by itself
        assert optimize_tiny(tiny_export, tmp_path / "out", *flags) == 1
        assert "SQNR" in capsys.readouterr().err
        monkeypatch.setattr(optimize, "MIN_SQNR_DB", -100)
    assert optimize_tiny(tiny_export, tmp_path / "out", *flags) == 1
    output, error = capsys.readouterr()
    assert re.search(r"on noise\n +SQNR -?\d+\.\d dB", output)
    assert re.search(r"  clips/\w+\.flac: \d+ → \d+ errors  .*\[.* → .*\]", output)
    found = re.fullmatch(r"check failed: the word error rate rises by \S+ points \((\d+) of 65 words\).*\n", error)
    assert int(found[1]) >= 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_gate_lets_a_good_encoder_pass(tiny_export, tmp_path, capsys):
    flags = ("--quant_method", "int8", "--eval_manifest", MANIFEST, "--max_wer_increase", "0")
    assert optimize_tiny(tiny_export, tmp_path / "out", *flags) == 0
    assert re.search(r"on 11 clips\n +WER (\S+ % \[.*?\]) → \1  \+0.00 points", capsys.readouterr().out)


def evaluated(text: str, float32: str, optimized: str, lang: str | None = None) -> EvaluatedClip:
    return EvaluatedClip("clip", lang, 1.0, text, float32, optimized, 20.0)


def test_a_language_cannot_hide_in_the_whole():
    clips = [evaluated("a b c d", "a b x d", "a b c d", "en"), evaluated("e f g h", "e f g h", "e f g", "uk")]
    table = word_table(clips)
    assert [(row.lang, row.increase.percent) for row in table] == [(None, 0), ("en", -25), ("uk", 25)]
    judge(table, 25)
    with pytest.raises(CheckError, match=r"\+25.00 points in uk \(1 of 4 words\), and the limit is \+24.9"):
        judge(table, 24.9)
    judge(word_table([evaluated("A b.", "A b.", "a B")]), 0)  # case and punctuation are not words
    assert word_table([evaluated("A b.", "A b.", "a B")], str)[0].increase.percent == 100
    with pytest.raises(CheckError, match=r"\+25.00 points \(1 of 4 words\)"):
        judge(word_table([evaluated("a b c d", "a b c d", "a b c", None)]), 0.5)


def test_most_words_wrong_in_float32_is_flagged(capsys):
    clips = [EvaluatedClip("a.wav", None, 1.0, "one two three", "x y z", "", 30.0)]
    print_word_errors(word_table(clips), clips)
    output = capsys.readouterr().out
    assert "warning: the float32 model has 100 % of the words wrong" in output
    assert "warning: every transcript of the optimized model is empty" in output
    assert "of the float32 model is empty" not in output


def test_changes_are_shown_in_context():
    words = "one two three four five six seven eight nine ten"
    kept = "one two three four …"
    assert marked_changes(f"a {words} b", f"c {words} b") == [("a", "c"), (kept, kept)]
    changed = marked_changes(f"{words} a {words}", f"{words} {words} z")
    assert [pair for pair in changed if pair[0] != pair[1]] == [("a", ""), ("", "z")]
    assert marked_changes("", "a b") == [("", "a b")]
    better, same, worse = evaluated("a", "b", "a"), evaluated("a", "a", "a"), evaluated("a", "a", "b")
    assert word_limit.changed([better, same, worse]) == [worse, better]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max_wer_increase", "1"), "--max_wer_increase needs --eval_manifest"),
        (("--eval_manifest", MANIFEST, "--max_wer_increase", "-1"), "not -1"),
        (("--eval_manifest", MANIFEST, "--max_wer_increase", "nan"), "not nan"),
        (("--eval_manifest", "none.jsonl"), "there is nothing at none.jsonl"),
        (("--eval_manifest", "{tmp}/no_text.jsonl"), "no_text.jsonl:2: "),
        (("--eval_manifest", "{tmp}/no_clip.jsonl"), "gone.flac"),
    ],
)
def test_unusable_speech_is_rejected_before_the_work(flags, message, tiny_export, tmp_path, capsys):
    rows = [json.dumps({"audio_filepath": str(clip.path), "text": clip.text}) for clip in read_clips(MANIFEST)]
    (tmp_path / "no_text.jsonl").write_text(f"{rows[0]}\n" + rows[1].replace('"text"', '"words"'))
    (tmp_path / "no_clip.jsonl").write_text(json.dumps({"audio_filepath": "gone.flac", "text": "a"}))
    flags = [str(flag).format(tmp=tmp_path) for flag in flags]
    assert optimize_tiny(tiny_export, tmp_path / "out", *flags) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_gate_imports_neither_nemo_nor_torch(tiny_export, tmp_path):
    shutil.copy(SAMPLES / "clips" / "105_slt.flac", tmp_path)
    (tmp_path / "one.jsonl").write_text('{"audio_filepath": "105_slt.flac", "text": "We have 8 blue doors."}')
    argv = ["--model_dir", str(tiny_export), "--output_dir", str(tmp_path / "out")]
    code = (
        f"{WITHOUT_SPEED}import sys, optimize_encoder;"
        f"status = optimize_encoder.main({[*argv, '--eval_manifest', str(tmp_path / 'one.jsonl')]!r});"
        "assert status == 0, status;"
        "assert not {'nemo', 'torch'} & set(sys.modules), 'imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 clips\n" in done.stdout
