"""`mmemb.fit`: trains from Python exactly as the command ``mmemb fit`` trains from a shell."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.trainer.states import TrainerFn

from mmemb.commands.parsing.errors import UsageError, explain
from mmemb.commands.parsing.lightning_cli import MmembCLI
from mmemb.commands.parsing.quiet import quiet
from mmemb.training.callbacks.interrupt import InterruptCheckpoint, Interrupted
from mmemb.training.module import EmbeddingModule

_GROUPS = ("trainer", "model", "data")
"""Groups of settings. A mapping given for a group changes only the settings that it names."""


@dataclass(frozen=True)
class FitResult:
    """The result of a training run.

    Attributes:
        folder: the run's folder, with ``config.yaml``, the log, the checkpoints and the evaluation.
        module: the trained module, in memory.
        checkpoint: the last checkpoint. None if the settings keep no checkpoint.
        summary: the content of ``summary.json``. None if the run was not evaluated on the test split.
    """

    folder: Path
    module: EmbeddingModule
    checkpoint: Path | None
    summary: dict[str, Any] | None


def fit(*configs: str | os.PathLike[str] | Mapping[str, Any], **settings: Any) -> FitResult:
    """Trains a model and evaluates it on the test split.

    The run's folder is ``runs/<config names>/version_<n>`` in the current folder::

        run = fit("recipes/r1.yaml", trainer={"max_steps": 20}, seed_everything=4)
        run = fit("recipes/r1.yaml", "own.yaml", {"model.selector": "random", "model.selector.seed": 4})
        run.summary["modes"]["never"]["hit@1"]

    Args:
        *configs: paths of YAML files and mappings of settings. A later one overrides an earlier one. The keys of a
            mapping are those of the command line (``trainer.max_steps``). ``trainer``, ``model`` and ``data`` also
            take nested mappings.
        **settings: one more mapping, applied last. ``ckpt_path`` resumes a run from a checkpoint.

    Raises:
        mmemb.commands.parsing.errors.UsageError: a setting is unknown or missing, or a value or the data is refused.
            It is a `ValueError`, and its message is the line that the command prints.
        OSError: a file is missing or cannot be written.
        KeyboardInterrupt: Ctrl-C was pressed. The message names the checkpoint to resume from.
    """
    quiet()
    words = ["fit"]
    for config in (*configs, settings):
        words += _flags(config) if isinstance(config, Mapping) else [f"--config={os.fspath(config)}"]
    interrupt = InterruptCheckpoint()
    # Only the main thread may handle signals.
    in_main = threading.current_thread() is threading.main_thread()
    listening: AbstractContextManager[None] = interrupt.listening() if in_main else nullcontext()
    try:
        with listening:
            cli = MmembCLI(args=words, interrupt=interrupt)
    except Interrupted as stop:
        hint = f"; resume with ckpt_path={str(interrupt.path)!r}" if interrupt.path else ""
        if stop.signum == signal.SIGINT:
            raise KeyboardInterrupt(f"interrupted{hint}") from None
        raise SystemExit(128 + stop.signum) from None
    except (UsageError, OSError):
        raise
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        raise UsageError(message) from error
    return _result(cli)


def _result(cli: MmembCLI) -> FitResult:
    trainer = cli.trainer
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    last = getattr(trainer.checkpoint_callback, "last_model_path", "") or getattr(
        trainer.checkpoint_callback, "best_model_path", ""
    )
    summary = folder / "summary.json"
    evaluated = trainer.state.fn == TrainerFn.TESTING  # otherwise the file is from an earlier run
    return FitResult(
        folder=folder,
        module=cast(EmbeddingModule, cli.model),
        checkpoint=Path(last) if last else None,
        summary=json.loads(summary.read_text(encoding="utf-8")) if evaluated and summary.is_file() else None,
    )


def _flags(settings: Mapping[str, Any]) -> list[str]:
    """The command-line words that make these settings."""
    return [f"--{key}={value if isinstance(value, str) else _written(value)}" for key, value in _flat(settings)]


def _flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields settings by dotted key. The mapping of a group becomes one setting per key."""
    for key, value in settings.items():
        if key in _GROUPS and isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", each) for inner, each in value.items())
        else:
            yield key, value


def _written(value: Any) -> str:
    """Writes a value as JSON, which YAML reads in the same way. Paths are written as text.

    Raises:
        UsageError: the value cannot be written as text. An example is a part that is already built.
    """

    def other(each: Any) -> str:
        if isinstance(each, os.PathLike):
            return str(os.fspath(each))
        raise UsageError(f"settings are plain values, got {type(each).__name__}; name a part by its short name")

    return other(value) if isinstance(value, os.PathLike) else json.dumps(value, default=other)
