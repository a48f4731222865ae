"""Hides library messages that our users can do nothing about. Each is listed with the reason."""

from __future__ import annotations

import logging
import warnings

_WARNINGS = (
    r".*does not have many workers.*",  # data.num_workers is the user's choice, and small data needs few
    r".*`srun` command is available.*",
    r".*isinstance\(treespec, LeafSpec\).*",  # Lightning calls torch in a deprecated way
    # The module steps its optimiser itself, and a checkpoint is meant to hold the state after the step.
    r"(?s).*ModelCheckpoint with manual optimization.*",
    r".*Total length of `list` across ranks is zero.*",  # training without validation data
    r".*The dirpath has changed from.*",  # a resumed run has its own folder
)

_LOGS = {
    "lightning.pytorch.utilities.rank_zero": ("Tip:", "`weights_only` was not set"),
    "lightning.pytorch.trainer.connectors.checkpoint_connector": ("`weights_only` was not set",),  # we always set it
    "bitsandbytes.backends.cpu.ops": ("kernels-community",),  # an optional faster kernel; the built-in one works
}


def quiet() -> None:
    """Installs the filters in this process. A second call changes nothing."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for logger, parts in _LOGS.items():
        logging.getLogger(logger).addFilter(_Without(parts))


class _Without(logging.Filter):
    """Drops log records that contain one of the given texts."""

    def __init__(self, parts: tuple[str, ...]) -> None:
        super().__init__()
        self.parts = parts

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(part in record.getMessage() for part in self.parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Without) and other.parts == self.parts

    def __hash__(self) -> int:
        return hash(self.parts)
