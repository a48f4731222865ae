"""`mmemb fit | validate | test | predict`: runs one of the trainer's commands."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities.exceptions import SIGTERMException

from mmemb.commands.parsing.errors import tell_interrupted
from mmemb.commands.parsing.lightning_cli import MmembCLI
from mmemb.training.callbacks.interrupt import InterruptCheckpoint, Interrupted


def main(argv: Sequence[str]) -> int:
    """Runs one of Lightning's commands.

    Returns:
        0, or 128 plus the number of the signal that stopped the command.
    """
    interrupt = InterruptCheckpoint()
    try:
        with interrupt.listening():
            MmembCLI(args=argv, interrupt=interrupt)
    except (Interrupted, KeyboardInterrupt, SIGTERMException) as stop:
        code = (
            128 + stop.signum if isinstance(stop, Interrupted) else 143 if isinstance(stop, SIGTERMException) else 130
        )
        tell_interrupted(_how_to_go_on(argv, interrupt))
        return code
    return 0


def _how_to_go_on(argv: Sequence[str], interrupt: InterruptCheckpoint) -> str:
    """Says how to continue after a stop: resume the training, or run the evaluation if the training had finished."""
    if interrupt.path is not None:
        return f"resume with: {_with_checkpoint(argv, interrupt.path)}"
    if interrupt.trained is not None:
        return f"training had finished; evaluate with: {_with_checkpoint(['test', *argv[1:]], interrupt.trained)}"
    if interrupt.finished:
        return "training had finished and kept no checkpoint, so there is nothing to evaluate"
    return "no training step was lost, so there is nothing to resume"


def _with_checkpoint(argv: Sequence[str], path: Path) -> str:
    words = list(argv)
    while "--ckpt_path" in words:
        position = words.index("--ckpt_path")
        del words[position : position + 2]
    words = [word for word in words if not word.startswith("--ckpt_path=")]
    return shlex.join(["mmemb", *words, "--ckpt_path", str(path)])
