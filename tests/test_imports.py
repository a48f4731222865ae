"""Imports point one way, and what must start fast stays light: no torch, Lightning or transformers until needed."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BASE = {"types", "registry", "interfaces", "digests"}
MAY_IMPORT = {
    "types": set(),
    "registry": set(),
    "digests": {"types"},
    "interfaces": {"types", "registry"},
    "data": {"types", "digests"},
    "kernels": set(),
    "losses": {"kernels"},
    "inference": BASE | {"data", "checkpoint"},
    "evaluation": BASE | {"inference"},
    "stages": BASE | {"data", "losses", "inference", "evaluation", "checkpoint"},
    "components": BASE | {"data", "inference"},
}
"""What each room may know besides itself; the command line, which is not listed, may know everything."""

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
    """Processor time of all finished children: unlike the clock, it does not know what else the machine does."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_types_and_registry_do_not_know_torch_at_run_time() -> None:
    done = run("import mmemb.types as t; t.Item('', (t.Text('a'),)); import sys; assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def imported(path: Path) -> Iterator[str]:
    """The rooms of mmemb that a file imports from, by its own statements."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "mmemb":
            yield from (name.name for name in node.names)
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
        yield from (name.split(".")[1] for name in names if name.startswith("mmemb."))


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_point_one_way(room: str) -> None:
    folder = ROOT / "components" if room == "components" else ROOT / "src" / "mmemb" / room
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    found = {(file.name, name) for file in files for name in imported(file)}
    assert files
    assert {(file, name) for file, name in found if name not in MAY_IMPORT[room] | {room}} == set()
