"""Phases: each has its own schedule; the data module changes streams where the second begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import get_scheduler

from mmemb.data.datamodule import Source
from mmemb.training.phases import Span, scheduler
from tests.unit.training.small import small_data


def rates(spans: list[Span], steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    schedule = scheduler(optimizer, spans)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_each_span_follows_its_own_schedule_from_its_beginning() -> None:
    spans = [Span(10, "cosine", 2), Span(6, "linear", 1, 0.1)]
    found = rates(spans, 18)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    library: list[float] = []
    alone = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=10)
    for _ in range(10):
        library.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        alone.step()
    assert found[:10] == pytest.approx(library)
    assert found[10:16] == pytest.approx([0.0, 0.05, 0.04, 0.03, 0.02, 0.01])
    assert found[16:] == [0.0, 0.0]


def test_a_first_phase_of_no_steps_leaves_the_second_alone() -> None:
    assert rates([Span(0, "cosine", 5), Span(4, "constant", 0, 0.5)], 4) == [0.25] * 4


def ids(batch: Any) -> list[str]:
    return [pair.id for pair in batch]


def test_batches_come_from_control_where_it_begins() -> None:
    control = [Source(path="bundled:control", tasks=["name"])]
    data = small_data(batch_size=8, control=control, control_batch_size=4, control_sub_batch_size=2)
    data.setup("fit")
    data.use_control(lambda pairs, seed: pairs, start=2)
    stream = iter(data.train_dataloader())
    batches = [next(stream) for _ in range(4)]
    assert [len(batch) for batch in batches] == [8, 8, 4, 4]
    known = {pair.id for pair in data.train_pairs}
    assert [set(ids(batch)) <= known for batch in batches] == [True, True, False, False]
    again = small_data(batch_size=8, control=control, control_batch_size=4, control_sub_batch_size=2)
    again.setup("fit")
    again.use_control(lambda pairs, seed: pairs, start=0)
    assert ids(next(iter(again.train_dataloader()))) == ids(batches[2]), (
        "the phase's batches do not depend on its start"
    )


def test_control_pairs_that_training_has_seen_give_a_warning() -> None:
    data = small_data(control=[Source(path="bundled:train", tasks=["name"], limit=5)])
    data.setup("fit")
    with pytest.warns(UserWarning, match="5 of the 5 control pairs are training pairs too"):
        data.use_control(lambda pairs, seed: pairs, start=2)


def test_a_control_phase_needs_a_source() -> None:
    data = small_data()
    data.setup("fit")
    with pytest.raises(ValueError, match="no control source; give data.control a list"):
        data.use_control(lambda pairs, seed: pairs, start=2)
