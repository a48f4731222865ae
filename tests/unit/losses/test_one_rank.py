"""What works across ranks, in a group of one process and without a group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mmemb.kernels import InfoNCEBatch, LossOptions, infonce_with_grads
from mmemb.losses import InfoNCE, gradient_hold
from mmemb.losses.collectives import all_sum, gather_rows
from mmemb.losses.distributed import distributed_infonce_with_grads
from tests.distributed.ranks import OPTIONS, Whole, assert_equal_gradients, batch, joined_positive, plain_step, train


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_ddp_that_looks_for_unused_parameters_wants_the_loss_outside() -> None:
    # It sees no way from the forward pass's output to a temperature inside, and then meets its gradient.
    whole = Whole()
    wrapped = DistributedDataParallel(whole, find_unused_parameters=True)
    x, y = batch(2)["query"], batch(2)["candidate"][:8]
    with pytest.raises(RuntimeError, match="marked as ready twice"):
        train(wrapped, whole.loss, x, y, 3, wrapped.no_sync)


@pytest.mark.usefixtures("group")
def test_ddp_inside_a_module_is_held_and_let_go() -> None:
    inner = DistributedDataParallel(Whole())
    hold = gradient_hold(torch.nn.ModuleDict({"model": inner, "other": torch.nn.Linear(2, 2)}))
    with hold():
        with hold():
            assert not inner.require_backward_grad_sync
        assert not inner.require_backward_grad_sync
    assert inner.require_backward_grad_sync


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_across_one_rank_the_loss_is_that_of_one_process(name: str, symmetric: bool) -> None:
    rows, options = InfoNCEBatch(**joined_positive(batch(2), 2), temperature=0.1), OPTIONS[name]
    options = LossOptions(symmetric=symmetric, **options)
    given = distributed_infonce_with_grads(rows, options, gather_dtype=torch.bfloat16)  # nothing travels
    expected = infonce_with_grads(rows, options)
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


def test_without_a_group_nothing_is_gathered() -> None:
    values, loss = joined_positive(batch(2), 2), InfoNCE(temperature=0.1, gather_dtype="bfloat16").double()
    given = loss.with_grads(**values)
    expected = infonce_with_grads(InfoNCEBatch(**values, temperature=loss.temperature.detach()))
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
    rows = torch.randn(2, 3, requires_grad=True)
    assert torch.equal(gather_rows(rows), rows)
    assert not gather_rows(rows).requires_grad
    assert torch.equal(all_sum(torch.ones(2)), torch.ones(2))


def test_without_a_group_a_ddp_free_step_is_the_plain_step() -> None:
    whole = Whole()
    train(whole, whole.loss, batch(2)["query"], batch(2)["candidate"][:8], 3)
    assert_equal_gradients({name: p.grad for name, p in whole.named_parameters() if p.grad is not None}, plain_step(2))
