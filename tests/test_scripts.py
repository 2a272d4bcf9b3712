"""The scripts as a user runs them: bad input gives one line and status 2, and leaves nothing half-written."""

import builtins
import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

import export_parakeet_to_onnx
import export_tokenizer
import optimize_encoder
import test_e2e
import test_real_speech
from common.cli import PUBLISH_COMMAND
from common.evaluate import engines
from common.folder import write_locations
from common.quantize import METHODS
from tests.helpers import (
    MANIFEST,
    ROOT,
    SAMPLES,
    TINY,
    WITHOUT_SPEED,
    change_weights,
    ctc_only,
    plain_rnnt,
    rejected,
    rewrite_config,
)

SCRIPTS = {
    module.__name__: module
    for module in (export_parakeet_to_onnx, export_tokenizer, optimize_encoder, test_e2e, test_real_speech)
}
CLIP = str(SAMPLES / "clips" / "029_hibari.flac")


def truncated(path, share=0.5):
    content = TINY.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


@pytest.mark.parametrize("script", [export_parakeet_to_onnx, export_tokenizer], ids=lambda module: module.__name__)
class TestBadCheckpoints:
    def rejection(self, script, capsys, tmp_path, checkpoint) -> str:
        error = rejected(capsys, script, "--model_name", checkpoint, "--output_dir", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*"))
        return error

    def test_missing(self, script, capsys, tmp_path):
        assert "there is nothing at" in self.rejection(script, capsys, tmp_path, tmp_path / "none.nemo")

    @pytest.mark.parametrize("share", [0, 0.001, 0.03, 0.5, 0.99])
    def test_truncated(self, script, share, capsys, tmp_path):
        error = self.rejection(script, capsys, tmp_path, truncated(tmp_path / "cut.nemo", share))
        assert "cut.nemo" in error
        assert "download it again" in error

    def test_not_an_archive(self, script, capsys, tmp_path):
        (tmp_path / "text.nemo").write_text("hello " * 1000)
        assert "not a NeMo checkpoint" in self.rejection(script, capsys, tmp_path, tmp_path / "text.nemo")

    def test_folder(self, script, capsys, tmp_path):
        (tmp_path / "folder.nemo").mkdir()
        assert "folder.nemo" in self.rejection(script, capsys, tmp_path, tmp_path / "folder.nemo")

    def test_broken_yaml(self, script, capsys, tmp_path):
        path = rewrite_config(tmp_path / "bad.nemo", lambda config: config.clear())
        assert "bad.nemo" in self.rejection(script, capsys, tmp_path, path)

    def test_no_network_for_a_hub_name(self, script, capsys, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        error = self.rejection(script, capsys, tmp_path, "nvidia/parakeet-tdt-0.6b-v3")
        assert "nvidia/parakeet-tdt-0.6b-v3 cannot be read from Hugging Face" in error
        assert "HF_HUB_OFFLINE" in error
        assert "pass the path of a checkpoint" in error


@pytest.mark.slow
@pytest.mark.parametrize("change", [ctc_only, plain_rnnt])
def test_another_family(change, capsys, tmp_path):
    path = rewrite_config(tmp_path / "other.nemo", change)
    argv = ("--model_name", path, "--output_dir", tmp_path / "out")
    error = rejected(capsys, export_parakeet_to_onnx, *argv)
    assert error.startswith(f"error: {path.name} is not a TDT model: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_features_that_genai_cannot_compute(capsys, tmp_path):
    odd = {"normalize": "all_features", "mag_power": 1.0, "frame_splicing": 2}
    path = rewrite_config(tmp_path / "odd.nemo", lambda config: config["preprocessor"].update(odd))
    error = rejected(capsys, export_parakeet_to_onnx, "--model_name", path, "--output_dir", tmp_path / "out")
    assert all(f"{key} is " in error for key in odd)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_windows_that_are_not_whole_frames(capsys, tmp_path):
    argv = ("--model_name", TINY, "--output_dir", tmp_path / "out", "--left_context_seconds", "1.23")
    error = rejected(capsys, export_parakeet_to_onnx, *argv)
    assert "--left_context_seconds must be a whole number of encoder frames of 0.08 s" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "script", [export_parakeet_to_onnx, export_tokenizer, optimize_encoder], ids=lambda module: module.__name__
)
def test_output_path_is_a_file(script, capsys, tmp_path, tiny_export):
    (tmp_path / "taken").write_text("mine")
    source = ("--model_dir", tiny_export) if script is optimize_encoder else ("--model_name", TINY)
    for path in (tmp_path / "taken", tmp_path / "taken" / "below"):
        assert "is a file, where a folder is to be written" in rejected(capsys, script, *source, "--output_dir", path)
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("argv", [("--block_size", "48"), ("--accuracy_level", "7"), ("--quant_method", "magic")])
def test_unknown_choices(argv, capsys, tmp_path, tiny_export):
    error = rejected(capsys, optimize_encoder, "--model_dir", tiny_export, "--output_dir", tmp_path / "out", *argv)
    assert argv[0] in error
    assert argv[1] in error


def test_optimize_without_an_encoder(capsys, tmp_path):
    error = rejected(capsys, optimize_encoder, "--model_dir", tmp_path, "--output_dir", tmp_path / "out")
    assert "encoder.onnx" in error
    assert "export_parakeet_to_onnx.py" in error


@pytest.mark.parametrize("script", [optimize_encoder, test_e2e, test_real_speech], ids=lambda module: module.__name__)
def test_before_the_tokenizer_was_exported(script, capsys, tmp_path, tiny_export):
    folder = tmp_path / "models"
    shutil.copytree(tiny_export, folder, ignore=lambda *_: ["tokenizer.json"])
    argv = {
        optimize_encoder: ("--output_dir", tmp_path / "out"),
        test_e2e: (),
        test_real_speech: ("--skip_nemo",),
    }[script]
    error = rejected(capsys, script, "--model_dir", folder, *argv)
    assert f"first run: python export_tokenizer.py --output_dir {folder}" in error
    assert not (tmp_path / "out").exists()


def bad_audio(tmp_path):
    """Name, file and what the message must say."""
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("this is not audio")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "short.wav", np.zeros(150), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    (tmp_path / "folder.wav").mkdir()
    return {
        "missing.wav": "there is nothing at", "empty.wav": "that libsndfile reads", "text.wav": "that libsndfile reads",
        "none.wav": "0.000 s",
        "short.wav": "has 0.009 s", "nan.wav": "not finite", "folder.wav": "is not a regular file",
    }  # fmt: skip


@pytest.mark.parametrize("script", [test_e2e, test_real_speech], ids=lambda module: module.__name__)
def test_bad_audio(script, capsys, tmp_path, tiny_export):
    flags = ("--skip_nemo",) if script is test_real_speech else ()
    for name, message in bad_audio(tmp_path).items():
        error = rejected(capsys, script, "--model_dir", tiny_export, "--audio", tmp_path / name, *flags)
        assert name in error
        assert message in error


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "lists no clip"),
        ("not json\n", "manifest.jsonl:1"),
        ('{"audio_filepath": "a.flac"}\n{"text": "b"}\n', "manifest.jsonl:2"),
        ("[1]\n", "manifest.jsonl:1"),
        (
            '{"audio_filepath": "a.flac", "text": 5}\n',
            "manifest.jsonl:1: a line must be a JSON object with audio_filepath (text must be a string, not 5)",
        ),
        ('{"audio_filepath": "gone.flac", "text": "a"}\n', "gone.flac"),
    ],
)
def test_bad_manifests(lines, message, capsys, tmp_path, tiny_export):
    (tmp_path / "manifest.jsonl").write_text(lines)
    argv = ("--model_dir", tiny_export, "--skip_nemo", "--manifest", tmp_path / "manifest.jsonl")
    assert message in rejected(capsys, test_real_speech, *argv)


def test_model_folder_that_is_not_there(capsys, tmp_path):
    for script in (test_e2e, test_real_speech):
        assert "export_parakeet_to_onnx.py" in rejected(capsys, script, "--model_dir", tmp_path / "none")


def test_a_graph_that_does_not_load(capsys, tmp_path, tiny_export):
    folder = tmp_path / "models"
    shutil.copytree(tiny_export, folder)
    (folder / "joint.onnx").write_bytes(b"not a graph")
    assert "joint.onnx" in rejected(capsys, test_e2e, "--model_dir", folder)


def test_end_to_end(tiny_export, capsys):
    assert test_e2e.main(["--model_dir", str(tiny_export)]) == 0
    output = capsys.readouterr().out
    assert "We have 13 black fans." in output
    assert re.findall(r"^\[\d/4\]", output, re.M) == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    assert output.count("\n") == 8  # a stage has two lines


def test_end_to_end_shows_both_sequences_when_they_differ(tiny_export, tmp_path, capsys, monkeypatch):
    genai = test_e2e.GenAI.transcribe
    monkeypatch.setattr(test_e2e.GenAI, "transcribe", lambda self, samples: genai(self, samples)[:-1])
    assert test_e2e.main(["--model_dir", str(tiny_export)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("check failed: GenAI gives the tokens ")
    assert len(re.findall(r"\[[\d, ]+\]", error)) == 2


def test_no_tokens_is_a_failure(tiny_export, capsys, monkeypatch):
    monkeypatch.setattr(test_e2e.GenAI, "transcribe", lambda self, samples: [])
    assert test_e2e.main(["--model_dir", str(tiny_export)]) == 1
    assert "no token" in capsys.readouterr().err


@pytest.mark.slow
def test_real_speech_against_nemo(tiny_export, tmp_path, capsys):
    results = tmp_path / "results.json"
    manifest = str(SAMPLES / "manifest.jsonl")
    argv = ["--model_dir", str(tiny_export), "--manifest", manifest, "--json", str(results)]
    assert test_real_speech.main(argv) == 0
    output = capsys.readouterr().out
    assert "equals NeMo token for token on 11 of 11 clips" in output
    assert shlex.split(output.splitlines()[-1].partition("next: ")[2]) == [
        *("hf", "upload", "YOUR_NAME/YOUR_MODEL"),
        str(tiny_export),
    ]
    found = json.loads(results.read_text())
    assert list(found["engines"]) == ["NeMo", "GenAI onnx_models", "ONNX Runtime onnx_models"]
    for row in found["engines"].values():
        assert 0 < row["wer"]["errors"] < 8
        assert row["wer"]["words"] == 65
        assert row["rtfx"] > 0
    assert found["differences"] == []
    assert len(found["clips"]) == 11
    assert found["clips"][0]["engines"]["NeMo"]["text"] == "Call me on Saturday, June the 9th."


def test_real_speech_notices_another_checkpoint(tiny_export, tmp_path, capsys):
    """One embedding changed in the exported decoder: float32 ONNX no longer transcribes what NeMo does."""
    folder = tmp_path / "models"
    shutil.copytree(tiny_export, folder)
    change_weights(folder / "joint.onnx", lambda weight: np.roll(weight, 1))
    argv = ["--model_dir", str(folder), "--model_name", str(TINY), "--audio", CLIP]
    assert test_real_speech.main(argv) == 1
    captured = capsys.readouterr()
    assert "nothing excuses it" in captured.out
    assert captured.err.startswith("check failed: float32 ONNX differs")


def test_the_recorded_checkpoint_has_changed(tiny_export, random_checkpoint, tmp_path, capsys):
    folder = tmp_path / "moved" / "models"
    shutil.copytree(tiny_export, folder)
    assert f"the checkpoint that the manifest of {folder} records is not at" in rejected(
        capsys, test_real_speech, "--model_dir", folder, "--audio", CLIP
    )
    write_locations(folder, folder, checkpoint=folder / "changed.nemo")
    shutil.copy(random_checkpoint, folder / "changed.nemo")
    assert "changed.nemo is not the checkpoint that" in rejected(
        capsys, test_real_speech, "--model_dir", folder, "--audio", CLIP
    )


# Runs a script as on a machine where these packages are not installed.
WITHOUT = """
import runpy, sys
for name in ("torch", "nemo", "onnx", "onnxscript", "onnx_ir"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_quick_look_on_another_machine(tiny_export, tmp_path):
    """The model folder and the scripts alone, elsewhere: no checkpoint, no samples, no NeMo, no torch; any audio."""
    import soxr

    place = tmp_path / "elsewhere"
    shutil.copytree(tiny_export, place / "models")
    shutil.copytree(ROOT / "common", place / "common")
    shutil.copy(ROOT / "test_real_speech.py", place)
    samples, rate = soundfile.read(CLIP)
    soundfile.write(place / "my.wav", np.stack([soxr.resample(samples, rate, 44100)] * 2, axis=1), 44100)
    argv = ["test_real_speech.py", "--model_dir", "models", "--audio", "my.wav", "--skip_nemo", "--srt", "my.srt"]
    done = subprocess.run(
        [sys.executable, "-I", "-c", "import sys; sys.path.insert(0, '.')" + WITHOUT, *argv],
        cwd=place, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "my.wav  1.9 s  We have 13 black fans.\n" in done.stdout
    assert re.search(r"^GenAI models .*\nONNX Runtime models ", done.stdout, re.M)
    assert (place / "my.srt").read_text().endswith("We have 13 black fans.\n")


def test_the_first_transcript_waits_for_genai_alone(tiny_export, capsys, monkeypatch):
    """The transcript is on the screen before the plain ONNX Runtime sessions are made."""
    shown = []

    class Late(engines.OnnxRuntime):
        def __init__(self, folder, *args):
            shown.append(capsys.readouterr().out)
            super().__init__(folder, *args)

    monkeypatch.setattr(engines, "OnnxRuntime", Late)
    assert test_real_speech.main(["--model_dir", str(tiny_export), "--audio", CLIP, "--skip_nemo"]) == 0
    assert len(shown) == 1
    assert shown[0].endswith("We have 13 black fans.\n")


@pytest.mark.slow
def test_an_optimized_encoder_of_zeros_has_its_own_figures(tiny_runtimes, tmp_path, capsys):
    """After --runtime all, both compared folders are called `genai`; neither may be shown with the figures of the
    other."""
    optimized = tmp_path / "optimized"
    assert optimize_encoder.main(["--model_dir", str(tiny_runtimes), "--output_dir", str(optimized)]) == 0
    data = optimized / "genai" / "encoder.onnx.data"
    content = np.zeros(data.stat().st_size, np.uint8)
    data.unlink()  # which may have a second name
    content.tofile(data)
    argv = ["--model_dir", str(optimized / "genai"), "--manifest", str(MANIFEST), "--skip_nemo"]
    assert test_real_speech.main([*argv, "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["engines"]
    exported = f"{tiny_runtimes.name}/genai"
    assert list(found) == [
        *("GenAI optimized/genai", "ONNX Runtime optimized/genai"),
        *(f"GenAI {exported}", f"ONNX Runtime {exported}"),
    ]
    errors = {engine: figures["normalised_wer"]["errors"] for engine, figures in found.items()}
    words = found["GenAI optimized/genai"]["normalised_wer"]["words"]
    assert errors["GenAI optimized/genai"] == errors["ONNX Runtime optimized/genai"] >= words
    assert errors[f"GenAI {exported}"] == errors[f"ONNX Runtime {exported}"] < words / 10


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (("--engines", "genai", "--folders", "optimized"), ["GenAI optimized"]),
        (("--engines", "genai,onnx", "--folders", "exported"), ["GenAI onnx_models", "ONNX Runtime onnx_models"]),
        (("--engines", "onnx"), ["ONNX Runtime optimized", "ONNX Runtime onnx_models"]),
        (("--skip_nemo", "--folders", "both"), ["GenAI optimized", "ONNX Runtime optimized",
                                                "GenAI onnx_models", "ONNX Runtime onnx_models"]),
    ],
)  # fmt: skip
def test_the_engines_and_folders_chosen_are_those_that_run(flags, names, tiny_optimized, tmp_path, monkeypatch, capsys):
    loaded = []
    for name in ("GenAI", "OnnxRuntime"):
        kind = getattr(engines, name)
        monkeypatch.setattr(
            engines, name, lambda path, *args, kind=kind: loaded.append((kind.__name__, path.name)) or kind(path, *args)
        )
    argv = ["--model_dir", str(tiny_optimized), "--audio", CLIP, *flags, "--json", str(tmp_path / "found.json")]
    assert test_real_speech.main(argv) == 0
    assert list(json.loads((tmp_path / "found.json").read_text())["engines"]) == names
    called = {"GenAI": "GenAI", "ONNX Runtime": "OnnxRuntime"}
    expected = sorted((called[kind], folder) for kind, _, folder in (name.rpartition(" ") for name in names))
    if flags == ("--engines", "onnx"):
        expected.insert(0, ("GenAI", "optimized"))  # computes the features
    assert sorted(loaded) == expected
    out = capsys.readouterr().out
    one_engine = flags in (("--engines", "onnx"), ("--engines", "genai", "--folders", "optimized"))
    assert ("nothing was compared with plain ONNX Runtime token for token" in out) == one_engine


def test_many_clips(tiny_optimized, tmp_path, capsys):
    """The transcripts are in --json, and the subtitles of each clip in a file of their own."""
    folder = tmp_path / "subtitles"
    clips = [tmp_path / f"{number}.flac" for number in range(21)]
    for clip in clips:
        shutil.copy(CLIP, clip)
    argv = ["--model_dir", tiny_optimized, "--engines", "onnx", "--folders", "optimized", "--audio", *clips]
    assert test_real_speech.main([*map(str, argv), "--srt", str(folder), "--vtt", str(folder)]) == 0
    assert "the transcripts of so many clips are not printed; --json FILE writes them" in capsys.readouterr().out
    expected = {f"{clip.stem}.{suffix}" for clip in clips for suffix in ("srt", "vtt")}
    assert {path.name for path in folder.iterdir()} == expected
    assert (folder / "7.vtt").read_text().startswith("WEBVTT\n\n00:00:0")
    assert (folder / "7.srt").read_text() == (folder / "8.srt").read_text()
    assert (
        rejected(capsys, test_real_speech, *argv, clips[0], "--srt", folder).count(
            "each result needs a file of its own"
        )
        == 1
    )
    other = tmp_path / "others"
    assert "is a folder" in rejected(capsys, test_real_speech, *argv, "--srt", other, "--json", other)
    assert "there is no folder" in rejected(capsys, test_real_speech, *argv, "--srt", other / "deeper")
    clips[-1].write_bytes(b"no audio")
    assert "that libsndfile reads" in rejected(capsys, test_real_speech, *argv, "--srt", other)
    assert not other.exists()


@pytest.mark.slow
def test_batches_transcribe_the_same_in_the_order_of_the_manifest(tiny_export, tmp_path, capsys):
    found = []
    for size in ("1", "4"):
        argv = ["--model_dir", str(tiny_export), "--manifest", str(SAMPLES / "manifest.jsonl"), "--skip_nemo"]
        assert test_real_speech.main([*argv, "--batch_size", size, "--json", str(tmp_path / "found.json")]) == 0
        clips = json.loads((tmp_path / "found.json").read_text())["clips"]
        assert all(engine["seconds"] > 0 for clip in clips for engine in clip["engines"].values())
        found.append(
            [(clip["audio_filepath"], clip["engines"]["ONNX Runtime onnx_models"]["tokens"]) for clip in clips]
        )
    assert found[0] == found[1]
    assert "11 clips" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--batch_size", "0"), "--batch_size: must be 1 or more, not 0"),
        (("--batch_size", "-2"), "--batch_size: must be 1 or more, not -2"),
        (("--audio", CLIP, CLIP, "--srt", "-"), "the subtitles of 2 clips need a folder, and - is none"),
        (("--audio", CLIP, CLIP, "--vtt", CLIP), "the subtitles of 2 clips need a folder"),
        (("--engines", "genai,sherpa"), "genai,sherpa names an engine that is not one of nemo,genai,onnx"),
        (("--engines", "nemo"), "--engines needs genai or onnx"),
        (("--engines", "genai", "--timestamps"), "--timestamps needs onnx among --engines"),
        (("--folders", "optimized"), "needs an optimized folder"),
        (("--srt", "none/a.srt"), "there is no folder"),
        (("--json", "-", "--srt", "-"), "each result needs a file of its own, and two go to -"),
    ],
)
def test_batches_and_subtitles_that_cannot_be(argv, message, capsys, tiny_export):
    assert message in rejected(capsys, test_real_speech, "--model_dir", tiny_export, "--skip_nemo", *argv)


@pytest.mark.slow
def test_optimized_folder_is_complete_and_brings_the_exported_one(tiny_export, tiny_optimized, tmp_path, capsys):
    assert {path.name for path in tiny_optimized.iterdir()} > {path.name for path in tiny_export.iterdir()}
    assert test_e2e.main(["--model_dir", str(tiny_optimized)]) == 0
    capsys.readouterr()
    assert test_real_speech.main(["--model_dir", str(tiny_optimized), "--audio", CLIP]) == 0
    output = capsys.readouterr().out
    table = output[output.index("\nengine") + 1 :]
    assert re.findall(r"^(\S+(?: \S+)*?)  ", table, re.M)[:6] == [
        "engine", "NeMo", "GenAI optimized", "ONNX Runtime optimized", "GenAI onnx_models", "ONNX Runtime onnx_models",
    ]  # fmt: skip
    alone = tmp_path / "alone"
    shutil.copytree(tiny_optimized, alone)
    assert test_e2e.main(["--model_dir", str(alone)]) == 0


# tests/test_optimize.py multiplies by every method's blocks of every size.
QUANTIZATIONS = [
    ("--quant_method", name, *(("--block_size", ("16", "128")[place % 2]) if method.uses_blocks else ()))
    for place, (name, method) in enumerate(METHODS.items())
]


@pytest.mark.parametrize("flags", QUANTIZATIONS, ids=" ".join)
def test_every_quantization_loads_in_genai_and_is_understood(flags, optimized, capsys):
    assert test_e2e.main(["--model_dir", str(optimized(*flags))]) == 0
    assert "We have 13 black fans." in capsys.readouterr().out


def test_a_missing_package_is_named(tiny_export, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    assert "pip install -r requirements.txt" in rejected(capsys, test_e2e, "--model_dir", tiny_export)


PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))


def documented_commands(page: str) -> list[str]:
    """The commands of a page: lines of bash blocks, `python script.py …` in lines of text, and lines after a `$`."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = [block.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", text, re.S)]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`(python \w+\.py[^`]*)`", text)
    prompted = re.findall(r"^\$ (.*)$", text, re.M)
    return [line for line in (*lines, *inline, *prompted) if line and not line.startswith("#")]


def python(*argv, **options) -> subprocess.CompletedProcess:
    """A process of its own, as a shell starts it."""
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, capture_output=True, check=False, **{"cwd": ROOT, "text": True, **options})


@pytest.fixture
def start(monkeypatch, capsys):
    """`start("test_e2e", "--help", without="numpy")`: the exit status and the standard error of a script that begins in
    this process: the modules of `common` are imported again, and the one package is not there."""
    before = dict(sys.modules)

    def start_script(name: str, *argv: str, without: str | None = None) -> tuple[int | None, str]:
        sys.modules.clear()
        sys.modules.update(before)
        for module in before:
            if module.partition(".")[0] in ("common", without):
                del sys.modules[module]
        if without:
            sys.modules[without] = None
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv])
        monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
        status = None
        try:
            runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
        except SystemExit as exit_:
            status = exit_.code
        except ImportError as error:  # as the interpreter does
            with pytest.raises(SystemExit) as exit_:
                sys.excepthook(type(error), error, error.__traceback__)
            status = exit_.value.code
        return status, capsys.readouterr().err

    yield start_script
    monkeypatch.undo()
    sys.modules.clear()
    sys.modules.update(before)


def imported_packages(name: str, start, monkeypatch) -> set[str]:
    """The packages that a script and the modules of `common` name in their imports before the script begins."""
    found = set()
    real = builtins.__import__

    def recorded(module, namespace=None, *args):
        if Path((namespace or {}).get("__file__") or "/").is_relative_to(ROOT):
            found.add(module.partition(".")[0])
        return real(module, namespace, *args)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", recorded)
        assert start(name, "--help") == (0, "")
    return found - {"common", "tests", ""} - sys.stdlib_module_names


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
class TestBeforeTheScriptBegins:
    def test_a_python_without_packages_is_one_line(self, name):
        done = python("-S", f"{name}.py", "--help")  # no site-packages at all
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(r"error: No module named '\w+'; run: pip install -r requirements.txt\n", done.stderr)

    def test_each_package_that_is_missing_is_one_line(self, name, start, monkeypatch):
        packages = imported_packages(name, start, monkeypatch)
        assert "numpy" in packages or "sentencepiece" in packages
        for package in packages:
            status, error = start(name, without=package)
            assert status == 2, package
            assert re.fullmatch(rf"error: .*{package}.*; run: pip install -r requirements.txt\n", error), package

    def test_an_old_python_is_one_line(self, name, start, monkeypatch, capsys):
        monkeypatch.setattr(sys, "version_info", (3, 10, 12, "final", 0))
        assert start(name) == (
            2, "error: Python 3.10.12 is too old for this; run it with Python 3.11 or newer\n"
        )  # fmt: skip
        assert capsys.readouterr().out == ""

    def test_help_in_ascii(self, name, monkeypatch):
        with (
            standard_output("ascii", monkeypatch) as output,
            pytest.raises(SystemExit) as exit_,
        ):
            SCRIPTS[name].main(["--help"])
        assert exit_.value.code == 0
        assert output.bytes() == output.text.encode("ascii", "replace")
        assert b"--verbose" in output.bytes()


class Output(io.TextIOWrapper):
    """A standard output in an encoding, which also keeps the text that a script wrote to it."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict")
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return super().write(text)

    def bytes(self) -> bytes:
        self.flush()
        return self.buffer.getvalue()


@contextlib.contextmanager
def standard_output(encoding: str, monkeypatch):
    with monkeypatch.context() as patch:
        output = Output(encoding)
        patch.setattr(sys, "stdout", output)
        yield output


@contextlib.contextmanager
def closed_output(monkeypatch):
    """A standard output into a pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch, os.fdopen(writer, "w") as output:
        patch.setattr(sys, "stdout", output)
        yield


def into_a_closed_pipe(*argv, unbuffered: str = "") -> subprocess.CompletedProcess:
    reader, writer = os.pipe()
    os.close(reader)
    command, environment = [sys.executable, *map(str, argv)], {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    try:
        return subprocess.run(
            command, cwd=ROOT, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writer)


def commands(folder, target) -> dict[str, tuple]:
    """The shortest command of each script on the tiny checkpoint."""
    return {
        "export_parakeet_to_onnx": ("--model_name", TINY, "--skip_verify", "--output_dir", target / "exported"),
        "export_tokenizer": ("--model_name", TINY, "--output_dir", target / "tokenizer"),
        "optimize_encoder": ("--model_dir", folder, "--output_dir", target / "optimized"),
        "test_e2e": ("--model_dir", folder),
        "test_real_speech": ("--model_dir", folder, "--skip_nemo", "--audio", CLIP),
    }


@pytest.fixture(scope="module")
def foreign(tiny_export, tmp_path_factory):
    """The tiny folder with a tokenizer that shows a Greek λ for every a."""
    folder = tmp_path_factory.mktemp("foreign") / "models"
    shutil.copytree(tiny_export, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for piece in tokenizer["model"]["vocab"]:
        piece[0] = piece[0].replace("a", "λ")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "manifest.json").unlink()  # it has the checksum of the former tokenizer
    return folder


class TestStandardOutput:
    @pytest.mark.parametrize(
        ("name", "encoding"), [*((name, "ascii") for name in SCRIPTS), ("optimize_encoder", "cp1252")]
    )
    def test_in_another_encoding_is_written_with_replacements(
        self, name, encoding, tiny_export, foreign, tmp_path, monkeypatch
    ):
        """The names of what is written have a λ, and those of what is read, or their transcripts."""
        target = tmp_path / "λ"
        target.mkdir()
        folder = tiny_export if name == "test_e2e" else foreign  # it would find the tokenizer of `foreign` wrong
        argv = [*map(str, commands(folder, target)[name])]
        if name == "test_e2e":
            argv += ["--audio", str(shutil.copy(CLIP, target / "λ.flac"))]
        with standard_output(encoding, monkeypatch) as output:
            assert SCRIPTS[name].main(argv) == 0
        assert "λ" in output.text
        assert output.bytes() == output.text.encode(encoding, "replace")

    def test_in_another_encoding_takes_transcripts_in_greek(self, foreign, tmp_path, monkeypatch):
        argv = ("--model_dir", foreign, "--skip_nemo", "--audio", CLIP, "--timestamps", "--json", tmp_path / "a.json")
        with standard_output("cp1252", monkeypatch) as output:
            assert test_real_speech.main([*map(str, argv)]) == 0
        transcript = json.loads((tmp_path / "a.json").read_text("utf-8"))["clips"][0]["engines"]
        texts = {engine["text"] for engine in transcript.values()}
        assert all("λ" in text for text in texts)
        assert all(text.replace("λ", "?").encode("cp1252") in output.bytes() for text in texts)

    @pytest.mark.parametrize("name", SCRIPTS)
    def test_that_nobody_reads_ends_the_script_quietly(self, name, tiny_export, tmp_path, monkeypatch, capsys):
        with closed_output(monkeypatch):
            assert SCRIPTS[name].main([*map(str, commands(tiny_export, tmp_path)[name])]) == 141
        assert capsys.readouterr().err == ""
        assert not [path for path in tmp_path.glob("*") if path.is_dir() and not (path / "manifest.json").is_file()]
        assert not list(tmp_path.glob(".*"))

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is a full disk")
    def test_that_is_full_is_no_traceback(self, tiny_export):
        for unbuffered in ("", "1"):
            command = [sys.executable, "test_e2e.py", "--model_dir", str(tiny_export)]
            environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
            with Path("/dev/full").open("w") as full:
                done = subprocess.run(
                    command, cwd=ROOT, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False
                )
            assert (done.returncode, done.stderr) == (2, "error: [Errno 28] No space left on device\n")

    @pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "not buffered"])
    def test_that_nobody_reads_ends_the_interpreter_quietly(self, unbuffered, tiny_export):
        done = into_a_closed_pipe("test_e2e.py", "--model_dir", tiny_export, unbuffered=unbuffered)
        assert (done.returncode, done.stderr) == (141, "")


class TestResults:
    """--json and --srt of test_real_speech.py."""

    def run(self, capsys, folder, *argv) -> str:
        argv = ("--model_dir", folder, "--skip_nemo", "--audio", CLIP, *argv)
        assert test_real_speech.main([str(argument) for argument in argv]) == 0
        return capsys.readouterr()

    def test_never_replace_what_is_read_or_each_other(self, tiny_export, tmp_path, capsys):
        place = tmp_path / "place"
        shutil.copytree(tiny_export, place / "models")
        shutil.copy(CLIP, place / "clip.flac")
        shutil.copy(TINY, place / "a.nemo")
        (place / "m.jsonl").write_text('{"audio_filepath": "clip.flac", "text": "a"}')
        (place / "link").symlink_to("m.jsonl")
        before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        base = ("--model_dir", place / "models")
        clip = (*base, "--skip_nemo", "--audio", place / "clip.flac")
        manifest = (*base, "--model_name", place / "a.nemo", "--manifest", place / "m.jsonl")
        read = "is read, so no result can be written there"
        for argv, message in (
            ((*clip, "--json", place / "clip.flac"), read),
            ((*clip, "--srt", place / "models" / ".." / "clip.flac"), read),
            ((*clip, "--json", place / "models" / "manifest.json"), read),
            ((*clip, "--json", place / "models" / "encoder.onnx.data"), read),
            ((*manifest, "--json", place / "m.jsonl"), read),
            ((*manifest, "--json", place / "link"), read),
            ((*manifest, "--json", place / "clip.flac"), read),
            ((*manifest, "--json", place / "a.nemo"), read),
            (
                (*clip, "--json", place / "out", "--srt", place / "models" / ".." / "out"),
                "each result needs a file of its own",
            ),
            ((*clip, "--json", place / "models"), "is a folder, where a file is to be written"),
        ):
            assert message in rejected(capsys, test_real_speech, *argv)
        assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before

    def test_never_replace_the_recorded_checkpoint(self, tiny_export, tmp_path, capsys):
        folder, checkpoint = tmp_path / "models", tmp_path / "a.nemo"
        shutil.copytree(tiny_export, folder)
        shutil.copy(TINY, checkpoint)
        write_locations(folder, folder, checkpoint=checkpoint)
        argv = ("--model_dir", folder, "--audio", CLIP, "--json", checkpoint)
        assert "is read, so" in rejected(capsys, test_real_speech, *argv)

    def test_follow_links_and_leave_them(self, tiny_export, tmp_path, capsys):
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "old.json").write_text("old")
        for name, target in (("link", "sub/old.json"), ("dangling", "sub/new.json")):
            (tmp_path / name).symlink_to(target)
            self.run(capsys, tiny_export, "--json", tmp_path / name)
            assert (tmp_path / name).is_symlink()
            assert json.loads((tmp_path / target).read_text())["clips"]
        assert {path.name for path in (tmp_path / "sub").iterdir()} == {"old.json", "new.json"}

    def test_are_written_through_devices_and_pipes(self, tiny_export, tmp_path, capsys):
        null = tmp_path / "null"  # one of our own: a fault must not replace the system's
        with contextlib.suppress(PermissionError):  # only an administrator makes devices
            os.mknod(null, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        if null.exists():
            self.run(capsys, tiny_export, "--json", null, "--srt", null)
            assert null.is_char_device()
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True) as reader:
            self.run(capsys, tiny_export, "--json", pipe)
            assert json.loads(reader.communicate(timeout=60)[0])["clips"]
        assert pipe.is_fifo()

    @pytest.mark.parametrize("name", ["-", "/dev/stdout"])
    def test_are_all_there_is_on_the_standard_output(self, name, foreign, tmp_path):
        """Into a pipe, and /dev/stdout also into a file; the tables then go to the error output, and the result is
        always UTF-8."""
        argv = ("test_real_speech.py", "--model_dir", foreign, "--skip_nemo", "--audio", CLIP, "--json", name)
        environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
        done = python(*argv, env=environment, text=False)
        assert done.returncode == 0, done.stderr
        contents = [done.stdout]
        if name != "-":
            with (tmp_path / "out").open("wb") as file:
                command = [sys.executable, *map(str, argv)]
                subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.DEVNULL, check=True)
            contents.append((tmp_path / "out").read_bytes())
        for content in contents:
            assert "λ" in json.loads(content.decode())["clips"][0]["engines"]["GenAI models"]["text"]
        assert b"RTFx" in done.stderr

    def test_of_subtitles_on_the_standard_output(self, tiny_export, capsys):
        captured = self.run(capsys, tiny_export, "--srt", "-")
        assert captured.out.startswith("1\n00:00:0")
        assert "RTFx" in captured.err


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_interruption_while_a_script_starts_is_one_line(name, tmp_path):
    """The first package that is imported after those of Python interrupts the script.

    It restores Python's handler first: a process that was started in the background ignores the signal.
    """
    (tmp_path / "numpy.py").write_text(
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nsignal.raise_signal(signal.SIGINT)\n"
    )
    done = python(f"{name}.py", "--help", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (130, "interrupted; no output is half-written\n")


def test_printed_commands_can_be_pasted(tiny_export, tmp_path, capsys):
    """The names of the folders have spaces and quotes; the printed commands are parsed as a shell would parse them."""
    place = tmp_path / "it's a folder; really"
    shutil.copytree(tiny_export, place / "models")
    shutil.copy(TINY, place / "a b.nemo")
    optimized, tokenizer = place / "out put", place / "models"
    assert export_tokenizer.main(["--model_name", str(place / "a b.nemo"), "--output_dir", str(tokenizer)]) == 0
    assert optimize_encoder.main(["--model_dir", str(place / "models"), "--output_dir", str(optimized)]) == 0
    printed = [line.partition("next: ")[2] for line in capsys.readouterr().out.splitlines() if "next: " in line]
    (place / "models" / "tokenizer.json").unlink()
    printed.append(rejected(capsys, test_e2e, "--model_dir", place / "models").partition("first run: ")[2])
    shutil.rmtree(place / "models")
    (place / "models").mkdir()
    printed.append(rejected(capsys, test_e2e, "--model_dir", place / "models").partition("first run: ")[2])
    assert [shlex.split(command) for command in printed] == [
        ["python", "optimize_encoder.py", "--model_dir", str(place / "models")],
        ["python", "test_e2e.py", "--model_dir", str(optimized)],
        ["python", "export_tokenizer.py", "--output_dir", str(place / "models")],
        ["python", "export_parakeet_to_onnx.py", "--output_dir", str(place / "models")],
    ]


def test_the_command_that_publishes_is_one_of_hugging_face(tiny_export):
    """Hugging Face's own program accepts the command, and then finds no server at the address."""
    program, *argv = shlex.split(PUBLISH_COMMAND.format(tiny_export))
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_none"}
    command = [str(Path(sys.executable).with_name(program)), *argv]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Usage" not in done.stderr
    assert "onnect" in done.stderr, done.stderr


MANIFESTS = {
    "an export that is a list": {"export": []},
    "files that are a number": {"files": 3},
    "an optimization that is a string": {"optimize": "x"},
    "a section of another program": {"notes": 3},
}


@pytest.mark.parametrize("content", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_of_another_shape_is_one_line_in_every_script(content, tiny_export, tmp_path, capsys, monkeypatch):
    """The line comes before the work, and nothing is changed."""
    monkeypatch.setattr("common.checkpoint.nemo.open_archive", lambda *_, **__: pytest.fail("the work began"))
    folder = tmp_path / "models"
    shutil.copytree(tiny_export, folder)
    (folder / "manifest.json").write_text(json.dumps(content))
    checkpoint = ("--model_name", TINY, "--output_dir", folder)
    for script, argv in (
        (export_parakeet_to_onnx, checkpoint),
        (export_tokenizer, checkpoint),
        (optimize_encoder, ("--model_dir", folder, "--output_dir", tmp_path / "out")),
        (test_e2e, ("--model_dir", folder)),
        (test_real_speech, ("--model_dir", folder, "--audio", CLIP)),
    ):
        error = rejected(capsys, script, *argv)
        assert "manifest.json is not a manifest of this project; " in error, script.__name__
    assert json.loads((folder / "manifest.json").read_text()) == content
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [{}, {"optimize": {}}, {"export": {}}, {"export": {"source": {}}}, {"files": {}}])
def test_a_manifest_that_says_little_is_enough_to_transcribe_by(content, tiny_export, tmp_path):
    folder = tmp_path / "models"
    shutil.copytree(tiny_export, folder)
    (folder / "manifest.json").write_text(json.dumps(content))
    argv = ("--model_dir", str(folder), "--audio", CLIP, "--skip_nemo")
    assert test_real_speech.main([*argv]) == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [("chunk_samples", 0), ("chunk_samples", -5), ("chunk_samples", 1), ("chunk_samples", 1e6), ("hop_length", 0),
     ("left_context_samples", -1), ("subsampling_factor", "8"), ("tdt_durations", [0, -1]), ("sample_rate", None),
     ("tdt_durations", 3), ("decoder", [])],
)  # fmt: skip
def test_a_config_edited_to_what_cannot_be_is_rejected(key, value, tiny_export, tmp_path, capsys, monkeypatch):
    """GenAI 0.18 never ends with chunk_samples of 0 or 1, so it is not even loaded."""
    monkeypatch.setattr("onnxruntime_genai.Model", lambda *_: pytest.fail("GenAI was loaded"))
    folder = tmp_path / "models"
    shutil.copytree(tiny_export, folder)
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"][key] = value
    (folder / "genai_config.json").write_text(json.dumps(config))
    for script, *argv in ((test_e2e,), (test_real_speech, "--skip_nemo")):
        assert "genai_config.json" in rejected(capsys, script, "--model_dir", folder, *argv)


def test_empty_model_folders(tmp_path, capsys, monkeypatch):
    """An empty folder is also rejected as the default: an empty ./onnx_models_optimized does not hide ./onnx_models."""
    (tmp_path / "onnx_models_optimized").mkdir()
    empty = tmp_path / "onnx_models_optimized"
    for script, *argv in ((optimize_encoder, "--output_dir", tmp_path / "out"), (test_e2e,), (test_real_speech,)):
        message = f"first run: python export_parakeet_to_onnx.py --output_dir {empty}"
        assert message in rejected(capsys, script, "--model_dir", empty, *argv)
    monkeypatch.chdir(tmp_path)
    assert "--output_dir onnx_models\n" in rejected(capsys, test_e2e)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_stated_memory_is_what_is_taken(tiny_export, tmp_path):
    """Within a quarter, for a process of its own, by the kernel's count, which begins anew with each program."""
    argv = ("--model_dir", tiny_export, "--output_dir", tmp_path / "out")
    code = (
        f"{WITHOUT_SPEED}import optimize_encoder, pathlib, sys; status = optimize_encoder.main(sys.argv[1:]); "
        "print(pathlib.Path('/proc/self/status').read_text()); sys.exit(status)"
    )
    done = python("-c", code, *argv)
    assert done.returncode == 0, done.stderr
    stated = 1e6 * float(re.search(r"about (\d+) MB of memory", done.stdout)[1])
    assert stated == pytest.approx(1024 * int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]), rel=0.25)


README_COMMANDS = [
    pytest.param(command, id=f"{page}: {command}") for page in PAGES for command in documented_commands(page)
]


def flags_of(script: str, capsys) -> set[str]:
    """Every flag that the help of a script names."""
    with pytest.raises(SystemExit):
        SCRIPTS[script].parse_args(["--help"])
    return set(re.findall(r"--\w+", capsys.readouterr().out))


@pytest.mark.parametrize("command", README_COMMANDS)
def test_readme_command(command, capsys):
    words = shlex.split(command, comments=True)
    if words[0] == "python" and words[1].endswith(".py"):
        script = words[1].removesuffix(".py")
        SCRIPTS[script].parse_args(words[2:])
        given = {word for word in words if word.startswith("--")}
        assert given <= flags_of(script, capsys)  # argparse would also accept the beginning of a flag
    elif words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif words[:2] == ["python", "-m"]:
        assert (ROOT / (words[2].replace(".", "/") + ".py")).is_file() or words[2] == "venv"
    else:
        assert words[0] in {"conda", "pip", "uv", "pre-commit", "git", "cd", "source"} or words[1:3] == ["-m", "venv"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_documented(name, capsys):
    """In the section of its own script in docs/cli.md, whose beginning has the flags of all scripts."""
    assert f"python {name}.py" in (ROOT / "README.md").read_text(encoding="utf-8")
    common, *sections = (ROOT / "docs/cli.md").read_text(encoding="utf-8").split("\n## `")
    (section,) = (text for text in sections if text.startswith(f"{name}.py`"))
    for flag in flags_of(name, capsys):
        assert f"| `{flag}` |" in common + section, flag


@pytest.mark.parametrize("page", ["README.md", "docs/cli.md"])
def test_every_documented_flag_exists(page, capsys):
    flags = {flag for name in SCRIPTS for flag in flags_of(name, capsys)}
    assert set(re.findall(r"\| `(--\w+)`", (ROOT / page).read_text(encoding="utf-8"))) <= flags
