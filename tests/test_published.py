"""Measuring a published checkpoint: the bundled one and the bundled clips, on loopback in the published forms."""

import contextlib
import importlib
import io
import json
import os
import re
from pathlib import Path

import jiwer
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import yaml
from huggingface_hub import constants
from whisper_normalizer.english import EnglishTextNormalizer

import optimize_encoder
from benchmarks import published, published_report, steps
from benchmarks.published_report import FLOAT32, METHODS, MODELS, README_TITLES, TERNARY, TERNARY_TITLES, Model
from benchmarks.published_speech import CLIPS as CLIP_LIST
from benchmarks.published_speech import HELD_OUT_CLIPS, SETS, choose, fetch_set, set_files
from common.checkpoint.hub import DEFAULT_MODEL
from common.cli import CheckError, Stages
from common.evaluate import stress
from common.run.audio import read_clips
from tests.helpers import CLIPS, ROOT, ROWS, TINY, rejected, run_python
from tests.hub import COMMIT, point_client_at, serve

ENGLISH, GERMAN = "librispeech-test-other", "fleurs-de_de"
NOWHERE = "http://127.0.0.1:9"  # where nothing answers


def parquet(key: str) -> bytes:
    """The bundled clips in the published form of a set: FLAC and capitals (LibriSpeech), WAV in 32 bits and two readers
    of the first sentence (FLEURS)."""
    is_english = SETS[key].english_rules
    rows = []
    for number, (clip, row) in enumerate(zip(CLIPS, ROWS, strict=True)):
        content = clip.read_bytes()
        if not is_english:
            samples, rate = soundfile.read(clip, dtype="float32")
            file = io.BytesIO()
            soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
            content = file.getvalue()
        rows.append(
            {
                "id": f"367-{number:04}" if is_english else max(number, 1),
                "audio": {"bytes": content, "path": clip.name},
                SETS[key].text: re.sub("[.,]", "", row["text"].upper()) if is_english else row["text"],
            }
        )
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=4)
    return file.getvalue()


def speech_files(*keys: str) -> dict[str, bytes]:
    """What the hub has of these sets, and a file that is not asked for."""
    files = {}
    for key in keys:
        one = SETS[key]
        name = "0000.parquet" if one.english_rules else "00000-of-00001.parquet"
        files[f"datasets/{one.repository}/{one.files}{name}"] = parquet(key)
        files[f"datasets/{one.repository}/README.md"] = b"card"
    return files


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The bundled checkpoint under v3's name, and LibriSpeech; FLEURS is missing."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    checkpoint = {f"{DEFAULT_MODEL}/{DEFAULT_MODEL.split('/')[1]}.nemo": TINY.read_bytes()}
    with serve(checkpoint | speech_files(ENGLISH)) as hub:
        hub.revisions |= {one.commit for one in SETS.values()}
        point_client_at(hub.url, monkeypatch)
        yield hub


class Scripts:
    """Runs the scripts in this process, which has loaded NeMo already; `ran` has their names."""

    def __init__(self):
        self.ran: list[str] = []
        self.stopped_at: str | None = None  # the script at which the run is interrupted

    def run(self, command, log) -> dict:
        self.ran.append(command[0])
        if command[0] == self.stopped_at:
            raise KeyboardInterrupt
        with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            status = importlib.import_module(command[0].removesuffix(".py")).main(command[1:])
        return {"status": status, "seconds": 1.0, "peak_memory": 1}


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_and_measures_its_own_clips(hub, tmp_path, monkeypatch, capsys, nemo_texts):
    scripts = Scripts()
    monkeypatch.setattr(steps, "run_script", scripts.run)
    shown = [each for each in stress.CONDITIONS if each is stress.CLEAN or each.name in published_report.STRESS]
    monkeypatch.setattr(stress, "CONDITIONS", shown)
    argv = ["--clips", "2", "--sets", ENGLISH, GERMAN, "--methods", "rtn", "--work_dir", str(tmp_path / "work")]
    folder = tmp_path / "work" / DEFAULT_MODEL.replace("/", "--")

    scripts.stopped_at = "optimize_encoder.py"
    assert published.main(argv) == 130
    printed = capsys.readouterr().out
    assert "checkpoint 7.2 MB" in printed
    assert "of disk, about 7.9 GB of memory" in printed
    assert f"LEFT OUT: Hugging Face shows no data set google/fleurs at {SETS[GERMAN].commit}" in printed
    assert not (folder / "published.json").exists()

    # The second set is there now; nothing is made again of the first one.
    hub.files |= speech_files(GERMAN)
    scripts.ran.clear()
    scripts.stopped_at = None
    published.main(argv)
    assert "export_parakeet_to_onnx.py" not in scripts.ran
    # Of the second set the reference, float32 and rtn; rtn of the first one; and both under stress, on other clips now.
    assert scripts.ran.count("test_real_speech.py") == 6
    content = json.loads((folder / "published.json").read_text())
    written = {name: (folder / name).read_text() for name in ("published.md", "readme_rows.md")}
    _check_figures(content, tmp_path / "work" / "speech", nemo_texts)
    assert content["commit"] == COMMIT
    assert content["missing"] == {}
    assert f"### {DEFAULT_MODEL} on " in written["published.md"]
    command = re.search("`python optimize_encoder.py (.*)`", written["readme_rows.md"])[1]
    assert optimize_encoder.parse_args(command.split()).skip_fusion

    # Without a network everything is still there.
    scripts.ran.clear()
    point_client_at(NOWHERE, monkeypatch)
    published.main(argv)
    assert scripts.ran == []
    assert {name: (folder / name).read_text() for name in written} == written


def _check_figures(content: dict, speech: Path, nemo_texts: list[str]) -> None:
    """The error rates are those of NeMo's own transcripts of the clips, which are known by their content."""
    clips = read_clips(speech / ENGLISH / CLIP_LIST)
    numbers = [[clip.read_bytes() for clip in CLIPS].index(clip.path.read_bytes()) for clip in clips]
    rules = EnglishTextNormalizer()
    pairs = [(rules(clip.text), rules(nemo_texts[number])) for clip, number in zip(clips, numbers, strict=True)]
    counted = jiwer.process_words(*map(list, zip(*pairs, strict=True)))
    for engine in ("NeMo", FLOAT32):
        rate = content["engines"][engine]["wer"][ENGLISH]
        assert rate["errors"] == counted.substitutions + counted.insertions + counted.deletions
        assert rate["words"] == sum(len(text.split()) for text, _ in pairs)
        assert rate["percent"] == pytest.approx(100 * counted.wer)
        assert rate["low"] <= rate["percent"] <= rate["high"]
    float32, rtn = content["engines"][FLOAT32], content["engines"]["rtn"]
    assert set(rtn["wer"]) == {ENGLISH, GERMAN}
    assert float32["words_changed"] is None
    assert rtn["words_changed"]["words"] == sum(rate["words"] for rate in float32["wer"].values())
    assert rtn["bytes"] < 0.6 * float32["bytes"]
    assert set(published_report.STRESS) <= set(rtn["stress"])
    assert rtn["stress"]["as it is"]["words"] == float32["stress"]["as it is"]["words"] > 0
    assert min(rtn["load_seconds"], rtn["peak_memory"], rtn["rtfx"], float32["rtfx"]) > 0


class TestSpeech:
    @pytest.mark.parametrize("clips", [2, 5, None])
    def test_no_sentence_is_both_measured_and_held_out(self, clips):
        sentences = [1, 1, 2, 3, 3, 3, 4, 5, 6, 7, 8, 9]
        measured, held_out = choose(sentences, clips)
        held = {sentences[number] for number in held_out}
        assert len(held_out) == len(held) == 3
        assert held.isdisjoint(sentences[number] for number in measured)
        left = [number for number, sentence in enumerate(sentences) if sentence not in held]
        assert measured == set(left) if clips is None else len(measured) == clips and measured <= set(left)

    def test_the_clips_of_a_set_are_those_that_were_published(self, hub, tmp_path):
        hub.files |= speech_files(GERMAN)
        one, folder = SETS[GERMAN], tmp_path / "set"
        counted = fetch_set(one, set_files(one), None, folder)
        clips, held_out = (read_clips(folder / name) for name in (CLIP_LIST, HELD_OUT_CLIPS))
        assert (len(clips), len(held_out)) == (8, 3)
        assert counted[CLIP_LIST]["clips"] == 8
        texts = {row["text"]: clip for row, clip in zip(ROWS, CLIPS, strict=True)}
        for clip in (*clips, *held_out):
            assert clip.lang == "de"
            samples, rate = soundfile.read(texts[clip.text])
            assert np.array_equal(soundfile.read(clip.path)[0], samples.astype(np.float32))
            assert clip.stated_length == pytest.approx(len(samples) / rate)
        assert not {clip.text for clip in clips} & {clip.text for clip in held_out}
        assert [path.name for path in tmp_path.iterdir() if "set" in path.name] == ["set"]  # no download is left

    def test_a_file_that_arrives_damaged_is_not_used(self, hub, tmp_path):
        one = SETS[ENGLISH]
        files = set_files(one)
        hub.gets.append(("flip", 1000))
        with pytest.raises(ValueError, match=r"expected SHA-256 .* of all/test.other/0000.parquet, got another"):
            fetch_set(one, files, 2, tmp_path / "set")
        assert not (tmp_path / "set").exists()
        fetch_set(one, files, 2, tmp_path / "set")

    def test_a_repository_without_the_set_is_told_from_no_repository(self, hub):
        name = "datasets/google/fleurs/parquet-data/fr_fr/test-00000-of-00001.parquet"
        with pytest.raises(ValueError, match="shows no data set google/fleurs"):
            set_files(SETS[GERMAN])
        hub.files[name] = b""
        with pytest.raises(ValueError, match=r"google/fleurs has no file parquet-data/de_de/test-\*"):
            set_files(SETS[GERMAN])
        assert list(set_files(SETS["fleurs-fr_fr"])) == ["parquet-data/fr_fr/test-00000-of-00001.parquet"]


def test_no_network_is_one_line(hub, tmp_path, monkeypatch, capsys):
    point_client_at(NOWHERE, monkeypatch)
    assert published.main(["--work_dir", str(tmp_path / "work")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: the list of files of {DEFAULT_MODEL} cannot be read from Hugging Face at {NOWHERE}"
    )
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--clips", "0"], "--clips is a number or all, not 0"),
        (["--model_name", "./model.nemo"], "./model.nemo is no name on Hugging Face"),
        (["--methods", "rtn_2_bits"], f"--methods: {DEFAULT_MODEL} has rtn, int8, int8_4_bits, not rtn_2_bits"),
    ],
)
def test_flags_that_cannot_be_used_are_one_line(argv, message, capsys):
    assert message in rejected(capsys, published, *argv)


class TestSteps:
    @pytest.fixture
    def run(self, tmp_path):
        return steps.Run(tmp_path, Stages(9))

    def test_a_result_is_kept_until_its_inputs_change_or_its_files_are_gone(self, run, tmp_path):
        made = []

        def make():
            made.append(None)
            (tmp_path / "file").touch()
            return {"number": len(made)}

        assert run.step("one", {"a": (1, 2)}, make, tmp_path / "file") == {"number": 1}
        assert run.step("one", {"a": (1, 2)}, make, tmp_path / "file") == {"number": 1}
        assert run.step("one", {"a": (1, 3)}, make, tmp_path / "file") == {"number": 2}
        (tmp_path / "file").unlink()
        assert run.step("one", {"a": (1, 3)}, make, tmp_path / "file") == {"number": 3}

    def test_what_failed_is_run_again_and_other_exit_statuses_end_the_run(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr(steps, "ROOT", tmp_path)
        script = tmp_path / "script.py"
        script.write_text("print('check failed: two words')\nraise SystemExit(1)")
        for _ in range(2):
            result = run.script("two", ["script.py"], {})
            assert result["failed"] == "check failed: two words"
            assert result["peak_memory"] > 1e6
        assert run.failures == ["two: check failed: two words"] * 2
        script.write_text("raise SystemExit('error: no such flag' if 0 else 2)")
        with pytest.raises(ValueError, match=r"script.py ended with status 2 and said: exit status 2 \(.*two.txt\)"):
            run.script("two", ["script.py"], {})


class TestReport:
    def content(self, **changes) -> dict:
        rate = {"errors": 5, "words": 100, "percent": 5.0, "low": 2.0, "high": 8.0}
        engine = {"wer": {ENGLISH: rate}, "rtfx": 20.0}
        folder = {**engine, "bytes": 1e6, "load_seconds": 1.0, "peak_memory": 1e9, "flags": None}
        return {
            "model": DEFAULT_MODEL, "commit": COMMIT, "date": "2026-01-01", "versions": {"onnx": "1"},
            "machine": {"cpu": "CPU", "cores": 4, "extensions": [], "memory": 16e9},
            "sets": {ENGLISH: {"title": "LibriSpeech", CLIP_LIST: {"clips": 2, "seconds": 9.0}}},
            "missing": {}, "engines": {"NeMo": engine, FLOAT32: folder}, "source": "the card",
            "published": {ENGLISH: 3.59}, "far": [], "failed_checks": [], **changes,
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("expected", "is_far"), [(3.59, False), (1.01, False), (8.99, False), (0.9, True), (9.1, True)]
    )
    def test_a_float32_that_is_far_from_what_is_published_is_said_loudly(self, expected, is_far):
        content = self.content(published={ENGLISH: expected, GERMAN: 50.0})
        content["far"] = published_report.far_from_published(content)
        assert bool(content["far"]) is is_far
        assert ("**Far from what is published.**" in published_report.markdown(content)) is is_far
        if is_far:
            with pytest.raises(
                CheckError, match=r"FAR FROM WHAT IS PUBLISHED: LibriSpeech test-other: float32 has 5\.00 %"
            ):
                published_report.judge(content)
        else:
            published_report.judge(content)

    def test_a_missing_set_and_a_failed_script_are_in_the_table_and_in_the_exit_status(self):
        content = self.content(missing={GERMAN: "no FLEURS"}, failed_checks=["rtn optimize: check failed: far off"])
        content["engines"]["rtn"] = {"flags": ["--skip_fusion"], "failed": "check failed: far off"}
        table = published_report.markdown(content)
        assert "**Not measured:** no FLEURS." in table
        assert "| rtn | check failed: far off | – |" in table
        with pytest.raises(CheckError, match="left out: no FLEURS; rtn optimize: check failed: far off"):
            published_report.judge(content)
        assert published_report.readme_rows(content) == ""

    def test_every_flag_of_a_method_is_one_of_step_3(self):
        for model in (Model(), *MODELS.values()):
            for flags in model.methods.values():
                optimize_encoder.parse_args([*flags, *(["clips.jsonl"] if flags[-1] == published.CALIBRATED else [])])
            assert set(model.published) <= set(SETS)

    def test_the_rows_for_the_readme_replace_rows_of_the_readme(self):
        readme = (ROOT / "README.md").read_text()
        for methods, titles in ((METHODS, README_TITLES), (TERNARY, TERNARY_TITLES)):
            content = self.content()
            for name, flags in methods.items():
                content["engines"][name] = {"flags": flags, "bytes": 1e6, "speed": None}
            rows = published_report.readme_rows(content).splitlines()
            assert len(rows) == len(titles)
            for row in rows:
                title, command = row.split(" | ")[:2]
                assert f"\n{title}" in readme, row
                assert command in readme, row


@pytest.mark.slow
def test_the_program_that_loads_a_folder_measures_this_process(tiny_export):
    done = run_python(published.LOAD, tiny_export, CLIPS[0])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["peak_memory"] > 10e6


@pytest.mark.parametrize("name", ["ci", "published"])
def test_a_workflow_pins_its_actions_and_runs_what_there_is(name):
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())["jobs"].values()
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"]) for step in job["steps"] if "uses" in step)
    if name == "ci":
        assert os.access(ROOT / commands[0], os.X_OK)
    assert {command.split()[1] for command in commands if command.startswith("make ")} <= set(targets)
