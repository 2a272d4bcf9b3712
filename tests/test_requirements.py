"""requirements-runtime.txt pins what requirements.txt does, and is enough to transcribe with a model folder."""

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers import ROOT, SAMPLES

CLIP = SAMPLES / "clips" / "029_hibari.flac"
# Prints the packages that a run has imported, in a process that has not imported any before.
PROGRAM = """
import json, sys

started_with = set(sys.modules)
import test_real_speech

assert test_real_speech.main(sys.argv[1:]) == 0
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - started_with})))
"""


def pinned(name: str) -> set[str]:
    lines = (line.strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return {line for line in lines if line and not line.startswith("#")}


def with_dependencies(names: set[str]) -> set[str]:
    """These distributions and everything that they require, without extras."""
    found, left = set(), {canonicalize_name(name) for name in names}
    while left:
        name = left.pop()
        found.add(name)
        requirements = [Requirement(line) for line in requires(name) or ()]
        needed = {r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})}
        left |= {canonicalize_name(one) for one in needed} - found
    return found


def test_both_files_pin_the_same_versions():
    assert pinned("requirements-runtime.txt") <= pinned("requirements.txt")


def test_the_same_versions_of_python_are_named_everywhere():
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(classifiers))
    for page in ("README.md", "CONTRIBUTING.md"):
        sentence = re.search(r"Python ((?:3\.\d+[, or]*)+)", (ROOT / page).read_text())
        assert re.findall(r"3\.\d+", sentence[1]) == named, page
    assert f"newest={named[-1]}\n" in (ROOT / ".ci/run").read_text()


def test_transcribing_imports_only_the_runtime_requirements(tiny_export, tmp_path):
    argv = ["--model_dir", tiny_export, "--skip_nemo", "--audio", CLIP]
    argv += ["--timestamps", "--srt", tmp_path / "clip.srt", "--json", tmp_path / "clip.json"]
    command = [sys.executable, "-c", PROGRAM, *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "clip.srt").stat().st_size > 0
    imported = json.loads(done.stdout.splitlines()[-1])
    installed = packages_distributions()
    sufficient = with_dependencies({Requirement(line).name for line in pinned("requirements-runtime.txt")})
    assert "onnxruntime_genai" in imported
    missing = {name for name in imported if name in installed and not sufficient & _canonical(installed[name])}
    assert not missing


def _canonical(names: list[str]) -> set[str]:
    return {canonicalize_name(name) for name in names}
