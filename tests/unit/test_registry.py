"""Tests of the registry: names, listings and plug-ins."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmemb import registry
from mmemb.registry import (
    KINDS,
    Component,
    PluginError,
    UnknownComponentError,
    available,
    create,
    is_name,
    listings,
    resolve,
)


@pytest.fixture(autouse=True)
def _registry_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", {kind: dict(parts) for kind, parts in registry._REGISTRY.items()})


class Base(Component, kind="selector"):
    """A contract."""


def test_a_class_registers_itself_under_its_kind() -> None:
    class Longest(Base, name="longest"):
        """Takes the longest. More words."""

        def __init__(self, least: int = 0) -> None:
            self.least = least

    assert resolve("selector", "longest") is Longest
    assert create("selector", "longest", least=2).least == 2
    assert Longest.name == "longest"
    assert "longest" in available("selector")
    assert is_name("selector", "longest")
    assert not is_name("pooler", "longest")


def test_a_class_without_a_name_registers_nothing() -> None:
    before = available("selector")

    class Unnamed(Base):
        """Named by class path only."""

    assert available("selector") == before
    assert Unnamed.name == ""


def test_a_name_is_unique_within_its_kind() -> None:
    class First(Base, name="first"):
        """One."""

    with pytest.raises(ValueError, match="selector name 'first' is taken by .*First; give .*Second another name"):

        class Second(Base, name="first"):
            """Two."""


def test_a_kind_must_exist() -> None:
    with pytest.raises(ValueError, match="unknown component kind 'sorter'; the kinds are backbone"):

        class Sorter(Component, kind="sorter"):
            """No such kind."""


def test_every_built_in_component_has_a_summary_and_resolves_as_listed() -> None:
    found = listings()
    assert {item.kind for item in found} == set(KINDS)
    for item in found:
        assert item.summary, f"{item.path} has no docstring"
        if item.path.startswith("mmemb."):
            cls = resolve(item.kind, item.name)
            assert f"{cls.__module__}.{cls.__qualname__}" == item.path
            assert cls.kind == item.kind  # type: ignore[attr-defined]
            assert cls.name == item.name  # type: ignore[attr-defined]


def test_components_outside_the_components_folder_are_listed_without_torch() -> None:
    code = "import sys, mmemb.registry as r; print(r.available('reward')); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['format', 'over_length', 'retrieval', 'utility']"
    assert available("objective") == ["control", "joint", "next_token"]
    assert create("reward", "utility", price=0.01).price == 0.01
    assert create("loss", "infonce", temperature=0.1).temperature.item() == pytest.approx(0.1)


def test_every_class_with_a_short_name_is_listed() -> None:
    package = Path(registry.__file__).parent
    listed = {item.path for item in registry._builtin_listings()}
    for file in package.rglob("*.py"):
        module = ".".join(("mmemb", *file.relative_to(package).with_suffix("").parts))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any(word.arg == "name" for word in node.keywords):
                assert f"{module}.{node.name}" in listed


def test_every_function_refuses_an_unknown_kind() -> None:
    for ask in (lambda: available("sorter"), lambda: resolve("sorter", "random"), lambda: create("sorter", "random")):
        with pytest.raises(ValueError, match="unknown component kind 'sorter'; the kinds are backbone"):
            ask()


def test_an_unknown_name_lists_similar_and_existing_names() -> None:
    with pytest.raises(UnknownComponentError, match="no selector named 'randm': did you mean 'random'.*counterfactual"):
        resolve("selector", "randm")
    with pytest.raises(UnknownComponentError, match="no selector named 'embed_token': that is a pooler"):
        resolve("selector", "embed_token")
    with pytest.raises(UnknownComponentError, match="named 'zzz': Registered: .*`mmemb components` lists them"):
        resolve("selector", "zzz")


def distribution(folder: Path, *, target: str, code: str) -> None:
    """Makes an installed distribution with one entry point by hand."""
    info = folder / "their_parts-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-parts\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[mmemb.components]\nselector.theirs = {target}\n", encoding="utf-8")
    (folder / "their_parts.py").write_text(code, encoding="utf-8")


GOOD = """
from mmemb.registry import Component

class Contract(Component, kind="selector"):
    pass

class Theirs(Contract, name="theirs"):
    '''Takes theirs.'''
"""


def in_another_process(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); "
        f"from mmemb.__main__ import main; sys.exit(main({list(words)}))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_a_plug_in_registers_by_entry_point(tmp_path: Path) -> None:
    distribution(tmp_path, target="their_parts:Theirs", code=GOOD)
    done = in_another_process(tmp_path, "components", "--kind", "selector", "--json")
    assert done.returncode == 0, done.stderr
    found = {item["name"]: item for item in json.loads(done.stdout)}
    assert found["theirs"] == {
        "kind": "selector",
        "name": "theirs",
        "summary": "Takes theirs.",
        "path": "their_parts.Theirs",
    }
    assert "counterfactual" in found


def test_errors_name_a_plug_in_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(tmp_path, target="their_parts", code="import nothing_of_that_name")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        PluginError, match="'selector.theirs' .their_parts. of their-parts cannot be loaded: .*repair or un"
    ):
        available("selector")


def test_a_plug_in_that_fails_gives_one_line_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
) -> None:
    distribution(tmp_path, target="their_parts", code="1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    code, _, err = cli("components")
    assert code == 2
    assert err.startswith("mmemb: error: the plug-in 'selector.theirs'")
    assert err.count("\n") == 1
