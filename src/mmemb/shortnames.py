"""Teaches jsonargparse the registry's short names: ``selector: counterfactual`` in YAML, ``--model.selector random`` in a shell.

This is the one place that touches a private part of jsonargparse (4.53): the function by which it turns a name into a class
path, and the one by which it tries a string as a file of settings. There is no public way that sees both YAML and flags.
`tests/test_cli_shortnames.py` holds each behaviour that rests on it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import _typehints

from mmemb.registry import Component, UnknownComponentError, is_name, resolve, unknown

_MARK = "_mmemb_short_names"


class ShadowedNameError(ValueError):
    """A short name is also a file in the current folder, so it is unclear which of the two is meant."""


def _kind(typehint: Any) -> str:
    """The component kind of a contract or of a class below it; empty for anything else."""
    return typehint.kind if inspect.isclass(typehint) and issubclass(typehint, Component) else ""


def _resolve_with_names(original: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(original)
    def resolve_class_path(cls: type | tuple[type], name: str) -> str:
        kind = "" if isinstance(cls, tuple) else _kind(cls)
        if not kind or "." in name:
            return original(cls, name)
        try:
            found = resolve(kind, name)
        except UnknownComponentError:
            path = original(cls, name)  # a bare class name of an imported class
            if "." not in path:
                raise unknown(kind, name) from None
            return path
        return f"{found.__module__}.{found.__qualname__}"

    setattr(resolve_class_path, _MARK, True)
    return resolve_class_path


def _refuse_shadowed(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def adapt_subconfig_path(val: Any, typehint: Any, adapt_kwargs: dict[str, Any]) -> Any:
        kind = _kind(typehint)
        if kind and isinstance(val, str) and is_name(kind, val) and Path(val).exists():
            raise ShadowedNameError(
                f"{val!r} is the short name of a {kind} and also a file in {Path.cwd()}; rename the file, "
                f"run from another folder, or write the class path {_path(kind, val)}"
            )
        return original(val, typehint, adapt_kwargs)

    setattr(adapt_subconfig_path, _MARK, True)
    return adapt_subconfig_path


def _path(kind: str, name: str) -> str:
    found = resolve(kind, name)
    return f"{found.__module__}.{found.__qualname__}"


def install() -> None:
    """Makes every jsonargparse parser of this process understand short names; doing it twice changes nothing."""
    for name, wrap in (
        ("resolve_class_path_by_name", _resolve_with_names),
        ("adapt_subconfig_path", _refuse_shadowed),
    ):
        current = getattr(_typehints, name)
        if not hasattr(current, _MARK):
            setattr(_typehints, name, wrap(current))
