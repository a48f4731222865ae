"""What decays and what does not, in whatever a strategy has wrapped the module."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import bitsandbytes
import pytest
import torch
from torch import nn

from mmemb.losses import InfoNCE
from mmemb.stages.optimization import parameter_groups, plain_name, vector_names
from tests.stages.small import small_data, small_module, small_trainer


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
def test_wrappers_do_not_show_in_names(given: str, expected: str) -> None:
    assert plain_name(given) == expected


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, bitsandbytes.optim.AdamW8bit])
def test_an_optimiser_of_any_kind_takes_the_groups(kind: type[torch.optim.Optimizer]) -> None:
    module = model()
    optimizer = kind(parameter_groups(module, without_decay=vector_names(module)), lr=1e-3, weight_decay=0.3)  # type: ignore[call-arg]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def test_decay_moves_matrices_alone(tmp_path: Path) -> None:
    # The decay is a tenth a step, the gradient's part nothing.
    module = small_module(optimizer=partial(torch.optim.AdamW, lr=1e-12, weight_decay=1e11))
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    small_trainer(tmp_path, max_steps=1).fit(module, datamodule=small_data(batch_size=8))
    for name, parameter in module.named_parameters():
        assert torch.allclose(parameter, before[name]) == (parameter.ndim < 2), name
