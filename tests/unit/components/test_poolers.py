"""Tests that every registered pooler keeps the contract and pools what its name says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmemb.interfaces import Pooler, SetupContext
from mmemb.registry import available, create

NAMES = available("pooler")
ROWS, COLUMNS, WIDTH = 3, 5, 12


@pytest.fixture
def states() -> tuple[Tensor, Tensor, Tensor]:
    """Left-padded states: rows of 5, 3 and 1 real tokens."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
    return torch.randn(ROWS, COLUMNS, WIDTH, generator=generator), mask, torch.tensor([4, 4, 4])


def built(name: str, **arguments: int) -> Pooler:
    torch.manual_seed(0)
    pooler: Pooler = create("pooler", name, **arguments)
    pooler.setup(SetupContext(hidden_size=WIDTH))
    return pooler


def test_the_four_poolers_are_registered() -> None:
    assert {"attention", "embed_token", "last_token", "mean"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("arguments", "size"), [({}, 12), ({"projection": 7}, 7), ({"dim": 5}, 5), ({"projection": 7, "dim": 3}, 3)]
)
def test_embeddings_are_unit_float32_of_the_announced_width(
    name: str, arguments: dict, size: int, dtype: torch.dtype, states: tuple
) -> None:
    pooler = built(name, **arguments)
    hidden, mask, position = states
    out = pooler(hidden.to(dtype), mask, position)
    assert out.dtype == torch.float32
    assert out.shape == (ROWS, size)
    assert pooler.size == size
    torch.testing.assert_close(out.norm(dim=1), torch.ones(ROWS))


@pytest.mark.parametrize("name", NAMES)
def test_padding_does_not_change_an_embedding(name: str, states: tuple) -> None:
    pooler = built(name)
    hidden, mask, position = states
    noisy = torch.where(mask[..., None] == 1, hidden, 100.0)
    torch.testing.assert_close(pooler(noisy, mask, position), pooler(hidden, mask, position))


@pytest.mark.parametrize("name", NAMES)
def test_a_matryoshka_embedding_is_the_renormalised_start_of_the_full_one(name: str, states: tuple) -> None:
    full, short = built(name, projection=8)(*states), built(name, projection=8, dim=3)(*states)
    torch.testing.assert_close(short, torch.nn.functional.normalize(full[:, :3], dim=1))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_states_and_parameters(name: str, states: tuple) -> None:
    pooler = built(name, projection=6)
    hidden, mask, position = states
    hidden = hidden.requires_grad_()
    pooler(hidden, mask, position)[:, 0].sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0
    for parameter in pooler.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_each_pooler_pools_what_its_name_says(states: tuple) -> None:
    hidden, mask, _ = states
    position = torch.tensor([2, 3, 4])
    unit = torch.nn.functional.normalize
    rows = torch.arange(ROWS)
    torch.testing.assert_close(built("embed_token")(hidden, mask, position), unit(hidden[rows, position], dim=1))
    torch.testing.assert_close(built("last_token")(hidden, mask, position), unit(hidden[:, -1], dim=1))
    mean = torch.stack([hidden[0].mean(0), hidden[1, 2:].mean(0), hidden[2, 4]])
    torch.testing.assert_close(built("mean")(hidden, mask, position), unit(mean, dim=1))
    torch.testing.assert_close(built("attention")(hidden, mask, position), unit(mean, dim=1))  # queries start at zero


def test_last_token_of_a_right_padded_row_is_its_last_real_one(states: tuple) -> None:
    hidden, _, position = states
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    expected = torch.nn.functional.normalize(torch.stack([hidden[0, 4], hidden[1, 1], hidden[2, 0]]), dim=1)
    torch.testing.assert_close(built("last_token")(hidden, mask, position), expected)


def test_each_attention_head_uses_its_own_slice(states: tuple) -> None:
    pooler = built("attention", heads=2)
    hidden, mask, position = states
    with torch.no_grad():
        pooler.query[0].copy_(hidden[0, 1, :6] * 100)
    pooled = pooler.pool(hidden, mask, position)[0]
    torch.testing.assert_close(pooled[:6], hidden[0, 1, :6], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(pooled[6:], hidden[0, :, 6:].mean(0))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("mean", {"dim": 13}, "pooler.dim is 13; give a number of at most 12"),
        ("mean", {"dim": 9, "projection": 8}, "pooler.dim is 9; give a number of at most 8"),
        ("mean", {"dim": 0}, "pooler.dim is 0; give 1 or more"),
        ("mean", {"projection": -1}, "pooler.projection is -1; give 1 or more"),
        ("attention", {"heads": 5}, "heads=5 does not divide the hidden width 12"),
        ("attention", {"heads": 0}, "pooler.heads is 0; give 1 or more"),
    ],
)
def test_impossible_widths_are_errors(name: str, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(name, **arguments)
