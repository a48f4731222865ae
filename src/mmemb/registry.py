"""Short names for swappable parts.

A component declares its kind once, on the contract (``class Selector(Component, kind="selector")``), and its short name
once, on the class (``class Random(Selector, name="random")``). Nothing else is needed: `resolve` turns a name into the
class, `available` lists what exists, and plug-ins of other distributions join through the entry-point group
``mmemb.components``. This module imports neither torch nor any component until a name is asked for.
"""

from __future__ import annotations

import ast
import difflib
import functools
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


class PluginError(ImportError):
    """A plug-in that cannot be imported; the message names its entry point."""


class Component:
    """Base of every contract: registers a subclass under its kind by the short name it declares.

    ``__init_subclass__`` takes ``kind=`` (contracts only) and ``name=`` (concrete parts only; a part without one is
    still usable by class path).

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


@functools.cache
def _builtin_listings() -> tuple[Listing, ...]:
    """Names and first doc lines, read from the source of `mmemb.components`: importing it, and torch, costs seconds."""
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
    return tuple(listings)


def load_plugins() -> None:
    """Imports every plug-in module or class so that it registers itself.

    Raises:
        PluginError: a plug-in cannot be imported.
    """
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            point.load()
        except Exception as error:
            package = point.dist.name if point.dist else "an unknown package"
            raise PluginError(
                f"the plug-in {point.name!r} ({point.value}) of {package} cannot be loaded: "
                f"{type(error).__name__}: {error}; repair or uninstall it"
            ) from error


def listings() -> list[Listing]:
    """Every component by kind and name: the built-in ones (from source, no import), registered and plugged-in ones."""
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
    raise unknown(kind, name)


def is_name(kind: str, name: str) -> bool:
    """Whether a component of the kind has this short name."""
    return name in _REGISTRY[kind] or name in available(kind)


def unknown(kind: str, name: str) -> UnknownComponentError:
    """The error for a name that no component of the kind has: what was probably meant, and what exists."""
    names = available(kind)
    close = difflib.get_close_matches(name, names, n=1)
    elsewhere = [other for other in KINDS if other != kind and is_name(other, name)]
    if close:
        hint = f"did you mean {close[0]!r}? "
    elif elsewhere:
        hint = f"that is a {elsewhere[0]}. "
    else:
        hint = ""
    return UnknownComponentError(
        f"there is no {kind} named {name!r}: {hint}Registered: {', '.join(names) or 'none'}. "
        "`mmemb components` lists them; a class of your own is named by its path (my_package.MyClass)."
    )


def create(kind: str, name: str, **arguments: Any) -> Any:
    """Builds the component that a short name stands for: ``create("selector", "random", seed=4)``."""
    return resolve(kind, name)(**arguments)
