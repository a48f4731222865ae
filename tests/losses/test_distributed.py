"""Two gloo ranks against one process on the joined batch, with rows divided unevenly; and one rank without a group."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from mmemb.kernels import infonce_with_grads, reference
from mmemb.losses import CachedLoss, ChunkOutput, InfoNCE, cached_step
from mmemb.losses.distributed import all_sum, distributed_infonce_with_grads, gather_rows

QUERIES, CANDIDATES = [3, 5], [4, 9]
"""Rows by rank; the ranks' hard negatives differ in number."""


def batch() -> dict[str, Tensor]:
    """The global batch in float64; positives are rows of a rank's own candidates."""
    generator = torch.Generator().manual_seed(1)

    def rows(n: int) -> Tensor:
        return normalize(torch.randn(n, 6, generator=generator, dtype=torch.float64), dim=1)

    return {
        "query": rows(8),
        "candidate": rows(13),
        "positive": torch.tensor([1, 0, 3, 8, 2, 0, 5, 1]),
        "query_id": torch.randint(4, (8,), generator=generator),
        "candidate_id": torch.randint(4, (13,), generator=generator),
        "weight": torch.rand(8, generator=generator, dtype=torch.float64) + 0.1,
    }


def share(values: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    return {
        name: value.split(CANDIDATES if name.startswith("candidate") else QUERIES)[rank]
        for name, value in values.items()
    }


def joined_positive(values: dict[str, Tensor]) -> dict[str, Any]:
    """The global batch with positives counted over all candidates."""
    return values | {"positive": values["positive"] + torch.tensor([0] * 3 + [4] * 5)}


def model() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)).double()


class Whole(nn.Module):
    """Encoder and loss in one module, as a trainer wraps them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.loss = model(), InfoNCE(temperature=0.1).double()

    def forward(self, x: Tensor) -> Tensor:
        return normalize(self.encoder(x), dim=1)


def train(module: nn.Module, whole: Whole, x: Tensor, y: Tensor, chunk: int, *, no_sync: Any) -> None:
    """A cached step on queries x and targets y."""
    pieces = list(zip(x.split(chunk), y.split(chunk), strict=True))

    def forward(piece: tuple[Tensor, Tensor], final: bool) -> ChunkOutput:
        both = module(torch.cat(piece))
        query, target = both.split(len(piece[0]))
        return ChunkOutput({"query": query, "target": target})

    def loss(embeddings: dict[str, Tensor]) -> CachedLoss:
        result = whole.loss.with_grads(embeddings["query"], embeddings["target"])
        gradients = {"query": result.query_grad, "target": result.candidate_grad}
        return CachedLoss(result.loss, gradients, whole.loss.temperature_term(result))

    cached_step(pieces, forward, loss, no_sync=no_sync)


def refusal(arguments: dict[str, Any]) -> str:
    try:
        distributed_infonce_with_grads(**arguments, temperature=0.1)
    except ValueError as error:
        return str(error)
    return ""


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        result: dict[str, Any] = {}
        local: dict[str, Any] = share(batch(), rank)
        for averaged in (True, False):
            for symmetric in (False, True):
                grads = distributed_infonce_with_grads(**local, temperature=0.1, averaged=averaged, symmetric=symmetric)
                result[f"{averaged} {symmetric}"] = list(grads)
        diagonal = {name: local[name] for name in ("query", "candidate")}
        result["diagonal"] = list(distributed_infonce_with_grads(**diagonal, temperature=0.1))
        # One rank without queries, and one whose weights are all 0.
        first = rank == 0
        lone = local | {name: local[name][:0] for name in ("query", "positive", "query_id", "weight")}
        for symmetric in (False, True):
            grads = distributed_infonce_with_grads(**(lone if first else local), temperature=0.1, symmetric=symmetric)
            result[f"lone {symmetric}"] = list(grads)
        unweighted = local | {"weight": local["weight"] * rank}
        result["unweighted"] = list(distributed_infonce_with_grads(**unweighted, temperature=0.1))
        result["errors"] = [
            refusal(local | {"weight": local["weight"] * 0}),
            refusal(local | {"positive": local["positive"] + 9}),  # rows of the other rank's candidates
        ]
        result["rows"] = gather_rows(local["query_id"])
        result["empty"] = gather_rows(local["query"][: 2 * rank])
        result["sum"] = all_sum(torch.tensor(float(rank + 1)))

        whole = Whole()
        wrapped = DistributedDataParallel(whole)
        x, y = batch()["query"], batch()["candidate"][:8]
        rows = slice(0, 3) if rank == 0 else slice(3, 8)
        # Two chunks on each rank, of uneven sizes.
        train(wrapped, whole, x[rows], y[rows], 2 if rank == 0 else 3, no_sync=wrapped.no_sync)
        result["trained"] = [p.grad for p in whole.parameters()]
        torch.save(result, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found; started once, for importing torch takes seconds."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("averaged", [True, False])
def test_two_ranks_equal_one_process(ranks: list[dict[str, Any]], averaged: bool, symmetric: bool) -> None:
    expected = infonce_with_grads(**joined_positive(batch()), temperature=0.1, symmetric=symmetric)
    loss, query, candidate, temperature = zip(*(rank[f"{averaged} {symmetric}"] for rank in ranks), strict=True)
    factor = 2 if averaged else 1
    for value in loss:
        torch.testing.assert_close(value, expected.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat(query), factor * expected.query_grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(torch.cat(candidate), factor * expected.candidate_grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(sum(temperature), factor * expected.temperature_grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_rank_may_have_no_queries(ranks: list[dict[str, Any]], symmetric: bool) -> None:
    values = joined_positive(batch())
    kept = {name: value if name.startswith("candidate") else value[3:] for name, value in values.items()}
    expected = infonce_with_grads(**kept, temperature=0.1, symmetric=symmetric)
    loss, query, candidate, _ = zip(*(rank[f"lone {symmetric}"] for rank in ranks), strict=True)
    for value in loss:
        torch.testing.assert_close(value, expected.loss)
    assert len(query[0]) == 0
    torch.testing.assert_close(query[1], 2 * expected.query_grad)
    torch.testing.assert_close(torch.cat(candidate), 2 * expected.candidate_grad)


def test_a_ranks_weights_may_all_be_zero_but_not_everyones(ranks: list[dict[str, Any]]) -> None:
    values = joined_positive(batch())
    values["weight"][:3] = 0
    expected = infonce_with_grads(**values, temperature=0.1)
    for rank in ranks:
        torch.testing.assert_close(rank["unweighted"][0], expected.loss)
        assert rank["errors"][0].startswith("the weights of all ranks' queries sum to 0")


def test_a_positive_is_a_row_of_the_ranks_own_candidates(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["errors"][1] == "positive has values 9 to 12; allowed are rows of candidate, 0 to 3"
    assert ranks[1]["errors"][1] == "positive has values 9 to 17; allowed are rows of candidate, 0 to 8"


def test_the_diagonal_is_of_the_ranks_own_rows(ranks: list[dict[str, Any]]) -> None:
    values = batch()
    positive = torch.tensor([0, 1, 2, 4, 5, 6, 7, 8])
    expected = reference.infonce(values["query"], values["candidate"], temperature=0.1, positive=positive)
    for rank in ranks:
        torch.testing.assert_close(rank["diagonal"][0], expected)


def test_a_cached_step_under_ddp_equals_the_plain_step_of_one_process(ranks: list[dict[str, Any]]) -> None:
    whole = Whole()
    x, y = batch()["query"], batch()["candidate"][:8]
    reference.infonce(whole(x), whole(y), temperature=whole.loss.temperature).backward()
    for rank in ranks:
        for given, parameter in zip(rank["trained"], whole.parameters(), strict=True):
            torch.testing.assert_close(given, parameter.grad, rtol=1e-6, atol=1e-9)


def test_rows_and_sums_over_ranks(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert torch.equal(rank["rows"], batch()["query_id"])
        assert torch.equal(rank["empty"], batch()["query"][3:5])  # the first rank gave none
        assert float(rank["sum"]) == 3


def test_without_a_group_nothing_is_gathered() -> None:
    values = joined_positive(batch())
    given = distributed_infonce_with_grads(**values, temperature=0.1)
    expected = infonce_with_grads(**values, temperature=0.1)
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
    rows = torch.randn(2, 3, requires_grad=True)
    assert torch.equal(gather_rows(rows), rows)
    assert not gather_rows(rows).requires_grad
    assert torch.equal(all_sum(torch.ones(2)), torch.ones(2))


def test_without_a_group_a_ddp_free_step_is_the_plain_step() -> None:
    whole = Whole()
    x, y = batch()["query"], batch()["candidate"][:8]
    reference.infonce(whole(x), whole(y), temperature=whole.loss.temperature).backward()
    expected = [p.grad for p in whole.parameters()]
    whole.zero_grad()
    train(whole, whole, x, y, 3, no_sync=nullcontext)
    for parameter, wanted in zip(whole.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted)
