"""Teaches jsonargparse short names: ``selector: counterfactual`` in YAML, ``--model.selector random`` in a shell.

jsonargparse (4.53) has no public way to do this for both YAML and flags. So this module, and no other, replaces two of
its private functions:

- the function that turns a name into a class path also looks names up in `mmemb.registry` and in `torch.optim`;
- before the check of a typed value, the short forms of parts are replaced by long ones (`mmemb.commands.parsing.
  shorthand`). A name that is also a file is refused, because the file would be read as settings. The entries of a list
  of sources get the fields that they leave out, because jsonargparse would take them from an earlier config's list.

`tests/commands/test_short_names.py` and `tests/commands/test_shorthand.py` test every behaviour that depends on this.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from jsonargparse import _typehints

from mmemb.commands.parsing.shorthand import PartError, class_path, expand, kinds, optimizer_path
from mmemb.registry import UnknownComponentError, is_name, resolve, unknown

_MARK = "_mmemb_short_names"


class ShadowedNameError(TypeError):
    """A short name is also a file in the current folder, so its meaning is unclear."""


def install() -> None:
    """Makes every jsonargparse parser of this process understand short names. A second call changes nothing."""
    if not hasattr(_typehints.resolve_class_path_by_name, _MARK):
        _typehints.resolve_class_path_by_name = _with_names(_typehints.resolve_class_path_by_name)
        action: Any = _typehints.ActionTypeHint
        action._check_type = _checking(action._check_type)


def _with_names(original: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(original)
    def resolve_class_path_by_name(cls: type | tuple[type, ...], name: str) -> str:
        admitted = [] if isinstance(cls, tuple) else list(kinds(cls))
        if "." in name or not admitted:
            return optimizer_path(cls, name) or original(cls, name)
        try:
            return class_path(resolve(admitted[0], name))
        except UnknownComponentError:
            path = original(cls, name)  # a bare class name of an imported class
            if "." not in path:
                raise unknown(admitted[0], name) from None
            return path

    setattr(resolve_class_path_by_name, _MARK, True)
    return resolve_class_path_by_name


def _checking(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _check_type(self: Any, value: Any, append: bool = False, cfg: Any = None, mode: Any = None) -> Any:
        for kind in kinds(self._typehint):
            for name in _words(value):
                if is_name(kind, name) and Path(name).exists():
                    error = (
                        f"{name!r} is the short name of a {kind}, and there is also a file {Path(name).absolute()}; "
                        f"rename the file, run from another folder, or write {class_path(resolve(kind, name))}"
                    )
                    raise ShadowedNameError(f'Parser key "{self.dest}": {error}') from ShadowedNameError(error)
        try:
            loaded = _loaded(value)
            expanded = expand(loaded, self._typehint, previous=_previous(self, cfg), append=append)
        except (PartError, UnknownComponentError) as error:
            raise TypeError(f'Parser key "{self.dest}":\n{error}') from error
        if expanded != loaded:
            value = expanded
        if isinstance(value, list) and (defaults := _defaults(self._typehint)):
            value = [{**defaults, **entry} if isinstance(entry, dict) else entry for entry in value]
        return original(self, value, append, cfg, mode)

    return _check_type


def _loaded(value: Any) -> Any:
    """The mapping or list that a flag spells out in YAML. Any other value is returned as it is."""
    if not isinstance(value, str) or value.strip()[:1] not in ("{", "["):
        return value
    try:
        return _typehints.parse_value_or_config(value, enable_path=False)[0]
    except _typehints.get_loader_exceptions():
        return value  # jsonargparse reports it


def _previous(action: Any, cfg: Any) -> Any:
    """The value that a parameter has before the one that is checked: from earlier settings, or its default."""
    value = cfg.get(action.dest) if cfg else None
    return value if _typehints.is_subclass_spec(value) else action.default


def _defaults(typehint: Any) -> dict[str, Any]:
    """For a list of dataclasses: the fields that an entry may leave out, with their defaults."""
    if get_origin(typehint) is list and dataclasses.is_dataclass(entry := get_args(typehint)[0]):
        defaults = {each.name: each.default for each in dataclasses.fields(entry)}
        return {name: value for name, value in defaults.items() if value is not dataclasses.MISSING}
    for inner in get_args(typehint):
        if found := _defaults(inner):
            return found
    return {}


def _words(value: Any) -> Iterator[str]:
    """The strings of a value that may be short names."""
    if isinstance(value, str):
        yield value.strip("[] ")
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _words(entry)
