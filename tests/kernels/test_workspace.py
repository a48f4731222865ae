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
from mmemb.kernels import InfoNCEResult, _infonce_tiled, infonce_with_grads, release_workspace
from mmemb.kernels._workspace import Workspace

BYTES = 2 * 2**20


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    release_workspace()
    yield
    release_workspace()


def call(seed: int = 0, **options: Any) -> InfoNCEResult:
    generator = torch.Generator().manual_seed(seed)
    query, candidate = normalize(torch.randn(2, 2048, 8, generator=generator), dim=2)
    return infonce_with_grads(query, candidate, temperature=0.05, engine="tiled", workspace_bytes=BYTES, **options)


def taken(**options: Any) -> float:
    """Bytes that a call allocates at most."""
    return 1e6 * harness.peak_megabytes(lambda: call(**options), device="cpu")


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"dims": [4, 8]}], ids=str)
def test_a_second_call_takes_the_buffers_of_the_first(options: dict[str, Any]) -> None:
    first, second = taken(**options), taken(**options)
    assert first - second > 0.9 * BYTES
    release_workspace()
    assert taken(**options) == pytest.approx(first, rel=0.1)


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"dims": [4, 8], "symmetric": True}], ids=str)
def test_what_lies_in_the_buffers_changes_nothing_and_results_are_no_part_of_them(options: dict[str, Any]) -> None:
    first = call(**options)
    copies = [each.clone() for each in first]
    workspace = Workspace()
    for _ in range(4):  # every buffer that was kept, and further ones
        workspace.take(first.loss, BYTES // 16).fill_(torch.nan)
    workspace.keep()
    assert all(torch.equal(each, copy) for each, copy in zip(first, copies, strict=True))
    again = call(**options)
    assert all(torch.equal(each, copy) for each, copy in zip(again, copies, strict=True))


def test_a_buffer_is_lent_once_and_what_a_call_left_is_freed() -> None:
    like, first = torch.empty(0), Workspace()
    ours = [first.take(like, 100), first.take(like, 3, 200)]
    assert [each.shape for each in ours] == [(100,), (3, 200)]
    assert Workspace().take(like, 100).data_ptr() not in [each.data_ptr() for each in ours]  # the call goes on
    first.keep()
    second = Workspace()
    assert second.take(like.double(), 50).data_ptr() == ours[0].data_ptr()  # the smallest that holds it
    assert second.take(like, 601).data_ptr() != ours[1].data_ptr()
    second.keep()
    assert Workspace().take(like, 3, 200).data_ptr() != ours[1].data_ptr()


def test_a_call_that_fails_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(excess: Tensor) -> Tensor:
        raise MemoryError

    call()
    with monkeypatch.context() as patch:
        patch.setattr(_infonce_tiled, "excess_loss", fail)
        with pytest.raises(MemoryError):
            call()
    assert taken() > BYTES


def test_buffers_made_in_inference_mode_serve_outside() -> None:
    expected = call()
    release_workspace()
    with torch.inference_mode():
        call()
    assert all(torch.equal(each, other) for each, other in zip(call(), expected, strict=True))


def test_threads_have_their_own() -> None:
    expected = [call(seed) for seed in range(4)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            for found, result in zip(pool.map(call, range(4)), expected, strict=True):
                assert all(torch.equal(each, other) for each, other in zip(found, result, strict=True))
