"""The parser of every command: jsonargparse with short names and one-line errors."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from mmemb.commands.parsing import short_names as shortnames
from mmemb.commands.parsing.errors import UsageError
from mmemb.commands.parsing.messages import condense


class OneLineErrors:
    """Mix-in for a jsonargparse parser: refused input raises `UsageError` with one line and prints no usage text."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises `UsageError`, except in the inner parsers of jsonargparse (``exit_on_error=False``)."""
        if not self.exit_on_error:  # type: ignore[attr-defined]
            super().error(message, ex)  # type: ignore[misc]
        raise UsageError(condense(message, ex, _keys(self))) from ex  # type: ignore[arg-type]


def _keys(parser: argparse.ArgumentParser) -> list[str]:
    """Lists the keys of the parser and of its commands, without leading dashes."""
    keys = []
    for action in parser._actions:
        keys += [option.lstrip("-") for option in action.option_strings]
        for below in set(getattr(action, "_name_parser_map", {}).values()):
            keys += _keys(below)
    return keys


class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A help formatter that keeps the line breaks of examples."""


class CommandParser(OneLineErrors, ArgumentParser):
    """The parser of a command that does not come from Lightning."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        shortnames.install()
        super().__init__(*args, formatter_class=HelpFormatter, default_env=False, **kwargs)
