"""`mmemb data show`: draws a contact sheet of the bundled tasks with their queries, targets and rationales."""

from __future__ import annotations

from collections.abc import Sequence

from mmemb.commands.parsing.errors import UsageError
from mmemb.commands.parsing.parser import CommandParser

_EPILOG = """examples:
  mmemb data show                                       writes four queries per task to data.png
  mmemb data show --split train --task left1 flagscene --rows 6 --output scenes.png
"""


def main(argv: Sequence[str]) -> int:
    """Draws the contact sheet and prints its path."""
    words = list(argv[1:])
    if words[:1] in (["-h"], ["--help"]):
        words = ["show", *words]
    if words[:1] != ["show"]:
        raise UsageError("`mmemb data` has one command: `mmemb data show` (`mmemb data show --help` lists the options)")
    parser = CommandParser(
        prog="mmemb data show",
        description="Draws a contact sheet of the bundled data: a few queries per task with target and rationale.",
        epilog=_EPILOG,
    )
    parser.add_argument("--split", type=str, default="test", help="the split: train, control, validation or test")
    parser.add_argument("--task", nargs="+", type=str, help="show these tasks only; by default all")
    parser.add_argument("--rows", type=int, default=4, help="number of queries shown per task")
    parser.add_argument("--seed", type=int, default=0, help="seed that draws the queries")
    parser.add_argument("--output", type=str, default="data.png", help="the PNG file to write")
    options = parser.parse_args(words[1:])
    from mmemb.drawing import contact_sheet

    path = contact_sheet.draw(
        options.output, split=options.split, tasks=options.task, rows=options.rows, seed=options.seed
    )
    print(path)
    return 0
