"""The other runtimes themselves, from PyPI, run folders in their layouts: their transcripts must be NeMo's."""

import contextlib
import dataclasses
import errno
import io
import json
import re
import shutil
import string
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import onnxruntime_genai as og
import pytest
import soundfile
import soxr
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto

import export_parakeet_to_onnx
import export_tokenizer
import optimize_encoder
import test_e2e
from common import optimize
from common.checkpoint.find import find_checkpoint
from common.checkpoint.spec import ModelSpec
from common.checkpoint.tokenizer import bpe_text, tokens_text
from common.cli import CheckError
from common.contract import DECODER, ENCODER, JOINT, Tensor, View
from common.evaluate import speed
from common.evaluate.speed import Speed, measure_speed
from common.evaluate.words import normalize, word_errors
from common.folder import CHECKPOINT, FILES, MANIFEST, read_location, read_manifest, staged_folder, verify_files
from common.layouts import LAYOUTS, genai_folder, layouts_in, views
from common.layouts.genai import GENAI
from common.layouts.layout import Layout
from common.layouts.onnx_asr import ONNX_ASR
from common.layouts.sherpa_onnx import SHERPA_ONNX, SHERPA_ONNX_GRAPHS
from common.report.card import CARD, FEATURES
from common.report.report import REPORT_JSON
from common.run.genai import GenAI
from common.run.reference import Nemo, features_of
from tests.helpers import (
    CLIPS,
    ROOT,
    ROWS,
    SAMPLES,
    SHERPA_PROGRAM,
    TINY,
    check_runtime,
    edit_json,
    files_in,
    hub_cache_of,
    rejected,
    run_python,
    runtime_texts,
    trained,
)
from tests.readers import Readers

pytestmark = pytest.mark.slow  # the fixture exports for every runtime

OTHERS = (ONNX_ASR, SHERPA_ONNX)


@pytest.fixture(scope="module")
def exported(tiny_runtimes) -> Path:
    return tiny_runtimes


@pytest.fixture(scope="module")
def spec(tiny_model) -> ModelSpec:
    return ModelSpec.of(tiny_model)


@pytest.mark.parametrize("layout", OTHERS, ids=lambda layout: layout.runtime)
def test_transcribes_as_nemo_does(layout, exported, nemo_texts):
    assert runtime_texts(layout, exported / layout.runtime) == nemo_texts


@pytest.mark.parametrize(
    ("layout", "expected"),
    [(ONNX_ASR, "costs$5(net)¿Qué€€7+x- 9&«a»"), (SHERPA_ONNX, "costs$5(net) ¿Qué € €7+x- 9& «a »")],
    ids=lambda value: getattr(value, "runtime", ""),
)
def test_spaces_before_marks_are_deleted_as_the_rule_says(layout, expected, exported, tmp_path):
    """The tokens of a clip have other names. What they cost is words as written, and none that are normalised."""
    genai = GenAI(exported / GENAI.runtime)
    tokens = genai.transcribe(genai.config.read_audio(CLIPS[2]))
    pieces = re.findall(r"\S+", "▁costs ▁$ 5 ▁( net ) ▁¿ Qué ▁€ 7 ▁+ x ▁- ▁9 ▁& ▁« a ▁»")
    names = dict(zip(dict.fromkeys(tokens), pieces, strict=True))
    folder = shutil.copytree(exported / layout.runtime, tmp_path / "models")
    path = folder / layout.vocabulary[0]
    lines = path.read_text(encoding="utf-8").splitlines()
    for token, name in names.items():
        lines[token] = f"{name} {token}"
    path.unlink()  # which may have a second name
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    spelt = "".join(names[token] for token in tokens).replace("▁", " ").strip()
    assert spelt == "costs $5 (net) ¿Qué € €7 +x - 9 & «a »"
    found = runtime_texts(layout, folder, CLIPS[2:3])
    assert found == [expected]
    # onnx-asr: before every character that is no letter, digit or _; sherpa-onnx: before every ASCII mark.
    marks = {ONNX_ASR: r"[^\w\s]", SHERPA_ONNX: f"[{re.escape(string.punctuation)}]"}[layout]
    assert re.sub(rf"\s+(?={marks})", "", spelt) == expected
    assert word_errors(spelt, expected)[0] > 5
    assert word_errors(normalize(spelt), normalize(expected)) == (0, 8)


def test_every_runtime_has_its_folder_and_they_share_the_encoders_weights(exported):
    assert sorted(path.name for path in exported.iterdir()) == sorted(LAYOUTS)
    for name, layout in LAYOUTS.items():
        files = sorted(path.name for path in (exported / name).iterdir() if path.is_file())
        features = ["nemo128.onnx"] if layout is ONNX_ASR else []
        graphs = [graph.file for graph in layout.graphs]
        expected = (*graphs, layout.encoder.data_file, *layout.config_files, *layout.vocabulary)
        assert files == sorted((*expected, *features, MANIFEST, CARD))
        assert verify_files(exported / name, layout.files) == len(expected)
        manifest = read_manifest(exported / name)["export"]
        assert manifest["source"]["file"] == TINY.name
        assert read_location(exported / name, CHECKPOINT).samefile(TINY)
        for graph in layout.graphs:
            session = ort.InferenceSession(exported / name / graph.file)
            assert [value.name for value in session.get_inputs()] == graph.input_names
            assert [value.name for value in session.get_outputs()] == graph.output_names
        assert (exported / name / layout.encoder.data_file).samefile(exported / GENAI.runtime / ENCODER.data_file)


@pytest.fixture(
    scope="module",
    params=[(), ("--calibration_manifest", str(SAMPLES / "manifest.jsonl"))],
    ids=["plain", "calibrated"],
)
def optimized_for_all(request, exported, optimized) -> Path:
    flags = ("--quant_method", "int8", *request.param, "--decoder_joint_precision", "int8")
    return optimized(*flags, source=exported)


@pytest.mark.parametrize("layout", OTHERS, ids=lambda layout: layout.runtime)
def test_int8_transcribes_as_nemo_does(layout, optimized_for_all, nemo_texts):
    assert runtime_texts(layout, optimized_for_all / layout.runtime) == nemo_texts


def test_quantized_graphs_hold_their_weights_where_clients_need_that(exported, optimized_for_all):
    """Those of onnx-asr and sherpa-onnx have the names that others publish, too."""
    optimized = optimized_for_all
    for name, layout in LAYOUTS.items():
        folder = optimized / name
        graphs = {path.name for path in folder.glob("*.onnx*")} - {"nemo128.onnx"}
        names = {graph.file for graph in layout.graphs}
        second = set() if layout is GENAI else {f"{graph.name}.int8.onnx" for graph in layout.graphs}
        assert graphs == names | second | ({ENCODER.data_file} if layout is GENAI else set())
        assert graphs <= read_manifest(folder)[FILES].keys()
        assert verify_files(folder, layout.files) == len(files_in(folder, layout))
        assert read_manifest(folder)["optimize"]["flags"]["quant_method"] == "int8"
        for graph in layout.graphs:
            assert not second or (folder / graph.file).samefile(folder / f"{graph.name}.int8.onnx")
            assert graph.bytes_in(folder) < graph.bytes_in(exported / name)  # an 8-bit LSTM, an 8-bit joint, or both
    shown = read_manifest(optimized / SHERPA_ONNX.runtime)[FILES]
    for name in ("encoder", "decoder", "joiner"):
        assert shown[f"{name}.int8.onnx"] == shown[f"{name}.onnx"]


@pytest.fixture(scope="module")
def single(exported, tmp_path_factory) -> Path:
    """The export of `exported` with the encoder's weights in its graph, written over a folder that has them apart."""
    folder = Path(shutil.copytree(exported, tmp_path_factory.mktemp("single") / "onnx_models"))
    argv = ["--model_name", str(TINY), "--output_dir", str(folder), "--runtime", "all", "--skip_verify"]
    assert export_parakeet_to_onnx.main([*argv, "--single_file"]) == 0
    return folder


def with_its_weights(path: Path) -> bytes:
    """A graph as one file holds it; its data file may not have several names."""
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        if tensor.external_data:
            place = onnx.external_data_helper.ExternalDataInfo(tensor)
            content = (path.parent / place.location).read_bytes()
            tensor.raw_data = content[place.offset or 0 :][: place.length]
            del tensor.external_data[:]
        tensor.ClearField("data_location")
    return proto.SerializeToString(deterministic=True)


def test_a_single_file_has_the_graph_and_the_weights_of_two(exported, single):
    assert not list(single.rglob("*.data"))
    for name, layout in LAYOUTS.items():
        assert read_manifest(single / name)["export"]["flags"]["single_file"]
        assert verify_files(single / name, layout.files) == len(files_in(single / name, layout))
        assert not [file for file in read_manifest(single / name)[FILES] if file.endswith(".data")]
        for graph in layout.graphs:
            assert with_its_weights(single / name / graph.file) == with_its_weights(exported / name / graph.file)


def test_a_single_file_is_optimized_as_two_are(exported, single, optimized, tmp_path):
    flags = ("--quant_method", "int8")
    expected = optimized(*flags, source=exported / GENAI.runtime)
    folder = Path(shutil.copytree(expected, tmp_path / "out"))
    argv = ["--model_dir", str(single / GENAI.runtime), "--output_dir", str(folder), *flags]
    assert optimize_encoder.main([*argv, "--single_file"]) == 0
    assert not (folder / ENCODER.data_file).exists()  # of the former run
    assert ENCODER.data_file not in read_manifest(folder)[FILES]
    assert with_its_weights(folder / ENCODER.file) == with_its_weights(expected / ENCODER.file)
    report = json.loads((folder / REPORT_JSON).read_text())
    before = report["components"]["encoder"]["exported"]
    assert sum(before.values()) == (single / GENAI.runtime / ENCODER.file).stat().st_size
    assert before["padding"] == 0
    assert report["source"]["roles"][ENCODER.file] == "encoder"


def test_a_folder_in_the_cache_of_the_hub_is_calibrated_optimized_and_run(exported, optimized, tmp_path, monkeypatch):
    """Its files are links, through which onnx, onnx_ir and some versions of ONNX Runtime read no weights."""
    source = hub_cache_of(exported / GENAI.runtime, tmp_path / "exported")
    assert (source / ENCODER.data_file).is_symlink()
    monkeypatch.setattr(optimize, "measure_speed", measure_speed)
    monkeypatch.setattr(speed, "SECONDS", 0)
    flags = (
        "--quant_method",
        "k_quant_mixed",
        "--block_size",
        "128",
        "--calibration_manifest",
        str(SAMPLES / "manifest.jsonl"),
    )
    argv = ["--model_dir", str(source), "--output_dir", str(tmp_path / "out"), *flags]
    assert optimize_encoder.main(argv) == 0
    assert json.loads((tmp_path / "out" / REPORT_JSON).read_text())["speed"]["optimized"]["rtfx"] > 0
    expected = optimized(*flags, source=exported / GENAI.runtime)
    for name in (*ENCODER.files, DECODER.file, JOINT.file):
        assert (tmp_path / "out" / name).read_bytes() == (expected / name).read_bytes(), name
        assert not (tmp_path / "out" / name).is_symlink()
    assert test_e2e.main(["--model_dir", str(hub_cache_of(expected, tmp_path / "optimized"))]) == 0


def test_what_is_too_large_for_one_file_is_an_error(exported, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("common.onnx_io.SINGLE_FILE_MAX", 3e6)
    argv = ["--model_name", str(TINY), "--output_dir", str(tmp_path / "out"), "--skip_verify", "--single_file"]
    message = "the weights of encoder.onnx take 8.2 MB, and one ONNX file holds 3.0 MB at most; leave --single_file out"
    assert message in rejected(capsys, export_parakeet_to_onnx, *argv)
    source = ("--model_dir", exported / GENAI.runtime, "--output_dir", tmp_path / "out")
    assert message in rejected(capsys, optimize_encoder, *source, "--skip_quantization", "--single_file")
    assert list(tmp_path.iterdir()) == []


def test_an_optimized_folder_for_several_runtimes_shares_what_is_equal(exported, optimized):
    folder = optimized("--skip_quantization", source=exported)
    encoders = [folder / name / layout.encoder.data_file for name, layout in LAYOUTS.items()]
    assert all(path.samefile(encoders[0]) for path in encoders)


def test_the_speed_of_one_encoder_is_in_the_reports_of_all_runtimes(exported, tmp_path, monkeypatch):
    measured = []

    def measure(graphs):
        measured.append(graphs)
        return [Speed(1.0, None), Speed(2.0 * len(measured), None)]

    monkeypatch.setattr(optimize, "measure_speed", measure)
    argv = ["--model_dir", str(exported), "--output_dir", str(tmp_path / "out"), "--quant_method", "int8"]
    assert optimize_encoder.main(argv) == 0
    assert len(measured) == 1
    reports = [json.loads((tmp_path / "out" / name / REPORT_JSON).read_text()) for name in LAYOUTS]
    assert [report["speed"]["optimized"]["rtfx"] for report in reports] == [2.0] * len(LAYOUTS)
    assert {report["speed"]["runtime"] for report in reports} == {measured[0][0].parent.name} <= {*LAYOUTS}


@pytest.mark.parametrize(
    ("layout", "flags"),
    [
        (ONNX_ASR, ("--quant_method", "rtn")),
        (SHERPA_ONNX, ("--quant_method", "rtn")),
        (SHERPA_ONNX, ("--quant_method", "k_quant_mixed")),
        (SHERPA_ONNX, ("--skip_quantization",)),
    ],
    ids=lambda value: value.runtime if isinstance(value, Layout) else value[-1],
)
def test_one_optimized_folder_is_transcribed_as_by_genai(layout, flags, exported, optimized):
    """4-bit weights change words, so the transcripts are compared with those of GenAI with the same weights."""
    folder = optimized(*flags, source=exported)
    for name in (GENAI.runtime, layout.runtime):
        assert read_manifest(folder / name)["optimize"]["fused"] == {"SkipLayerNormalization": 20}
    genai = GenAI(folder / GENAI.runtime)
    expected = [genai.text(genai.transcribe(genai.config.read_audio(clip))) for clip in CLIPS]
    assert runtime_texts(layout, folder / layout.runtime) == expected


def renamed(view, names: dict[str, str]):
    """`view` with other names for the same tensors."""
    inputs, outputs = (
        tuple(dataclasses.replace(t, name=names.get(t.name, t.name), of=t.source) for t in side)
        for side in (view.inputs, view.outputs)
    )
    return dataclasses.replace(view, inputs=inputs, outputs=outputs)


@pytest.mark.parametrize(
    ("view", "one", "other"),
    [
        (SHERPA_ONNX_GRAPHS[1], "h_in", "c_in"),
        (ONNX_ASR.graphs[1], "output_states_1", "output_states_2"),
    ],
    ids=["states in", "states out"],
)
def test_a_swap_is_noticed(view, one, other, exported, tmp_path):
    """The swapped tensors have the same shape, so that only their values show the swap."""
    source = shutil.copytree(exported / GENAI.runtime, tmp_path / "source")  # not shared: onnx_ir can join its graphs
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    for folder, each in ((right, view), (wrong, renamed(view, {one: other, other: one}))):
        folder.mkdir()
        views.write_view(each, source, folder, {})
    views.check_view(view, source, right, 8193)
    with pytest.raises(CheckError, match=f"of {view.file} differs from the output of"):
        views.check_view(view, source, wrong, 8193)


def test_without_hard_links_weights_are_copied(exported, tmp_path, monkeypatch):
    def no_links(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", no_links)
    view, source = SHERPA_ONNX_GRAPHS[0], exported / GENAI.runtime
    views.write_view(view, source, tmp_path, {})
    views.check_view(view, source, tmp_path, 8193)
    assert (tmp_path / view.data_file).stat().st_nlink == 1
    assert (tmp_path / view.data_file).read_bytes() == (source / ENCODER.data_file).read_bytes()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vocab_size", "8191", "<blk> is not the last token"),
        ("url", "rnnt", "vocab_size: 8193 != output_size: 8198"),
        ("pred_hidden", "128", "Got invalid dimensions for input"),
    ],
)
def test_sherpa_onnx_does_not_accept_wrong_metadata(key, value, message, exported, tmp_path):
    for path in (exported / SHERPA_ONNX.runtime).iterdir():
        if path.is_file():
            (tmp_path / path.name).hardlink_to(path)
    encoder = tmp_path / "encoder.onnx"
    model = onnx.load(encoder, load_external_data=False)
    next(entry for entry in model.metadata_props if entry.key == key).value = value
    encoder.unlink()
    onnx.save(model, encoder)
    done = run_python(SHERPA_PROGRAM, tmp_path, CLIPS[0])
    assert done.returncode != 0
    assert message in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("runtime", "change", "named"),
    [
        ("onnx-asr", {"durations": (0, 1, 2, 4, 8)}, "must be [0, 1, 2, 3, 4]"),
        ("sherpa-onnx", {"durations": (0, 2)}, "must be [0, 1]"),
        ("onnx-asr", {"num_mels": 64}, "num_mels is 64, not 80 or 128"),
        ("onnx-asr", {"log_guard": 1e-6}, "log_guard is 1e-06"),
        (
            "sherpa-onnx",
            {"hop_length": 200, "preemphasis": 0.0},
            "hop_length is 200, not 160; preemphasis is 0, not 0.97",
        ),
        (
            "sherpa-onnx",
            {"unsupported_features": ("normalize is 'NA'",)},
            "sherpa-onnx computes log-mel features one way",
        ),
    ],
)
def test_a_checkpoint_that_a_runtime_cannot_compute_is_rejected_by_name(runtime, change, named, spec, tiny_model):
    features = partial(features_of, tiny_model)
    check_runtime(LAYOUTS[runtime], spec, features)
    other = dataclasses.replace(spec, **change)
    with pytest.raises(ValueError, match=re.escape(named)):
        check_runtime(LAYOUTS[runtime], other, features)
    if "unsupported_features" not in change:
        check_runtime(GENAI, other)


@pytest.mark.parametrize(
    ("sample_rate", "fft_size", "win_length", "hop_length"),
    [(16000, 512, 400, 160), (8000, 512, 200, 80), (8000, 256, 200, 80), (16000, 512, 512, 160), (16000, 512, 512, 320),
     (16000, 512, 256, 160), (16000, 512, 257, 160), (16000, 512, 416, 160), (16000, 512, 417, 160)],
)  # fmt: skip
def test_features_of_which_genai_computes_another_number_are_rejected(
    sample_rate, fft_size, win_length, hop_length, spec, tmp_path
):
    """GenAI itself counts the frames, in a model of constants."""
    Readers(trained("bpe"), tmp_path)  # writes it
    numbers = {"sample_rate": sample_rate, "fft_size": fft_size, "win_length": win_length, "hop_length": hop_length}
    edit_json(tmp_path / "genai_config.json", lambda config: config["model"].update(numbers))
    audio = io.BytesIO()
    soundfile.write(audio, np.zeros(50 * hop_length), sample_rate, format="WAV")
    model = og.Model(str(tmp_path))  # which must outlive its processor
    inputs = model.create_multimodal_processor()("", audios=og.Audios.open_bytes(audio.getvalue()))
    frames = inputs["audio_features"].as_numpy().shape[2]
    expected = contextlib.nullcontext() if frames == 50 else pytest.raises(ValueError, match="another number of frames")
    with expected:
        check_runtime(GENAI, dataclasses.replace(spec, **numbers))


def test_a_hotword_changes_a_transcript_of_sherpa_onnx(exported, tmp_path):
    """Run the program in the documentation; its transcript without hotwords is the reference."""
    section = (ROOT / "docs/runtimes.md").read_text(encoding="utf-8").split("\n## Hotwords in sherpa-onnx\n")[1]
    program = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    program = program.replace("onnx_models_all", str(exported)).replace("audio.wav", str(CLIPS[5]))
    assert ROWS[5]["text"] == "Do 40 do for."
    for hotword, expected in (("", "Do 40 do 4."), ("do for.", "Do 40 do for.")):
        (tmp_path / "hotwords.txt").write_text(hotword, encoding="utf-8")
        done = run_python(program, cwd=tmp_path)
        assert done.stdout.strip() == expected, done.stderr


def test_bpe_vocab_holds_every_piece_in_the_order_of_the_tokens(exported):
    """SentencePiece itself names the pieces. The scores of a Unigram model are its own."""
    processor = SentencePieceProcessor(model_proto=find_checkpoint(str(TINY)).sentencepiece)
    pieces = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
    lines = (exported / SHERPA_ONNX.runtime / "bpe.vocab").read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[0] for line in lines] == pieces
    scores = [float(line.split("\t")[1]) for line in lines]
    ranks = [processor.get_score(index) for index in range(len(pieces))]
    assert sorted(range(len(pieces)), key=lambda index: -scores[index]) == sorted(
        range(len(pieces)), key=lambda index: -ranks[index]
    )
    assert 2 * max(scores) < min(scores)  # one piece is better than two
    unigram = SentencePieceProcessor(model_proto=trained("unigram"))
    for index, line in enumerate(bpe_text(ModelProto.FromString(trained("unigram"))).splitlines()):
        piece, score = line.split("\t")
        assert piece == unigram.id_to_piece(index)
        assert float(score) == pytest.approx(unigram.get_score(index), rel=1e-5)


def pieces(*texts: str) -> ModelProto:
    return ModelProto(pieces=[ModelProto.SentencePiece(piece=text) for text in texts])


@pytest.mark.parametrize("text", ["a b", "a\nb", "\r", "<blk>", ""])
def test_pieces_that_would_be_misread_are_rejected(text):
    assert tokens_text(pieces("▁a", "é")) == "▁a 0\né 1\n<blk> 2\n"
    with pytest.raises(ValueError, match="misread 1 pieces"):
        tokens_text(pieces("▁a", text))


def test_a_vocabulary_that_sherpa_onnx_takes_for_bytes_is_rejected():
    assert tokens_text(pieces("▁ſ", "ф"))
    with pytest.raises(ValueError, match="byte-level BPE"):
        tokens_text(pieces("▁ſ", "a", "ƒ"))


def test_scripts_find_the_folder_for_genai(exported, capsys, tmp_path):
    assert genai_folder(exported) == exported / GENAI.runtime
    assert genai_folder(tmp_path) == tmp_path
    argv = ["--model_name", str(TINY), "--output_dir", str(exported / ONNX_ASR.runtime)]
    assert export_tokenizer.main(argv) == 2
    assert "is a folder for onnx-asr, not for ONNX Runtime GenAI" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("runtime", "folder", "found"),
    [("genai", "", "genai and onnx-asr and sherpa-onnx"), ("genai", "onnx-asr", "onnx-asr"), ("all", "genai", "genai")],
)
def test_one_runtime_is_not_written_over_another(runtime, folder, found, exported, capsys):
    before = sorted(exported.rglob("*"))
    argv = ["--model_name", str(TINY), "--output_dir", str(exported / folder), "--runtime", runtime]
    assert export_parakeet_to_onnx.main(argv) == 2
    assert f"is a folder for {found}, not for " in capsys.readouterr().err
    assert sorted(exported.rglob("*")) == before


def test_a_second_run_keeps_what_it_did_not_write_in_a_subfolder(tmp_path):
    folder = tmp_path / "onnx_models" / GENAI.runtime
    folder.mkdir(parents=True)
    for name in ("encoder.onnx", "tokenizer.json"):
        (folder / name).write_text("old")
    with staged_folder(folder.parent) as staging:
        (staging / GENAI.runtime).mkdir()
        (staging / GENAI.runtime / "encoder.onnx").write_text("new")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "encoder.onnx": "new",
        "tokenizer.json": "old",
    }


@pytest.mark.parametrize("runtime", LAYOUTS)
def test_the_usage_runs_and_is_documented(runtime, exported, nemo_texts, tmp_path):
    documented = {GENAI.runtime: ("README.md", "onnx_models_optimized")}
    page, folder = documented.get(runtime, ("docs/runtimes.md", f"onnx_models_all/{runtime}"))
    text = (ROOT / page).read_text(encoding="utf-8")
    assert f"`pip install {' '.join(LAYOUTS[runtime].packages)}`" in text
    assert LAYOUTS[runtime].usage.format(folder=folder, audio="audio.wav", **FEATURES) in text
    samples, sample_rate = soundfile.read(CLIPS[0], dtype="float32")
    stereo = np.stack([1.5 * samples, 0.5 * samples], axis=1)
    soundfile.write(tmp_path / "audio.wav", stereo, sample_rate, subtype="FLOAT")
    assert transcribed_by_the_snippet(LAYOUTS[runtime], exported, tmp_path / "audio.wav") == nemo_texts[0]


def transcribed_by_the_snippet(layout: Layout, exported: Path, audio: Path) -> str:
    done = run_python(layout.usage.format(folder=exported / layout.runtime, audio=audio, **FEATURES))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_snippet_of_genai_gives_nemos_text_where_genai_alone_does_not(exported, tiny_model, tmp_path):
    """A clip for which GenAI by itself computes a frame of features more than NeMo, and whose text depends on that;
    as a WAV of six channels, of which GenAI by itself makes three times as many samples."""
    samples, _ = soundfile.read(CLIPS[0], dtype="float32")
    samples = samples[: 216 * 160 + 159]
    nemo, genai = Nemo(tiny_model), GenAI(exported / GENAI.runtime)
    features = nemo.features(samples)
    expected = nemo.transcribe(features).text
    assert genai.features(samples).shape[1] == features.shape[1] + 1
    assert genai.text(genai.transcribe(samples)) != expected
    soundfile.write(tmp_path / "audio.wav", np.repeat(samples[:, None], 6, axis=1), 16000, subtype="FLOAT")
    assert transcribed_by_the_snippet(GENAI, exported, tmp_path / "audio.wav") == expected


def test_the_snippet_of_genai_reads_mp3_with_a_tag(exported, tmp_path):
    """GenAI by itself does not. The rate is another than the model's."""
    samples, rate = soundfile.read(CLIPS[3], dtype="float32")
    encoded = io.BytesIO()
    soundfile.write(encoded, soxr.resample(samples, rate, 24000), 24000, format="MP3")
    title = b"TIT2\0\0\0\6\0\0\0Clip\0"
    tag = b"ID3\3\0\0\0\0\0" + bytes([len(title)]) + title
    (tmp_path / "audio.mp3").write_bytes(tag + encoded.getvalue())
    genai = GenAI(exported / GENAI.runtime)
    with pytest.raises(RuntimeError, match="Cannot detect audio stream format"):
        genai.processor("", audios=og.Audios.open(str(tmp_path / "audio.mp3")))
    assert transcribed_by_the_snippet(GENAI, exported, tmp_path / "audio.mp3") == ROWS[3]["text"]


TOY_GRAPHS = (
    View("toy_encoder", ENCODER.inputs, ENCODER.outputs, parts=(ENCODER,)),
    View("toy_decoder", DECODER.inputs, DECODER.outputs, parts=(DECODER,)),
    View(
        "toy_joint",
        (
            Tensor("audio", ("B", "D", "S"), of="encoder_output"),  # GenAI's has the width last
            Tensor("text", ("B", "U", "H"), of="decoder_output"),
        ),
        (Tensor("scores", ("B", "S", "U", "V+K"), of="joint_output"),),
        parts=(JOINT,),
    ),
)


def toy_files(spec, tokenizer, features, window, device) -> dict[str, bytes]:
    config = json.dumps({"blank": spec.blank_id, "chunk": window["chunk_samples"]})
    return {"toy.json": config.encode(), "pieces.txt": tokens_text(tokenizer).encode()}


def rejected_files(spec, tokenizer, features, window, device) -> dict[str, bytes]:
    raise ValueError(f"the toy runtime does not compute {spec.num_mels} mel bins")


TOY = Layout(
    runtime="toy",
    packages=("toy-runtime",),
    graphs=TOY_GRAPHS,
    config_files=("toy.json",),
    vocabulary=("pieces.txt",),
    make_files=toy_files,
    usage="import toy\nprint(toy.transcribe('{folder}', '{audio}'))\n",
)


@pytest.fixture
def toy(monkeypatch) -> Layout:
    """A new layout, which is among the layouts for one test."""
    monkeypatch.setitem(LAYOUTS, "toy", TOY)
    return TOY


def test_a_layout_of_its_own_kind_needs_nothing_but_its_entry(toy, tiny_export, tmp_path, capsys):
    with pytest.raises(SystemExit):
        export_parakeet_to_onnx.main(["--help"])
    assert "{genai,onnx-asr,sherpa-onnx,toy,all}" in "".join(capsys.readouterr().out.split())
    argv = ["--model_name", str(TINY), "--output_dir", str(tmp_path / "out"), "--runtime", "toy", "--skip_verify"]
    assert export_parakeet_to_onnx.main(argv) == 0
    assert optimize_encoder.main(["--model_dir", str(tmp_path / "out"), "--output_dir", str(tmp_path / "small")]) == 0
    for folder in (tmp_path / "out", tmp_path / "small"):
        assert layouts_in(folder) == {"toy": toy}
        assert layouts_in(folder / "toy") == {"": toy}
        assert verify_files(folder / "toy", toy.files) == len(files_in(folder / "toy", toy))
        assert json.loads((folder / "toy" / "toy.json").read_text()) == {"blank": 8192, "chunk": 60 * 16000}
        assert len((folder / "toy" / "pieces.txt").read_text(encoding="utf-8").splitlines()) == 8193
        card = (folder / "toy" / CARD).read_text(encoding="utf-8")
        assert "import toy" in card
        assert "toy-runtime" in card

    # The joint has the numbers of the one that GenAI runs, under its own names and with its own order of axes.
    joint, own = (
        ort.InferenceSession(path) for path in (tiny_export / JOINT.file, tmp_path / "out/toy/toy_joint.onnx")
    )
    draw = np.random.default_rng(0)
    audio, text = (
        draw.normal(size=(2, size, given.shape[-1])).astype(np.float32)
        for size, given in zip((5, 1), joint.get_inputs(), strict=True)
    )
    inputs = dict(zip(JOINT.input_names, (audio, text), strict=True))
    (scores,) = own.run(["scores"], {"audio": audio.transpose(0, 2, 1), "text": text})
    np.testing.assert_array_equal(scores, joint.run(None, inputs)[0])

    del LAYOUTS["toy"]
    assert layouts_in(tmp_path / "out") == {"": GENAI}
    with pytest.raises(SystemExit):
        export_parakeet_to_onnx.main(argv)
    assert "invalid choice: 'toy'" in capsys.readouterr().err


def test_a_checkpoint_that_a_new_layout_does_not_accept_leaves_no_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(LAYOUTS, "toy", dataclasses.replace(TOY, make_files=rejected_files))
    argv = ["--model_name", str(TINY), "--output_dir", str(tmp_path / "out"), "--runtime", "toy"]
    assert export_parakeet_to_onnx.main(argv) == 2
    assert "error: the toy runtime does not compute 128 mel bins" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_layout_has_a_name_and_a_last_graph_of_its_own():
    assert [layout.runtime for layout in LAYOUTS.values()] == list(LAYOUTS)
    assert len({layout.graphs[-1].name for layout in LAYOUTS.values()}) == len(LAYOUTS)
