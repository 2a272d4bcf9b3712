"""Atomic outputs and untrusted input: disks, checkpoints, model folders, clip lists and audio; each fault once."""

import contextlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import tarfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import soxr

import export_parakeet_to_onnx
import export_tokenizer
import optimize_encoder
import test_e2e
import test_real_speech
from common import folder as swap
from common.checkpoint import nemo
from common.checkpoint.find import find_checkpoint
from common.checkpoint.nemo import open_archive, parse_config
from common.folder import LOCATIONS, fingerprint, staged_folder, verify_files, write_json
from common.layouts.layout import REPORT_FILES
from common.report.card import CARD
from common.run.audio import Clip, load_clip
from common.run.genai import GenAI
from common.run.ort import OnnxRuntime
from tests import helpers
from tests.faults import audio, checkpoints
from tests.faults.clip_lists import CLIP_LISTS
from tests.faults.disks import small_disk
from tests.faults.folders import DAMAGES
from tests.helpers import (
    CONFIG,
    ROOT,
    TINY,
    WEIGHTS,
    WITHOUT_SPEED,
    config_of,
    load_model,
    members_of,
    prefer,
    rejected,
    reproducible,
    run_python,
    small_members,
    snapshot,
    write_tar,
)

pytestmark = pytest.mark.slow

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked child")


class TestReplacing:
    """A folder with old files and one file of the user's own, and a run that writes two new files."""

    def lay_out(self, place: Path) -> Path:
        target = place / "models"
        (target / "sub").mkdir(parents=True)
        (target / "sub" / "mine").write_text("mine")
        for name in ("a.onnx", "b.onnx"):
            (target / name).write_text("old")
        return target

    def write(self, target: Path) -> None:
        with staged_folder(target) as staging:
            (staging.parent / "unpacked").mkdir()
            for name in ("a.onnx", "b.onnx"):
                (staging / name).write_text("new")

    def read(self, target: Path) -> dict[str, str]:
        return {path.name: path.read_text() for path in target.rglob("*") if path.is_file()}

    OLD = {"mine": "mine", "a.onnx": "old", "b.onnx": "old"}  # noqa: RUF012
    NEW = {"mine": "mine", "a.onnx": "new", "b.onnx": "new"}  # noqa: RUF012

    @needs_fork
    def test_killed_before_every_single_step(self, tmp_path):
        """An audit hook kills the child at its n-th file operation, n = 1, 2, …, until the child runs to its end."""
        killed, seen = 0, set()
        while True:
            place = tmp_path / str(killed)
            target = self.lay_out(place)
            pid = os.fork()
            if pid == 0:
                steps = iter(range(killed))

                def step(event, args, steps=steps):
                    file_operation = event.split(".")[0] in {"open", "os", "shutil"} and event != "os.kill"
                    if file_operation and next(steps, None) is None:
                        os.kill(os.getpid(), signal.SIGKILL)

                sys.addaudithook(step)
                self.write(target)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with swap.lock(target):  # what the next run does first
                found = self.read(target)
            assert found in (self.OLD, self.NEW), killed
            assert [path.name for path in place.iterdir()] == ["models"]
            seen.add(found["a.onnx"])
            if status == 0:
                break
            assert status == -signal.SIGKILL
            killed += 1
        assert killed > 20
        assert seen == {"old", "new"}
        assert found == self.NEW

    def test_what_a_run_did_not_write_stays_as_it_is(self, tmp_path):
        target = self.lay_out(tmp_path)
        (target / "notes").write_text("mine")
        (target / "notes").chmod(0o640)
        (target / "link").symlink_to("notes")
        (target / "dangling").symlink_to("/nowhere/at/all")
        target.chmod(0o750)
        inode = (target / "notes").stat().st_ino
        self.write(target)
        assert (target / "notes").stat().st_ino == inode
        assert oct((target / "notes").stat().st_mode & 0o777) == "0o640"
        assert oct(target.stat().st_mode & 0o777) == "0o750"
        assert (target / "link").readlink() == Path("notes")
        assert (target / "dangling").readlink() == Path("/nowhere/at/all")
        assert (target / "sub" / "mine").read_text() == "mine"

    def test_without_hard_links_entries_are_copied(self, tmp_path, monkeypatch):
        def no_link(*args, **kwargs):
            raise PermissionError

        monkeypatch.setattr(os, "link", no_link)
        target = self.lay_out(tmp_path)
        (target / "link").symlink_to("sub")
        self.write(target)
        assert self.read(target) == self.NEW
        assert (target / "link").is_symlink()

    def test_a_link_to_the_folder_stays_a_link(self, tmp_path):
        target = self.lay_out(tmp_path / "elsewhere")
        (tmp_path / "models").symlink_to(target)
        self.write(tmp_path / "models")
        assert (tmp_path / "models").is_symlink()
        assert self.read(target) == self.NEW

    def test_an_error_between_the_two_renames_puts_the_old_folder_back(self, tmp_path, monkeypatch):
        target, rename = self.lay_out(tmp_path), Path.rename

        def fail(path, new):
            if path.name == "new":
                raise OSError("Input/output error")
            return rename(path, new)

        monkeypatch.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="Input/output"):
            self.write(target)
        assert self.read(target) == self.OLD
        assert [path.name for path in tmp_path.iterdir()] == ["models"]

    def test_an_error_changes_nothing(self, tmp_path):
        target = self.lay_out(tmp_path)

        def fail():
            with staged_folder(target) as staging:
                (staging / "a.onnx").write_text("half")
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail()
        assert self.read(target) == self.OLD
        assert [path.name for path in tmp_path.iterdir()] == ["models"]

    def test_a_second_run_is_rejected_and_a_dead_one_forgotten(self, tmp_path):
        target = self.lay_out(tmp_path)
        with staged_folder(target):
            with pytest.raises(BlockingIOError, match="another run is writing to"):
                self.write(target)
            with staged_folder(tmp_path / "other"):
                pass
        (tmp_path / ".models.lock").touch()
        (tmp_path / ".models.partial" / "new").mkdir(parents=True)
        self.write(target)
        assert {path.name for path in tmp_path.iterdir()} == {"models", "other"}

    def test_json_is_written_whole_or_not_at_all(self, tmp_path, monkeypatch):
        path = tmp_path / "results.json"
        write_json(path, {"a": 1})

        def full(_):
            raise OSError("No space left on device")

        monkeypatch.setattr("common.folder.fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_json(path, {"a": 2})
        assert json.loads(path.read_text()) == {"a": 1}
        assert [found.name for found in tmp_path.iterdir()] == ["results.json"]

    def test_space_is_checked_before_the_work(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        argv = ["--model_name", str(TINY), "--output_dir", str(tmp_path / "out")]
        assert export_parakeet_to_onnx.main(argv) == 2
        assert "of free disk" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


@pytest.fixture
def must_end():
    """A test that hangs ends this process, by the signal's default action."""
    signal.alarm(60)
    yield
    signal.alarm(0)


WRITERS = [export_parakeet_to_onnx, export_tokenizer, optimize_encoder]


def argv_of(script, tiny_export: Path) -> tuple:
    """The shortest command of a script that writes a folder, but for --output_dir."""
    return ("--model_dir", tiny_export) if script is optimize_encoder else ("--model_name", TINY)


class TestDisks:
    """Disks that are too small or read-only, files that cannot be written whole, and places that are no folder."""

    @pytest.mark.parametrize("limit", [2_000, 100_000], ids="at byte {}".format)
    @pytest.mark.parametrize("script", [export_tokenizer, optimize_encoder], ids=lambda module: module.__name__)
    def test_a_write_that_fails_changes_nothing(self, script, limit, tiny_export, optimized, tmp_path, capsys):
        """A limit on the size of files acts like a disk that fills up."""
        source = tiny_export if script is export_tokenizer else optimized("--quant_method", "hqq")
        target = shutil.copytree(source, tmp_path / "models")
        (target / "notes.txt").write_text("mine")
        before = snapshot(tmp_path)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            rejected(capsys, script, *argv_of(script, tiny_export), "--output_dir", target)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert snapshot(tmp_path) == before

    @pytest.mark.parametrize("read_only", [False, True], ids=["too small", "read-only"])
    @pytest.mark.parametrize("script", WRITERS, ids=lambda module: module.__name__)
    def test_a_disk_that_does_not_take_the_folder(self, script, read_only, tiny_export, tmp_path, capsys):
        size = 50_000_000 if read_only else 300_000
        with small_disk(tmp_path / "disk", size, read_only=read_only) as disk:
            if disk is None:
                pytest.skip("this process may not mount a file system")
            before = snapshot(disk)
            rejected(capsys, script, *argv_of(script, tiny_export), "--output_dir", disk / "out")
            assert snapshot(disk) == before

    @pytest.mark.parametrize("target", [".", "/proc", "x" * 300], ids=["working directory", "mount point", "long"])
    @pytest.mark.parametrize("script", WRITERS, ids=lambda module: module.__name__)
    def test_a_place_that_cannot_be_replaced(self, script, target, tiny_export, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        rejected(capsys, script, *argv_of(script, tiny_export), "--output_dir", target)
        assert list(tmp_path.iterdir()) == []


class TestModelFolders:
    @pytest.mark.parametrize("name", DAMAGES)
    def test_a_damaged_folder_is_one_line(self, name, tiny_export, tmp_path, capsys, must_end):
        folder = shutil.copytree(tiny_export, tmp_path / "models")
        DAMAGES[name](folder)
        before = snapshot(tmp_path)
        rejected(capsys, test_e2e, "--model_dir", folder)
        rejected(capsys, optimize_encoder, "--model_dir", folder, "--output_dir", tmp_path / "out")
        assert snapshot(tmp_path) == before

    @pytest.mark.parametrize("fault", ["gone", "cut in half", "empty"])
    def test_data_that_a_runtime_does_not_load_are_named(self, fault, tiny_export, tmp_path, capsys):
        folder = shutil.copytree(tiny_export, tmp_path / "models")
        DAMAGES[f"encoder.onnx.data {fault}"](folder)
        argv = ("--model_dir", folder, "--audio", audio.SPEECH)
        reason = f"{folder}: encoder.onnx.data is not the file that"
        for script, *flags in ((test_e2e,), *((test_real_speech, "--engines", name) for name in ("genai", "onnx"))):
            assert reason in rejected(capsys, script, *argv, *flags)
        with pytest.raises(ValueError, match=re.escape(reason)):
            OnnxRuntime(folder)


class TestClipLists:
    @pytest.mark.parametrize("name", CLIP_LISTS)
    def test_a_list_that_cannot_be_read_is_named(self, name, tiny_export, tmp_path, capsys, must_end):
        shutil.copy(audio.SPEECH, tmp_path / "clip.flac")
        path = tmp_path / "m.jsonl"
        path.write_bytes(CLIP_LISTS[name])
        before = sorted(tmp_path.iterdir())
        model = ("--model_dir", tiny_export)
        assert f"{path}" in rejected(capsys, test_real_speech, *model, "--skip_nemo", "--manifest", path)
        target = ("--output_dir", tmp_path / "out", "--eval_manifest", path)
        assert f"{path}" in rejected(capsys, optimize_encoder, *model, *target)
        assert sorted(tmp_path.iterdir()) == before

    @pytest.mark.parametrize("kind", ["pipe", "device"])
    def test_what_is_no_file_is_not_read(self, kind, tiny_export, tmp_path, capsys, must_end):
        path = Path("/dev/zero") if kind == "device" else tmp_path / "pipe"
        if kind == "pipe":
            os.mkfifo(path)
        rejected(capsys, test_real_speech, "--model_dir", tiny_export, "--skip_nemo", "--audio", path)


class TestManifest:
    def test_lists_every_file(self, tiny_export):
        listed = json.loads((tiny_export / "manifest.json").read_text())["files"]
        assert set(listed) == {path.name for path in tiny_export.iterdir() if path.is_file()} - {"manifest.json"}
        for name, entry in listed.items():
            assert entry == fingerprint(tiny_export / name)

    def test_says_which_file_is_wrong_and_how(self, tiny_export, tmp_path):
        folder = tmp_path / "models"
        shutil.copytree(tiny_export, folder)
        names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != "manifest.json")
        assert verify_files(folder, names) == len(names)
        os.truncate(folder / "encoder.onnx.data", 1000)
        shutil.copy(folder / "joint.onnx", folder / "decoder.onnx")
        (folder / "vocab.txt").write_text("x" * (folder / "vocab.txt").stat().st_size)
        with pytest.raises(ValueError, match="make the folder again") as error:
            verify_files(folder, names)
        for part in (
            "encoder.onnx.data is not the file that manifest.json lists (1000 bytes, not ",
            "decoder.onnx is not the file that",
            "vocab.txt is not the file that",
        ):
            assert part in str(error.value)
        assert "joint.onnx is" not in str(error.value)

    def test_of_an_older_version_is_accepted(self, tiny_export, tmp_path):
        folder = tmp_path / "models"
        shutil.copytree(tiny_export, folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["files"]
        (folder / "manifest.json").write_text(json.dumps(manifest))
        assert verify_files(folder, ["encoder.onnx"]) == 0


OPTIMIZE = f"{WITHOUT_SPEED}import sys, optimize_encoder; sys.exit(optimize_encoder.main(sys.argv[1:]))"


def test_the_same_input_gives_the_same_bytes(tiny_export, tiny_optimized, tmp_path):
    """From a checkpoint in another folder into folders elsewhere; the optimization in another process, with another
    hash seed. tests/test_transformers.py exports in such a process."""
    folder = tmp_path / "again" / "onnx_models"
    checkpoint = tmp_path / "again" / TINY.name
    folder.parent.mkdir()
    shutil.copy(TINY, checkpoint)
    source = ["--model_name", str(checkpoint), "--output_dir", str(folder)]
    assert export_parakeet_to_onnx.main([*source, "--skip_verify"]) == 0
    assert export_tokenizer.main(source) == 0
    again = folder.parent / tiny_optimized.name
    argv = ("--model_dir", folder, "--output_dir", again)
    done = run_python(OPTIMIZE, *argv, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert done.returncode == 0, done.stderr
    for one, other in ((tiny_export, folder), (tiny_optimized, again)):
        assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
        for path in sorted(one.iterdir()):
            if path.name in (CARD, LOCATIONS.parts[0]):
                continue  # the locations differ; the card has what verification measured, which is left out here
            if path.name != "manifest.json":
                assert reproducible(path) == reproducible(other / path.name), path.name
                continue
            actual, expected = (json.loads((folder / path.name).read_text()) for folder in (other, one))
            for manifest in (actual, expected):
                for name in REPORT_FILES:  # which have a date and speeds
                    manifest["files"].pop(name, None)
                del manifest["export"]["parity"], manifest["export"]["flags"]["skip_verify"], manifest["files"][CARD]
            assert json.dumps(actual) == json.dumps(expected)


# Faults that only NeMo or torch can find; `make faults` gives them to the scripts. The others are rejected before NeMo
# is asked.
LEFT_TO_NEMO = {
    "_target_: a NeMo class that is no encoder",
    "a width of -1",
    "a width of 'wide'",
    "negative durations",
    "a pickle with code in the zip of torch",
    "a tensor that is a string",
    "a tensor missing",
    "a tensor of another shape",
    "a weight that is not a number (NaN)",
}


def saved_by_torch(path: Path, **options) -> None:
    import torch

    torch.save({"state_dict": {"x": torch.zeros(3)}, "epoch": 3}, path, **options)


TRAINING_RUN = ("is not a NeMo checkpoint", "NeMo's save_to makes a .nemo file of the .ckpt of a training run")
PACKINGS = {
    "the .ckpt of a training run": (saved_by_torch, TRAINING_RUN),
    "the same before torch 1.6": (partial(saved_by_torch, _use_new_zipfile_serialization=False), TRAINING_RUN),
    "a top folder": (
        lambda path: write_tar(path, {f"model/{name}": content for name, content in small_members().items()}),
        (f"has no {CONFIG} at its top", "unpack it, and pass the folder that has the file"),
    ),
    "a pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), ("git lfs pull",)),
}


class TestCheckpoints:
    @pytest.mark.parametrize("name", sorted(checkpoints.CHECKPOINTS.keys() - LEFT_TO_NEMO))
    def test_is_rejected_before_nemo_is_asked(self, name, tmp_path, monkeypatch):
        path = tmp_path / "in" / "bad.nemo"
        path.parent.mkdir()
        checkpoints.CHECKPOINTS[name](path)
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr("nemo.collections.asr.models.ASRModel.restore_from", lambda *a, **k: pytest.fail("asked"))
        with pytest.raises((ValueError, OSError)):
            load_model(path)
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("a pickle with code in the zip of torch", "holds more than tensors"),
            ("a tensor of another shape", "size mismatch"),
            ("a weight that is not a number (NaN)", "not finite"),
        ],
    )
    def test_is_rejected_by_torch(self, name, message, random_checkpoint, tmp_path, monkeypatch):
        """The damaged checkpoint is the random one, which NeMo builds in a tenth of the time."""
        for module in (helpers, checkpoints):
            monkeypatch.setattr(module, "small_members", partial(members_of, random_checkpoint))
        checkpoints.CHECKPOINTS[name](tmp_path / "bad.nemo")
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path / "bad.nemo")
        assert [path.name for path in tmp_path.iterdir()] == ["bad.nemo"]

    def test_nemos_own_guards_are_behind_ours(self, tmp_path):
        """NeMo 3.0.0 would not run what our checks let through by mistake: it has an allow-list and a tar filter."""
        from nemo.core.classes.common import UnsafeTargetError, safe_instantiate
        from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
        from omegaconf import OmegaConf

        with pytest.raises(UnsafeTargetError):
            safe_instantiate(OmegaConf.create({"_target_": "os.system", "command": "true"}))
        checkpoints.CHECKPOINTS["a member ../canary"](tmp_path / "bad.nemo")
        SaveRestoreConnector._unpack_nemo_file(str(tmp_path / "bad.nemo"), str(tmp_path / "deep" / "er"))
        assert not list(tmp_path.rglob(checkpoints.CANARY))

    def test_a_gzipped_checkpoint_as_older_versions_wrote_is_read(self, random_checkpoint, tmp_path):
        import gzip

        path = tmp_path / "old.nemo"
        path.write_bytes(gzip.compress(random_checkpoint.read_bytes(), 1))
        assert config_of(path) == config_of(random_checkpoint)
        assert load_model(path).decoder.blank_idx == 40

    def test_an_unpacked_checkpoint_is_the_checkpoint(
        self, tmp_path, random_checkpoint, monkeypatch, restore_with_nemo
    ):
        """The folder that `tar xf` makes of it, with files that do not belong to it and are not counted."""
        import torch

        monkeypatch.setattr(nemo, "load_model", restore_with_nemo)
        folder = tmp_path / "unpacked"
        with tarfile.open(random_checkpoint) as tar:
            tar.extractall(folder, filter="data")
        (folder / "README.md").write_text("---\nlicense: mit\n---\n")
        (folder / "notes.txt").write_text("mine")
        (folder / "runs").mkdir()
        found, packed = find_checkpoint(str(folder)), find_checkpoint(str(random_checkpoint))
        assert (found.path, found.format) == (folder, nemo.NAME)
        assert {path.name for path in found.files} == members_of(random_checkpoint).keys()
        assert found.sentencepiece == packed.sentencepiece
        assert found.record()["terms"] == {"license": "mit"}
        digest = found.digest
        (folder / "notes.txt").write_text("changed")
        assert find_checkpoint(str(folder)).digest == digest
        state = find_checkpoint(os.path.relpath(folder)).load_model().state_dict()
        for name, tensor in packed.load_model().state_dict().items():
            assert torch.equal(tensor, state[name]), name

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda folder: (folder / WEIGHTS).unlink(),
                f"has no {WEIGHTS} at its top, so it is not a whole NeMo checkpoint",
            ),
            (lambda folder: (folder / CONFIG).write_text("x: ${oc.env:HOME}"), "a reference, and NeMo saves none"),
            (lambda folder: (folder / "out").symlink_to("/etc/passwd"), "is a link to a place outside"),
            (lambda folder: (folder / WEIGHTS).write_bytes(b"pickle"), "is not a file as torch.save writes it"),
        ],
    )
    def test_an_unpacked_checkpoint_is_checked(self, change, message, tmp_path):
        for name, content in small_members().items():
            (tmp_path / name).write_bytes(content)
        change(tmp_path)
        with pytest.raises(ValueError, match=message):
            find_checkpoint(str(tmp_path)).load_model()

    @pytest.mark.parametrize("name", PACKINGS)
    def test_another_packing_is_named_with_what_to_do(self, name, tmp_path):
        write, messages = PACKINGS[name]
        write(tmp_path / "model.nemo")
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / "model.nemo"))) as caught:
            find_checkpoint(str(tmp_path / "model.nemo"))
        assert all(message in str(caught.value) for message in messages), caught.value

    def test_names_with_a_leading_dot_are_found(self, tmp_path):
        """NeMo's own save_to writes ./model_config.yaml."""
        write_tar(tmp_path / "plain.nemo", small_members())
        write_tar(tmp_path / "dot.nemo", {f"./{name}": content for name, content in small_members().items()})
        assert config_of(tmp_path / "dot.nemo") == config_of(tmp_path / "plain.nemo")
        with open_archive(tmp_path / "dot.nemo") as members:
            assert "model_weights.ckpt" in members

    def test_a_config_with_a_few_aliases_is_read(self):
        assert parse_config(b"a: &x [1, 2]\nb: *x\n", set()) == {"a": [1, 2], "b": [1, 2]}


LONG_CLIP = "half an hour, 192 kHz, 8 channels"  # only in `make faults`
ODD_SOUNDS = [
    "silence", "constant 0.5", "white noise", "a click", "speech clipped at 1 %", "speech at -100 dB", "noise of 1e30",
]  # fmt: skip


class TestAudio:
    """The reader, sounds that are no speech, and a model that would stay on one frame for ever."""

    @pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
    @pytest.mark.parametrize("rate", [8000, 16000, 44100])
    def test_block_by_block_is_as_read_whole(self, suffix, rate, tmp_path, monkeypatch):
        samples = audio.speech(rate)
        path = tmp_path / f"clip.{suffix}"
        soundfile.write(path, np.stack([samples, 0.5 * samples], axis=1), rate)
        whole = soundfile.read(path, dtype="float32", always_2d=True)[0].mean(axis=1)
        expected = soxr.resample(whole, rate, 16000) if rate != 16000 else whole
        monkeypatch.setattr("common.run.audio.BLOCK_VALUES", 10_000)
        np.testing.assert_allclose(load_clip(Clip(path), 16000, 1), expected, atol=1e-6)

    def test_a_clip_over_the_limit_is_rejected_before_it_is_in_memory(self, tmp_path, monkeypatch):
        monkeypatch.setattr("common.run.audio.MAX_SECONDS", 2)
        monkeypatch.setattr("common.run.audio.BLOCK_VALUES", 1000)
        soundfile.write(tmp_path / "long.wav", np.zeros(8000 * 3), 8000)
        soundfile.write(tmp_path / "right.wav", np.zeros(8000 * 2), 8000)
        assert len(load_clip(Clip(tmp_path / "right.wav"), 16000, 1)) == 32_000
        with pytest.raises(ValueError, match=r"long\.wav has more than \S+ h of audio"):
            load_clip(Clip(tmp_path / "long.wav"), 16000, 1)

    @pytest.mark.parametrize("name", [name for name in audio.CLIPS if name != LONG_CLIP])
    def test_odd_files_are_read_or_rejected(self, name, tmp_path, capsys, must_end):
        path = audio.CLIPS[name](tmp_path)
        if name.startswith("speech, "):
            assert np.abs(load_clip(Clip(path), 16000, 320)).max() > 0.1
        else:
            with contextlib.suppress(ValueError, OSError):
                assert np.isfinite(load_clip(Clip(path), 16000, 320)).all()
        assert capsys.readouterr().err == audio.warning_of(name, path)

    @pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff"])
    def test_fuzzed_files_are_read_or_rejected(self, suffix, tmp_path, capsys, must_end):
        for seed in range(10):
            path = audio.fuzzed(tmp_path, suffix, seed)
            with contextlib.suppress(ValueError, OSError):
                assert np.isfinite(load_clip(Clip(path), 16000, 320)).all()
            assert capsys.readouterr().err == audio.warning_of(f"fuzzed {suffix}, seed {seed}", path)

    @pytest.mark.parametrize("name", ODD_SOUNDS)
    def test_odd_sounds_end_in_a_transcript_or_in_one_line(self, name, tiny_export, tmp_path, capsys, must_end):
        status = test_e2e.main(["--model_dir", str(tiny_export), "--audio", str(audio.CLIPS[name](tmp_path))])
        assert status in (0, 1, 2)
        assert capsys.readouterr().err.count("\n") == (status != 0)

    @pytest.mark.parametrize("token", [7, 8192], ids=["a token", "the blank"])
    def test_a_model_that_loves_duration_0_ends(self, token, tiny_export, tmp_path, must_end):
        """After ten tokens on a frame a step is forced."""
        folder = shutil.copytree(tiny_export, tmp_path / "models")
        prefer(folder, token)
        genai, raw = GenAI(folder), OnnxRuntime(folder)
        samples = genai.config.read_audio(audio.SPEECH)
        features = genai.features(samples)
        found = genai.transcribe(samples)
        assert found == raw.transcribe(features).tokens
        frames = math.ceil(features.shape[1] / 8)
        assert found == ([] if token == 8192 else [token] * 10 * frames)
