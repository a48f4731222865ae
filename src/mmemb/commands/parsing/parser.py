"""The parser of every command: jsonargparse with short names, and errors of one line."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from mmemb.commands.parsing import short_names as shortnames
from mmemb.commands.parsing.errors import UsageError
from mmemb.commands.parsing.messages import condense


class OneLineErrors:
    """Mix-in before a jsonargparse parser: a refused input raises `UsageError` with one line; no usage is printed."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises `UsageError`; parsers that jsonargparse uses inside (``exit_on_error=False``) keep their own way."""
        if not self.exit_on_error:  # type: ignore[attr-defined]
            super().error(message, ex)  # type: ignore[misc]
        raise UsageError(condense(message, ex, _keys(self))) from ex  # type: ignore[arg-type]


def _keys(parser: argparse.ArgumentParser) -> list[str]:
    """Every key the parser or one of its commands has, without leading dashes."""
    keys = []
    for action in parser._actions:
        keys += [option.lstrip("-") for option in action.option_strings]
        for below in set(getattr(action, "_name_parser_map", {}).values()):
            keys += _keys(below)
    return keys


class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of examples."""


class CommandParser(OneLineErrors, ArgumentParser):
    """Parser of a command that is not Lightning's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        shortnames.install()
        super().__init__(*args, formatter_class=HelpFormatter, default_env=False, **kwargs)
