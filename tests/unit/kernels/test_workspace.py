"""The tiled engine's buffers from call to call."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import harness
from mmemb.kernels import InfoNCEResult, release_workspace
from mmemb.kernels.tiled import engine as _infonce_tiled
from mmemb.kernels.tiled import workspace as _workspace
from mmemb.kernels.tiled.workspace import Workspace
from tests.unit.kernels.cases import grads

ROWS = 2048
STRIPES = 2.5
"""What the workspace holds: the symmetric loss keeps one stripe beside the one it works on, and half of one is left."""

BYTES = int(STRIPES * 4 * ROWS * _infonce_tiled.ROWS)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    release_workspace()
    yield
    release_workspace()


def call(seed: int = 0, rows: int = ROWS, workspace: int = BYTES, **options: Any) -> InfoNCEResult:
    generator = torch.Generator().manual_seed(seed)
    query, candidate = normalize(torch.randn(2, rows, 8, generator=generator), dim=2)
    return grads(query, candidate, temperature=0.05, engine="tiled", workspace_bytes=workspace, **options)


def taken(**options: Any) -> float:
    """Bytes that a call allocates at most, less what it frees of former calls."""
    return 1e6 * harness.peak_megabytes(lambda: call(**options), device="cpu")


def kept() -> list[int]:
    """Bytes of each buffer that this thread keeps."""
    return [len(buffer) for buffer in _workspace._kept.buffers]


def addresses(tensors: list[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize(
    ("options", "buffers"), [({}, 1), ({"symmetric": True}, 2), ({"dims": [4, 8], "symmetric": True}, 2)], ids=str
)
def test_a_second_call_takes_the_buffers_of_the_first(options: dict[str, Any], buffers: int) -> None:
    first = taken(**options)
    held = addresses(_workspace._kept.buffers)
    assert len(kept()) == buffers
    second = taken(**options)
    assert sorted(addresses(_workspace._kept.buffers)) == sorted(held)
    assert first - second == pytest.approx(sum(kept()), rel=0.1)
    release_workspace()
    assert kept() == []
    assert taken(**options) == pytest.approx(first, rel=0.1)


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"dims": [4, 8], "symmetric": True}], ids=str)
def test_what_lies_in_the_buffers_changes_nothing_and_results_are_no_part_of_them(options: dict[str, Any]) -> None:
    first = call(**options)
    copies = [each.clone() for each in first]
    assert sum(kept()) > 0
    for buffer in _workspace._kept.buffers:
        buffer.fill_(255)  # NaN as a float
    assert all(torch.equal(each, copy) for each, copy in zip(first, copies, strict=True))
    again = call(**options)
    assert all(torch.equal(each, copy) for each, copy in zip(again, copies, strict=True))


def test_memory_stays_within_the_workspace_whatever_came_before() -> None:
    for rows in (ROWS, ROWS + 8, ROWS - 8):
        held = sum(kept())
        # What is kept and what the call has taken are together at most the workspace.
        assert held + taken(rows=rows, symmetric=True) < BYTES + 8 * 2**20
        assert sum(kept()) <= BYTES
    call(workspace=2**20)
    assert sum(kept()) <= 2**20


def test_buffers_of_a_larger_workspace_are_freed_before_a_smaller_one_is_used() -> None:
    like = torch.empty(0)
    former = Workspace(1000)
    former.take(like, 100)
    former.take(like, 50)
    former.keep()
    assert kept() == [400, 200]
    Workspace(600)
    assert kept() == [400, 200]
    Workspace(599)
    assert kept() == []


def test_a_buffer_is_lent_once_and_what_a_call_left_is_freed() -> None:
    like, first = torch.empty(0), Workspace(10_000)
    ours = [first.take(like, 100), first.take(like, 3, 200)]
    assert [each.shape for each in ours] == [(100,), (3, 200)]
    assert Workspace(10_000).take(like, 100).data_ptr() not in addresses(ours)  # the call goes on
    first.keep()
    second = Workspace(10_000)
    assert second.take(like.double(), 50).data_ptr() == ours[0].data_ptr()
    assert kept() == [2400]
    second.keep()
    assert kept() == [400]


def test_a_call_that_fails_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(excess: Tensor) -> Tensor:
        raise MemoryError

    call()
    with monkeypatch.context() as patch:
        patch.setattr(_infonce_tiled, "excess_loss", fail)
        with pytest.raises(MemoryError):
            call()
    assert kept() == []


def test_buffers_made_in_inference_mode_serve_outside() -> None:
    expected = call()
    release_workspace()
    with torch.inference_mode():
        call()
    held = addresses(_workspace._kept.buffers)
    assert all(torch.equal(each, other) for each, other in zip(call(), expected, strict=True))
    assert addresses(_workspace._kept.buffers) == held


@pytest.mark.parametrize(
    "options",
    [{}, {"symmetric": True, "margin": 0.1}, {"dims": [4, 8], "query_negatives": True, "candidate_negatives": True}],
    ids=str,
)
def test_buffers_are_where_the_embeddings_are_whatever_the_default_device_is(options: dict[str, Any]) -> None:
    expected = call(**options)
    release_workspace()
    query, candidate = normalize(torch.randn(2, ROWS, 8, generator=torch.Generator().manual_seed(0)), dim=2)
    how: dict[str, Any] = {"temperature": 0.05, "engine": "tiled", "workspace_bytes": BYTES}
    with torch.device("meta"):
        found = grads(query, candidate, **how, **options)
    assert all(torch.equal(each, other) for each, other in zip(found, expected, strict=True))
    like = torch.empty(0)
    with torch.device("meta"):
        assert Workspace(4).take(like, 1).device == like.device


def test_threads_have_their_own() -> None:
    call()
    held = addresses(_workspace._kept.buffers)

    def elsewhere() -> tuple[list[int], list[int]]:
        before = kept()
        call()
        there = addresses(_workspace._kept.buffers)
        release_workspace()
        return before, there

    with ThreadPoolExecutor(1) as pool:
        before, there = pool.submit(elsewhere).result()
    assert before == []
    assert not set(there) & set(held)
    assert addresses(_workspace._kept.buffers) == held
