"""NeMo's own text compared with the exported folder's, and folders with parts of different checkpoints."""

import contextlib
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import export_parakeet_to_onnx
import export_tokenizer
import optimize_encoder
import test_e2e
import test_real_speech
from common.cli import CheckError
from common.evaluate.blanks import Flaws
from common.evaluate.compare import ComparedClip
from common.evaluate.text_rules import explaining_rules, text_rules
from common.evaluate.verdict import judge, judge_texts, judge_tokens, transcribe_and_print
from common.folder import read_manifest, staged_folder, write_json
from common.layouts.genai import GENAI
from common.layouts.layout import REPORT_FILES, check_same_checkpoint, tokenizer_command
from common.layouts.onnx_asr import ONNX_ASR
from common.layouts.sherpa_onnx import SHERPA_ONNX
from common.layouts.views import write_view
from common.run.audio import Clip, load_clip
from common.run.decode import Hypothesis, Step, Transcript
from common.run.reference import Nemo
from tests.helpers import SAMPLES, TINY, change_weights, comparison_of, rejected, rewrite_weights, small_members

CLIPS = [SAMPLES / "clips" / f"{name}.flac" for name in ("029_hibari", "128_rms", "105_slt")]
# Pieces that the bundled checkpoint emits on CLIPS, and the pieces that replace them, whose text differs by rule.
SWAPS = {"▁b": "▁¿", "3": "<unk>", "th": "<|es|>", "8": "%"}


@pytest.fixture(scope="module")
def swapped(tmp_path_factory):
    """The bundled checkpoint with pieces that change places: it emits `▁¿`, `<unk>`, `<|es|>`, and `▁` before `%`."""
    path = tmp_path_factory.mktemp("swapped") / "swapped.nemo"
    vocabulary = next(content for name, content in small_members().items() if name.endswith(".vocab"))
    names = [line.split("\t")[0] for line in vocabulary.decode().splitlines()]

    def swap(weights):
        for one, other in SWAPS.items():
            pair = [names.index(one), names.index(other)]
            for name in ("decoder.prediction.embed.weight", "joint.joint_net.2.weight", "joint.joint_net.2.bias"):
                weights[name][pair] = weights[name][pair[::-1]]

    return rewrite_weights(path, swap)


@pytest.fixture(scope="module")
def exported_over(swapped, tiny_export, tmp_path_factory):
    """The swapped checkpoint's graphs, exported into a folder that held the bundled one's graphs and tokenizer, and the
    report of an optimization."""
    folder = tmp_path_factory.mktemp("over") / "models"
    shutil.copytree(tiny_export, folder)
    (folder / "notes.txt").write_text("mine")
    for name in REPORT_FILES:
        (folder / name).write_text("old")
    write_json(folder / "manifest.json", {**read_manifest(folder), "optimize": {"method": "rtn"}})
    argv = ["--model_name", str(swapped), "--output_dir", str(folder), "--skip_verify"]
    assert export_parakeet_to_onnx.main(argv) == 0
    return folder


@pytest.fixture
def both_parts(exported_over, swapped, tmp_path):
    folder = tmp_path / "both" / "models"
    shutil.copytree(exported_over, folder)
    assert export_tokenizer.main(["--model_name", str(swapped), "--output_dir", str(folder)]) == 0
    return folder


def compare(folder, checkpoint, *argv):
    clips = map(str, CLIPS)
    return test_real_speech.main(
        ["--model_dir", str(folder), "--model_name", str(checkpoint), *argv, "--audio", *clips]
    )


def test_nemos_row_is_what_nemo_transcribes(tiny_model):
    nemo = Nemo(tiny_model)
    samples = [load_clip(Clip(clip), 16000, 1) for clip in CLIPS]
    try:
        own = [hypothesis.text for hypothesis in tiny_model.transcribe(samples, batch_size=1, verbose=False)]
    finally:
        tiny_model.eval()  # NeMo's transcribe leaves the decoder and the joint in training mode
    assert [nemo.transcribe(nemo.features(one)).text for one in samples] == own
    assert all(own)


def test_what_differs_by_rule_is_named_and_no_failure(both_parts, swapped, capsys):
    assert compare(both_parts, swapped, "--timestamps") == 0
    output = capsys.readouterr().out
    rows = re.findall(r"^  NeMo  +(.*)$", output, re.M)
    assert rows == ["We have 1 ⁇ ¿lack fans.", "Call me on Saturday, June the 9<|es|>.", "We have%¿lue doors."]
    genai = re.findall(r"^  GenAI models  +(.*)$", output, re.M)
    assert genai == ["We have 1 ¿lack fans.", "Call me on Saturday, June the 9.", "We have % ¿lue doors."]
    assert re.search(r"^GenAI models .*  0\.00 % \[0\.00, 0\.00\]  ", output, re.M)  # no error against NeMo
    for name in (
        "NeMo shows ⁇ for <unk>",
        "NeMo shows marks such as <|en|>",
        "NeMo deletes the space before punctuation",
    ):
        assert f"{name} (2)" in output or f"{name} (4)" in output  # GenAI and plain ONNX Runtime
    assert (
        "0 transcripts with the tokens of NeMo also have its text, letter for letter; 6 differ from it by rule"
        in output
    )
    assert "2 clips left out" in output


def test_a_tokenizer_that_hides_digits_is_noticed(both_parts, swapped, capsys):
    """Digits marked special, as all user-defined pieces once were: the tokens are NeMo's, the text is not."""
    path = both_parts / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = [name for name, _ in content["model"]["vocab"]]
    like = content["added_tokens"][0]
    content["added_tokens"] += [{**like, "id": vocabulary.index(d), "content": d} for d in "0123456789"]
    path.write_text(json.dumps(content))
    assert compare(both_parts, swapped) == 1
    captured = capsys.readouterr()
    assert "equals NeMo token for token on 3 of 3 clips" in captured.out
    assert re.search(r"the same tokens as 'We have +¿lack fans\.'; no rule explains it", captured.out)
    assert captured.err.startswith("check failed: the same tokens have different texts in ")


def test_a_graph_that_cannot_decide_does_not_excuse_itself(tiny_export, tmp_path, capsys):
    """All logits are alike: each decision of the broken joint is a near tie, and none of NeMo's decisions is."""
    folder = tmp_path / "models"
    shutil.copytree(tiny_export, folder)
    change_weights(folder / "joint.onnx", lambda weight: weight * np.float32(1e-7))
    assert compare(folder, TINY) == 1
    captured = capsys.readouterr()
    assert "nothing excuses it" in captured.out
    assert "float32 ONNX differs from its reference" in captured.err


def test_rules_explain_every_text_of_random_tokens_and_nothing_else(tiny_model, tiny_export):
    """NeMo's own function renders the tokens; the exported tokenizer.json renders them too. Marks, the unknown piece,
    lone spaces and punctuation are drawn often."""
    from tokenizers import Tokenizer

    decoding = tiny_model.decoding
    model = tiny_model.tokenizer.tokenizer
    rules = text_rules(model.serialized_model_proto())
    exported = Tokenizer.from_file(str(tiny_export / "tokenizer.json"))
    names = [model.id_to_piece(index) for index in range(model.get_piece_size())]
    often = [names.index(name) for name in ("▁", "▁¿", "¿", ".", "'", "-", "1", "%", "<unk>", "<|en|>", "<pad>")]
    draw, named, unexplained = random.Random(0), set(), 0
    for _ in range(3000):
        tokens = [
            draw.choice(often) if draw.random() < 0.8 else draw.randrange(len(names))
            for _ in range(draw.randrange(1, 9))
        ]
        nemo = decoding.decode_tokens_to_str_with_strip_punctuation(tokens)
        found = explaining_rules(nemo, exported.decode(tokens).strip(), rules)
        assert found is not None, tokens
        named |= set(found)
        without = exported.decode([token for token in tokens if not names[token].isdigit()]).strip()
        unexplained += explaining_rules(nemo, without, rules) is None
    assert named == {rule.name for rule in rules}
    assert unexplained > 500  # of texts without their digits


def transcript(text, tokens=(1,)):
    return Transcript(list(tokens), text, 1.0)


def clip_of(nemo, genai, raw, **fields):
    return ComparedClip(SAMPLES / "a.wav", seconds=1.0, transcripts={"NeMo": nemo, "G": genai, "R": raw}, **fields)


def test_nothing_compared_is_printed(capsys):
    other = transcript("b", (2,))
    clip = clip_of(transcript("a", (1,)), other, other, one_window=False)
    judge(comparison_of([clip], with_nemo=True), with_times=True)
    output = capsys.readouterr().out
    assert "1 of 1 clips have several windows of 60 s, and NeMo transcribed them whole" in output
    assert "word errors against it: G 100.00 %" in output
    assert "nothing was compared with NeMo token for token: that needs a float32 folder and a clip of at most" in output
    assert "no text was compared with NeMo's" in output
    assert "R: no times of words were compared; 1 clips left out" in output
    assert "0 of 0" not in output
    clip.one_window = True
    judge_tokens(comparison_of([clip], is_float32=False, with_nemo=True))
    assert "nothing was compared with NeMo token for token" in capsys.readouterr().out


def test_empty_transcripts_are_flagged(capsys):
    empty = transcript("", ())
    judge(comparison_of([clip_of(empty, empty, empty)], with_nemo=True), with_times=False)
    output = capsys.readouterr().out
    assert [f"every transcript of {name} is empty" in output for name in ("NeMo", "G", "R")] == [True] * 3
    assert "no text was compared" in output


def test_genai_and_tokenizers_show_the_same_tokens_alike(capsys):
    clip = clip_of(transcript("a"), transcript("a"), transcript("a"))
    del clip.transcripts["NeMo"]
    judge_texts(comparison_of([clip]))
    clip.transcripts["G"] = transcript("b")
    with pytest.raises(CheckError, match="the same tokens have different texts"):
        judge_texts(comparison_of([clip]))
    assert "no rule explains it" in capsys.readouterr().out


def test_a_high_error_rate_is_flagged(capsys):
    for text, is_flagged in (("a b x y z", False), ("a v x y z", True)):
        judge(comparison_of([clip_of(*[transcript(text)] * 3, text="a b c d e")], with_nemo=True), with_times=False)
        output = capsys.readouterr().out
        assert ("different checkpoints" in output) is is_flagged
    assert "the float32 model has 80 % of the words wrong" in output


class TestPartsOfDifferentCheckpoints:
    def test_exporting_anew_drops_the_other_tokenizer(self, exported_over, tiny_export):
        assert not [name for name in GENAI.vocabulary if (exported_over / name).exists()]
        manifest = read_manifest(exported_over)
        assert "tokenizer" not in manifest
        assert not set(GENAI.vocabulary) & set(manifest["files"])
        assert (exported_over / "notes.txt").read_text() == "mine"
        assert "tokenizer" in read_manifest(tiny_export)

    def test_exporting_anew_drops_what_an_optimization_wrote(self, exported_over):
        assert not [name for name in REPORT_FILES if (exported_over / name).exists()]
        assert "optimize" not in read_manifest(exported_over)

    def test_exporting_the_same_anew_keeps_the_tokenizer(self, tiny_export):
        source = read_manifest(tiny_export)["export"]["source"]
        manifest, removed = GENAI.kept_by_export(read_manifest(tiny_export), source)
        assert not set(GENAI.vocabulary) & set(removed)
        assert manifest["tokenizer"] == read_manifest(tiny_export)["tokenizer"]
        assert set(GENAI.vocabulary) <= set(manifest["files"])

    def test_only_what_is_named_is_removed(self, tmp_path):
        (tmp_path / "models" / "sub").mkdir(parents=True)
        for name in ("a", "b", "sub/a", "sub/b"):
            (tmp_path / "models" / name).write_text("old")
        with staged_folder(tmp_path / "models", ["a", "sub/b"]) as staging:
            (staging / "sub").mkdir()
            (staging / "sub" / "c").write_text("new")
        found = sorted(str(path.relative_to(tmp_path / "models")) for path in (tmp_path / "models").rglob("*"))
        assert found == ["b", "sub", "sub/a", "sub/c"]

    def test_the_tokenizer_of_another_checkpoint_is_not_exported(self, exported_over, swapped, capsys):
        before = sorted(exported_over.iterdir())
        for argv in (("--model_name", TINY), ()):  # another model, or step 1's flag forgotten: no download either
            error = rejected(capsys, export_tokenizer, "--output_dir", exported_over, *argv)
            assert f"run: python export_tokenizer.py --output_dir {exported_over} --model_name {swapped}" in error
        assert sorted(exported_over.iterdir()) == before

    @pytest.mark.parametrize(
        "script", [optimize_encoder, test_e2e, test_real_speech], ids=lambda module: module.__name__
    )
    def test_every_reader_rejects_them(self, script, tiny_export, tmp_path, capsys):
        folder = tmp_path / "models"
        shutil.copytree(tiny_export, folder)
        manifest = read_manifest(folder)
        manifest["tokenizer"]["source"] |= {"file": "other.nemo", "sha256": "0" * 64}
        write_json(folder / "manifest.json", manifest)
        argv = ("--output_dir", tmp_path / "out") if script is optimize_encoder else ()
        error = rejected(capsys, script, "--model_dir", folder, *argv)
        assert f"the graphs in {folder} are from {TINY.name} (SHA-256 " in error
        assert "other.nemo (SHA-256 00000000…)" in error
        assert f"run: python export_tokenizer.py --output_dir {folder} --model_name " in error

    @pytest.mark.parametrize(("form", "flag"), [("nemo", ""), ("transformers", " --checkpoint_format transformers")])
    def test_the_command_has_the_revision_and_the_format_of_the_graphs(self, form, flag, tmp_path):
        source = {"name": "owner/model", "revision": "v2", "sha256": "0" * 64, "format": form}
        write_json(tmp_path / "manifest.json", {"export": {"source": source}})
        command = f"python export_tokenizer.py --output_dir {tmp_path} --model_name owner/model --revision v2{flag}"
        assert tokenizer_command(tmp_path) == command

    @pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt", "genai_config.json"])
    def test_without_a_manifest_sizes_are_compared(self, file, tiny_export, tmp_path):
        folder = tmp_path / "models"
        shutil.copytree(tiny_export, folder)
        (folder / "manifest.json").unlink()
        GENAI.check_one_checkpoint(folder)
        if file == "vocab.txt":
            (folder / file).write_text("a\nb\n")
        else:
            content = json.loads((folder / file).read_text())
            if file == "tokenizer.json":
                content["model"]["vocab"].pop()
            else:
                content["model"]["blank_id"] -= 1
            write_json(folder / file, content)
        with pytest.raises(ValueError, match="they are of different checkpoints; run: python export_"):
            GENAI.check_one_checkpoint(folder)

    def test_a_manifest_that_says_nothing_of_the_tokenizer_leaves_sizes(self, tiny_export, tmp_path):
        folder = tmp_path / "models"
        shutil.copytree(tiny_export, folder)
        manifest = read_manifest(folder)
        del manifest["tokenizer"]
        write_json(folder / "manifest.json", manifest)
        GENAI.check_one_checkpoint(folder)
        assert set(GENAI.vocabulary) < set(GENAI.kept_by_export(manifest, manifest["export"]["source"])[1])

    def test_an_optimized_folder_and_new_graphs(self, tiny_export, exported_over):
        check_same_checkpoint(tiny_export, tiny_export)
        with pytest.raises(ValueError, match=r"now has graphs of .* run: python optimize_encoder\.py"):
            check_same_checkpoint(tiny_export, exported_over)

    @pytest.mark.parametrize("layout", [ONNX_ASR, SHERPA_ONNX], ids=lambda layout: layout.runtime)
    def test_the_vocabulary_of_another_layout_fits_its_logits(self, layout, tiny_export, tmp_path):
        # A copy, because the view's data file is a hard link to the source's, and onnx reads no such file.
        source = shutil.copytree(tiny_export, tmp_path / "source")
        write_view(layout.graphs[-1], source, tmp_path, {})
        lines = (tiny_export / "vocab.txt").read_text(encoding="utf-8").splitlines()
        vocabulary = tmp_path / layout.vocabulary[0]
        vocabulary.write_text("\n".join([*lines, ""]), encoding="utf-8")
        layout.check_one_checkpoint(tmp_path)
        vocabulary.write_text("\n".join([*lines[:100], ""]), encoding="utf-8")
        with pytest.raises(ValueError, match="do not fit the 100 tokens in"):
            layout.check_one_checkpoint(tmp_path)


FIRST = (0, 1, 5.0)


def decided(*decisions):
    """Decisions given as (frame, token, margin)."""
    return Hypothesis(
        [Step(frame, token, 1, margin, blank_zero=False) for frame, token, margin in decisions], blank_id=9
    )


def decoding(*made, with_steps):
    """What transcribes: it gives these decodings; GenAI gives tokens alone."""
    left = iter(made)

    def transcribe(recordings):
        now = [next(left) for _ in recordings]
        return [Transcript(one.tokens, str(one.tokens), 0.5, hypothesis=one if with_steps else None) for one in now]

    return transcribe


@pytest.mark.parametrize("is_float32", [False, True])
def test_clips_on_which_the_runtimes_differ_on_a_quantized_folder_are_counted(is_float32, capsys, monkeypatch):
    monkeypatch.setattr("common.evaluate.compare.find_flaws", lambda *_, **__: {name: Flaws(None, []) for name in "GR"})
    same, near, far = (decided(FIRST, (2, 2, margin)) for margin in (5.0, 0.004, 0.31))
    other = decided(FIRST, (2, 3, 5.0))
    comparison = comparison_of(
        [ComparedClip(Path(f"{name}.wav")) for name in "abc"],
        genai=decoding(same, other, decided(FIRST), with_steps=False),
        onnx=decoding(same, near, far, with_steps=True),
        is_float32=is_float32,
    )
    transcribe_and_print(comparison, print_times=False)
    with pytest.raises(CheckError) if is_float32 else contextlib.nullcontext():
        judge_tokens(comparison)
    out, found = capsys.readouterr().out, comparison.as_json()
    if is_float32:
        assert found["draws"] == []
        assert len(found["differences"]) == 2
        assert "quantized" not in out
        return
    assert found["differences"] == []
    assert [(draw["engine"], draw["expected"], draw["actual"], draw["margin"]) for draw in found["draws"]] == [
        ("G", 2, 3, 0.004), ("G", 2, None, 0.31),
    ]  # fmt: skip
    assert (
        "G differs from plain ONNX Runtime, token 2 of the transcript, encoder frame 2: expected 2, got 3; on "
        "quantized weights, rounding of the features decides (logits 4.0e-03 apart)" in out
    )
    assert "G differs from plain ONNX Runtime on 2 of 3 clips: on quantized weights, rounding of the features" in out
    assert "by logits that are at most 3.1e-01 apart" in out
