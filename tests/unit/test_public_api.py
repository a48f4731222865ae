"""Tests of `import mmemb`: it is fast, loads public names on first use, and shows their types to a type checker."""

from __future__ import annotations

import ast
import importlib
import inspect
import resource
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import mmemb

NAMES = {"Embedder", "InfoNCE", "Item", "Pair", "available", "cached_step", "create", "fit", "infonce"}
PACKAGE = Path(mmemb.__file__).parent


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_the_public_names_are_exported() -> None:
    assert set(mmemb.__all__) == NAMES
    assert {*NAMES, "__version__"} <= set(dir(mmemb))
    for name in NAMES:
        value = getattr(mmemb, name)
        assert value is getattr(importlib.import_module(value.__module__), value.__name__)
        assert inspect.getdoc(value)


def test_a_name_that_is_not_public_raises() -> None:
    with pytest.raises(AttributeError, match="module 'mmemb' has no attribute 'Embeder'"):
        mmemb.Embeder  # type: ignore[attr-defined]  # noqa: B018
    done = run("from mmemb import embedder")
    assert done.returncode == 1
    assert "ImportError" in done.stderr


def test_the_import_is_fast_and_loads_no_torch() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(
        "import sys, mmemb; dir(mmemb); from mmemb import Item, Pair, available, create; "
        "assert available('pooler'); assert 'torch' not in sys.modules; "
        "assert not any(name.startswith('mmemb.inference') for name in sys.modules)"
    )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # This is processor time including the start of Python. `tests/house/test_imports.py` limits the import to 0.3 s.
    assert used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_type_checkers_see_the_module_that_is_loaded() -> None:
    """Checks that the imports for type checkers and the table for the interpreter name the same modules."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imported = {
        alias.name: statement.module
        for statement in guarded.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert imported == mmemb._MODULES


def test_the_types_reach_editors_and_checkers() -> None:
    assert (PACKAGE / "py.typed").is_file()
    hints = get_type_hints(mmemb.fit)
    assert hints["return"] is importlib.import_module("mmemb.commands.fit").FitResult
    assert get_type_hints(mmemb.create)["kind"] is str
    # A type checker would read `__getattr__` at the top level and take every misspelt name for `Any`.
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    assert "__getattr__" not in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
