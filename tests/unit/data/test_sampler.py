from collections import Counter

import pytest

from mmemb.data.sampler import TaskBatchSampler, rows_by_task

ROWS = rows_by_task(["a"] * 10 + ["b"] * 7 + ["c"] * 23)


def make(weights: dict[str, float] | None = None, **options: int) -> TaskBatchSampler:
    return TaskBatchSampler(ROWS, weights, **{"batch_size": 8, "sub_batch_size": 4, "seed": 1, **options})


def test_rows_are_numbered_by_task_from_the_offset() -> None:
    assert rows_by_task(["a", "b", "a"], offset=5) == {"a": [5, 7], "b": [6]}


def test_sub_batches_have_one_task_each() -> None:
    sampler = make()
    for index in range(50):
        parts = list(sampler.parts(index))
        assert [len(rows) for _, rows in parts] == [4, 4]
        assert all(row in ROWS[task] for task, rows in parts for row in rows)
        assert sampler.batch(index) == [row for _, rows in parts for row in rows]


def test_a_task_takes_all_its_rows_before_any_row_comes_again() -> None:
    seen: dict[str, list[int]] = {task: [] for task in ROWS}
    sampler = make()
    for index in range(200):
        for task, rows in sampler.parts(index):
            seen[task] += rows
    for task, rows in ROWS.items():
        turns = [seen[task][start : start + len(rows)] for start in range(0, len(seen[task]) - len(rows), len(rows))]
        assert len(turns) > 5
        assert all(sorted(turn) == rows for turn in turns)
        assert turns[0] != turns[1]


def test_a_batch_depends_on_its_number_alone() -> None:
    whole = [batch for batch, _ in zip(make(), range(30), strict=False)]
    for index in (29, 3, 17, 0):
        assert make().batch(index) == whole[index]
    used = make()
    assert [used.batch(index) for index in (20, 2, 20, 11)] == [whole[index] for index in (20, 2, 20, 11)]


def test_a_far_batch_is_the_same_with_and_without_earlier_batches() -> None:
    sampler = TaskBatchSampler(ROWS, batch_size=2, sub_batch_size=1, seed=5)
    walked = [sampler.batch(index) for index in range(4100)]
    fresh = TaskBatchSampler(ROWS, batch_size=2, sub_batch_size=1, seed=5)
    assert [fresh.batch(index) for index in (4099, 2047, 2048, 2049)] == [walked[i] for i in (4099, 2047, 2048, 2049)]


def test_the_order_depends_on_the_seed() -> None:
    assert [make(seed=1).batch(i) for i in range(5)] != [make(seed=2).batch(i) for i in range(5)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_of_one_process(world_size: int) -> None:
    size = 16
    alone = make(batch_size=size)
    ranks = [make(batch_size=size // world_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    for index in range(20):
        assert [row for rank in ranks for row in rank.batch(index)] == alone.batch(index)


def test_ranks_have_no_row_in_common_within_a_pass() -> None:
    rows = {"only": list(range(64))}
    ranks = [TaskBatchSampler(rows, batch_size=8, sub_batch_size=4, rank=rank, world_size=2) for rank in (0, 1)]
    for index in range(4):
        assert not set(ranks[0].batch(index)) & set(ranks[1].batch(index))


def test_tasks_are_drawn_by_weight() -> None:
    sampler = make({"a": 3.0, "c": 0.0})
    drawn = Counter(task for index in range(2000) for task, _ in sampler.parts(index))
    assert set(drawn) == {"a", "b"}
    assert drawn["a"] / 4000 == pytest.approx(0.75, abs=0.03)


def test_a_range_of_any_length_is_taken_in_order() -> None:
    sampler = TaskBatchSampler({"stream": range(7, 10**12)}, batch_size=4, sub_batch_size=2)
    assert sampler.batch(0) == [7, 8, 9, 10]
    assert sampler.batch(10**6) == [7 + 4 * 10**6 + place for place in range(4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sub_batch_size": 3}, "sub_batch_size 3 must divide batch_size 8"),
        ({"sub_batch_size": 0}, "must divide"),
        ({"weights": {"d": 1.0}}, "task_weights has the task 'd', but no source has it; the tasks are a, b, c"),
        ({"weights": {"a": -1.0}}, "task_weights.a is -1.0; give 0 or more"),
        ({"weights": {"a": float("nan")}}, "task_weights.a is nan"),
        ({"weights": {"a": 0.0, "b": 0.0, "c": 0.0}}, "no task is left"),
    ],
)
def test_invalid_settings_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_tasks_without_rows_are_ignored() -> None:
    with pytest.raises(ValueError, match=r"no task is left to draw from \(tasks: none\)"):
        TaskBatchSampler({"a": []}, batch_size=2, sub_batch_size=1)
