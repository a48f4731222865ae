"""Runs the `mmemb` command line. It picks the command before it imports anything heavy."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from mmemb import __version__
from mmemb.commands.parsing.errors import EXIT_MISTAKE, guarded, tell
from mmemb.commands.parsing.quiet import quiet

COMMANDS = {
    "fit": ("train with validation, then evaluate on the test split", "mmemb.commands.train"),
    "validate": ("evaluate a checkpoint on the validation split", "mmemb.commands.train"),
    "test": ("evaluate a checkpoint on the test split and write the summary", "mmemb.commands.train"),
    "predict": ("embed a data set with a checkpoint, on every device of the trainer", "mmemb.commands.train"),
    "components": ("list the components by kind and name, with one line for each", "mmemb.commands.components"),
    "data": ("show the data: `mmemb data show` draws a contact sheet", "mmemb.commands.data_show"),
    "rationales": ("make, score and show rationale candidates", "mmemb.commands.rationales"),
    "embed": ("embed a JSONL file or a folder of pictures into a Parquet file", "mmemb.commands.embed"),
    "search": ("find a text or a picture in an embedded folder", "mmemb.commands.search"),
}
"""Maps a command to (one line of help, the module whose ``main(argv)`` runs it). ``argv`` starts with the command."""

_GOES_ON = "run the same command again to continue where it stopped"
_HINTS = {"embed": _GOES_ON, "rationales": _GOES_ON}
"""Maps a command to a hint on how to continue after Ctrl-C. Commands in `mmemb.commands.train` print their own."""


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {summary}" for name, (summary, _) in COMMANDS.items())
    return f"""usage: mmemb [--version] [--debug] <command> ...

Multimodal embedding models that reason when it pays.

commands:
{lines}

`mmemb <command> --help` explains a command. --debug (or MMEMB_DEBUG=1) shows the traceback of every error.

examples:
  mmemb fit --config recipes/r1.yaml
  mmemb fit --config recipes/r1.yaml --model.selector random --trainer.max_steps 50
  mmemb embed --checkpoint runs/r1/version_0/checkpoints/last.ckpt --input photos/ --output photos.parquet
  mmemb search --checkpoint runs/r1/version_0/checkpoints/last.ckpt --index photos.parquet --query "a red apple"

exit codes: 0 success, 1 defect in mmemb (with a traceback), 2 mistake in the input, 130 or 143 interrupted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the words after ``mmemb``. None takes them from the shell.

    Returns:
        the exit code: 0 for success, 2 for a mistake in the input, 130 / 143 for Ctrl-C / SIGTERM.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = bool(words) and words[0] == "--debug"
    if debug:
        words = words[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if words else EXIT_MISTAKE
    if words[0] == "--version":
        print(f"mmemb {__version__}")
        return 0
    if words[0] not in COMMANDS:
        close = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}? The" if close else "the"
        tell(f"there is no command {words[0]!r}; {hint} commands are {', '.join(COMMANDS)} (`mmemb --help`)")
        return EXIT_MISTAKE
    quiet()
    module = COMMANDS[words[0]][1]
    hint = _HINTS.get(words[0], "")
    return guarded(lambda: importlib.import_module(module).main(words), debug=debug, hint=hint)


if __name__ == "__main__":
    sys.exit(main())
