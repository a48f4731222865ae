"""The parser of every command: jsonargparse with short names, and errors of one line."""

from __future__ import annotations

import re
from argparse import RawDescriptionHelpFormatter
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from mmemb import shortnames
from mmemb.commands.errors import UsageError, one_line

_NOISE = re.compile(
    r"^(Does not validate against any of the Union subtypes|Subtypes: |Errors:$|Given value type: |Given value: |"
    r"Problem with given class_path )"
)


def condense(message: str) -> str:
    """The useful part of jsonargparse's error in one line.

    A value that fits none of a union's types comes with an error a type; the one about the value's content (an unknown name,
    a wrong argument of the named class) says most, so the longest branch that is not about None is kept.
    """
    return one_line(message)


class OneLineErrors:
    """Mix-in before a jsonargparse parser: a refused input raises `UsageError` with one line instead of printing usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises `UsageError`; parsers that jsonargparse uses inside (``exit_on_error=False``) keep their own way."""
        if not self.exit_on_error:  # type: ignore[attr-defined]
            super().error(message, ex)  # type: ignore[misc]
        prog = self.prog.replace(" [options]", "")  # type: ignore[attr-defined]
        raise UsageError(f"{condense(message)} (`{prog} --help` lists the options)") from ex


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of examples."""


class CommandParser(OneLineErrors, ArgumentParser):
    """Parser of a command that is not Lightning's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        shortnames.install()
        super().__init__(*args, formatter_class=HelpFormatter, default_env=False, **kwargs)
