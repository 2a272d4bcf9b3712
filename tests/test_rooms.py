"""Imports between the rooms of `common` go one way, in the order of the pipeline."""

import ast
import importlib
from pathlib import Path

import pytest

import common
from tests.helpers import ROOT

# A room imports from rooms of earlier floors, and a module from others of its own room.
FLOORS = (
    ("cli", "contract"),
    ("folder",),
    ("onnx_io",),
    ("checkpoint",),
    ("run",),
    ("layouts", "quantize"),
    ("export",),
    ("evaluate",),
    ("report",),
    ("optimize",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(
    path for path in (ROOT / "common").rglob("*.py") if path.parent != ROOT / "common" or path.stem != "__init__"
)


def imported_modules(path: Path) -> set[str]:
    """Names of the modules of `common` that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "common":
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "common"}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("common")}
    return found


def room_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_imports_only_from_earlier_floors_and_its_own_room(path):
    own = path.relative_to(ROOT / "common").with_suffix("").parts[0]
    for module in imported_modules(path):
        room = room_of(module)
        assert room == own or FLOOR_OF[room] < FLOOR_OF[own], f"{path.name} imports {module}"


def test_every_room_is_described_in_the_package_docstring():
    rooms = {path.stem for path in (ROOT / "common").iterdir() if not path.name.startswith("__")}
    assert rooms == set(FLOOR_OF)
    assert all(f"\n    {room}" in common.__doc__ for room in rooms)


@pytest.mark.parametrize("name", ["contract", "layouts", "checkpoint/tokenizer", "run/decode"])
def test_modules_that_need_neither_torch_nor_nemo(name):
    place = ROOT / "common" / name
    paths = place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        assert not {name.split(".")[0] for name in names} & {"torch", "nemo"}, path


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_a_benchmark_has_what_it_imports(path):
    importlib.import_module(f"benchmarks.{path.stem}")
