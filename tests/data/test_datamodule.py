import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from mmemb.data.datamodule import PairDataModule, Source
from mmemb.types import EvaluationTask, Pair


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    rows = [
        {"query": f"{task} question {row}", "positive": f"{task} answer {row}", "task": task}
        for task, count in (("even", 10), ("odd", 7))
        for row in range(count)
    ]
    return Source(write_rows(tmp_path / "pairs.jsonl", rows))


def number_pairs(pairs: list[Pair], seed: int) -> dict[str, Any]:
    return {"ids": [pair.id for pair in pairs], "x": torch.tensor([len(pair.id) + seed % 97 for pair in pairs]).float()}


class Module(L.LightningModule):
    """Trains one weight by hand on what comes, drawing noise as a real step does, and notes every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[str]] = []

    def setup(self, stage: str) -> None:
        self.trainer.datamodule.use_collate(number_pairs)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(((self.weight - batch["x"]) ** 2).mean())
        optimizer.step()
        self.seen.append(batch["ids"])

    def validation_step(self, task: EvaluationTask, batch_idx: int) -> None:
        assert isinstance(task, EvaluationTask)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    return L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        **options,
    )


def make(source: Source, **options: Any) -> PairDataModule:
    return PairDataModule([source], batch_size=4, sub_batch_size=2, steps_per_epoch=5, seed=3, **options)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("stop", [3, 5, 7], ids=["mid-epoch", "end of epoch", "mid second epoch"])
@pytest.mark.parametrize("length", [{"max_epochs": 2}, {"max_steps": 9, "max_epochs": -1}], ids=["epochs", "steps"])
def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(
    tmp_path: Path, source: Source, num_workers: int, stop: int, length: dict[str, int]
) -> None:
    whole = Module()
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, keep, **length).fit(whole, datamodule=make(source))

    resumed = Module()
    trainer(tmp_path, **length).fit(
        resumed,
        datamodule=make(source, num_workers=num_workers),
        ckpt_path=tmp_path / f"step={stop}.ckpt",
        weights_only=True,
    )
    assert len(whole.seen) == (10 if "max_steps" not in length else 9)
    assert resumed.seen == whole.seen[stop:]
    assert torch.equal(resumed.weight, whole.weight)
