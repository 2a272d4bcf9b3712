"""The default command, from Hugging Face: with the real client, from a repository that is served on loopback."""

import hashlib
import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

import common.checkpoint.digest
import export_parakeet_to_onnx
import export_tokenizer
import optimize_encoder
import test_real_speech
from common.checkpoint.digest import file_digest
from common.checkpoint.download import find_checkpoint
from common.checkpoint.hub import DEFAULT_MODEL, hub_name
from common.checkpoint.source import source_record
from tests.helpers import CLIPS, ROOT, TINY, shard
from tests.hub import COMMIT, Hub, serve

pytestmark = pytest.mark.slow

EXPORT, TOKENIZER = "export_parakeet_to_onnx.py", "export_tokenizer.py"
NAME = "owner/model"
TOKEN = "hf_thisisnotarealtoken"
HALF = TINY.stat().st_size // 2


@pytest.fixture
def hub():
    content = TINY.read_bytes()
    with serve(
        {"owner/model/model.nemo": content, f"{DEFAULT_MODEL}/{DEFAULT_MODEL.split('/')[1]}.nemo": content}
    ) as hub:
        yield hub


class Shell:
    """Runs a script as a user does, in an empty folder, with the cache beside it and `hub` for Hugging Face."""

    def __init__(self, folder, hub: Hub):
        self.folder, self.cache = folder, folder / "home" / "hub"
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
        }
        self.environment |= {
            "HF_HOME": str(folder / "home"),
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "HF_HUB_ETAG_TIMEOUT": "2",
            "HF_ENDPOINT": hub.url,
        }

    def run(self, script, *argv, **variables) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / script), *map(str, argv)]
        environment = self.environment | variables
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300)

    def tokenizer(self, *argv, model=NAME, **variables) -> subprocess.CompletedProcess:
        return self.run(TOKENIZER, "--model_name", model, *argv, **variables)

    def tokenizer_after(self, change: str) -> subprocess.CompletedProcess:
        """Export a tokenizer in a process that has first run the statement `change`."""
        script = f"import sys; from common.checkpoint import transfer; {change}; "
        script += "import export_tokenizer; sys.exit(export_tokenizer.main())"
        command = [sys.executable, "-c", script, "--model_name", NAME]
        environment = self.environment | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)

    def rejected(self, *argv, **variables) -> str:
        """The one line of a tokenizer export that must fail with the exit status for bad input."""
        outcome = self.tokenizer(*argv, **variables)
        assert outcome.returncode == 2, outcome.stdout + outcome.stderr
        assert outcome.stderr.startswith("error: ")
        assert outcome.stderr.count("\n") == 1, outcome.stderr
        assert not (self.folder / "onnx_models").exists()
        return outcome.stderr

    def downloaded(self) -> None:
        """Assert that the cache has the whole checkpoint, and no incomplete file."""
        found = self.cache / "models--owner--model" / "snapshots" / COMMIT / "model.nemo"
        assert found.read_bytes() == TINY.read_bytes()
        assert not list(self.cache.rglob("*.incomplete"))


@pytest.fixture
def shell(tmp_path, hub) -> Shell:
    return Shell(tmp_path, hub)


def succeeded(outcome: subprocess.CompletedProcess) -> str:
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout


def test_the_default_command_downloads_exports_and_records_the_commit(shell, hub):
    succeeded(shell.run(EXPORT))
    manifest = json.loads((shell.folder / "onnx_models" / "manifest.json").read_text())
    digest = hashlib.sha256(TINY.read_bytes()).hexdigest()
    assert manifest["export"]["source"] == {
        "name": DEFAULT_MODEL, "revision": "main", "commit": COMMIT, "sha256": digest, "format": "nemo",
    }  # fmt: skip
    assert manifest["export"]["parity"].keys() == {"encoder.onnx", "decoder.onnx", "joint.onnx"}
    card = (shell.folder / "onnx_models" / "README.md").read_text()
    assert f"--model_name {DEFAULT_MODEL} --revision {COMMIT}" in card
    # The next step takes it from the cache without the network, and so does the reference of the last step.
    asked = len(hub.asked)
    succeeded(shell.run(TOKENIZER, HF_HUB_OFFLINE="1"))
    clip = ROOT / "samples" / "jfk.wav"
    argv = ("--model_dir", "onnx_models", "--audio", clip)
    assert "equals NeMo token for token on 1 of 1" in succeeded(shell.run("test_real_speech.py", *argv))
    assert len(hub.asked) == asked


def test_a_name_exports_and_a_second_run_does_not_download(shell, hub):
    succeeded(shell.run(EXPORT, "--model_name", NAME, "--skip_verify"))
    shell.downloaded()
    assert len(hub.ranges()) == 1
    succeeded(shell.tokenizer("--revision", "main"))
    assert len(hub.ranges()) == 1
    manifest = json.loads((shell.folder / "onnx_models" / "manifest.json").read_text())
    assert manifest["export"]["source"] == manifest["tokenizer"]["source"]


def test_the_token_goes_to_hugging_face_and_not_to_the_content_network(shell, hub):
    succeeded(shell.tokenizer(HF_TOKEN=TOKEN))
    sent = {path.startswith("/content/"): "Authorization" in headers or "authorization" in headers
            for _, path, headers in hub.asked if "/resolve/" in path or "/content/" in path}  # fmt: skip
    assert sent == {False: True, True: False}


class TestInterrupted:
    @pytest.mark.parametrize("fault", ["drop", "reset", "stall"])
    def test_a_transfer_is_resumed_within_a_run(self, fault, shell, hub):
        hub.gets += [(fault, HALF), (fault, 1000)]
        assert "trying again in 1 s" in succeeded(shell.tokenizer())
        first, second, third = hub.ranges()
        assert first == "bytes=0-"
        begun = [int(text.removeprefix("bytes=").rstrip("-")) for text in (second, third)]
        assert 0 < begun[0] <= HALF
        assert begun[0] < begun[1] <= begun[0] + 1000
        shell.downloaded()

    def test_statuses_that_pass_are_tried_again(self, shell, hub):
        hub.heads += [503, (429, {"Retry-After": "1"})]
        hub.gets += [502, (429, {"Retry-After": "1"})]
        out = succeeded(shell.tokenizer())
        assert out.count("trying again in") == 4
        shell.downloaded()

    def test_a_killed_run_is_continued_by_the_next(self, shell, hub):
        hub.gets.append(("stall", HALF))
        command = [sys.executable, str(ROOT / TOKENIZER), "--model_name", NAME]
        environment = shell.environment | {"HF_HUB_DOWNLOAD_TIMEOUT": "60"}
        process = subprocess.Popen(command, cwd=shell.folder, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        # What is in the program's own buffer is lost when it is killed, so the file stays smaller than what was sent.
        while not any(path.stat().st_size > HALF // 2 for path in shell.cache.rglob("*.incomplete")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert "continuing the download at" in succeeded(shell.tokenizer())
        assert HALF // 2 < int(hub.ranges()[-1].removeprefix("bytes=").rstrip("-")) <= HALF
        shell.downloaded()

    def test_an_interrupted_run_says_what_is_kept_and_is_continued_by_the_next(self, shell, hub):
        hub.gets.append(("stall", HALF))
        command = [sys.executable, str(ROOT / TOKENIZER), "--model_name", NAME]
        environment = shell.environment | {"HF_HUB_DOWNLOAD_TIMEOUT": "60"}
        process = subprocess.Popen(
            command, cwd=shell.folder, env=environment, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size > HALF // 2 for path in shell.cache.rglob("*.incomplete")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 130
        (kept,) = shell.cache.rglob("*.incomplete")
        assert re.fullmatch(
            r"interrupted; [\d.]+ MB of [\d.]+ MB of model.nemo are kept in .*; run .* again .*\n", errors
        )
        size = kept.stat().st_size
        assert size > HALF // 2
        assert "continuing the download at" in succeeded(shell.tokenizer())
        assert hub.ranges()[-1] == f"bytes={size}-"
        shell.downloaded()

    def test_a_run_that_gives_up_is_continued_by_the_next(self, shell, hub):
        hub.gets += [("drop", HALF), *[("drop", 0)] * 6]
        outcome = shell.tokenizer_after("transfer.WAITS = (0.1,) * 5")
        assert outcome.returncode == 2
        assert outcome.stderr.count("\n") == 1
        assert "a download is continued" in outcome.stderr
        assert len(hub.ranges()) == 6  # the first, and five that bring no byte
        hub.gets.clear()
        assert "continuing the download at" in succeeded(shell.tokenizer())
        shell.downloaded()

    def test_a_server_without_ranges_starts_over(self, shell, hub):
        hub.gets += [("drop", HALF), "no range"]
        succeeded(shell.tokenizer())
        shell.downloaded()

    def test_a_byte_that_arrives_changed_is_noticed_and_not_kept(self, shell, hub):
        hub.gets.append(("flip", HALF))
        assert "expected SHA-256" in shell.rejected()
        assert not list(shell.cache.rglob("*.incomplete"))
        succeeded(shell.tokenizer())
        shell.downloaded()

    def test_a_second_run_at_the_same_time_is_rejected(self, shell, hub):
        hub.gets.append(("stall", HALF))
        command = [sys.executable, str(ROOT / TOKENIZER), "--model_name", NAME, "--output_dir", "first"]
        environment = shell.environment | {"HF_HUB_DOWNLOAD_TIMEOUT": "60"}
        process = subprocess.Popen(command, cwd=shell.folder, env=environment, stdout=subprocess.DEVNULL)
        try:
            while not hub.ranges():
                time.sleep(0.05)
            assert "another run is downloading" in shell.rejected()
        finally:
            process.kill()
            process.wait()


class TestProgress:
    def test_a_bar_on_a_terminal(self, shell, hub):
        hub.gets.append(("slow", HALF))
        main, terminal = pty.openpty()
        termios.tcsetwinsize(terminal, (24, 100))
        command = [sys.executable, str(ROOT / TOKENIZER), "--model_name", NAME]
        subprocess.run(command, cwd=shell.folder, env=shell.environment, stderr=terminal, stdout=subprocess.DEVNULL)
        os.close(terminal)
        shown = b""
        try:
            while chunk := os.read(main, 4096):
                shown += chunk
        except OSError:  # Linux, at the end
            pass
        assert shown.count(b"\r") > 5, shown
        assert b"model.nemo:  " in shown
        assert b"%|" in shown

    def test_lines_in_a_pipe(self, shell, hub):
        hub.gets.append(("slow", HALF))
        outcome = shell.tokenizer_after("transfer.LINE_SECONDS = 0.3")
        lines = [line for line in succeeded(outcome).splitlines() if line.startswith("model.nemo: ")]
        assert 3 <= len(lines) <= 8
        assert all(" of " in line and line.endswith("B/s") for line in lines)
        assert outcome.stderr == ""


GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model owner/model is restricted."}
REFUSALS = {
    "gated, no token": ([(401, GATED)], "is gated: accept its terms at http://127.0.0.1", "hf auth login", "HF_TOKEN"),
    "gated, a token": ([(403, GATED)], "is gated", "hf auth login", "HF_TOKEN"),
    "private": ([(401, {"X-Error-Code": "RepoNotFound"})], "no model owner/model", "hf auth login", "HF_TOKEN"),
    "an expired token": (
        [(401, {"X-Error-Message": "Invalid credentials in Authorization header"})], "expired", "hf auth login",
    ),
    "forbidden": ([403], "answers 403 Forbidden", "HF_TOKEN"),
    "not there": ([404], "has no model.nemo of owner/model", "--model_name", "HF_ENDPOINT"),
    "rate limit": ([(429, {"RateLimit": '"resolvers";r=0;t=250'})], "429", "try again in 251 s", "hf auth login"),
    "a fault of the server": ([500] * 3, "answers 500", "try again later"),
    "a fault that passes": ([503] * 3, "answers 503", "try again later"),
    "a login page": (["login"], "is not Hugging Face", "HF_ENDPOINT"),
    "a redirect to a login page": (
        [(302, {"Location": "http://localhost:1/login"})], "is not Hugging Face", "HF_ENDPOINT",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_hugging_face_rejects_is_one_line(case, shell, hub):
    answers, *parts = REFUSALS[case]
    hub.heads += answers
    error = shell.rejected()
    for part in parts:
        assert part in error


def test_no_such_repository_file_or_revision(shell, hub):
    assert "no model owner/other" in shell.rejected(model="owner/other")
    hub.files["owner/empty/notes.txt"] = b"nothing"
    assert "no empty.nemo and no config.json of owner/empty; check --model_name" in shell.rejected(model="owner/empty")
    assert "no revision v9 of owner/model; check --revision" in shell.rejected("--revision", "v9")
    assert "--revision is for a name on Hugging Face" in shell.rejected("--revision", "v9", model=str(TINY))


def test_a_login_page_in_place_of_the_file(shell, hub):
    hub.gets += [("drop", HALF), "login"]
    assert "is not Hugging Face" in shell.rejected()
    assert "continuing the download" in succeeded(shell.tokenizer())
    shell.downloaded()


@pytest.mark.parametrize("endpoint", ["huggingface.co", "ftp://huggingface.co", "", "http://", "http://host:port"])
def test_an_endpoint_that_is_no_address(endpoint, shell):
    assert "expected HF_ENDPOINT to be an address" in shell.rejected(HF_ENDPOINT=endpoint)


@pytest.mark.parametrize("endpoint", ["http://does-not-exist.invalid", "http://127.0.0.1:9"])
def test_an_endpoint_where_nothing_answers(endpoint, shell):
    error = shell.rejected(HF_ENDPOINT=endpoint)
    assert f"from {endpoint}, but Hugging Face cannot be reached" in error
    assert "HF_ENDPOINT" in error


def test_offline(shell, hub):
    assert "while HF_HUB_OFFLINE is set" in shell.rejected(HF_HUB_OFFLINE="1")
    succeeded(shell.tokenizer())
    hub.heads += [503]
    assert f"going on with the file in the local cache, of commit {COMMIT}" in succeeded(shell.tokenizer())
    assert "going on with the file in the local cache" in succeeded(shell.tokenizer(HF_ENDPOINT="http://127.0.0.1:9"))
    assert "going on" not in succeeded(shell.tokenizer("--revision", COMMIT, HF_ENDPOINT="http://127.0.0.1:9"))


def test_no_room_for_the_download(shell, hub):
    hub.size = 10**17
    error = shell.rejected()
    assert "expected 100000000.0 GB free" in error or "expected 100000000 GB free" in error
    assert "HF_HUB_CACHE" in error
    assert hub.ranges() == []


def test_a_disk_that_fills_up(shell, hub):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, HALF))

    command = [sys.executable, str(ROOT / TOKENIZER), "--model_name", NAME]
    how = {"cwd": shell.folder, "env": shell.environment, "capture_output": True, "text": True}
    outcome = subprocess.run(command, **how, preexec_fn=limit)
    assert outcome.returncode == 2
    assert outcome.stderr.count("\n") == 1
    assert "is full" in outcome.stderr
    assert "HF_HUB_CACHE" in outcome.stderr
    assert "continuing the download" in succeeded(shell.tokenizer())
    shell.downloaded()


@pytest.mark.parametrize(
    "argv",
    [
        ("--device", "cuda"),
        ("--opset_version", "99"),
        ("--chunk_seconds", "nan"),
        ("--chunk_seconds", "0"),
        ("--left_context_seconds", "-1"),
        ("--right_context_seconds", "inf"),
        ("--output_dir", "taken"),
    ],
    ids=" ".join,
)
def test_flags_are_checked_before_the_download(argv, shell, hub):
    if "cuda" in argv:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has the device")
    (shell.folder / "taken").write_text("a file")
    outcome = shell.run(EXPORT, "--model_name", NAME, *argv)
    assert outcome.returncode == 2, outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert hub.asked == []


class TestDamagedCache:
    def flip(self, shell) -> None:
        (blob,) = (shell.cache / "models--owner--model" / "blobs").iterdir()
        content = bytearray(blob.read_bytes())
        content[HALF] ^= 1
        blob.write_bytes(content)

    def test_is_named_with_a_command_that_repairs_it(self, shell, hub):
        succeeded(shell.tokenizer())
        shutil.rmtree(shell.folder / "onnx_models")
        self.flip(shell)
        error = shell.rejected()
        assert "the file in the cache is damaged" in error
        assert error == shell.rejected(HF_HUB_OFFLINE="1")
        command = error.split("remove it with: ")[1].split()
        assert command[0] == "hf"
        hf = shutil.which("hf", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
        subprocess.run([hf, *command[1:], "--yes"], env=shell.environment, check=True, capture_output=True)
        succeeded(shell.tokenizer())
        shell.downloaded()

    def test_without_links_the_server_tells_the_checksum(self, shell, hub):
        variables = {"HF_HUB_DISABLE_SYMLINKS": "1"}
        succeeded(shell.tokenizer(**variables))
        path = shell.cache / "models--owner--model" / "snapshots" / COMMIT / "model.nemo"
        assert not path.is_symlink()
        assert not list((shell.cache / "models--owner--model" / "blobs").iterdir())  # once on the disk
        shutil.rmtree(shell.folder / "onnx_models")
        content = bytearray(path.read_bytes())
        content[HALF] ^= 1
        path.write_bytes(content)
        assert "the file in the cache is damaged" in shell.rejected(**variables)


def test_a_checkpoint_is_hashed_once(monkeypatch, tmp_path):
    read = []
    real = common.checkpoint.digest.sha256
    monkeypatch.setattr(common.checkpoint.digest, "sha256", lambda path: read.append(path) or real(path))
    path = tmp_path / "copy.nemo"
    shutil.copy(TINY, path)
    for _ in range(3):
        record = source_record(find_checkpoint(str(path)), str(path))
    expected = {"file": "copy.nemo", "format": "nemo", "sha256": hashlib.sha256(TINY.read_bytes()).hexdigest()}
    assert record == expected
    assert read == [path]
    with path.open("ab") as file:
        file.write(b"\0")
    assert file_digest(path) != record["sha256"]


def test_names_and_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    for text in (
        "owner/model", "owner/model/", "https://huggingface.co/owner/model", "https://huggingface.co/owner/model/",
        "http://www.huggingface.co/owner/model", "huggingface.co/owner/model", "https://hf.co/owner/model",
    ):  # fmt: skip
        assert hub_name(text) == "owner/model"
    for text in (
        "x.nemo",
        "owner/x.nemo",
        "./owner/model",
        "../model",
        "/owner/model",
        "a/b/c",
        "model",
        "folder/inside",
    ):
        assert hub_name(text) is None
    for text, advice in (
        ("https://huggingface.co/owner/model/tree/main", "give --model_name owner/model"),
        ("https://huggingface.co/owner/model/tree/v2", "give --model_name owner/model --revision v2"),
        ("https://huggingface.co/owner/model/blob/v2/model.nemo", "give --model_name owner/model --revision v2"),
        ("https://example.com/model.nemo", "download the file and give its path"),
    ):
        with pytest.raises(ValueError, match=advice):
            hub_name(text)
    with pytest.raises(IsADirectoryError, match="got the folder folder/inside, which has neither; name the file"):
        find_checkpoint("folder/inside/")


def test_a_page_of_hugging_face_is_recorded_as_its_name(shell):
    succeeded(shell.tokenizer(model="https://huggingface.co/owner/model/"))
    source = json.loads((shell.folder / "onnx_models" / "manifest.json").read_text())["tokenizer"]["source"]
    assert (source["name"], source["commit"]) == (NAME, COMMIT)


def test_nothing_that_is_published_has_folder_names_of_the_machine(tmp_path, monkeypatch, capsys):
    """The checkpoint, the working directory and the second folder are each in a folder whose name is easy to find."""
    home, work, models = (tmp_path / name for name in ("alice-secret", "work-secret", "models-secret"))
    for folder in (home, work, models):
        folder.mkdir()
    shutil.copy(TINY, home / "mine.nemo")
    exported, optimized = models / "onnx_models", work / "optimized"
    monkeypatch.chdir(work)
    for script, *argv in (
        (export_parakeet_to_onnx, "--model_name", home / "mine.nemo", "--output_dir", exported, "--skip_verify"),
        (export_tokenizer, "--model_name", home / "mine.nemo", "--output_dir", exported),
        (optimize_encoder, "--model_dir", exported, "--output_dir", optimized),
    ):
        assert script.main([str(argument) for argument in argv]) == 0
    forbidden = {b"secret", *(part.encode() for part in tmp_path.parts[1:] if len(part) > 3)}
    from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

    for folder in (exported, optimized):
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        published = list(filter_repo_objects(names, ignore_patterns=DEFAULT_IGNORE_PATTERNS))
        assert len(published) == len(names) - 1
        assert {"manifest.json", "README.md", "encoder.onnx"} <= set(published)
        for name in published:
            content = (folder / name).read_bytes()
            assert not [part for part in forbidden if part in content], name
    # The files that are not published still lead to both folders, from another working directory.
    monkeypatch.chdir(models)
    capsys.readouterr()
    assert test_real_speech.main(["--model_dir", str(optimized), "--audio", str(CLIPS[0])]) == 0
    out = capsys.readouterr().out
    assert "GenAI onnx_models " in out
    assert "\n  NeMo " in out


class TestForms:
    """Repositories in the format of transformers, alone or beside the `.nemo` file."""

    NEEDED = {"config.json", "processor_config.json", "tokenizer.json", "model.safetensors"}  # noqa: RUF012

    @pytest.fixture
    def files(self, tiny_transformers):
        found = {path.name: path.read_bytes() for path in tiny_transformers.iterdir()}
        return {**found, "README.md": b"a card", "pytorch_model.bin": b"a pickle"}

    def publish(self, hub, name, files, *without):
        hub.files |= {f"{name}/{file}": content for file, content in files.items() if file not in without}

    def source(self, shell, folder="onnx_models"):
        return json.loads((shell.folder / folder / "manifest.json").read_text())["tokenizer"]["source"]

    def test_of_both_forms_only_one_is_fetched(self, shell, hub, files):
        self.publish(hub, NAME, files)
        succeeded(shell.tokenizer())
        assert hub.fetched() == {"model.nemo"}
        assert self.source(shell)["format"] == "nemo"
        hub.asked.clear()
        argv = ("--checkpoint_format", "transformers", "--output_dir", "other")
        succeeded(shell.tokenizer(*argv))
        assert hub.fetched() == self.NEEDED
        assert self.source(shell, "other")["format"] == "transformers"
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            assert (shell.folder / "other" / name).read_bytes() == (shell.folder / "onnx_models" / name).read_bytes()
        hub.asked.clear()
        succeeded(shell.tokenizer(*argv, HF_HUB_OFFLINE="1"))
        assert not hub.asked

    def test_a_repository_of_that_form_alone(self, shell, hub, files):
        self.publish(hub, "owner/new", files)
        succeeded(shell.tokenizer(model="owner/new"))
        assert hub.fetched() == self.NEEDED
        source = self.source(shell)
        assert (source["name"], source["commit"], source["format"]) == ("owner/new", COMMIT, "transformers")
        hub.asked.clear()
        succeeded(shell.tokenizer("--output_dir", "again", model="owner/new", HF_HUB_OFFLINE="1"))
        succeeded(shell.tokenizer("--output_dir", "third", model="owner/new", HF_ENDPOINT="http://127.0.0.1:9"))
        assert not hub.asked
        assert self.source(shell, "again") == self.source(shell, "third") == source
        # The folder records the checkpoint: recorded_checkpoint finds it again for the reference of a comparison.
        (shell.folder / "again" / "manifest.json").write_text(json.dumps({"export": {"source": source}}))
        code = "import sys; from pathlib import Path; from common.checkpoint.source import recorded_checkpoint; "
        command = [sys.executable, "-c", code + "print(recorded_checkpoint(Path(sys.argv[1])))", "again"]
        environment = shell.environment | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        found = subprocess.run(command, cwd=shell.folder, env=environment, capture_output=True, text=True)
        assert Path(succeeded(found).splitlines()[-1]) == shell.cache / "models--owner--new" / "snapshots" / COMMIT

    def test_what_rules_a_repository_out_is_known_before_its_weights(self, shell, hub, files):
        other = files["config.json"].replace(b"ParakeetForTDT", b"ParakeetForCTC")
        self.publish(hub, "owner/ctc", {**files, "config.json": other})
        assert "not a TDT model" in shell.rejected(model="owner/ctc")
        assert hub.fetched() == {"config.json"}
        self.publish(hub, "owner/none", files, "model.safetensors")
        error = shell.rejected(model="owner/none")
        assert "expected model.safetensors or model.safetensors.index.json beside config.json of owner/none" in error

    def test_the_shards_that_an_index_names(self, shell, hub, tiny_transformers, tmp_path):
        folder = tmp_path / "sharded"
        shutil.copytree(tiny_transformers, folder)
        names = {*shard(folder)["weight_map"].values(), "model.safetensors.index.json"}
        self.publish(hub, "owner/shards", {path.name: path.read_bytes() for path in folder.iterdir()})
        succeeded(shell.tokenizer(model="owner/shards"))
        assert hub.fetched() == self.NEEDED - {"model.safetensors"} | names
        hub.asked.clear()
        succeeded(shell.tokenizer("--output_dir", "again", model="owner/shards", HF_HUB_OFFLINE="1"))
        assert not hub.asked
        assert self.source(shell, "again") == self.source(shell)
