"""`mmemb components`: lists the swappable parts without importing any of the built-in ones."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import NoReturn

from rich.console import Console
from rich.table import Table

from mmemb.commands.parsing.errors import UsageError
from mmemb.registry import KINDS, listings


class _Parser(argparse.ArgumentParser):
    """Plain argparse: importing jsonargparse would take longer than the whole command."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (`{self.prog} --help` lists the options)")


def main(argv: Sequence[str]) -> int:
    """Prints the components as a table, or as JSON for programs."""
    parser = _Parser(
        prog="mmemb components",
        description="Lists the parts that a config can name. A short name stands for its class (`selector: random`).",
    )
    parser.add_argument("--kind", choices=KINDS, help="list this kind only")
    parser.add_argument("--json", action="store_true", help="print a JSON list of kind, name, summary and class path")
    options = parser.parse_args(argv[1:])
    found = [item for item in listings() if options.kind in (None, item.kind)]
    if options.json:
        print(json.dumps([asdict(item) for item in found], indent=2))
        return 0
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("kind", "name", "what it does"):
        table.add_column(heading, no_wrap=heading != "what it does")
    previous = ""
    for item in found:
        table.add_row(item.kind if item.kind != previous else "", item.name, item.summary)
        previous = item.kind
    Console(soft_wrap=False).print(table)
    return 0
