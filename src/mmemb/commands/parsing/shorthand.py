"""Turns the short form of a part into the long form that jsonargparse reads.

In YAML, or as the value of a flag, a part with arguments may be a mapping of one key, its short name::

    threshold: {token_share: 0.6}      ->  {class_path: ..., init_args: {token_share: 0.6}}

The same holds for optimizers, where the name is a class of `torch.optim`. The long form stays valid and is returned
unchanged. If the class is already known, the arguments can be given without it: a parameter of type `InfoNCE` takes
``{temperature: 0.1}``. A part that an earlier config named takes further arguments in the same way. A mapping with a
short name as its key always means that name.
"""

from __future__ import annotations

import collections.abc
import difflib
import functools
import importlib
import inspect
import operator
import sys
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from jsonargparse import Namespace

from mmemb.registry import Component, is_name, resolve, unknown

_LONG_FORM = ("class_path", "init_args", "dict_kwargs")


class PartError(ValueError):
    """A part is not written as a name with its arguments."""


def expand(value: Any, typehint: Any, *, previous: Any = None, append: bool = False) -> Any:
    """Replaces every short form in a value by its long form. Other values are returned unchanged.

    Args:
        value: from a config, or from a flag whose YAML has been read.
        typehint: the type of the parameter.
        previous: the value that the parameter has so far, in the long form.
        append: whether the value is one more element of a list, as in ``--model.controllers+``.

    Raises:
        PartError: a short name has other keys next to it, or its arguments are not a mapping.
        mmemb.registry.UnknownComponentError: the only key is neither a short name nor a known argument.
    """
    members = list(_members(typehint))
    if not any(_is_part(member) for member in _all_members(typehint)):
        return value
    elements = [get_args(member)[0] for member in members if _is_list(member)]
    if isinstance(value, list):
        return [expand(each, functools.reduce(operator.or_, elements)) for each in value] if elements else value
    if not isinstance(value, dict | Namespace):
        return value
    if append and elements:
        return expand(value, functools.reduce(operator.or_, elements))
    parts = [member for member in members if _is_part(member)]
    if parts:
        return _expand_part(value, parts, previous)
    for member in members:
        if isinstance(value, dict) and get_origin(member) in (dict, Mapping):
            return {key: expand(each, get_args(member)[1]) for key, each in value.items()}
    return value


def kinds(typehint: Any) -> Iterator[str]:
    """The component kinds that a type admits, also inside unions, lists and mappings."""
    for member in _all_members(typehint):
        if kind := _kind(member):
            yield kind


def optimizer_path(cls: Any, name: str) -> str | None:
    """The class path of a `torch.optim` class by its bare name, if `cls` is the type of optimizers."""
    base = _optimizer_base()
    if base is None or not (inspect.isclass(cls) and issubclass(cls, base)):
        return None
    found = getattr(sys.modules["torch.optim"], name, None)
    return f"torch.optim.{name}" if inspect.isclass(found) and issubclass(found, base) and found is not base else None


def class_path(cls: type) -> str:
    """The dotted path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _expand_part(value: dict[str, Any] | Namespace, parts: list[Any], previous: Any) -> Any:
    """The long form of a mapping that describes one part."""
    content = vars(value) if isinstance(value, Namespace) else value
    keys = [key for key in content if not key.startswith("__")]
    if not keys or any(key in content for key in _LONG_FORM):
        return value
    base = _known_class(parts, previous)
    arguments = _arguments(base) if base is not None else []
    paths = {key: path for key in keys if (path := _path_of(key, parts)) and _may_be_arguments(content[key])}
    if len(keys) == 1 and paths:
        (key, path) = next(iter(paths.items()))
        given = _as_dict(content[key])
        return {"class_path": path, "init_args": given} if given else {"class_path": path}
    named = [key for key in keys if _path_of(key, parts) and key not in arguments]
    if named:
        raise _misplaced(named[0], keys, content[named[0]])
    if len(keys) == 1 and keys[0] not in arguments and (base is None or isinstance(content[keys[0]], dict | Namespace)):
        raise _unknown(keys[0], parts)
    return value


def _misplaced(name: str, keys: list[str], given: Any) -> PartError:
    others = ", ".join(repr(key) for key in keys if key != name)
    if others:
        return PartError(f"the name {name!r} is on one level with {others}; indent the arguments of {name!r} below it")
    return PartError(f"the arguments of {name!r} must be a mapping ({name}: {{argument: value}}), got {given!r}")


def _path_of(key: str, parts: list[Any]) -> str | None:
    """The class path that a key stands for: a short name, a `torch.optim` class, or a dotted path."""
    if "." in key:
        return key
    for part in parts:
        if kind := _kind(part):
            if is_name(kind, key):
                return class_path(resolve(kind, key))
        elif path := optimizer_path(get_args(part)[-1], key):
            return path
    return None


def _unknown(key: str, parts: list[Any]) -> ValueError:
    """The error for an unknown name, with the nearest name and the names that exist."""
    for part in parts:
        if kind := _kind(part):
            return unknown(kind, key)
    names = [name for name in dir(sys.modules["torch.optim"]) if optimizer_path(get_args(parts[0])[-1], name)]
    close = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return PartError(
        f"torch.optim has no optimizer {key!r}: {hint}It has {', '.join(names)}. "
        "Give any other optimizer by its path (my_package.MyOptimizer)."
    )


def _known_class(parts: list[Any], previous: Any) -> type | None:
    """The class whose arguments may be given without its name: the one named before, or the only one admitted."""
    if isinstance(previous, dict | Namespace) and isinstance(path := _as_dict(previous).get("class_path"), str):
        module, _, name = path.rpartition(".")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError):
            return None
    return next((part for part in parts if inspect.isclass(part) and not inspect.isabstract(part)), None)


def _arguments(cls: type) -> list[str]:
    return [name for name in inspect.signature(cls).parameters if name not in ("args", "kwargs")]


def _may_be_arguments(value: Any) -> bool:
    return value is None or isinstance(value, dict | Namespace)


def _as_dict(value: Any) -> dict[str, Any]:
    return dict(vars(value)) if isinstance(value, Namespace) else dict(value or {})


def _members(typehint: Any) -> Iterator[Any]:
    """The types that a union admits, or the type itself."""
    if get_origin(typehint) in (Union, UnionType):
        for inner in get_args(typehint):
            yield from _members(inner)
    else:
        yield typehint


def _all_members(typehint: Any) -> Iterator[Any]:
    """The type itself and the types inside it, at every depth."""
    yield typehint
    for inner in get_args(typehint):
        yield from _all_members(inner)


def _is_list(typehint: Any) -> bool:
    origin = get_origin(typehint)
    return inspect.isclass(origin) and issubclass(origin, collections.abc.Sequence) and bool(get_args(typehint))


def _kind(typehint: Any) -> str:
    """The kind of a component class; empty for any other type."""
    return typehint.kind if inspect.isclass(typehint) and issubclass(typehint, Component) else ""


def _is_part(typehint: Any) -> bool:
    """Whether a type is a component class, or a callable that makes an optimizer."""
    if _kind(typehint):
        return True
    base = _optimizer_base()
    if base is None or get_origin(typehint) is not collections.abc.Callable:
        return False
    made = get_args(typehint)[-1]
    return inspect.isclass(made) and issubclass(made, base)


def _optimizer_base() -> type | None:
    """`torch.optim.Optimizer`, if torch is loaded: without torch, no type can ask for it."""
    return getattr(sys.modules.get("torch.optim"), "Optimizer", None)
