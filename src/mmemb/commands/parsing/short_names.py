"""Teaches jsonargparse short names: ``selector: counterfactual`` in YAML, ``--model.selector random`` in a shell.

This is the one place that changes a private part of jsonargparse (4.53): the function by which it turns a name into a
class path, and the check of a typed value, before which a name that is also a file is refused (the file would be read
as settings) and the entries of a list of sources get the fields that they leave out (jsonargparse would take them from
the entry at the same place of an earlier file, where both lists are of one length). There is no public way that sees
both YAML and flags. `tests/commands/test_short_names.py` holds each behaviour that rests on it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from jsonargparse import _typehints

from mmemb.registry import Component, UnknownComponentError, is_name, resolve, unknown

_MARK = "_mmemb_short_names"


class ShadowedNameError(TypeError):
    """A short name is also a file in the current folder, so it is unclear which of the two is meant."""


def install() -> None:
    """Makes every jsonargparse parser of this process understand short names; doing it twice changes nothing."""
    if not hasattr(_typehints.resolve_class_path_by_name, _MARK):
        _typehints.resolve_class_path_by_name = _with_names(_typehints.resolve_class_path_by_name)
        action: Any = _typehints.ActionTypeHint
        action._check_type = _checking(action._check_type)


def _with_names(original: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(original)
    def resolve_class_path_by_name(cls: type | tuple[type, ...], name: str) -> str:
        kinds = [] if isinstance(cls, tuple) else list(_kinds(cls))
        if not kinds or "." in name:
            return original(cls, name)
        try:
            return _path(resolve(kinds[0], name))
        except UnknownComponentError:
            path = original(cls, name)  # a bare class name of an imported class
            if "." not in path:
                raise unknown(kinds[0], name) from None
            return path

    setattr(resolve_class_path_by_name, _MARK, True)
    return resolve_class_path_by_name


def _checking(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _check_type(self: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        for kind in _kinds(self._typehint):
            for name in _words(value):
                if is_name(kind, name) and Path(name).exists():
                    error = (
                        f"{name!r} is the short name of a {kind}, and there is also a file {Path(name).absolute()}; "
                        f"rename the file, run from another folder, or write {_path(resolve(kind, name))}"
                    )
                    raise ShadowedNameError(f'Parser key "{self.dest}": {error}') from ShadowedNameError(error)
        if isinstance(value, list) and (defaults := _defaults(self._typehint)):
            value = [{**defaults, **entry} if isinstance(entry, dict) else entry for entry in value]
        return original(self, value, *args, **kwargs)

    return _check_type


def _defaults(typehint: Any) -> dict[str, Any]:
    """Of a list of dataclasses, the fields that an entry may leave out."""
    if get_origin(typehint) is list and dataclasses.is_dataclass(entry := get_args(typehint)[0]):
        defaults = {each.name: each.default for each in dataclasses.fields(entry)}
        return {name: value for name, value in defaults.items() if value is not dataclasses.MISSING}
    for inner in get_args(typehint):
        if found := _defaults(inner):
            return found
    return {}


def _kinds(typehint: Any) -> Iterator[str]:
    """Component kinds that a type admits, inside Optional, lists and the like."""
    if inspect.isclass(typehint) and issubclass(typehint, Component):
        yield typehint.kind
    for inner in get_args(typehint):
        yield from _kinds(inner)


def _words(value: Any) -> Iterator[str]:
    """The texts of a value that may be short names."""
    if isinstance(value, str):
        yield value.strip("[] ")
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _words(entry)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
