"""Checkpoints from Hugging Face: with the real client, from a repository that is served on loopback."""

import hashlib
import json
import os
import pty
import resource
import shutil
import subprocess
import sys
import termios
from pathlib import Path
from types import ModuleType

import pytest
from huggingface_hub import constants

import export_parakeet_to_onnx
import export_tokenizer
import optimize_encoder
import test_real_speech
from common.checkpoint import hub as hub_module
from common.checkpoint.find import find_checkpoint, recorded_checkpoint
from common.checkpoint.hub import DEFAULT_MODEL, file_digest, hub_name
from common.cli import size_text
from tests.helpers import CLIPS, ROOT, TINY, shard
from tests.hub import COMMIT, Hub, point_client_at, serve

pytestmark = pytest.mark.slow

NAME = "owner/model"
TOKEN = "hf_thisisnotarealtoken"
CONTENT = TINY.read_bytes()
HALF = len(CONTENT) // 2
NOWHERE = "http://127.0.0.1:9"  # where nothing answers


@pytest.fixture
def hub():
    with serve(
        {"owner/model/model.nemo": CONTENT, f"{DEFAULT_MODEL}/{DEFAULT_MODEL.split('/')[1]}.nemo": CONTENT}
    ) as hub:
        yield hub


class User:
    """Runs scripts in this process, in an empty folder, with the cache beside it and `hub` for Hugging Face.

    The constants of huggingface_hub are set, which reads the environment when it is imported.
    """

    def __init__(self, folder: Path, hub: Hub, capsys, monkeypatch):
        self.folder = folder
        self.cache = folder / "home" / "hub"
        self.capsys = capsys
        self.monkeypatch = monkeypatch
        monkeypatch.chdir(folder)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(self.cache))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "home" / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
        self.set_offline(offline=False)
        self.set_endpoint(hub.url)

    def set_endpoint(self, url: str) -> None:
        point_client_at(url, self.monkeypatch)

    def set_offline(self, *, offline: bool) -> None:
        self.monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)

    def run(self, *argv, model: str = NAME, script: ModuleType = export_tokenizer) -> tuple[int, str, str]:
        """Exit status, standard output and standard error of a script."""
        self.capsys.readouterr()
        try:
            status = script.main(["--model_name", model, *map(str, argv)])
        except SystemExit as exit_:  # argparse
            status = exit_.code
        return status, *self.capsys.readouterr()

    def succeeded(self, *argv, **options) -> str:
        """The standard output of a script that must succeed."""
        status, out, error = self.run(*argv, **options)
        assert status == 0, out + error
        return out

    def rejected(self, *argv, **options) -> str:
        """The one line of a script that must fail with the exit status for bad input."""
        status, out, error = self.run(*argv, **options)
        assert status == 2, out + error
        assert error.startswith("error: ")
        assert error.count("\n") == 1, error
        assert not (self.folder / "onnx_models").exists()
        return error

    def source(self, folder="onnx_models", section="tokenizer") -> dict:
        return json.loads((self.folder / folder / "manifest.json").read_text())[section]["source"]

    def has_downloaded(self) -> None:
        """Assert that the cache has the whole checkpoint, and no incomplete file."""
        found = self.cache / "models--owner--model" / "snapshots" / COMMIT / "model.nemo"
        assert found.read_bytes() == CONTENT
        assert not list(self.cache.rglob("*.incomplete"))


@pytest.fixture
def user(tmp_path, hub, capsys, monkeypatch) -> User:
    return User(tmp_path, hub, capsys, monkeypatch)


@pytest.fixture
def no_pauses(monkeypatch):
    """huggingface_hub does not wait before it sends a request again."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def test_the_default_command_downloads_exports_and_records_the_commit(user, hub):
    user.succeeded("--skip_verify", model=DEFAULT_MODEL, script=export_parakeet_to_onnx)
    assert user.source(section="export") == {
        "name": DEFAULT_MODEL,
        "revision": "main",
        "commit": COMMIT,
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "format": "nemo",
    }
    card = (user.folder / "onnx_models" / "README.md").read_text()
    assert f"--model_name {DEFAULT_MODEL} --revision {COMMIT}" in card
    # The next step takes it from the cache without the network, and so does the reference of the last step.
    asked = len(hub.resolved())
    user.set_offline(offline=True)
    user.succeeded(model=DEFAULT_MODEL)
    assert user.source() == user.source(section="export")
    assert test_real_speech.main(["--model_dir", "onnx_models", "--audio", str(ROOT / "samples" / "jfk.wav")]) == 0
    assert "equals NeMo token for token on 1 of 1" in user.capsys.readouterr().out
    assert len(hub.resolved()) == asked


def user_process(folder: Path, hub: Hub, **options) -> subprocess.CompletedProcess:
    """Export a tokenizer in a process of its own, to which the environment gives all settings."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_HOME": str(folder / "home"), "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
    command = [sys.executable, str(ROOT / "export_tokenizer.py"), "--model_name", NAME]
    return subprocess.run(command, cwd=folder, env=environment, **options)


def test_the_token_goes_to_hugging_face_and_not_to_the_content_network(tmp_path, hub):
    done = user_process(tmp_path, hub, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sent = {path.startswith("/content/"): "authorization" in {name.lower() for name in headers}
            for _, path, headers in hub.asked if "/resolve/" in path or "/content/" in path}  # fmt: skip
    assert sent == {False: True, True: False}
    assert done.stderr == ""
    assert f"downloading model.nemo, {size_text(len(CONTENT))}, of commit {COMMIT}" in done.stdout


def test_a_bar_on_a_terminal(tmp_path, hub):
    hub.gets.append(("slow", HALF))
    main, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    user_process(tmp_path, hub, stderr=terminal, stdout=subprocess.DEVNULL)
    os.close(terminal)
    shown = b""
    try:
        while chunk := os.read(main, 4096):
            shown += chunk
    except OSError:  # Linux, at the end
        pass
    assert shown.count(b"\r") > 3, shown
    assert b"%|" in shown


def test_a_second_run_does_not_download(user, hub):
    user.succeeded()
    user.has_downloaded()
    assert len(hub.ranges()) == 1
    assert f"model.nemo is in the local cache, of commit {COMMIT}" in user.succeeded("--revision", "main")
    assert len(hub.ranges()) == 1


class TestInterrupted:
    @pytest.mark.parametrize("fault", ["drop", "stall"])
    def test_a_transfer_that_breaks_off_is_tried_again(self, fault, user, hub):
        hub.gets += [(fault, HALF)]
        user.succeeded()
        assert len(hub.ranges()) == 2
        user.has_downloaded()

    def test_a_run_that_fails_is_one_line_and_the_next_run_starts_over(self, user, hub):
        hub.gets.append(("reset", HALF))
        error = user.rejected()
        assert "model.nemo of owner/model cannot be read from Hugging Face at" in error
        assert not list(user.cache.rglob("*.incomplete"))
        user.succeeded()
        assert hub.ranges() == [None, None]
        user.has_downloaded()

    def test_statuses_that_pass_are_tried_again(self, user, hub, no_pauses):
        hub.heads += [503, (429, {"Retry-After": "1"})]
        hub.gets += [(429, {"Retry-After": "1"})]
        user.succeeded()
        user.has_downloaded()

    def test_a_byte_that_arrives_changed_is_noticed(self, user, hub):
        hub.gets.append(("flip", HALF))
        assert "expected SHA-256" in user.rejected()


GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model owner/model is restricted."}
REFUSALS = {  # the library's own words, and what to do
    "gated": ([(401, GATED)], "Access to model owner/model is restricted", "accept its terms", "hf auth login"),
    "private": ([(401, {"X-Error-Code": "RepoNotFound"})], "Repository Not Found", "hf auth login"),
    "an expired token": (
        [(401, {"X-Error-Message": "Invalid credentials in Authorization header"})], "Invalid credentials",
        "hf auth login",
    ),
    "forbidden": ([403], "403 Forbidden", "hf auth login"),
    "rate limit": ([(429, {"RateLimit": '"resolvers";r=0;t=250'})] * 9, "429"),
    "a fault of the server": ([500] * 9, "500"),
    "a login page": (["login"], "does not seem to be served by a Hugging Face Hub endpoint", "HF_ENDPOINT"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_hugging_face_rejects_is_one_line(case, user, hub, no_pauses):
    answers, *parts = REFUSALS[case]
    hub.heads += answers
    error = user.rejected()
    for part in ("model.nemo of owner/model cannot be read from Hugging Face at", *parts):
        assert part in error


def test_no_such_repository_file_or_revision(user, hub):
    assert "owner/other cannot be read from Hugging Face" in user.rejected(model="owner/other")
    hub.files["owner/empty/notes.txt"] = b"nothing"
    error = user.rejected(model="owner/empty")
    assert (
        "no checkpoint of the format nemo or transformers in owner/empty on Hugging Face, which has notes.txt;" in error
    )
    error = user.rejected("--revision", "v9")
    assert "Revision Not Found" in error
    assert "check --model_name, --revision" in error
    assert "--revision is for a name on Hugging Face" in user.rejected("--revision", "v9", model=str(TINY))


def test_what_is_sent_in_place_of_the_file_is_one_line(user, hub):
    hub.gets += ["login", 502]
    assert "Consistency check failed" in user.rejected()
    assert "502" in user.rejected()
    user.succeeded()
    user.has_downloaded()


@pytest.mark.parametrize("endpoint", ["huggingface.co", "ftp://huggingface.co", "", "http://", NOWHERE])
def test_an_endpoint_where_nothing_answers(endpoint, user, no_pauses):
    user.set_endpoint(endpoint)
    error = user.rejected()
    assert f"owner/model cannot be read from Hugging Face at {endpoint or 'an empty HF_ENDPOINT'}: " in error
    assert "the network and HF_ENDPOINT" in error


def test_offline(user, hub):
    user.set_offline(offline=True)
    assert "HF_HUB_OFFLINE" in user.rejected()
    user.set_offline(offline=False)
    user.succeeded()
    hub.heads += [503] * 2
    assert f"model.nemo is in the local cache, of commit {COMMIT}" in user.succeeded()
    user.set_endpoint(NOWHERE)
    user.succeeded()
    user.succeeded("--revision", COMMIT)
    assert user.source()["revision"] == COMMIT


def test_no_room_for_the_download(user, hub):
    hub.size = 10**17
    error = user.rejected()
    assert "needs 100000000 GB of free disk" in error
    assert hub.ranges() == []


def test_a_disk_that_fills_up(user, hub):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, limits[1]))
    try:
        error = user.rejected()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in error
    user.succeeded()
    user.has_downloaded()


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
def test_flags_are_checked_before_the_download(argv, user, hub):
    if "cuda" in argv:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has the device")
    (user.folder / "taken").write_text("a file")
    user.rejected(*argv, script=export_parakeet_to_onnx)
    assert hub.resolved() == []


def test_a_damaged_file_in_the_cache_is_named_with_a_command_that_repairs_it(user):
    user.succeeded()
    shutil.rmtree(user.folder / "onnx_models")
    (blob,) = (user.cache / "models--owner--model" / "blobs").iterdir()
    content = bytearray(blob.read_bytes())
    content[HALF] ^= 1
    blob.write_bytes(content)
    error = user.rejected()
    assert "the file in the cache is damaged" in error
    user.set_offline(offline=True)
    assert error == user.rejected()
    command = error.split("remove it with: ")[1].split()
    assert command[0] == "hf"
    hf = shutil.which("hf", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    environment = os.environ | {"HF_HUB_CACHE": str(user.cache)}
    subprocess.run([hf, *command[1:], "--yes"], env=environment, check=True, capture_output=True)
    user.set_offline(offline=False)
    user.succeeded()
    user.has_downloaded()


def test_a_checkpoint_is_hashed_once(monkeypatch, tmp_path):
    read = []
    real = hub_module.sha256
    monkeypatch.setattr(hub_module, "sha256", lambda path: read.append(path) or real(path))
    path = tmp_path / "copy.nemo"
    shutil.copy(TINY, path)
    for _ in range(3):
        record = find_checkpoint(str(path)).record()
    assert record == {"file": "copy.nemo", "format": "nemo", "sha256": hashlib.sha256(CONTENT).hexdigest()}
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
        ("https://huggingface.co/owner/model/blob/v2/model.nemo", "give --model_name owner/model, and --revision"),
        ("https://example.com/model.nemo", "download the file, and give its path"),
    ):
        with pytest.raises(ValueError, match=advice):
            hub_name(text)
    with pytest.raises(
        ValueError, match="no checkpoint of the format nemo or transformers in folder/inside, which has no file"
    ):
        find_checkpoint("folder/inside/")


def test_a_page_of_hugging_face_is_recorded_as_its_name(user):
    user.succeeded(model="https://huggingface.co/owner/model/")
    assert (user.source()["name"], user.source()["commit"]) == (NAME, COMMIT)


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
    assert "\nNeMo " in out


class TestForms:
    """Repositories in the format of transformers, alone or beside the `.nemo` file."""

    NEEDED = {"config.json", "processor_config.json", "tokenizer.json", "model.safetensors"}  # noqa: RUF012

    @pytest.fixture
    def files(self, tiny_transformers):
        found = {path.name: path.read_bytes() for path in tiny_transformers.iterdir()}
        return {**found, "README.md": b"a card", "pytorch_model.bin": b"a pickle"}

    def publish(self, hub, name, files, *without):
        hub.files |= {f"{name}/{file}": content for file, content in files.items() if file not in without}

    def test_of_both_forms_only_one_is_fetched(self, user, hub, files):
        self.publish(hub, NAME, files)
        user.succeeded()
        assert hub.fetched() == {"model.nemo", "README.md"}
        assert user.source()["format"] == "nemo"
        hub.asked.clear()
        argv = ("--checkpoint_format", "transformers", "--output_dir", "other")
        user.succeeded(*argv)
        assert hub.fetched() == self.NEEDED
        assert user.source("other")["format"] == "transformers"
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            assert (user.folder / "other" / name).read_bytes() == (user.folder / "onnx_models" / name).read_bytes()
        hub.asked.clear()
        user.set_offline(offline=True)
        user.succeeded(*argv)
        assert not hub.asked

    def test_a_repository_of_that_form_alone(self, user, hub, files, no_pauses):
        self.publish(hub, "owner/new", files)
        user.succeeded(model="owner/new")
        assert hub.fetched() == self.NEEDED | {"README.md"}
        source = user.source()
        assert (source["name"], source["commit"], source["format"]) == ("owner/new", COMMIT, "transformers")
        hub.asked.clear()
        user.set_offline(offline=True)
        user.succeeded("--output_dir", "again", model="owner/new")
        # The folder records the checkpoint, which is found again for the reference of a comparison.
        (user.folder / "again" / "manifest.json").write_text(json.dumps({"export": {"source": source}}))
        folder = user.cache / "models--owner--new" / "snapshots" / COMMIT
        assert recorded_checkpoint(user.folder / "again").path == folder
        user.set_offline(offline=False)
        user.set_endpoint(NOWHERE)
        user.succeeded("--output_dir", "third", model="owner/new")
        assert not hub.asked
        assert user.source("third") == source

    def test_a_nemo_file_of_another_name_and_the_licence_of_its_card(self, user, hub, files):
        """As in oruk/orukeet, beside the form of transformers; a second time offline."""
        card = b"---\nlicense: cc-by-sa-4.0\nlanguage: [en, de]\nlibrary_name: nemo\n---\n# A model\n"
        self.publish(hub, "owner/other", {**files, "README.md": card, "other-r3.nemo": CONTENT})
        user.succeeded(model="owner/other")
        cached = user.cache / "models--owner--other" / "snapshots" / COMMIT
        assert {path.name for path in cached.iterdir()} == {"other-r3.nemo", "README.md"}
        source = user.source()
        assert (source["format"], source["sha256"]) == ("nemo", hashlib.sha256(CONTENT).hexdigest())
        assert source["terms"] == {"license": "cc-by-sa-4.0", "language": ["en", "de"]}
        made = (user.folder / "onnx_models" / "README.md").read_text()
        assert made.startswith("---\nlicense: cc-by-sa-4.0\nlanguage:\n- en\n- de\n")
        assert "[CC-BY-SA-4.0](https://creativecommons.org/licenses/by-sa/4.0/)" in made
        hub.asked.clear()
        user.set_offline(offline=True)
        user.succeeded("--output_dir", "again", model="owner/other")
        assert user.source("again") == source
        assert not hub.asked

    def test_of_several_nemo_files_that_with_the_name_of_the_repository_is_fetched(self, user, hub):
        self.publish(hub, "owner/two", {"a.nemo": b"another", "two.nemo": CONTENT})
        user.succeeded(model="owner/two")
        cached = user.cache / "models--owner--two" / "snapshots" / COMMIT
        assert {path.name for path in cached.iterdir()} == {"two.nemo"}

    def test_what_a_repository_of_another_format_holds_is_named(self, user, hub):
        hub.files["owner/packed/model.tar.zst"] = b"?"
        error = user.rejected(model="owner/packed")
        assert (
            "no checkpoint of the format nemo or transformers in owner/packed on Hugging Face, which has model.tar"
            in error
        )
        hub.files["owner/two/a.nemo"] = hub.files["owner/two/b.nemo"] = CONTENT
        assert (
            "owner/two on Hugging Face has a.nemo, b.nemo; pass the path of one of them, downloaded"
            in user.rejected(model="owner/two")
        )

    def test_what_rules_a_repository_out_is_known_before_its_weights(self, user, hub, files):
        other = files["config.json"].replace(b"ParakeetForTDT", b"ParakeetForCTC")
        self.publish(hub, "owner/ctc", {**files, "config.json": other})
        assert "not a TDT model" in user.rejected(model="owner/ctc")
        assert hub.fetched() == {"README.md", "config.json"}
        self.publish(hub, "owner/none", files, "model.safetensors")
        error = user.rejected(model="owner/none")
        assert "there is no model.safetensors or model.safetensors.index.json in owner/none on Hugging Face" in error

    def test_the_published_form_of_redux(self, user, hub, tiny_transformers, tmp_path):
        """It has no feature extractor, which is asked for once and then known to be missing, offline too."""
        from benchmarks.published_forms import write_form

        folder = write_form("redux", tiny_transformers, tmp_path / "form")
        self.publish(hub, "owner/redux", {path.name: path.read_bytes() for path in folder.iterdir()})
        user.succeeded(model="owner/redux")
        assert hub.fetched() == {"config.json", "tokenizer.json", "ternary.json", "model.safetensors"}
        assert len(user.source()["notes"]) == 3
        hub.asked.clear()
        user.set_offline(offline=True)
        user.succeeded("--output_dir", "again", model="owner/redux")
        assert not hub.asked
        assert user.source("again") == user.source()

    def test_the_shards_that_an_index_names(self, user, hub, tiny_transformers, tmp_path):
        folder = tmp_path / "sharded"
        shutil.copytree(tiny_transformers, folder)
        names = {*shard(folder)["weight_map"].values(), "model.safetensors.index.json"}
        self.publish(hub, "owner/shards", {path.name: path.read_bytes() for path in folder.iterdir()})
        user.succeeded(model="owner/shards")
        assert hub.fetched() == self.NEEDED - {"model.safetensors"} | names
        hub.asked.clear()
        user.set_offline(offline=True)
        user.succeeded("--output_dir", "again", model="owner/shards")
        assert not hub.asked
        assert user.source("again") == user.source()
