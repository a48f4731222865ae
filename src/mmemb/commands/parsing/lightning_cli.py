"""`mmemb fit | validate | test | predict`: LightningCLI with our module, data and checkpoint format."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from mmemb.commands.parsing import short_names as shortnames
from mmemb.commands.parsing.configs import check_yaml, config_paths
from mmemb.commands.parsing.errors import UsageError
from mmemb.commands.parsing.parser import HelpFormatter, OneLineErrors
from mmemb.commands.parsing.phase_flags import apply_phase_flags, take_phase_flags
from mmemb.common.terminal import has_terminal
from mmemb.training.callbacks.checkpoint import SafeCheckpointIO
from mmemb.training.callbacks.interrupt import InterruptCheckpoint
from mmemb.training.callbacks.progress import ProgressLines, StepsBar
from mmemb.training.phases import total_steps

RUNS = "runs"
"""Folder of all runs, in the current folder. The folder of a run is ``runs/<config names>/version_<n>``."""

_EPILOG = """examples:
  mmemb {command} --config recipes/r1.yaml{checkpoint}
  mmemb {command} --config recipes/r1.yaml --config mine.yaml{checkpoint}      the later file overrides
  mmemb {command} --config recipes/r1.yaml --model.selector random --model.selector.seed 4{checkpoint}
  mmemb {command} --model.selector.help counterfactual                the arguments of a part
  mmemb {command} --config recipes/r1.yaml --print_config             the merged settings
"""


class Parser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser with one-line errors."""


def _trained() -> tuple[type[L.LightningModule], type[L.LightningDataModule]]:
    """The module and the data module of every run. Importing them takes seconds, so it waits until a run needs them."""
    from mmemb.data.datamodule import PairDataModule
    from mmemb.training.module import EmbeddingModule

    return EmbeddingModule, PairDataModule


class MmembCLI(LightningCLI):
    """LightningCLI with the defaults of this project.

    Args:
        args: the words after ``mmemb``, the command first.
        interrupt: stops a run on a signal. The caller must make it listen.
    """

    def __init__(
        self,
        *,
        args: Sequence[str],
        interrupt: InterruptCheckpoint | None = None,
    ) -> None:
        shortnames.install()
        self.interrupt = interrupt or InterruptCheckpoint()
        self.run_name = _run_name(args)
        self.command = args[0]
        super().__init__(
            *_trained(),
            parser_class=Parser,
            parser_kwargs={"prog": "mmemb", "formatter_class": HelpFormatter, self.command: _help(self.command)},
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            args=list(args),
        )

    # -- parsing -----------------------------------------------------------------------------------------------------

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Returns the given command only: building the parsers of all four would take four times as long."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds ``--evaluate`` and defaults that a config can override: the logger and the checkpoints."""
        # Every command has this option, so that the config.yaml of a `fit` run works for `test` too.
        parser.add_argument(
            "--evaluate", type=bool, default=True, help="fit only: whether to evaluate on the test split at the end"
        )
        parser.set_defaults(
            {
                "trainer.logger": {
                    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                    "init_args": {"save_dir": RUNS, "name": self.run_name},
                },
                "trainer.callbacks": [
                    {
                        "class_path": "mmemb.training.callbacks.checkpoint.RunCheckpoint",
                        "init_args": {"every_n_train_steps": 100, "save_top_k": 0, "save_last": True},
                    }
                ],
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the given words. Lightning's own method warns if ``sys.argv`` has the words of another program."""
        for path in config_paths(args):
            check_yaml(path)
        words, flags = take_phase_flags(args)
        if flags:
            # Parsed once for the phases that the files give, and again with these changed: printing comes last.
            given = [word for word in words if not word.startswith("--print_config")]
            phases = parser.parse_args(given).as_dict()[self.command]["model"]["phases"]
            apply_phase_flags(phases, flags)
            words = [*words, f"--model.phases={json.dumps(phases)}"]
        self.config = parser.parse_args(words)

    def _parse_ckpt_path(self) -> None:
        """Keeps the settings as given: Lightning would replace the model section by the checkpoint's without asking.

        A checkpoint that does not fit the settings is refused when it is loaded. Lightning's keywords (``last``,
        ``best``) are not supported: they look in the new run's folder, which is still empty.
        """
        subcommand = self.config.subcommand
        path = self.config[subcommand].get("ckpt_path")
        if path is None and subcommand != "fit":
            rank_zero_warn(
                f"no --ckpt_path was given: `mmemb {subcommand}` uses the untrained model that the settings build"
            )
        if path is not None and "://" not in path and not Path(path).exists():
            raise FileNotFoundError(2, "--ckpt_path: there is no such file; give a .ckpt file of an earlier run", path)

    # -- building and running ----------------------------------------------------------------------------------------

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Adds the checkpoint writer, progress reports and the stop on Ctrl-C; leaves out what the settings disable."""
        config = self._get(self.config_init, "trainer")
        callbacks = _listed(config.get("callbacks"))
        if config.get("enable_checkpointing") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, ModelCheckpoint)]
        plugins = _listed(config.get("plugins"))
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(SafeCheckpointIO())
        shown = config.get("enable_progress_bar") is not False
        if shown and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            if has_terminal(sys.stdout):
                callbacks.append(StepsBar())
            else:  # otherwise Lightning adds its own bar
                kwargs["enable_progress_bar"] = False
        callbacks.append(ProgressLines(show=shown))
        callbacks.append(self.interrupt)
        if self.command == "predict":
            from mmemb.training.callbacks.predictions import EmbeddingWriter

            callbacks.append(EmbeddingWriter())
        if config.get("max_steps", -1) == -1 and config.get("max_epochs") is None:
            # The run is as long as its phases unless the trainer settings give a length.
            steps = total_steps(getattr(self.model, "phases", ())) or -1
            kwargs = {"max_steps": steps, **kwargs}
        try:
            return super().instantiate_trainer(callbacks=callbacks, plugins=plugins, **kwargs)
        except ValueError as error:  # for example an unknown strategy
            raise UsageError(f"trainer: {error}") from error

    def before_predict(self) -> None:
        """Keeps no embeddings in memory unless the settings ask for it: they are written batch by batch."""
        settings = self.config_init.predict
        settings.return_predictions = bool(settings.return_predictions)

    def after_fit(self) -> None:
        """Evaluates on the test split if there is one. Pretraining has none."""
        has_test = getattr(self.datamodule, "sources", {}).get("test", True)
        if has_test and self.config.fit.evaluate and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            # The evaluation prints its own table, so Lightning's is switched off.
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)


class _Check(MmembCLI):
    """Parses the settings and does nothing else."""

    def _set_seed(self) -> None:
        """Does not change the random state of the process."""

    def instantiate_classes(self) -> None:
        """Builds nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""


def check_config(args: Sequence[str]) -> Namespace:
    """Parses a command with its configs without building anything. Recipes are tested with it.

    Args:
        args: the words after ``mmemb``, e.g. ``["fit", "--config", "recipes/r1.yaml"]``.

    Returns:
        The merged settings of the command.

    Raises:
        mmemb.commands.parsing.errors.UsageError: a key is unknown or missing, or a value does not fit.
    """
    cli = _Check(args=args)
    return cli.config[cli.config.subcommand]


class _Build(MmembCLI):
    """Builds the model and the data without a trainer."""

    def instantiate_classes(self) -> None:
        """Builds the model and the data only."""
        self.config_init = self.parser.instantiate_classes(self.config)
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing: the caller uses the parts."""


class Built(NamedTuple):
    """The parts of a training run: the model, the data module, and the setting ``trainer.accelerator``."""

    model: Any
    datamodule: Any
    accelerator: Any


def build(args: Sequence[str]) -> Built:
    """Builds the parts that a command's settings name, for commands that use them without training.

    Args:
        args: the same as for `check_config`.

    Raises:
        ValueError: the settings are refused, as by `check_config`, or a part refuses its arguments.
    """
    cli = _Build(args=args)
    return Built(cli.model, cli.datamodule, cli.config[cli.config.subcommand].trainer.accelerator)


def _listed(value: Any) -> list[Any]:
    """Returns a trainer setting as a list. The setting may be a list, a single part or None."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _run_name(args: Sequence[str]) -> str:
    """Joins the stems of the configs by ``+``: ``--config r1.yaml --config scale/a.yaml`` -> ``r1+a``."""
    return "+".join(path.stem for path in config_paths(args)) or "default"


def _help(command: str) -> dict[str, str]:
    """The description and the examples in the help of a command."""
    descriptions = {
        "fit": f"Trains, then evaluates on the test split. The run's folder is {RUNS}/<config names>/version_<n>.",
        "validate": "Evaluates a checkpoint on the validation split.",
        "test": "Evaluates a checkpoint on the test split and writes summary.json and summary.md.",
        "predict": "Embeds data.predict with a checkpoint and writes embeddings.parquet to the run's folder.",
    }
    checkpoint = "" if command == "fit" else " --ckpt_path last.ckpt"
    return {
        "description": descriptions[command],
        "epilog": _EPILOG.format(command=command, checkpoint=checkpoint),
    }
