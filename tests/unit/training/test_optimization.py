"""Which parameters get weight decay, however a strategy has wrapped the module, and gradient clipping."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import bitsandbytes
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

from mmemb.losses import InfoNCE
from mmemb.training.optimization import clip_gradient_norm, parameter_groups, plain_name, vector_names
from tests.unit.training.small import small_data, small_module, small_trainer


def model() -> nn.Module:
    return nn.ModuleDict(
        {"linear": nn.Linear(3, 2), "norm": nn.LayerNorm(2), "frozen": nn.Linear(2, 2).requires_grad_(False)}
        | {"loss": InfoNCE(), "embedding": nn.Embedding(4, 3)}
    )


def test_vectors_and_the_temperature_do_not_decay_and_frozen_parts_are_left_out() -> None:
    module = model()
    names = {parameter: name for name, parameter in module.named_parameters()}
    decaying, spared = parameter_groups(module, without_decay=vector_names(module))
    assert {names[each] for each in decaying["params"]} == {"linear.weight", "embedding.weight"}
    assert {names[each] for each in spared["params"]} == {
        "linear.bias",
        "norm.weight",
        "norm.bias",
        "loss.log_temperature",
    }
    assert "weight_decay" not in decaying
    assert spared["weight_decay"] == 0.0


def test_a_group_without_parameters_is_left_out() -> None:
    assert parameter_groups(nn.Linear(2, 2).requires_grad_(False), without_decay=()) == []
    assert [list(group) for group in parameter_groups(nn.LayerNorm(2), without_decay={"weight", "bias"})] == [
        ["params", "weight_decay"]
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            "backbone._fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.norm.weight",
            "backbone.layers.0.norm.weight",
        ),
        ("_orig_mod.norm.bias", "norm.bias"),
        ("norm.bias", "norm.bias"),
    ],
)
def test_plain_names_leave_out_wrappers(given: str, expected: str) -> None:
    assert plain_name(given) == expected


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, bitsandbytes.optim.AdamW8bit])
def test_every_kind_of_optimiser_accepts_the_groups(kind: type[torch.optim.Optimizer]) -> None:
    module = model()
    optimizer = kind(parameter_groups(module, without_decay=vector_names(module)), lr=1e-3, weight_decay=0.3)  # type: ignore[call-arg]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def test_decay_moves_matrices_only(tmp_path: Path) -> None:
    # The decay is a tenth per step. The gradient contributes nothing.
    module = small_module(optimizer=partial(torch.optim.AdamW, lr=1e-12, weight_decay=1e11))
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    small_trainer(tmp_path, max_steps=1).fit(module, datamodule=small_data(batch_size=8))
    for name, parameter in module.named_parameters():
        assert torch.allclose(parameter, before[name]) == (parameter.ndim < 2), name


@pytest.mark.parametrize("maximum", [0.1, 1e6])
def test_clipping_equals_torchs(maximum: float) -> None:
    left, right = model(), model()
    for module in (left, right):
        torch.manual_seed(1)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
    norm = clip_gradient_norm(left.parameters(), maximum=maximum)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(right.parameters(), maximum))
    for a, b in zip(left.parameters(), right.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


def test_without_gradients_nothing_is_clipped() -> None:
    assert float(clip_gradient_norm(model().parameters(), maximum=1.0)) == 0.0


def test_a_step_is_clipped(tmp_path: Path) -> None:
    """In every step, SGD moves the weights by at most the learning rate times the clipped norm."""
    module = small_module(optimizer=partial(torch.optim.SGD, lr=1.0), gradient_clip=1e-3)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    small_trainer(tmp_path, max_steps=1).fit(module, datamodule=small_data(batch_size=8))
    moved = [(parameter.detach() - before[name]).norm() for name, parameter in module.named_parameters()]
    assert float(torch.stack(moved).norm()) == pytest.approx(1e-3, rel=0.01)


def test_fsdp_is_refused_before_anything_is_wrapped(tmp_path: Path) -> None:
    module, trainer = small_module(), small_trainer(tmp_path)
    trainer._accelerator_connector.strategy = FSDPStrategy()  # the trainer itself accepts FSDP only with a GPU
    module.trainer = trainer
    with pytest.raises(ValueError, match="strategy is fsdp.* Use ddp"):
        module.setup("fit")
