"""What the tests share: the bundled checkpoint, exported and optimized once a session by the scripts themselves.

A test that changes a folder copies it first. The workers of pytest-xdist share the folders too.
"""

import contextlib
import copy
import hashlib
import io
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import export_parakeet_to_onnx
import export_tokenizer
import optimize_encoder
from common import optimize
from common.checkpoint import nemo
from common.export import parity
from common.folder import sha256
from common.run.audio import Clip, load_clip
from common.run.decode import Transcript
from common.run.reference import Nemo
from tests.helpers import CLIPS, REDUX, SMALL, TINY, export_for_every_runtime, load_model

KEPT_MODELS = 3
# Fixtures that restore a checkpoint or run scripts. A test with one of them, directly or through another, is slow.
SLOW_FIXTURES = {"tiny_model", "random_checkpoint", "tiny_transformers", "tiny_export", "tiny_runtimes"}


# The files that take longest, in that order: 90 to 20 s of one core. The first does not begin with `tiny_export`, which
# the second makes meanwhile.
LONGEST = (
    *("browser", "scripts", "layouts", "faults", "stress", "ternary", "int4", "float16", "calibrate", "topologies"),
    *("transformers", "numbers", "timestamps", "model", "published", "smoothing", "identity", "export", "runtime"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests with a slow fixture, and run the longest files first, then those with the most slow tests: a
    worker of pytest-xdist takes one file after the other, and none should begin a long one when others have finished.
    """
    for item in items:
        if SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    place = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (place.get(item.path.stem, len(place)), -slow[item.path]))


@pytest.fixture(scope="session", autouse=True)
def speed_is_not_measured():
    """Where an optimization runs in this process, speed is not measured, since that takes two processes and seconds of
    runs each time. tests/test_pages.py measures it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimize, "measure_speed", lambda graphs: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def long_clips_are_not_verified():
    """The clip of more than 400 s, on which an encoder is verified for half a minute, is left to one test of
    tests/test_export.py. This gives the limit of parameters for it."""
    limit = parity.LONG_CASE_MAX_PARAMETERS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "LONG_CASE_MAX_PARAMETERS", 0)
        yield limit


@pytest.fixture(scope="session", autouse=True)
def restore_with_nemo() -> Iterator[Callable[..., Any]]:
    """Let NeMo restore a checkpoint only once in this process, since the lists of its 8192 labels take NeMo seconds.
    The file is checked each time. This gives the function that always restores; a test that changes a model, or looks
    at how it is restored, puts that function back into place."""
    load = nemo.load_model
    models: dict[tuple[str, str], Any] = {}  # the one used last at the end
    bundled = sha256(TINY), "cpu"  # which stays

    def loaded_once(checkpoint: Path, config: dict[str, Any], device: str = "cpu", scratch: Path | None = None) -> Any:
        key = sha256(checkpoint), device
        model = models.pop(key) if key in models else load(checkpoint, config, device, scratch)
        models[key] = model
        if len(models) > KEPT_MODELS:
            del models[next(key for key in models if key != bundled)]
        return model.eval()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nemo, "load_model", loaded_once)
        yield load


@pytest.fixture(scope="session", autouse=True)
def configs_are_read_once() -> Iterator[None]:
    """Let a config with the lists of 8192 labels, whose reader takes seconds, be read only once in this process."""
    parse, configs = nemo.parse_config, {}

    def parsed_once(text: bytes, members: Iterable[str]) -> dict[str, Any]:
        key = text, frozenset(members)
        if key not in configs:
            configs[key] = parse(text, members)
        return copy.deepcopy(configs[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nemo, "parse_config", parsed_once)
        yield


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`made_once(name, make)`: the folder of that name. The first worker that asks for it makes it by `make(folder)`
    while the others wait."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    shared.mkdir(exist_ok=True)

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, made = shared / name, shared / f"{name}.made"
        with FileLock(shared / f"{name}.lock"):
            if not made.exists():
                make(folder)
                made.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def tiny_model():
    """The bundled checkpoint in NeMo."""
    from common.cli import quiet_libraries

    quiet_libraries()
    return load_model(TINY)


@pytest.fixture(scope="session")
def nemo_transcripts(tiny_model) -> list[Transcript]:
    """NeMo's own transcripts of the bundled clips."""
    reference = Nemo(tiny_model)
    return [reference.transcribe(reference.features(load_clip(Clip(clip), 16000, 0))) for clip in CLIPS]


@pytest.fixture(scope="session")
def nemo_texts(nemo_transcripts) -> list[str]:
    return [transcript.text for transcript in nemo_transcripts]


@pytest.fixture(scope="session")
def random_checkpoint(made_once) -> Path:
    """A small one of 40 pieces, which NeMo restores in a tenth of the time, with the features of the bundled one."""
    from benchmarks.random_checkpoint import write_checkpoint

    def write(folder: Path) -> None:
        folder.mkdir()
        write_checkpoint(folder / "random.nemo", {"predictor": 32, "pieces": 40, "encoder": {**SMALL, "d_model": 64}})

    return made_once("random", write) / "random.nemo"


@pytest.fixture(scope="session")
def tiny_transformers(made_once) -> Path:
    """The bundled checkpoint as transformers saves it."""
    from benchmarks.transformers_checkpoint import convert

    return made_once("transformers", lambda folder: convert(TINY, folder))


@pytest.fixture(scope="session")
def tiny_export(made_once) -> Path:
    """The bundled checkpoint exported and verified, with its tokenizer."""

    def export(folder: Path) -> None:
        argv = ["--model_name", str(TINY), "--output_dir", str(folder)]
        assert export_parakeet_to_onnx.main(argv) == 0
        assert export_tokenizer.main(argv) == 0

    return made_once("onnx_models", export)


@pytest.fixture(scope="session")
def redux_runtimes(made_once) -> Path:
    """The bundled ternary checkpoint, in the published form of parakeet-redux, exported with a subfolder for each
    runtime."""
    return made_once("onnx_models_redux", lambda folder: export_for_every_runtime(REDUX, folder))


@pytest.fixture(scope="session")
def redux_export(made_once, redux_runtimes) -> Path:
    """The same, for GenAI: a copy, since the runtimes share files by hard links, which onnx_ir does not read."""
    return made_once("onnx_models_redux_genai", lambda folder: shutil.copytree(redux_runtimes / "genai", folder))


@pytest.fixture(scope="session")
def tiny_runtimes(made_once) -> Path:
    """The bundled checkpoint exported with a subfolder for each runtime."""
    return made_once("onnx_models_all", lambda folder: export_for_every_runtime(TINY, folder))


@pytest.fixture(scope="session")
def optimized(made_once, tiny_export) -> Callable[..., Path]:
    """`optimized("--quant_method", "int8")`: the folder that optimize_encoder.py makes of the exported one with these
    flags; `source` names another folder to optimize. Each is made once a session. `helpers.printed_by` gives what the
    script printed."""

    def folder_of(*flags: object, source: Path = tiny_export) -> Path:
        argv = ["--model_dir", str(source), *map(str, flags)]

        def optimize(place: Path) -> None:
            place.mkdir()
            with (
                contextlib.redirect_stdout(io.StringIO()) as output,
                contextlib.redirect_stderr(io.StringIO()) as errors,
            ):
                status = optimize_encoder.main([*argv, "--output_dir", str(place / "optimized")])
            assert status == 0, errors.getvalue()
            (place / "output").write_text(output.getvalue())
            (place / "errors").write_text(errors.getvalue())

        name = hashlib.sha256("\0".join(argv).encode()).hexdigest()[:16]
        return made_once(f"optimized-{name}", optimize) / "optimized"

    return folder_of


@pytest.fixture(scope="session")
def tiny_optimized(optimized) -> Path:
    """The exported folder, optimized as optimize_encoder.py does without flags."""
    return optimized()
