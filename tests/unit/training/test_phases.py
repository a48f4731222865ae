"""Phases: each has its own schedule, and the data module changes streams where a phase starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from mmemb.data.datamodule import PhaseBatches
from mmemb.data.sources import Source, Stream
from mmemb.interfaces import Model
from mmemb.training.objective import Objective, StepContext
from mmemb.training.phases import Phase, phase_spans, scheduler, span_at, total_steps
from tests.unit.training.small import small_data


class Nothing(Objective):
    """An objective that optimises nothing."""

    def collate(self, model: Model, pairs: Any, seed: int) -> Any:
        return pairs

    def step(self, model: Model, batch: Any, context: StepContext) -> dict[str, torch.Tensor]:
        return {"loss": torch.zeros(())}


def phase(**settings: Any) -> Phase:
    return Phase(Nothing(), **settings)


def rates(phases: list[Phase], steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    schedule = scheduler(optimizer, phase_spans(phases))
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_each_phase_follows_its_own_schedule_from_its_first_step() -> None:
    phases = [
        phase(steps=10, schedule="cosine", warmup_steps=2),
        phase(steps=6, schedule="linear", warmup_steps=1, learning_rate_factor=0.1),
    ]
    found = rates(phases, 18)
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


def test_a_first_phase_without_steps_does_not_change_the_second() -> None:
    phases = [
        phase(steps=0, warmup_steps=5),
        phase(steps=4, schedule="constant", warmup_steps=0, learning_rate_factor=0.5),
    ]
    assert rates(phases, 4) == [0.25] * 4


def test_spans_cover_the_run_and_are_cut_where_it_ends() -> None:
    phases = [phase(steps=4, name="a"), phase(steps=3, name="b"), phase(name="a")]
    whole = phase_spans(phases, run_steps=20)
    assert [(span.name, span.first_step, span.steps) for span in whole] == [("a", 0, 4), ("b", 4, 3), ("a_2", 7, 13)]
    assert [span_at(whole, step).name for step in (0, 3, 4, 6, 7, 19)] == ["a", "a", "b", "b", "a_2", "a_2"]
    short = phase_spans(phases, run_steps=5)
    assert [span.steps for span in short] == [4, 1, 0]
    assert total_steps(phases) is None
    assert total_steps(phases[:2]) == 7


@pytest.mark.parametrize(
    ("phases", "run_steps", "told"),
    [
        ([], None, "model.phases is empty"),
        ([phase(), phase(steps=3)], None, r"model.phases\[0\].steps is missing"),
        ([phase(steps=3), phase(steps=4)], 8, "trainer.max_steps: the run has 8 steps, .* 7 in total"),
    ],
)
def test_phases_that_do_not_fit_are_refused(phases: list[Phase], run_steps: int | None, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        phase_spans(phases, run_steps=run_steps)


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"warmup_steps": -1}, {"learning_rate_factor": 0.0}])
def test_a_number_out_of_range_is_named(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"phase.{name}"):
        phase(**wrong)


def ids(batch: Any) -> list[str]:
    return [pair.id for pair in batch]


def in_phases(*phases: tuple[int, str]) -> list[PhaseBatches]:
    return [PhaseBatches(first, stream, lambda pairs, seed: pairs, reads_rationales=True) for first, stream in phases]


def test_batches_come_from_the_stream_of_their_phase() -> None:
    control = Stream([Source(path="bundled:control", tasks=["name"])], batch_size=4, sub_batch_size=2)
    data = small_data(batch_size=8, streams={"control": control})
    data.setup("fit")
    data.use_phases(in_phases((0, "train"), (2, "control"), (3, "train")))
    stream = iter(data.train_dataloader())
    batches = [next(stream) for _ in range(4)]
    assert [len(batch) for batch in batches] == [8, 8, 4, 8]
    known = {pair.id for pair in data.stream_pairs("train")}
    assert [set(ids(batch)) <= known for batch in batches] == [True, True, False, True]
    assert ids(batches[3]) == ids(batches[0]), "a phase's batches do not depend on where it starts"
    again = small_data(batch_size=8, streams={"control": control})
    again.setup("fit")
    again.use_phases(in_phases((0, "control")))
    assert ids(next(iter(again.train_dataloader()))) == ids(batches[2])


def test_coming_pairs_are_those_of_the_phases_that_read_rationales() -> None:
    control = Stream([Source(path="bundled:control", tasks=["name"])], batch_size=4, sub_batch_size=2)
    data = small_data(batch_size=8, streams={"control": control})
    data.setup("fit")
    first, second, third = in_phases((0, "train"), (1, "control"), (2, "train"))
    data.use_phases([first, replace(second, reads_rationales=False), third])
    stream = iter(data.train_dataloader())
    batches = [next(stream) for _ in range(3)]
    wanted = list(dict.fromkeys(ids(batches[0]) + ids(batches[2])))
    assert [pair.id for pair in data.coming_pairs(3)] == wanted


def test_pairs_that_an_earlier_phase_has_trained_on_give_a_warning() -> None:
    seen = Stream([Source(path="bundled:train", tasks=["name"], limit=5)])
    data = small_data(streams={"control": seen})
    data.setup("fit")
    with pytest.warns(UserWarning, match="5 of the 5 pairs of 'control' were trained on"):
        data.use_phases(in_phases((0, "train"), (2, "control")))


def test_a_phase_needs_a_stream_with_a_source() -> None:
    data = small_data()
    data.setup("fit")
    with pytest.raises(ValueError, match=r"no control source; .*data.streams.control.sources"):
        data.use_phases(in_phases((0, "train"), (2, "control")))


def test_a_stream_may_not_take_the_name_of_a_split() -> None:
    with pytest.raises(ValueError, match=r"data.streams.test: .*another name"):
        small_data(streams={"test": Stream([Source(path="bundled:train")])})
