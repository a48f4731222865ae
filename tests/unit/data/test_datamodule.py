import json
import multiprocessing
import pickle
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from mmemb.data.datamodule import PairDataModule, PhaseBatches
from mmemb.data.sources import Source
from mmemb.types import EvaluationTask, Item, Pair
from tests.unit.data.small import make, two_tasks, write_rows


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return two_tasks(tmp_path)


def number_pairs(pairs: list[Pair], seed: int) -> dict[str, Any]:
    return {"ids": [pair.id for pair in pairs], "x": torch.tensor([len(pair.id) + seed % 97 for pair in pairs]).float()}


class Module(L.LightningModule):
    """Trains one weight by hand, draws noise as a real step does, and records every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[str]] = []

    def setup(self, stage: str) -> None:
        self.trainer.datamodule.use_phases([PhaseBatches(0, "train", number_pairs)])

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


class Interrupt(L.Callback):
    """Fails in the middle of a step like a killed run, after saving a checkpoint at the last whole step."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / "interrupted.ckpt"
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        trainer.save_checkpoint(self.path)


def test_a_run_interrupted_within_a_step_repeats_that_step(tmp_path: Path, source: Source) -> None:
    whole = Module()
    trainer(tmp_path, max_epochs=2).fit(whole, datamodule=make(source))

    first, interrupt = Module(), Interrupt(tmp_path, 6)
    with pytest.raises(RuntimeError, match="killed"):
        trainer(tmp_path, interrupt, max_epochs=2).fit(first, datamodule=make(source, num_workers=1))
    second = Module()
    trainer(tmp_path, max_epochs=2).fit(second, datamodule=make(source), ckpt_path=interrupt.path, weights_only=True)
    assert len(first.seen) == 6
    assert first.seen + second.seen == whole.seen
    assert torch.equal(second.weight, whole.weight)


def test_epochs_continue_the_stream_and_limits_skip_nothing(tmp_path: Path, source: Source) -> None:
    module = Module()
    trainer(tmp_path, max_epochs=3, limit_train_batches=2).fit(module, datamodule=make(source))
    alone = make(source)
    alone.setup("fit")
    assert (
        module.seen == [[pair.id for pair in batch] for batch in list(alone.train_dataloader())[:5]] + module.seen[5:]
    )
    assert len(module.seen) == 6


def test_workers_change_nothing_and_leave_the_global_generator_alone(source: Source) -> None:
    batches = []
    for num_workers in (0, 2):
        data = make(source, num_workers=num_workers)
        data.use_phases([PhaseBatches(0, "train", number_pairs)])
        data.setup("fit")
        torch.manual_seed(5)
        batches.append(list(data.train_dataloader()))
        assert torch.initial_seed() == 5
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))
        data.teardown("fit")
    assert [batch["ids"] for batch in batches[0]] == [batch["ids"] for batch in batches[1]]
    assert all(torch.equal(one["x"], two["x"]) for one, two in zip(*batches, strict=True))


def test_the_data_of_workers_can_be_sent_to_a_new_process(source: Source) -> None:
    data = make(source)
    data.use_phases([PhaseBatches(0, "train", number_pairs)])
    data.setup("fit")
    loader = data.train_dataloader()
    first = next(iter(loader))
    sent = pickle.loads(pickle.dumps(loader._open().dataset))
    assert sent[0]["ids"] == first["ids"]


def broken(pairs: list[Pair], seed: int) -> Any:
    raise FileNotFoundError("picture x.png: there is no such file")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_found_by_a_worker_has_one_line(source: Source, num_workers: int) -> None:
    data = make(source, num_workers=num_workers)
    data.use_phases([PhaseBatches(0, "train", broken)])
    data.setup("fit")
    with pytest.raises(FileNotFoundError) as caught:
        next(iter(data.train_dataloader()))
    data.teardown("fit")
    assert str(caught.value) == "picture x.png: there is no such file"


@pytest.mark.parametrize("killed", [False, True])
def test_workers_end_with_the_fit(tmp_path: Path, source: Source, killed: bool) -> None:
    data, calls = make(source, num_workers=1), [Interrupt(tmp_path, 2)] if killed else []
    with pytest.raises(RuntimeError, match="killed") if killed else nullcontext():
        trainer(tmp_path, *calls, max_epochs=1).fit(Module(), datamodule=data)
    assert not multiprocessing.active_children()


def as_rank(data: PairDataModule, rank: int, world_size: int) -> PairDataModule:
    """Makes the data module of one process among several."""
    progress = SimpleNamespace(total=SimpleNamespace(processed=0))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, fit_loop=loop)  # type: ignore[assignment]
    data.setup("fit")
    return data


def with_seeds(pairs: list[Pair], seed: int) -> list[tuple[str, int]]:
    return [(pair.id, seed + row) for row, pair in enumerate(pairs)]


def test_two_ranks_see_the_rows_and_seeds_of_one(source: Source) -> None:
    def batches(batch_size: int, rank: int, world_size: int) -> list[list[tuple[str, int]]]:
        data = as_rank(PairDataModule([source], batch_size=batch_size, sub_batch_size=2), rank, world_size)
        data.use_phases([PhaseBatches(0, "train", with_seeds)])
        return list(data.train_dataloader())

    alone, first, second = batches(8, 0, 1), batches(4, 0, 2), batches(4, 1, 2)
    assert len(alone) == len(first) == 3  # 17 rows in batches of 8
    assert [one + two for one, two in zip(first, second, strict=True)] == alone
    seeds = [seed for batch in alone for _, seed in batch]
    assert len(set(seeds)) == len(seeds)


class Ranked(Module):
    """Records the batches and tasks of its rank in a file."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.tasks: list[str] = []

    def validation_step(self, task: EvaluationTask, batch_idx: int) -> None:
        self.tasks.append(task.name)

    def on_fit_end(self) -> None:
        path = self.folder / f"rank{self.global_rank}.json"
        path.write_text(json.dumps({"seen": self.seen, "tasks": self.tasks}))


def test_ranks_of_a_real_group_share_the_batches_and_get_every_task(tmp_path: Path, source: Source) -> None:
    if torch.cuda.is_initialized():
        pytest.skip("a process that has used CUDA cannot be forked")
    data = PairDataModule([source], [source], batch_size=2, sub_batch_size=2, steps_per_epoch=4, seed=3)
    trainer(tmp_path, max_epochs=1, devices=2, strategy="ddp_fork", num_sanity_val_steps=0).fit(Ranked(tmp_path), data)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    alone = make(source)
    alone.setup("fit")
    expected = [[pair.id for pair in batch] for batch in alone.train_dataloader()][:4]
    assert [one + two for one, two in zip(ranks[0]["seen"], ranks[1]["seen"], strict=True)] == expected
    assert [rank["tasks"] for rank in ranks] == [
        ["even", "odd"]
    ] * 2  # evaluation splits queries between ranks, not tasks


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_every_stage_passes_its_data_on_at_any_precision(tmp_path: Path, source: Source, precision: str) -> None:
    class Stages(Module):
        def setup(self, stage: str) -> None:
            self.got: list[Any] = []

        def training_step(self, batch: list[Pair], batch_idx: int) -> None:
            self.got.append(batch)

        def validation_step(self, task: EvaluationTask, batch_idx: int) -> None:
            self.got.append(task)

        def test_step(self, task: EvaluationTask, batch_idx: int) -> None:
            self.got.append(task)

        def predict_step(self, items: list[Item], batch_idx: int) -> None:
            self.got.append(items)

    items = Source(write_rows(tmp_path / "items.jsonl", [{"text": str(row)} for row in range(6)]))
    data = PairDataModule([source], [source], [source], [items], batch_size=4, sub_batch_size=2, steps_per_epoch=1)
    run, module = trainer(tmp_path, precision=precision, max_epochs=1, num_sanity_val_steps=0), Stages()
    run.fit(module, datamodule=data)
    assert [type(value) for value in module.got] == [list, EvaluationTask, EvaluationTask]
    assert isinstance(module.got[0][0], Pair)
    run.validate(module, datamodule=data, verbose=False)
    assert [task.name for task in module.got] == ["even", "odd"]
    run.test(module, datamodule=data, verbose=False)
    assert [task.name for task in module.got] == ["even", "odd"]
    run.predict(module, datamodule=data, return_predictions=False)
    assert [[item.text for item in items] for items in module.got] == [["0", "1", "2", "3"], ["4", "5"]]


def test_fit_needs_no_validation(tmp_path: Path, source: Source) -> None:
    module = Module()
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=make(source))
    assert len(module.seen) == 5


def test_loaders_work_without_a_trainer(source: Source) -> None:
    data = PairDataModule([source], [source], [source], batch_size=4, sub_batch_size=2)
    data.setup("fit")
    data.setup("test")
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) == 5  # 17 rows in batches of 4
    assert {len({pair.task for pair in batch[:2]}) for batch in batches} == {1}
    assert (
        [task.name for task in data.val_dataloader()]
        == [task.name for task in data.test_dataloader()]
        == ["even", "odd"]
    )


def test_the_stream_continues_at_the_restored_state(source: Source) -> None:
    data = make(source)
    data.setup("fit")
    whole = list(data.train_dataloader())
    data.load_state_dict({**data.state_dict(), "batches": 2})
    assert data.state_dict()["batches"] == 2
    assert list(data.train_dataloader())[:3] == whole[2:]


def test_continuing_with_another_stream_warns(source: Source) -> None:
    data, other = make(source), PairDataModule([source], batch_size=8, sub_batch_size=2, seed=3)
    data.setup("fit")
    other.setup("fit")
    other.load_state_dict(data.state_dict())
    with pytest.warns(UserWarning, match="not with the batches of an uninterrupted run"):
        other.train_dataloader()


@pytest.mark.parametrize("stop", [2, 4, 7])
def test_a_run_resumed_from_a_checkpoint_of_a_validation_continues_exactly(
    tmp_path: Path, source: Source, stop: int
) -> None:
    def run(module: Module, keep: ModelCheckpoint | None = None, **options: Any) -> None:
        data = PairDataModule([source], [source], batch_size=4, sub_batch_size=2, steps_per_epoch=5, seed=3)
        callbacks = [keep] if keep else []
        trainer(tmp_path, *callbacks, max_epochs=2, val_check_interval=2).fit(module, datamodule=data, **options)

    whole, resumed = Module(), Module()
    run(whole, ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=False))
    run(resumed, ckpt_path=tmp_path / f"step={stop}.ckpt", weights_only=True)
    assert resumed.seen == whole.seen[stop:]
    assert torch.equal(resumed.weight, whole.weight)
