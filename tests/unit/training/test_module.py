"""The module in a real trainer: resume is exact, runs with equal seeds are equal, other backbones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from mmemb.components.backbones.tiny import TinyBackbone
from mmemb.components.backbones.tuning import LoraSettings
from mmemb.components.controllers.always_reason import AlwaysReason
from mmemb.components.controllers.never import Never
from mmemb.data.datamodule import Source
from mmemb.interfaces import Controller
from mmemb.training import module as module_file
from mmemb.training.module import EmbeddingModule
from mmemb.types import EvaluationResults
from tests.unit.training.small import largest_difference, small_data, small_module, small_trainer, weights


def with_dropout() -> EmbeddingModule:
    """A module whose steps draw random numbers."""
    torch.manual_seed(1)
    return small_module(backbone=TinyBackbone(weights="random", lora=LoraSettings(rank=4, dropout=0.3)))


def train(folder: Path, *, steps: int, ckpt_path: Path | None = None, make: Any = with_dropout) -> EmbeddingModule:
    module = make()
    saver = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    trainer = small_trainer(folder, max_steps=steps, callbacks=[saver], enable_checkpointing=True)
    trainer.fit(module, datamodule=small_data(batch_size=8), ckpt_path=ckpt_path, weights_only=True)
    return module


def test_a_resumed_run_with_dropout_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", steps=6)
    train(tmp_path / "part", steps=4)
    torch.manual_seed(99)  # the random state before the resume must not matter
    resumed = train(tmp_path / "part", steps=6, ckpt_path=tmp_path / "part" / "step=2.ckpt")
    assert largest_difference(weights(whole), weights(resumed)) == 0.0
    left, right = (torch.load(tmp_path / run / "step=6.ckpt", weights_only=True) for run in ("whole", "part"))
    for state in ("optimizer_states", "lr_schedulers", "PairDataModule"):
        assert str(left[state]) == str(right[state])
    assert torch.equal(left["random_state"]["cpu"], right["random_state"]["cpu"])


def test_two_runs_with_the_same_seed_are_equal(tmp_path: Path) -> None:
    left, right = (train(tmp_path / name, steps=2, make=small_module) for name in "ab")
    assert largest_difference(weights(left), weights(right)) == 0.0


def test_a_checkpoint_of_another_backbone_is_refused_with_both_identities(tmp_path: Path) -> None:
    trained = train(tmp_path, steps=2, make=small_module)
    module = small_module()
    module.backbone._identity = "another#0"
    checkpoint = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    with pytest.raises(ValueError, match="another#0") as caught:
        module.on_load_checkpoint(checkpoint)
    assert trained.backbone.identity in str(caught.value)


def test_a_checkpoint_made_in_python_holds_plain_values_only(tmp_path: Path) -> None:
    train(tmp_path, steps=2, make=small_module)
    checkpoint = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    assert "hyper_parameters" not in checkpoint


def test_validation_scores_a_few_queries_during_training_and_all_queries_on_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []

    def evaluate(encoder: Any, tasks: Any, **rest: Any) -> EvaluationResults:
        scored.append(len(tasks[0].queries))
        return EvaluationResults()

    monkeypatch.setattr(module_file, "evaluate", evaluate)
    module = small_module(validation_queries=2)
    data = small_data(batch_size=8, validation=[Source("bundled:validation", tasks=["fact"], limit=5)])
    small_trainer(tmp_path, max_steps=1, val_check_interval=1, num_sanity_val_steps=0).fit(module, datamodule=data)
    assert scored == [2]
    small_trainer(tmp_path).validate(module, datamodule=data)
    assert scored == [2, 5]


@pytest.mark.parametrize(("controllers", "scored"), [([Never(), AlwaysReason()], [["never"]]), ([AlwaysReason()], [])])
def test_the_model_before_training_is_scored_on_the_direct_path_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, controllers: list[Controller], scored: list[list[str]]
) -> None:
    seen: list[list[str]] = []

    def evaluate(encoder: Any, tasks: Any, *, controllers: Any, **rest: Any) -> EvaluationResults:
        seen.append(list(controllers))
        return EvaluationResults()

    monkeypatch.setattr(module_file, "evaluate", evaluate)
    data = small_data(batch_size=8, test=[Source("bundled:test", tasks=["fact"], limit=5)])
    small_trainer(tmp_path, max_steps=1).fit(small_module(controllers=controllers), datamodule=data)
    assert seen == scored


def test_a_run_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the run has no end.*trainer\.max_steps or trainer\.max_epochs"):
        small_trainer(tmp_path, max_steps=-1, max_epochs=-1).fit(small_module(), datamodule=small_data(batch_size=8))


def test_a_controller_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="'never' is there twice"):
        small_module(controllers=[Never(), Never()])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gradient_clip", -1.0),
        ("encode_batch_size", 0),
        ("budget", 0),
        ("validation_queries", -1),
    ],
)
def test_a_number_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^model\.{name} is {value}; give [01] or more"):
        small_module(**{name: value})


def test_an_error_of_the_optimizer_names_its_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model\.optimizer: Invalid learning rate: -1$"):
        small_trainer(tmp_path).fit(small_module(lr=-1), datamodule=small_data(batch_size=8))
