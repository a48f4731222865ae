"""Short names for swappable parts.

A contract declares the kind: ``class Selector(Component, kind="selector")``. A class declares its short name:
``class Random(Selector, name="random")``. `resolve` turns a name into the class, and `available` lists the names of a
kind. Other packages add their parts through the entry-point group ``mmemb.components``.

Importing this module imports neither torch nor any component. A component is imported when its name is resolved. Names
and summaries of the built-in parts are read from their source code.
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

KINDS = (
    "backbone",
    "pooler",
    "worker",
    "evaluator",
    "selector",
    "controller",
    "objective",
    "loss",
    "reward",
    "policy_loss",
    "augmentation",
)
MODULES = {
    "objective": ("training.joint.objective", "training.control.objective", "training.pretrain"),
    "loss": ("losses.infonce",),
    "reward": ("training.control.rewards",),
    "policy_loss": ("losses.grpo",),
    "augmentation": ("data.augment",),
}
"""Kind -> modules below ``mmemb`` whose classes have short names; the other kinds are in ``mmemb.components``."""
ENTRY_POINT_GROUP = "mmemb.components"

_REGISTRY: dict[str, dict[str, type]] = {kind: {} for kind in KINDS}


class UnknownComponentError(ValueError):
    """No component of the kind has the name. The message lists the names that exist, and the nearest one."""


class PluginError(ImportError):
    """A plug-in cannot be imported. The message names its entry point."""


class Component:
    """Base class of every contract. It registers each subclass that declares a short name.

    A class statement takes ``kind=`` on a contract and ``name=`` on a concrete part. A class that is both its own
    contract and the only part, such as a loss, takes both. A part without a name is used by its class path.

    Raises:
        ValueError: the kind is unknown, or another class of the kind already has the name.
    """

    kind: ClassVar[str] = ""
    name: ClassVar[str] = ""

    def __init_subclass__(cls, *, kind: str | None = None, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind is not None:
            _check_kind(kind)
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
    """One line of `mmemb components`: kind and short name of a part, a one-sentence summary, and its class path."""

    kind: str
    name: str
    summary: str
    path: str


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown component kind {kind!r}; the kinds are {', '.join(KINDS)}")


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _first_line(doc: str | None) -> str:
    return (doc or "").strip().split("\n", 1)[0].strip()


@functools.cache
def _builtin_listings() -> tuple[Listing, ...]:
    """The built-in parts, read from source code because importing them (and torch) takes seconds."""
    found: list[Listing] = []
    spec = find_spec("mmemb.components")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(root).glob("*/*.py")):
            kind = file.parent.name.removesuffix("s")
            found += _listings_of(file, kind, f"mmemb.components.{file.parent.name}.{file.stem}")
    package = Path(__file__).parent
    for kind, modules in MODULES.items():
        for module in modules:
            # Not `find_spec`: it would import the packages above the module, and some of them import torch.
            file = package.joinpath(*module.split(".")).with_suffix(".py")
            found += _listings_of(file, kind, f"mmemb.{module}")
    return tuple(found)


def _listings_of(file: Path, kind: str, module: str) -> list[Listing]:
    """The classes of a source file whose class statement declares a short name."""
    found = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for keyword in node.keywords:
            if keyword.arg == "name" and isinstance(keyword.value, ast.Constant):
                summary = _first_line(ast.get_docstring(node))
                found.append(Listing(kind, str(keyword.value.value), summary, f"{module}.{node.name}"))
    return found


def load_plugins() -> None:
    """Imports the plug-ins of other packages, so that their parts register themselves.

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
    """Every component, sorted by kind and name: built-in parts, plug-ins, and classes registered in this process."""
    load_plugins()
    found = {(item.kind, item.name): item for item in _builtin_listings()}
    for kind, classes in _REGISTRY.items():
        for name, cls in classes.items():
            found.setdefault((kind, name), Listing(kind, name, _first_line(inspect.getdoc(cls)), _path(cls)))
    return sorted(found.values(), key=lambda item: (KINDS.index(item.kind), item.name))


def available(kind: str) -> list[str]:
    """The short names of a kind, sorted.

    Args:
        kind: one of `KINDS`.

    Raises:
        ValueError: there is no such kind.
    """
    _check_kind(kind)
    return [item.name for item in listings() if item.kind == kind]


def resolve(kind: str, name: str) -> type:
    """Returns the class that has a short name. Imports its module if necessary.

    Args:
        kind: one of `KINDS`.
        name: a short name (``"counterfactual"``).

    Raises:
        UnknownComponentError: no component of the kind has the name.
        ValueError: there is no such kind.
    """
    _check_kind(kind)
    cls = _REGISTRY[kind].get(name)
    if cls is not None:
        return cls
    for item in listings():
        if (item.kind, item.name) == (kind, name):
            module, _, attribute = item.path.rpartition(".")
            return getattr(importlib.import_module(module), attribute)
    raise unknown(kind, name)


def is_name(kind: str, name: str) -> bool:
    """Whether a component of the kind has the short name."""
    return name in _REGISTRY[kind] or name in available(kind)


def unknown(kind: str, name: str) -> UnknownComponentError:
    """The error for a name that no component of the kind has. It suggests the nearest name and lists all names."""
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
        "`mmemb components` lists them. Give a class of your own by its path (my_package.MyClass)."
    )


def create(kind: str, name: str, **arguments: Any) -> Any:
    """Builds the component that has a short name: ``create("selector", "random", seed=4)``.

    Args:
        kind: one of `KINDS`.
        name: a short name.
        **arguments: the arguments of the component's constructor.

    Raises:
        UnknownComponentError: no component of the kind has the name.
        ValueError: there is no such kind, or the component refuses an argument.
    """
    return resolve(kind, name)(**arguments)
