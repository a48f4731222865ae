"""Leaves out messages of libraries that our users can do nothing about: each is named, with the reason."""

from __future__ import annotations

import logging
import warnings

_WARNINGS = (
    r".*does not have many workers.*",  # small data: data.num_workers says how many
    r".*`srun` command is available.*",
    r".*isinstance\(treespec, LeafSpec\).*",  # torch, inside Lightning
    # the module steps its optimiser itself, and a checkpoint is meant to hold the state after the step
    r"(?s).*ModelCheckpoint with manual optimization.*",
    r".*Total length of `list` across ranks is zero.*",  # training without validation data
    r".*The dirpath has changed from.*",  # a resumed run has a folder of its own
)

_LOGS = {
    "lightning.pytorch.utilities.rank_zero": ("Tip:", "`weights_only` was not set"),
    "lightning.pytorch.trainer.connectors.checkpoint_connector": ("`weights_only` was not set",),  # ours is always True
    "bitsandbytes.backends.cpu.ops": ("kernels-community",),  # an optional faster kernel; its own one works
}


def quiet() -> None:
    """Filters them in this process; doing it twice changes nothing."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for logger, parts in _LOGS.items():
        logging.getLogger(logger).addFilter(_Without(parts))


class _Without(logging.Filter):
    """Drops records that contain one of the parts."""

    def __init__(self, parts: tuple[str, ...]) -> None:
        super().__init__()
        self.parts = parts

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(part in record.getMessage() for part in self.parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Without) and other.parts == self.parts

    def __hash__(self) -> int:
        return hash(self.parts)
