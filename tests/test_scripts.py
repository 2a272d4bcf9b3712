"""The scripts as a user meets them: bad input gives one line and status 2, and leaves nothing half-written."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile

import export_parakeet_to_onnx
import export_tokenizer
import optimize_encoder
import test_e2e
import test_real_speech
from common.quantize import METHODS
from tests.conftest import ROOT, SAMPLES, TINY
from tests.test_model import ctc_only, plain_rnnt, rewrite_config

SCRIPTS = {
    module.__name__: module
    for module in (export_parakeet_to_onnx, export_tokenizer, optimize_encoder, test_e2e, test_real_speech)
}
CLIP = str(SAMPLES / "clips" / "029_hibari.flac")


def refused(capsys, script, *argv) -> str:
    """Run a script that must refuse its input; return its one line on stderr."""
    try:
        status = script.main([str(argument) for argument in argv])
    except SystemExit as exit_:  # argparse
        status = exit_.code
    error = capsys.readouterr().err
    assert status == 2, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def truncated(path, share=0.5):
    content = TINY.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


@pytest.mark.parametrize("script", [export_parakeet_to_onnx, export_tokenizer], ids=lambda module: module.__name__)
class TestBadCheckpoints:
    def refuse(self, script, capsys, tmp_path, checkpoint) -> str:
        error = refused(capsys, script, "--model_name", checkpoint, "--output_dir", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*"))
        return error

    def test_missing(self, script, capsys, tmp_path):
        assert "found nothing at" in self.refuse(script, capsys, tmp_path, tmp_path / "none.nemo")

    @pytest.mark.parametrize("share", [0, 0.001, 0.03, 0.5, 0.99])
    def test_truncated(self, script, share, capsys, tmp_path):
        error = self.refuse(script, capsys, tmp_path, truncated(tmp_path / "cut.nemo", share))
        assert "cut.nemo" in error
        assert "download it again" in error

    def test_not_an_archive(self, script, capsys, tmp_path):
        (tmp_path / "text.nemo").write_text("hello " * 1000)
        assert "not a NeMo checkpoint" in self.refuse(script, capsys, tmp_path, tmp_path / "text.nemo")

    def test_folder(self, script, capsys, tmp_path):
        (tmp_path / "folder.nemo").mkdir()
        assert "folder.nemo" in self.refuse(script, capsys, tmp_path, tmp_path / "folder.nemo")

    def test_broken_yaml(self, script, capsys, tmp_path):
        path = rewrite_config(tmp_path / "bad.nemo", lambda config: config.clear())
        assert "bad.nemo" in self.refuse(script, capsys, tmp_path, path)

    def test_no_network_for_a_hub_name(self, script, capsys, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        error = self.refuse(script, capsys, tmp_path, "nvidia/parakeet-tdt-0.6b-v3")
        assert "Hugging Face cannot be reached" in error
        assert "--model_name" in error


@pytest.mark.parametrize("change", [ctc_only, plain_rnnt])
def test_another_family(change, capsys, tmp_path):
    path = rewrite_config(tmp_path / "other.nemo", change)
    argv = ("--model_name", path, "--output_dir", tmp_path / "out")
    assert "not a TDT model: other.nemo" in refused(capsys, export_parakeet_to_onnx, *argv)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "named"),
    [
        (("normalize", "all_features"), "normalize"),
        (("mag_power", 1.0), "mag_power"),
        (("frame_splicing", 2), "frame_splicing"),
    ],
)
def test_features_that_genai_cannot_compute(option, named, capsys, tmp_path):
    key, value = option
    path = rewrite_config(tmp_path / "odd.nemo", lambda config: config["preprocessor"].update({key: value}))
    error = refused(capsys, export_parakeet_to_onnx, "--model_name", path, "--output_dir", tmp_path / "out")
    assert named in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["chunk_seconds", "left_context_seconds", "right_context_seconds"])
def test_windows_that_are_not_whole_frames(name, capsys, tmp_path):
    argv = ("--model_name", TINY, "--output_dir", tmp_path / "out", f"--{name}", "1.23")
    assert f"wanted --{name} as a whole number of encoder frames of 0.08 s" in refused(
        capsys, export_parakeet_to_onnx, *argv
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "script", [export_parakeet_to_onnx, export_tokenizer, optimize_encoder], ids=lambda module: module.__name__
)
def test_output_path_is_a_file(script, capsys, tmp_path, tiny_export):
    (tmp_path / "taken").write_text("mine")
    source = ("--model_dir", tiny_export) if script is optimize_encoder else ("--model_name", TINY)
    for path in (tmp_path / "taken", tmp_path / "taken" / "below"):
        assert "found the file" in refused(capsys, script, *source, "--output_dir", path)
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("argv", [("--block_size", "48"), ("--accuracy_level", "7"), ("--quant_method", "magic")])
def test_unknown_choices(argv, capsys, tmp_path, tiny_export):
    error = refused(capsys, optimize_encoder, "--model_dir", tiny_export, "--output_dir", tmp_path / "out", *argv)
    assert argv[0] in error
    assert argv[1] in error


def test_optimize_without_an_encoder(capsys, tmp_path):
    error = refused(capsys, optimize_encoder, "--model_dir", tmp_path, "--output_dir", tmp_path / "out")
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
    error = refused(capsys, script, "--model_dir", folder, *argv)
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
        "missing.wav": "found nothing", "empty.wav": "not audio", "text.wav": "not audio", "none.wav": "0.000 s",
        "short.wav": "wanted", "nan.wav": "not finite", "folder.wav": "found nothing",
    }  # fmt: skip


@pytest.mark.parametrize("script", [test_e2e, test_real_speech], ids=lambda module: module.__name__)
def test_bad_audio(script, capsys, tmp_path, tiny_export):
    flags = ("--skip_nemo",) if script is test_real_speech else ()
    for name, message in bad_audio(tmp_path).items():
        error = refused(capsys, script, "--model_dir", tiny_export, "--audio", tmp_path / name, *flags)
        assert name in error
        assert message in error


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "lists no clips"),
        ("not json\n", "manifest.jsonl:1"),
        ('{"audio_filepath": "a.flac"}\n{"text": "b"}\n', "manifest.jsonl:2"),
        ("[1]\n", "manifest.jsonl:1"),
        ('{"audio_filepath": "a.flac", "text": 5}\n', "manifest.jsonl:1 has the text 5"),
        ('{"audio_filepath": "gone.flac", "text": "a"}\n', "gone.flac"),
    ],
)
def test_bad_manifests(lines, message, capsys, tmp_path, tiny_export):
    (tmp_path / "manifest.jsonl").write_text(lines)
    argv = ("--model_dir", tiny_export, "--skip_nemo", "--manifest", tmp_path / "manifest.jsonl")
    assert message in refused(capsys, test_real_speech, *argv)


def test_model_folder_that_is_not_there(capsys, tmp_path):
    for script in (test_e2e, test_real_speech):
        assert "export_parakeet_to_onnx.py" in refused(capsys, script, "--model_dir", tmp_path / "none")


def test_a_graph_that_does_not_load(capsys, tmp_path, tiny_export):
    folder = tmp_path / "models"
    shutil.copytree(tiny_export, folder)
    (folder / "joint.onnx").write_bytes(b"not a graph")
    assert "joint.onnx" in refused(capsys, test_e2e, "--model_dir", folder)


def test_end_to_end(tiny_export, capsys):
    assert test_e2e.main(["--model_dir", str(tiny_export)]) == 0
    output = capsys.readouterr().out
    assert "We have 13 black fans." in output
    assert output.count("\n") == 4


def test_end_to_end_shows_both_sequences_when_they_differ(tiny_export, tmp_path, capsys, monkeypatch):
    genai = test_e2e.GenAI.transcribe
    monkeypatch.setattr(test_e2e.GenAI, "transcribe", lambda self, samples: genai(self, samples)[:-1])
    assert test_e2e.main(["--model_dir", str(tiny_export)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("check failed: GenAI and the raw ONNX baseline differ")
    assert len(re.findall(r"\[[\d, ]+\]", error)) == 2


def test_no_tokens_is_a_failure(tiny_export, capsys, monkeypatch):
    monkeypatch.setattr(test_e2e.GenAI, "transcribe", lambda self, samples: [])
    assert test_e2e.main(["--model_dir", str(tiny_export)]) == 1
    assert "no token" in capsys.readouterr().err


def test_real_speech_against_nemo(tiny_export, tmp_path, capsys):
    results = tmp_path / "results.json"
    manifest = str(SAMPLES / "manifest.jsonl")
    argv = ["--model_dir", str(tiny_export), "--manifest", manifest, "--json", str(results)]
    assert test_real_speech.main(argv) == 0
    output = capsys.readouterr().out
    assert "equals NeMo token for token on 11 of 11 clips" in output
    found = json.loads(results.read_text())
    assert list(found["engines"]) == ["NeMo", "GenAI onnx_models", "ONNX Runtime onnx_models"]
    for row in found["engines"].values():
        assert 0 < row["wer"]["errors"] < 8
        assert row["wer"]["words"] == 73
        assert row["rtfx"] > 0
    assert found["differences"] == []
    assert len(found["clips"]) == 11
    assert found["clips"][0]["engines"]["NeMo"]["text"] == "Call me on Saturday, June the 9th."


def test_real_speech_notices_another_checkpoint(tiny_export, tmp_path, capsys):
    """One embedding changed in the exported decoder: float32 ONNX no longer says what NeMo says."""
    folder = tmp_path / "models"
    shutil.copytree(tiny_export, folder)
    data = np.memmap(folder / "joint.onnx.data", dtype=np.float32, mode="r+")
    data[:] = np.roll(data, 1)
    data.flush()
    argv = ["--model_dir", str(folder), "--model_name", str(TINY), "--audio", CLIP]
    assert test_real_speech.main(argv) == 1
    captured = capsys.readouterr()
    assert "nothing excuses it" in captured.out
    assert captured.err.startswith("check failed: float32 ONNX differs")


def test_the_recorded_checkpoint_has_changed(tiny_export, tmp_path, capsys):
    folder = tmp_path / "moved" / "models"
    shutil.copytree(tiny_export, folder)
    assert "is gone; pass --model_name or --skip_nemo" in refused(
        capsys, test_real_speech, "--model_dir", folder, "--audio", CLIP
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["export"]["source"]["path"] = "changed.nemo"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "changed.nemo").write_bytes(b"other")
    assert "is not the file" in refused(capsys, test_real_speech, "--model_dir", folder, "--audio", CLIP)


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
    assert done.stdout.count("We have 13 black fans.") == 2
    assert (place / "my.srt").read_text().endswith("We have 13 black fans.\n")


def test_the_first_transcript_waits_for_genai_alone(tiny_export, capsys, monkeypatch):
    """It is on the screen before the plain ONNX Runtime sessions are made."""
    shown = []

    class Late(test_real_speech.RawOrt):
        def __init__(self, folder):
            shown.append(capsys.readouterr().out)
            super().__init__(folder)

    monkeypatch.setattr(test_real_speech, "RawOrt", Late)
    assert test_real_speech.main(["--model_dir", str(tiny_export), "--audio", CLIP, "--skip_nemo"]) == 0
    assert len(shown) == 1
    assert shown[0].endswith("We have 13 black fans.\n")


def test_batches_say_the_same_in_the_order_of_the_manifest(tiny_export, tmp_path, capsys):
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
        (("--batch_size", "0"), "--batch_size: wanted 1 or more, found 0"),
        (("--batch_size", "-2"), "--batch_size: wanted 1 or more, found -2"),
        (("--audio", CLIP, CLIP, "--srt", "a.srt"), "--srt: wanted one clip"),
        (("--manifest", str(SAMPLES / "manifest.jsonl"), "--srt", "a.srt"), "--srt: wanted one clip"),
        (("--srt", "none/a.srt"), "found no"),
    ],
)
def test_batches_and_subtitles_that_cannot_be(argv, message, capsys, tiny_export):
    assert message in refused(capsys, test_real_speech, "--model_dir", tiny_export, "--skip_nemo", *argv)


def test_optimized_folder_is_complete_and_brings_the_exported_one(tiny_export, tmp_path, capsys):
    optimized = tiny_export.parent / "beside"
    argv = ["--model_dir", str(tiny_export), "--output_dir", str(optimized)]
    assert optimize_encoder.main(argv) == 0
    assert {path.name for path in optimized.iterdir()} > {path.name for path in tiny_export.iterdir()}
    assert test_e2e.main(["--model_dir", str(optimized)]) == 0
    capsys.readouterr()
    assert test_real_speech.main(["--model_dir", str(optimized), "--audio", CLIP]) == 0
    output = capsys.readouterr().out
    assert re.findall(r"^  (\S+(?: \S+)*?)  ", output, re.M) == [
        "engine", "NeMo", "GenAI beside", "ONNX Runtime beside", "GenAI onnx_models", "ONNX Runtime onnx_models",
    ]  # fmt: skip
    alone = tmp_path / "alone"
    shutil.copytree(optimized, alone)
    assert test_e2e.main(["--model_dir", str(alone)]) == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block", [16, 128])
def test_every_quantization_loads_in_genai_and_is_understood(method, block, tiny_export, tmp_path, capsys):
    target = ["--model_dir", str(tiny_export), "--output_dir", str(tmp_path / "out")]
    assert optimize_encoder.main([*target, "--quant_method", method, "--block_size", str(block)]) == 0
    assert test_e2e.main(["--model_dir", str(tmp_path / "out")]) == 0
    assert "We have 13 black fans." in capsys.readouterr().out


def test_a_missing_package_is_named(tiny_export, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    assert "pip install -r requirements.txt" in refused(capsys, test_e2e, "--model_dir", tiny_export)


README_COMMANDS = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.strip().startswith("#")
]


@pytest.mark.parametrize("command", README_COMMANDS)
def test_readme_command(command):
    words = shlex.split(command, comments=True)
    if words[0] == "python" and words[1].endswith(".py"):
        SCRIPTS[words[1].removesuffix(".py")].parse_args(words[2:])
    elif words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words[1:]) <= set(targets)
    elif words[:2] == ["python", "-m"]:
        assert (ROOT / (words[2].replace(".", "/") + ".py")).is_file() or words[2] == "venv"
    else:
        assert words[0] in {"conda", "pip", "git", "cd", "source"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_in_the_readme(name):
    readme = (ROOT / "README.md").read_text()
    source = (ROOT / f"{name}.py").read_text()
    assert f"python {name}.py" in readme
    for flag in re.findall(r'"(--[a-z_]+)"', source):
        assert f"`{flag}`" in readme, flag
