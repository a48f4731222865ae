"""Short names for swappable parts.

A component declares its kind once, on the contract (``class Selector(Component, kind="selector")``), and its short name once,
on the class (``class Random(Selector, name="random")``). Nothing else is needed: `resolve` turns a name, a class path or a
class name into the class, `available` lists what exists, and plug-ins of other distributions join through the entry-point
group ``mmemb.components``. This module imports neither torch nor any component until a name is asked for.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

KINDS = ("backbone", "pooler", "worker", "evaluator", "selector", "controller")
ENTRY_POINT_GROUP = "mmemb.components"

_REGISTRY: dict[str, dict[str, type]] = {kind: {} for kind in KINDS}


class UnknownComponentError(ValueError):
    """A name that no component of the kind has; the message lists what exists and the nearest name."""


class Component:
    """Base of every contract: registers a subclass under its kind by the short name it declares.

    ``__init_subclass__`` takes ``kind=`` (contracts only) and ``name=`` (concrete parts only; a part without one is still
    usable by class path).

    Raises:
        ValueError: the kind is unknown, or another class of the kind has the name already.
    """

    kind: ClassVar[str] = ""
    name: ClassVar[str] = ""

    def __init_subclass__(cls, *, kind: str | None = None, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind is not None:
            if kind not in KINDS:
                raise ValueError(f"unknown component kind {kind!r}; the kinds are {', '.join(KINDS)}")
            cls.kind = kind
        if name is None:
            return
        taken = _REGISTRY[cls.kind].get(name)
        if taken is not None and _path(taken) != _path(cls):
            raise ValueError(f"the {cls.kind} name {name!r} is taken by {_path(taken)}; give {_path(cls)} another name")
        cls.name = name
        _REGISTRY[cls.kind][name] = cls


@dataclass(frozen=True)
class Listing:
    """One line of `mmemb components`: what a part is called, in one sentence what it does, and where it lives."""

    kind: str
    name: str
    summary: str
    path: str


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _first_line(doc: str | None) -> str:
    return (doc or "").strip().split("\n", 1)[0].strip()


def _builtin_listings() -> list[Listing]:
    """Reads names and first doc lines from the source of `mmemb.components` without importing it (torch costs seconds)."""
    spec = find_spec("mmemb.components")
    roots = list(spec.submodule_search_locations or []) if spec else []
    listings = []
    for root in roots:
        for file in sorted(Path(root).glob("*/*.py")):
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if not isinstance(node, ast.ClassDef):
                    continue
                for keyword in node.keywords:
                    if keyword.arg == "name" and isinstance(keyword.value, ast.Constant):
                        module = f"mmemb.components.{file.parent.name}.{file.stem}"
                        summary = _first_line(ast.get_docstring(node))
                        kind = file.parent.name.removesuffix("s")
                        listings.append(Listing(kind, str(keyword.value.value), summary, f"{module}.{node.name}"))
    return listings


def _plugins() -> dict[str, Any]:
    """Entry points of other distributions, ``kind.name`` or any label -> the entry point (not loaded)."""
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def load_plugins() -> None:
    """Imports every plug-in module or class so that it registers itself.

    Raises:
        ImportError: a plug-in cannot be imported; the message names its distribution's entry point.
    """
    for label, point in _plugins().items():
        try:
            point.load()
        except Exception as error:
            raise ImportError(f"the plug-in {label!r} ({point.value}) cannot be loaded: {error}") from error


def listings() -> list[Listing]:
    """Every component by kind and name: the built-in ones (from source, no import) and those registered or plugged in."""
    load_plugins()
    found = {(item.kind, item.name): item for item in _builtin_listings()}
    for kind, classes in _REGISTRY.items():
        for name, cls in classes.items():
            found.setdefault((kind, name), Listing(kind, name, _first_line(inspect.getdoc(cls)), _path(cls)))
    return sorted(found.values(), key=lambda item: (KINDS.index(item.kind), item.name))


def available(kind: str) -> list[str]:
    """Short names of a kind, sorted."""
    return [item.name for item in listings() if item.kind == kind]


def resolve(kind: str, name: str) -> type:
    """Returns the class that a short name stands for, importing its module if need be.

    Args:
        kind: one of `KINDS`.
        name: a short name (``"counterfactual"``).

    Raises:
        UnknownComponentError: no component of the kind has the name.
    """
    cls = _REGISTRY[kind].get(name)
    if cls is not None:
        return cls
    for item in listings():
        if (item.kind, item.name) == (kind, name):
            module, _, attribute = item.path.rpartition(".")
            return getattr(importlib.import_module(module), attribute)
    names = available(kind)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UnknownComponentError(
        f"there is no {kind} named {name!r}{hint} Registered: {', '.join(names) or 'none'}. "
        f"`mmemb components` lists them; a class of your own is named by its path (my_package.MyClass)."
    )


def create(kind: str, name: str, **arguments: Any) -> Any:
    """Builds the component that a short name stands for: ``create("selector", "random", seed=4)``."""
    return resolve(kind, name)(**arguments)
