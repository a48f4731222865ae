"""Flags for one phase of a run: ``--model.phases.joint.chunk_size 8``.

A list in YAML cannot be changed in part by a later file or flag, and ``model.phases`` is a list. So flags that name a
phase, by its number or by its name, are taken out of the command line and applied to the settings that the files gave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from mmemb.commands.parsing.errors import UsageError

PREFIX = "--model.phases."
_OF_PHASE = ("objective", "data", "steps", "learning_rate_factor", "schedule", "warmup_steps", "name")
"""Arguments of a phase; every other key belongs to its objective."""


class PhaseFlag(NamedTuple):
    """One setting of one phase.

    Attributes:
        flag: as it was typed, for messages.
        phase: number or name of the phase.
        keys: the way to the setting within the phase.
        value: decoded as YAML.
    """

    flag: str
    phase: str
    keys: tuple[str, ...]
    value: Any


def take_phase_flags(words: Sequence[str]) -> tuple[list[str], list[PhaseFlag]]:
    """Splits the words of a command into those for the parser and the flags of single phases.

    Raises:
        UsageError: a flag names no setting, or has no value.
    """
    rest: list[str] = []
    flags: list[PhaseFlag] = []
    waiting = iter(words)
    for word in waiting:
        if not word.startswith(PREFIX) or word.startswith(PREFIX + "help"):
            rest.append(word)
            continue
        name, equals, text = word.partition("=")
        value = text if equals else next(waiting, None)
        phase, _, path = name.removeprefix(PREFIX).partition(".")
        if value is None or not path:
            raise UsageError(f"{name}: give a phase, a setting and a value, such as {PREFIX}joint.chunk_size 8")
        flags.append(PhaseFlag(name, phase, tuple(path.split(".")), yaml.safe_load(value)))
    return rest, flags


def apply_phase_flags(phases: Sequence[Any], flags: Sequence[PhaseFlag]) -> None:
    """Changes the settings of phases in place.

    Args:
        phases: the list of ``model.phases`` as plain containers, parts as ``class_path`` and ``init_args``.
        flags: later ones win.

    Raises:
        UsageError: there is no such phase, or a key on the way belongs to no part.
    """
    names = [_name(phase) for phase in phases]
    for flag in flags:
        if flag.phase.isdigit() and int(flag.phase) < len(phases):
            phase = phases[int(flag.phase)]
        elif flag.phase in names:
            phase = phases[names.index(flag.phase)]
        else:
            raise UsageError(f"{flag.flag}: there is no phase {flag.phase!r}; the phases are {', '.join(names)}")
        keys = flag.keys if flag.keys[0] in _OF_PHASE else ("objective", *flag.keys)
        place = _arguments(phase)
        for key in keys[:-1]:
            if not isinstance(place.get(key), Mapping):
                raise UsageError(f"{flag.flag}: {key} is {place.get(key)!r} there, so it has no settings of its own")
            place = _arguments(place[key])
        place[keys[-1]] = flag.value


def _arguments(part: Any) -> Any:
    """Where a part's own settings are."""
    return part.get("init_args", part)


def _name(phase: Any) -> str:
    """What the run will call the phase."""
    settings = _arguments(phase)
    if settings.get("name"):
        return str(settings["name"])
    from mmemb.registry import listings

    path = settings["objective"]["class_path"]
    short = {item.path: item.name for item in listings() if item.kind == "objective"}
    return short.get(path, path.rpartition(".")[2].lower())
