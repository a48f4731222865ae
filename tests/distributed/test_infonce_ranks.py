"""Two and three gloo ranks against one process on the joined batch, with rows divided unevenly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from mmemb.kernels import InfoNCEBatch, LossOptions, reference
from mmemb.kernels.engines import solve
from mmemb.kernels.prepare import prepare
from mmemb.losses.agreement import ANOTHER_REFUSED
from tests.distributed.ranks import (
    CANDIDATES,
    MOST,
    OPTIONS,
    QUERIES,
    assert_equal_gradients,
    batch,
    joined_positive,
    nccl_worker,
    own_queries,
    plain_gradients,
    plain_step,
    worker,
)
from tests.unit.kernels.cases import error, grads

Found = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each rank found, by number of ranks; started once, for importing torch takes seconds."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=MOST)
    return {
        world: [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]
        for world in (2, MOST)
    }


@pytest.fixture(params=[2, 3], ids=["two ranks", "three ranks"])
def world(request: pytest.FixtureRequest) -> int:
    """The number of ranks."""
    return int(request.param)


@pytest.fixture
def ranks(found: Found, world: int) -> list[dict[str, Any]]:
    """What each rank found."""
    return found[world]


def by_field(ranks: list[dict[str, Any]], key: str) -> list[tuple[Tensor, ...]]:
    """Losses, query, candidate and temperature gradients, each by rank."""
    return list(zip(*(rank[key] for rank in ranks), strict=True))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("averaged", [True, False])
def test_ranks_equal_one_process(ranks: list[dict[str, Any]], world: int, averaged: bool, symmetric: bool) -> None:
    expected = grads(**joined_positive(batch(world), world), temperature=0.1, symmetric=symmetric)
    loss, query, candidate, temperature = by_field(ranks, f"{averaged} {symmetric}")
    factor = world if averaged else 1
    for value in loss:
        torch.testing.assert_close(value, expected.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat(query), factor * expected.query_grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(torch.cat(candidate), factor * expected.candidate_grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(sum(temperature), factor * expected.temperature_grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_ranks_equal_one_process_with_every_option(
    ranks: list[dict[str, Any]], world: int, name: str, symmetric: bool
) -> None:
    values = joined_positive(batch(world), world)
    expected = grads(**values, temperature=0.1, symmetric=symmetric, **OPTIONS[name])
    bare = grads(**values, temperature=0.1, symmetric=symmetric)
    assert not torch.allclose(expected.loss, bare.loss, rtol=1e-3)  # the option does something to this batch
    loss, query, candidate, temperature = by_field(ranks, f"{name} {symmetric}")
    for value in loss:
        torch.testing.assert_close(value, expected.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat(query), world * expected.query_grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(torch.cat(candidate), world * expected.candidate_grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(sum(temperature), world * expected.temperature_grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_ranks_equal_one_process_in_float32(ranks: list[dict[str, Any]], world: int, symmetric: bool) -> None:
    expected = grads(**joined_positive(batch(world), world), temperature=0.1, symmetric=symmetric)
    loss, query, candidate, temperature = by_field(ranks, f"float32 {symmetric}")
    for value in loss:
        assert error(value, expected.loss) < 1e-5
    assert error(torch.cat(query), expected.query_grad) < 1e-5
    assert error(torch.cat(candidate), expected.candidate_grad) < 1e-5
    assert error(torch.stack(temperature).sum(), expected.temperature_grad) < 1e-5


def test_candidates_may_be_rounded_on_their_way(ranks: list[dict[str, Any]], world: int) -> None:
    values = joined_positive(batch(world), world)
    rounded = values | {"candidate": values["candidate"].bfloat16().double()}
    expected = grads(**rounded, temperature=0.1)
    exact = grads(**values, temperature=0.1)
    loss, query, candidate, _ = by_field(ranks, "rounded")
    for value in loss:
        torch.testing.assert_close(value, expected.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat(query), world * expected.query_grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(torch.cat(candidate), world * expected.candidate_grad, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(torch.cat(query), world * exact.query_grad, rtol=1e-4)


def test_16_bit_gradients_are_summed_over_ranks_in_float32_and_rounded_once(
    ranks: list[dict[str, Any]], world: int
) -> None:
    values = joined_positive(batch(world), world)
    half = {name: x.bfloat16() if x.is_floating_point() else x for name, x in values.items()}
    weight = half.pop("weight").float()
    total = torch.stack([part.sum() for part in weight.split(QUERIES[world])]).sum()
    parts = []
    for rank in range(world):
        own = own_queries(world, rank)
        local = {name: x if name.startswith("candidate") else x[own] for name, x in half.items()}
        problem, _ = prepare(InfoNCEBatch(**local, temperature=0.1), LossOptions())
        _, gradients = solve(problem, LossOptions(), coefficient=(weight / total)[own])
        assert gradients is not None
        parts.append(gradients.candidate)
    _, query, candidate, _ = by_field(ranks, "half")
    assert {each.dtype for each in (*query, *candidate)} == {torch.bfloat16}
    assert torch.equal(torch.cat(candidate), torch.stack(parts).sum(0).bfloat16())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", ["lone", "bare"])
def test_a_rank_may_have_no_queries_or_nothing(
    ranks: list[dict[str, Any]], world: int, name: str, symmetric: bool
) -> None:
    values = joined_positive(batch(world), world)
    first = {"query": QUERIES[world][0], "candidate": CANDIDATES[world][0] if name == "bare" else 0}
    kept = {
        key: value[first["candidate" if key.startswith("candidate") else "query"] :] for key, value in values.items()
    }
    kept["positive"] = kept["positive"] - first["candidate"]
    expected = grads(**kept, temperature=0.1, symmetric=symmetric)
    loss, query, candidate, _ = by_field(ranks, f"{name} {symmetric}")
    for value in loss:
        torch.testing.assert_close(value, expected.loss)
    assert len(query[0]) == 0
    torch.testing.assert_close(torch.cat(query), world * expected.query_grad)
    torch.testing.assert_close(torch.cat(candidate), world * expected.candidate_grad)


def test_a_ranks_weights_may_all_be_zero_but_not_everyones(ranks: list[dict[str, Any]], world: int) -> None:
    values = joined_positive(batch(world), world)
    values["weight"][: QUERIES[world][0]] = 0
    expected = grads(**values, temperature=0.1)
    for rank in ranks:
        torch.testing.assert_close(rank["unweighted"][0], expected.loss)
        assert rank["errors"][0].startswith("the weights of all ranks' queries sum to 0")


def test_a_positive_is_a_row_of_the_ranks_own_candidates(ranks: list[dict[str, Any]], world: int) -> None:
    for number, rank in enumerate(ranks):
        given = batch(world)["positive"][own_queries(world, number)] + 9
        assert rank["errors"][1] == (
            f"positive has values {given.min()} to {given.max()}; "
            f"allowed are rows of candidate, 0 to {CANDIDATES[world][number] - 1}"
        )


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (2, "averaged is 'no'; allowed are"),
        (3, "query has a row of norm nan in torch.float64"),
        (4, "candidate_id is torch.int64 of"),
        (5, "temperature is nan; allowed are finite numbers above 0"),
    ],
)
def test_what_one_rank_refuses_ends_every_rank(ranks: list[dict[str, Any]], number: int, message: str) -> None:
    first, *others = (rank["errors"][number] for rank in ranks)
    assert first.startswith(message)
    assert set(others) == {ANOTHER_REFUSED}


def test_ranks_without_any_candidate_are_refused_together(ranks: list[dict[str, Any]]) -> None:
    assert {rank["errors"][6] for rank in ranks} == {"no rank has a candidate; at least one rank needs one"}


def test_a_query_that_the_group_does_not_serve_is_refused_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    first, *others = (rank["nowhere"] for rank in ranks)
    assert first == "query is on meta; the process group serves cpu and cuda alone"
    assert set(others) == {ANOTHER_REFUSED}


@pytest.mark.parametrize(
    ("name", "first", "other"),
    [
        ("width", "5", "6"),
        ("dtype", "torch.bfloat16", "torch.float64"),
        ("ids", "not given", "given"),
        ("margin", "0.1", "None"),
        ("query_negatives", "True", "False"),
        ("candidate_negatives", "True", "False"),
        ("hardness", "1.0", "0.0"),
        ("symmetric", "True", "False"),
        ("averaged", "True", "False"),
        ("dims", "(2, 6)", "(3, 6)"),
        ("gather_dtype", "torch.bfloat16", "None"),
        ("engine", "triton", "tiled"),
        ("device", "meta", "cpu"),
    ],
)
def test_what_differs_between_ranks_is_told_on_every_rank(
    ranks: list[dict[str, Any]], world: int, name: str, first: str, other: str
) -> None:
    rest = ", ".join(map(str, range(1, world)))
    hint = ", such as engine='tiled'" if name == "engine" else ""
    assert ranks[0]["differing"][name] == (
        f"{name} is {first} on rank 0 and not on rank {rest}; all ranks need the same{hint}"
    )
    for number, rank in enumerate(ranks[1:], start=1):
        expected = f"{name} is {other} on rank {number} and not on rank 0; all ranks need the same{hint}"
        assert rank["differing"][name] == expected


def test_temperatures_that_differ_are_told_on_every_rank(ranks: list[dict[str, Any]], world: int) -> None:
    assert {rank["differing"]["temperature"] for rank in ranks} == {
        "temperature is 0.1 on rank 1 and 0.2 on rank 0; all ranks need the same"
    }
    apart = {rank["apart"] for rank in ranks}
    assert apart == (
        {""}
        if world == 2
        else {f"temperature is 0.1 on rank 0 and {0.1 * (1 + 1.4e-3)} on rank 2; all ranks need the same"}
    )


def test_the_diagonal_is_of_the_ranks_own_rows(ranks: list[dict[str, Any]], world: int) -> None:
    values = batch(world)
    starts = [sum(CANDIDATES[world][:rank]) for rank in range(world)]
    positive = torch.cat([torch.arange(n) + start for n, start in zip(QUERIES[world], starts, strict=True)])
    expected = reference.infonce(values["query"], values["candidate"], temperature=0.1, positive=positive)
    for rank in ranks:
        torch.testing.assert_close(rank["diagonal"][0], expected)


def test_a_rank_may_leave_out_what_the_others_give(ranks: list[dict[str, Any]], world: int) -> None:
    values = joined_positive(batch(world), world)
    first = QUERIES[world][0]
    values["positive"][:first] = torch.arange(first)
    values["weight"][:first] = 1.0
    expected = grads(**values, temperature=0.1)
    loss, query, candidate, _ = by_field(ranks, "own")
    assert (query[0].dtype, query[1].dtype) == (torch.float32, torch.float64)
    for value in loss:
        torch.testing.assert_close(value, expected.loss, rtol=1e-6, atol=0)
    assert error(torch.cat([each.double() for each in query]), world * expected.query_grad) < 1e-6
    assert error(torch.cat([each.double() for each in candidate]), world * expected.candidate_grad) < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU for each rank")
def test_two_gpus_over_nccl_find_what_gloo_finds(found: Found, tmp_path: Path) -> None:
    mp.spawn(nccl_worker, args=(str(tmp_path),), nprocs=2)
    # Of the norm: sums in another order, products of three TF32 parts, weights rounded to bfloat16.
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.int64: 0.0}
    for rank, expected in enumerate(found[2]):
        given = torch.load(tmp_path / f"{rank}.pt", weights_only=True, map_location="cpu")
        assert given["errors"] == expected["errors"]
        told = {"errors", "differing", "nowhere", "apart"}
        devices = {"device": given["differing"]["device"]}  # gloo's are CPUs
        assert given["differing"] == expected["differing"] | devices
        for name in given.keys() - told:
            lists = [each[name] if isinstance(each[name], list) else [each[name]] for each in (given, expected)]
            for ours, theirs in zip(*lists, strict=True):
                assert error(ours, theirs.double()) <= tolerance[ours.dtype], name


def test_a_cached_step_under_ddp_is_the_plain_step_and_reduces_once(ranks: list[dict[str, Any]], world: int) -> None:
    for rank in ranks:
        assert_equal_gradients(rank["trained"], plain_step(world))
        assert rank["reductions"] == 1
        assert_equal_gradients(rank["kept"], plain_step(world))
        assert rank["kept reductions"] == 1


def test_accumulated_steps_under_ddp_reduce_once(ranks: list[dict[str, Any]], world: int) -> None:
    for rank in ranks:
        assert_equal_gradients(rank["accumulated"], plain_step(world), factor=2)
        assert rank["accumulated reductions"] == 1


def test_ranks_may_leave_out_layers_under_ddp(ranks: list[dict[str, Any]], world: int) -> None:
    for rank in ranks:
        assert_equal_gradients(rank["outside"], plain_gradients(world))


@pytest.mark.parametrize("held", [False, True], ids=["reduced by chunk", "reduced once"])
@pytest.mark.parametrize("kept", [1, 2])
def test_a_cached_step_under_fsdp2_is_the_plain_step(
    ranks: list[dict[str, Any]], world: int, held: bool, kept: int
) -> None:
    for rank in ranks:
        assert_equal_gradients(rank["sharded"][f"{held} {kept}"], plain_gradients(world))
    # Three groups of parameters (the root's unused on all ranks but the last), three chunks of two ranks, else one; and
    # the candidates' gradients.
    chunks = 1 if held or world == 3 else 3
    assert {rank["sharded"][f"{held} {kept} reductions"] for rank in ranks} == {3 * chunks + 1}
    assert sum(rank["sharded"]["own rows"][0] for rank in ranks) == 8  # the first layer's rows are divided


def test_every_graph_may_be_kept_under_fsdp2(ranks: list[dict[str, Any]], world: int) -> None:
    for rank in ranks:
        assert_equal_gradients(rank["sharded"]["False 3"], plain_gradients(world))


def test_sharded_gradients_are_clipped_by_their_common_norm(ranks: list[dict[str, Any]], world: int) -> None:
    norm = torch.stack([gradient.norm() for gradient in plain_gradients(world).values()]).norm()
    for rank in ranks:
        torch.testing.assert_close(rank["sharded"]["norm"], norm, rtol=1e-6, atol=0)
        torch.testing.assert_close(float(rank["sharded"]["clipped norm"]), 0.01, rtol=1e-3, atol=0)


def test_every_rank_resumes_its_own_random_numbers(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert torch.equal(rank["drawn"], rank["drawn again"])
    assert not torch.equal(ranks[0]["drawn"], ranks[1]["drawn"])


def test_rows_and_sums_over_ranks(ranks: list[dict[str, Any]], world: int) -> None:
    values = batch(world)
    kept = torch.cat([values["query"][own_queries(world, rank)][: 2 * rank] for rank in range(world)])
    for rank in ranks:
        assert torch.equal(rank["rows"], values["query_id"])
        assert torch.equal(rank["empty"], kept)  # the first rank gave none
        assert float(rank["sum"]) == world * (world + 1) / 2
