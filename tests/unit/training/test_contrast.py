"""The number of function calls between the joint objective's loss and the engine that computes it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

import mmemb
from mmemb.kernels.tiled import engine
from mmemb.losses.infonce import InfoNCE
from mmemb.training.joint.objective import Joint

SOURCE = Path(mmemb.__file__).parent

MOST = 7
"""Maximum number of our functions on the call stack, from the objective's loss to the engine's function."""


class Rows:
    """The queries of a chunk, all on both paths."""

    rows = torch.arange(3)

    def __len__(self) -> int:
        return 3


def joint_batch() -> Any:
    """The part of a training batch that the loss reads: three queries with their positives in one chunk."""
    index = torch.arange(3)
    chunk = SimpleNamespace(query=Rows(), reasoned_weight=torch.ones(3))
    return SimpleNamespace(chunks=[chunk], query_id=index, candidate_id=index, positive=index)


@pytest.mark.parametrize("symmetric", [False, True], ids=["one_direction", "symmetric"])
def test_few_calls_lie_between_the_embeddings_and_the_engine(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "symmetric" if symmetric else "one_direction"
    solved = getattr(engine, name)
    ways: list[list[str]] = []

    def counted(*arguments: Any, **how: Any) -> Any:
        frame, way = sys._getframe(1), [name]
        while frame is not None and frame.f_code is not Joint._contrast.__code__:
            if SOURCE in Path(frame.f_code.co_filename).parents:
                way.append(frame.f_code.co_name)
            frame = frame.f_back
        assert frame is not None
        ways.append([*way, "_contrast"])
        return solved(*arguments, **how)

    monkeypatch.setattr(engine, name, counted)
    rows = {path: normalize(torch.randn(3, 4), dim=1) for path in ("query", "reasoned", "target")}
    loss = Joint(infonce=InfoNCE(symmetric=symmetric))._contrast(rows, joint_batch())
    assert loss.loss.isfinite()
    assert len(ways) == 2  # the direct and the reasoned path
    assert all(len(way) <= MOST for way in ways), ways
