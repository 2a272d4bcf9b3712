"""What the tests share: the bundled checkpoint, exported and optimized once a session by the scripts themselves.

A test that changes a folder copies it first.
"""

from pathlib import Path

import pytest

import export_parakeet_to_onnx
import export_tokenizer
import optimize_encoder
from common.report import optimized_folder
from tests.helpers import TINY


@pytest.fixture(scope="session", autouse=True)
def speed_is_not_measured():
    """Where an optimization runs in this process: two processes and seconds of runs each time. tests/test_pages.py
    measures it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimized_folder, "measure_speed", lambda graphs: None)
        yield


@pytest.fixture(scope="session")
def tiny_model():
    """The bundled checkpoint in NeMo."""
    from common.checkpoint.nemo import load_model
    from common.cli import quiet_libraries

    quiet_libraries()
    return load_model(TINY)


@pytest.fixture(scope="session")
def tiny_transformers(tmp_path_factory) -> Path:
    """The bundled checkpoint as transformers saves it."""
    from benchmarks.transformers_checkpoint import convert

    return convert(TINY, tmp_path_factory.mktemp("transformers") / "tiny")


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory) -> Path:
    """The bundled checkpoint exported and verified, with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "onnx_models"
    assert export_parakeet_to_onnx.main(["--model_name", str(TINY), "--output_dir", str(folder)]) == 0
    assert export_tokenizer.main(["--model_name", str(TINY), "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def tiny_optimized(tiny_export) -> Path:
    """The exported folder, optimized as optimize_encoder.py does without flags."""
    folder = tiny_export.parent / "optimized"
    assert optimize_encoder.main(["--model_dir", str(tiny_export), "--output_dir", str(folder)]) == 0
    return folder
