"""Where ranks agree before they send what they were given, by the backends of their group."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from mmemb.losses.agreement import device_of_group


@pytest.mark.parametrize(
    ("backends", "query", "expected"),
    [
        ("cpu:gloo,cuda:gloo", "cuda:1", "cpu"),
        ("cpu:gloo,cuda:nccl", "cuda:1", "cpu"),
        ("cpu:gloo", "cpu", "cpu"),
        ("cuda:nccl", "cuda:1", "cuda:1"),
        ("cuda:nccl", "cpu", "cuda:3"),
        ("cuda:nccl", "meta", "cuda:3"),
        ("xpu:xccl", "xpu:0", "xpu:0"),
        ("xpu:xccl", None, "xpu:3"),
    ],
)
def test_ranks_agree_on_the_cpu_if_the_group_serves_it_and_else_where_the_query_is(
    monkeypatch: pytest.MonkeyPatch, backends: str, query: str | None, expected: str
) -> None:
    class Query(torch.Tensor):
        device = torch.device(query or "cpu")  # type: ignore[assignment]

    monkeypatch.setattr(dist, "get_backend_config", lambda: backends)
    monkeypatch.setattr(torch, "accelerator", SimpleNamespace(current_device_index=lambda: 3))
    given = None if query is None else torch.empty(0).as_subclass(Query)
    assert device_of_group(given) == torch.device(expected)
