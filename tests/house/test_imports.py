"""Tests that imports point one way, and that torch, Lightning and transformers are imported only when needed."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "mmemb"
FLOORS = (
    ("types", "registry"),
    ("common",),
    ("interfaces",),
    ("kernels",),
    ("losses",),
    ("data",),
    ("rationales", "inference"),
    ("drawing", "search"),
    ("evaluation",),
    ("training",),
    ("commands",),
)
"""The rooms, from the lowest floor up. A room may import rooms of lower floors, but not others of its own floor."""
COMPONENTS_MAY = {"types", "registry", "common", "interfaces", "data", "rationales", "inference"}
"""Rooms that a component may import. Only the command line and the registry's names may import a component."""

HEAVY = ("torch", "lightning", "transformers", "numpy", "pyarrow", "PIL", "matplotlib")


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("code", "seconds"),
    [
        ("import mmemb", 0.3),
        ("import mmemb.registry, mmemb.types", 0.5),
        ("from mmemb.__main__ import main; assert main(['--help']) == 0", 2.0),
        ("from mmemb.__main__ import main; assert main(['--version']) == 0", 1.0),
        ("from mmemb.__main__ import main; assert main(['components']) == 0", 1.0),
        ("from mmemb.__main__ import main; assert main(['components', '--json']) == 0", 1.0),
        ("from mmemb.__main__ import main; assert main(['fitt']) == 2", 1.0),
    ],
)
def test_light_and_fast(code: str, seconds: float) -> None:
    check = f"{code}\nimport sys; heavy = [name for name in {HEAVY!r} if name in sys.modules]; assert not heavy, heavy"
    before = cpu_seconds()
    done = run(check)
    assert done.returncode == 0, done.stderr
    assert cpu_seconds() - before < seconds


def cpu_seconds() -> float:
    """Processor time of all finished child processes. Unlike the clock, it does not depend on other processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_types_and_registry_do_not_import_torch() -> None:
    done = run("import mmemb.types as t; t.Item('', (t.Text('a'),)); import sys; assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def modules_imported(path: Path) -> Iterator[str]:
    """The modules of mmemb that a file imports by its own statements, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "mmemb":
            yield from (f"{node.module}.{name.name}" for name in node.names)
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("mmemb."))


def room_of(module: str) -> str:
    """The first part of a module's name below ``mmemb``."""
    return module.split(".")[1]


def files_of(room: str) -> list[Path]:
    """The source files of a room, which is a folder or a single file."""
    folder = ROOT / "components" if room == "components" else PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def upward(room: str, allowed: set[str]) -> set[tuple[str, str]]:
    """(file, module) of every import in a room that leads to a room that is not allowed."""
    found = {(file.name, module) for file in files_of(room) for module in modules_imported(file)}
    return {(file, module) for file, module in found if room_of(module) not in allowed | {room}}


@pytest.mark.parametrize("floor", range(len(FLOORS)), ids=lambda floor: "+".join(FLOORS[floor]))
def test_imports_point_down(floor: int) -> None:
    below = {room for rooms in FLOORS[:floor] for room in rooms}
    for room in FLOORS[floor]:
        assert files_of(room)
        assert upward(room, below) == set()


def test_components_import_only_the_rooms_that_they_may() -> None:
    assert upward("components", COMPONENTS_MAY) == set()


def test_every_room_has_a_floor() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__", "__main__"} == {room for floor in FLOORS for room in floor}


def test_there_are_no_import_cycles() -> None:
    """Checks file by file. Imports inside functions and imports for type checking count too."""
    files = {
        path: ".".join(("mmemb", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in PACKAGE.rglob("*.py")
    }
    names = {name.removesuffix(".__init__"): name for name in files.values()}
    graph: dict[str, set[str]] = {}
    for path, name in files.items():
        asked = {part for module in modules_imported(path) for part in (module, module.rpartition(".")[0])}
        graph[name] = {names[part] for part in asked if part in names} - {name}
    assert circle(graph) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The first cycle of a directed graph as a closed path; empty if there is none."""
    state: dict[str, int] = {}

    def visit(node: str, path: list[str]) -> list[str]:
        state[node] = 1
        for other in sorted(graph.get(node, ())):
            if state.get(other) == 1:
                return [*path[path.index(other) :], other]
            if other not in state and (found := visit(other, [*path, other])):
                return found
        state[node] = 2
        return []

    for node in sorted(graph):
        if node not in state and (found := visit(node, [node])):
            return found
    return []


OPTIONAL_WORK = ("bitsandbytes", "peft", "tensorboard", "matplotlib")
"""Libraries that only some runs need: for quantised models, adapters, logs and drawings."""


@pytest.mark.parametrize(
    ("module", "brought_by_lightning"),
    [
        ("mmemb.training.module", {"matplotlib"}),  # imported by torchmetrics, which Lightning imports
        ("mmemb.inference.embedder", set()),
        ("mmemb.commands.embed", set()),
        ("mmemb.drawing.curves", set()),
        ("mmemb.rationales.page", set()),
    ],
)
def test_libraries_that_only_some_runs_need_are_not_imported_by_others(
    module: str, brought_by_lightning: set[str]
) -> None:
    done = run(f"import sys, {module}; print(*[name for name in {OPTIONAL_WORK!r} if name in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= brought_by_lightning
