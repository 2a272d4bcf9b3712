"""benchmarks/peers.py names what is missing, and a process of another environment answers, or says why it cannot."""

import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import encoder, peers
from benchmarks.peers import PEERS, PeerProcess
from tests.helpers import ROOT

OPENVINO, TRANSCRIBE = PEERS[0], PEERS[-1]
THIS_PYTHON = Path(sys.executable)
# A runtime that prints a lot, as some do; it takes no time and reports a time of its own.
RUNTIME = """
import os
from types import SimpleNamespace


class Model:
    def __init__(self, path, backend):
        assert backend == "cpu"
        os.write(1, b"loading")

    def session(self, n_threads):
        return self

    def run(self, samples):
        print("transcribing", len(samples))
        return SimpleNamespace(timings=SimpleNamespace(encode_ms=1000.0 * len(samples)))
"""


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    (tmp_path / "transcribe_cpp.py").write_text(RUNTIME)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(bytes(1234))
    return gguf


def test_what_is_missing_is_said_in_one_line_with_what_to_do(tmp_path):
    nowhere = tmp_path / "peers" / "bin" / "python"
    for peer in PEERS:
        reason = peers.missing(peer, nowhere, tmp_path / "no.gguf")
        assert str(nowhere) in reason
        assert f"-m venv {tmp_path / 'peers'} " in reason
        assert "\n" not in reason
    assert not peers.missing(OPENVINO, THIS_PYTHON, tmp_path / "no.gguf")
    assert str(tmp_path / "no.gguf") in peers.missing(TRANSCRIBE, THIS_PYTHON, tmp_path / "no.gguf")
    assert (ROOT / peers.REQUIREMENTS).is_file()


def test_missing_peers_are_left_out_and_not_failures(tmp_path, capsys):
    nowhere = tmp_path / "bin" / "python"
    paths = (nowhere, tmp_path / "no.gguf", tmp_path / "no.nemo", tmp_path)
    assert encoder.peer_candidates(list(PEERS), *paths, np.zeros(1)) == []
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert all(peer.name in lines[0] for peer in PEERS)


def test_a_runtime_prints_what_it_likes_and_measures_itself(runtime):
    process = PeerProcess(THIS_PYTHON, *peers.loader(TRANSCRIBE, runtime))
    try:
        assert process.submit(encoder.output, np.zeros(16)).result() is None
        assert process.submit(encoder.seconds, np.zeros(16)).result() == 16.0
        facts = process.submit(encoder.facts).result()
        assert facts["bytes"] == 1234
        assert facts["peak_bytes"] > 1e6
    finally:
        process.shutdown()


def test_an_error_of_a_runtime_is_its_candidates(runtime, tmp_path):
    candidate = encoder.Candidate("peer", lambda: PeerProcess(THIS_PYTHON, "load_transcribe_cpp", "absent.gguf", 2))
    candidate.restart()
    candidate.stop()
    assert candidate.result["failed"].startswith("load_transcribe_cpp: FileNotFoundError: ")
    assert candidate.result["failed"].endswith("'absent.gguf'")
    assert "**failed**, load_transcribe_cpp" in encoder.row("peer", candidate.result, {})


def test_a_process_that_dies_is_named(runtime):
    process = PeerProcess(THIS_PYTHON, *peers.loader(TRANSCRIBE, runtime))
    process._child.kill()
    with pytest.raises(RuntimeError, match="seconds: the process ended with status -9"):
        process.submit(encoder.seconds, np.zeros(1)).result()
    process._child.stdout.close()


def test_a_row_has_a_dash_where_a_runtime_shows_no_output():
    times = {length: [1.0] for length in encoder.CLIP_SECONDS}
    facts = {"bytes": 10**6, "loads": [0.5], "peak_bytes": 10**9, "seconds": times}
    line = encoder.row("peer", {**facts, "sqnr_db": {20: 31.25}}, {"seconds": times})
    assert line.endswith("| – / 31.2 / – / – |")
    assert "72.0 (1.00×)" in line
