"""A module and data small enough to train in milliseconds, with parts of three kinds as arguments."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmemb.interfaces import Controller, Pooler, Selector


class StandInModule(L.LightningModule):
    """A linear layer, trained by hand as the real module is.

    Args:
        selector: any selector, or none.
        controllers: any controllers.
        pooler: any pooler, or none.
        width: columns of a row.
        identity: what its checkpoints say about their backbone.
        signal_at: sends itself this signal in the middle of step 3; 0 sends none.
        optimizer: any optimiser.
    """

    seen: list[Any] = []

    def __init__(
        self,
        *,
        selector: Selector | None = None,
        controllers: list[Controller] | None = None,
        pooler: Pooler | None = None,
        width: int = 4,
        identity: str = "stand-in",
        signal_at: int = 0,
        optimizer: OptimizerCallable = torch.optim.SGD,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.selector, self.controllers, self.pooler = selector, controllers, pooler
        self.identity, self.signal_at, self.optimizer = identity, signal_at, optimizer
        self.layer = torch.nn.Linear(width, 1)
        self.tested = False
        StandInModule.seen.append(self)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        if self.signal_at and self.global_step == 3:
            os.kill(os.getpid(), self.signal_at)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss = self.layer(batch).pow(2).mean()
        self.manual_backward(loss)
        optimizer.step()
        self.log("loss", loss)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.tested = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["backbone_identity"] = self.identity


class Rows(Dataset):  # type: ignore[type-arg]
    """Numbered rows; row ``broken`` raises as a file with a bad row does."""

    def __init__(self, count: int, broken: int | None) -> None:
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if index == self.broken:
            raise ValueError(f"row {index} is broken")
        return torch.full((4,), float(index + 1) / self.count)


class Loader:
    """Batches of two rows in order, resumable in the middle of an epoch."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.position, self.resumed = rows, 0, 0

    def __len__(self) -> int:
        return len(self.rows) // 2

    def __iter__(self) -> Iterator[Tensor]:
        first, self.resumed = self.resumed, 0
        for batch in range(first, len(self)):
            self.position = batch + 1
            yield torch.stack([self.rows[2 * batch], self.rows[2 * batch + 1]])

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.resumed = state["position"] % len(self)


class StandInData(L.LightningDataModule):
    """Rows in order.

    Args:
        rows: how many.
        broken: the row that cannot be read.
        num_workers: loader processes; 0 gives a resumable loader.
    """

    def __init__(self, *, rows: int = 12, broken: int | None = None, num_workers: int = 0) -> None:
        super().__init__()
        self.rows, self.broken, self.num_workers = rows, broken, num_workers

    def train_dataloader(self) -> Any:
        rows = Rows(self.rows, self.broken)
        return DataLoader(rows, batch_size=2, num_workers=self.num_workers) if self.num_workers else Loader(rows)

    def test_dataloader(self) -> Any:
        return DataLoader(Rows(4, None), batch_size=2)


SIGINT, SIGTERM = int(signal.SIGINT), int(signal.SIGTERM)
QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.max_epochs=1",
]
