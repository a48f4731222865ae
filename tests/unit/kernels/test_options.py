"""Every option of the loss, alone and in combination, against the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import harness
from mmemb.kernels import InfoNCEBatch, LossOptions, reference, release_workspace
from mmemb.kernels.prefixes import by_dimension
from mmemb.kernels.prepare import prepare
from mmemb.kernels.problem import Gradients, Problem
from mmemb.kernels.tiled import engine as tiled
from mmemb.kernels.tiled.stripes import CHUNK_BYTES
from tests.unit.kernels.cases import OPTIONS, arguments, combinations, doubled, error, grads, loss, oracle, unit_rows

Case = tuple[tuple[int, int, int], frozenset[str], float]


def identity(case: Case) -> str:
    return f"{'x'.join(map(str, case[0]))}-{'+'.join(sorted(case[1])) or 'plain'}-{case[2]}"


@pytest.mark.parametrize("case", combinations(64), ids=identity)
def test_every_combination_equals_the_definition(case: Case) -> None:
    shape, options, temperature = case
    n, m, d = shape
    query, candidate = unit_rows(n, d, torch.float32), unit_rows(m, d, torch.float32)
    kwargs = arguments(options, shape)
    temperature = float(torch.tensor(temperature))
    expected = oracle(query, candidate, temperature, **kwargs)
    given = grads(query, candidate, temperature=temperature, **kwargs)
    # Logits of 1 / temperature carry float32's relative error into exponents.
    allowed = 1e-5 + 2 * torch.finfo(torch.float32).eps / temperature
    for field, value in given._asdict().items():
        # Normalised rows of width 1 are all 1 or -1, so gradients cancel but for the rounding of their terms.
        terms = temperature ** (-2 if field == "temperature_grad" else -1) if d == 1 else 1e-2
        assert error(value, getattr(expected, field), least=terms) < allowed, field
    again = grads(query, candidate, temperature=temperature, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(given, again, strict=True))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("temperature", [0.05, 0.01])
@pytest.mark.parametrize("options", [frozenset[str](), frozenset(OPTIONS) - {"symmetric"}], ids=["plain", "all"])
def test_a_smaller_workspace_gives_the_same(
    options: frozenset[str], temperature: float, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (29, 37, 11)
    query, candidate = unit_rows(29, 11, torch.float64), unit_rows(37, 11, torch.float64)
    kwargs: dict[str, Any] = arguments(options, shape) | {"symmetric": symmetric, "temperature": temperature}
    whole = grads(query, candidate, **kwargs)
    monkeypatch.setattr("mmemb.kernels.tiled.stripes.CHUNK_BYTES", 3 * 37 * 8)  # chunks of 3 rows
    monkeypatch.setattr(tiled, "ROWS", 8)  # stripes of 8, of which the workspace can keep some
    for rows in (1, 7, 17):
        striped = grads(query, candidate, workspace_bytes=rows * 37 * 8, **kwargs)
        for a, b in zip(whole, striped, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [frozenset(OPTIONS), frozenset(OPTIONS) - {"symmetric", "dims"}], ids=["T", "1"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(options: frozenset[str], reduction: str) -> None:
    # Without hardness: its weights are constants, which finite differences do not know.
    kwargs: dict[str, Any] = arguments(options - {"hardness"}, (5, 8, 4)) | {"reduction": reduction}
    leaves = [unit_rows(5, 4, torch.float64), unit_rows(8, 4, torch.float64), torch.tensor(0.3, dtype=torch.float64)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(lambda q, k, t: loss(q, k, temperature=t, **kwargs), leaves)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)
@pytest.mark.parametrize("without", ["", "symmetric", "dims"])
def test_16_bits(dtype: torch.dtype, allowed: float, without: str) -> None:
    kwargs = arguments(frozenset(OPTIONS) - {without}, (61, 67, 24))
    query, candidate = unit_rows(61, 24, dtype), unit_rows(67, 24, dtype)
    expected = oracle(query, candidate, 0.05, **kwargs)
    given = grads(query, candidate, temperature=0.05, **kwargs)
    # All is computed in float32; only the gradients are rounded, when they are returned.
    assert error(given.loss, expected.loss) < 1e-5
    assert error(given.temperature_grad, expected.temperature_grad) < 1e-5
    assert error(given.query_grad, expected.query_grad) < allowed
    assert error(given.candidate_grad, expected.candidate_grad) < allowed
    upcast = grads(query.float(), candidate.float(), temperature=0.05, **kwargs)
    for field, value in upcast._asdict().items():
        assert error(value, getattr(expected, field)) < 1e-3, field


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_loss_is_finite_at_the_lowest_temperature(symmetric: bool) -> None:
    kwargs = arguments(frozenset(OPTIONS) - {"ids", "margin"}, (7, 9, 4)) | {"symmetric": symmetric}
    query = unit_rows(7, 4, torch.float32)
    given = grads(query, torch.cat([-query, query[:2]]), temperature=1e-3, **kwargs)
    assert all(bool(value.isfinite().all()) for value in given)
    assert float(given.loss) > 88  # where float32's exp overflows


def test_a_margin_leaves_out_what_scores_above_the_positive() -> None:
    query = torch.tensor([[1.0, 0.0]])
    candidate = torch.tensor([[0.5, 0.0], [0.59, 0.0], [0.61, 0.0], [0.2, 0.0]])
    kept = loss(query, candidate[[0, 1, 3]], temperature=0.1)
    torch.testing.assert_close(loss(query, candidate, temperature=0.1, margin=0.1), kept)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("options", [{}, {"dims": [8, 300]}, {"candidate_negatives": True}], ids=str)
def test_copies_of_the_positive_are_kept_at_margin_0(options: dict[str, Any], symmetric: bool) -> None:
    query, candidate = doubled(300)
    for temperature in (0.05, 0.07, 0.01):
        how: dict[str, Any] = options | {"temperature": temperature, "symmetric": symmetric, "reduction": "none"}
        losses = loss(query, candidate, margin=0.0, **how)
        assert float(losses.min()) > 0.69 * len(options.get("dims", "1"))  # log 2: a negative that is the positive


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_long_row_does_not_widen_the_margin_of_the_others(symmetric: bool) -> None:
    query, candidate = unit_rows(64, 16, torch.float32), unit_rows(64, 16, torch.float32)
    query[-1] *= 1000
    candidate[-1] *= 1000
    how: dict[str, Any] = {"temperature": 1.0, "margin": 0.1, "symmetric": symmetric, "reduction": "none"}
    given = loss(query, candidate, **how)
    expected = reference.infonce(query.double(), candidate.double(), **how)
    assert error(given[:-1], expected[:-1]) < 1e-5


def test_in_the_other_direction_the_margin_is_that_of_the_candidates_own_query() -> None:
    query = torch.tensor([[1.0, 0.0], [0.4, 0.0]])
    candidate = torch.tensor([[0.5, 0.0], [1.0, 0.0]])  # dot products .5 1 / .2 .4; positives .5 and .4
    losses = loss(query, candidate, temperature=1.0, margin=0.1, symmetric=True, reduction="none")
    # Row 0 leaves out 1.0 and column 1 leaves it out too (1.0 > .4 + .1); row 1 and column 0 keep .2.
    by_row = torch.tensor([0.0, 0.2 - 0.4]).exp() * torch.tensor([0.0, 1.0])
    by_column = torch.tensor([0.2 - 0.5, 0.0]).exp() * torch.tensor([1.0, 0.0])
    torch.testing.assert_close(losses, (by_row.log1p() + by_column.log1p()) / 2)


def test_further_negatives_are_the_other_queries_and_candidates() -> None:
    query, candidate = unit_rows(2, 3, torch.float64), unit_rows(3, 3, torch.float64)
    both = loss(query, candidate, temperature=0.5, query_negatives=True, candidate_negatives=True, reduction="none")
    for i, other in ((0, 1), (1, 0)):
        negatives = [query[i] @ candidate[other], query[i] @ candidate[2], query[i] @ query[other]]
        negatives += [candidate[i] @ candidate[other], candidate[i] @ candidate[2]]
        logits = torch.stack([query[i] @ candidate[i], *negatives]) / 0.5
        torch.testing.assert_close(both[i], logits.logsumexp(0) - logits[0])


def test_hardness_weighs_negatives_by_a_constant() -> None:
    query, candidate = unit_rows(4, 3, torch.float64), unit_rows(4, 3, torch.float64)
    leaf = query.clone().requires_grad_()
    dots = leaf @ candidate.T
    weights = (2.0 * dots.detach()).exp().fill_diagonal_(1.0)
    scores = weights * (dots / 0.5).exp()
    expected = (scores.sum(1) / scores.diagonal()).log().mean()
    given = grads(query, candidate, temperature=0.5, hardness=2.0)
    torch.testing.assert_close(given.loss, expected.detach())
    torch.testing.assert_close(given.query_grad, torch.autograd.grad(expected, leaf)[0])


@pytest.mark.parametrize("symmetric", [False, True])
def test_dims_are_the_sum_of_the_losses_on_normalised_prefixes(symmetric: bool) -> None:
    query, candidate = (torch.randn(rows, 12).requires_grad_() for rows in (9, 11))  # not normalised
    together = loss(query, candidate, temperature=0.1, dims=[2, 5, 12], symmetric=symmetric)
    alone = sum(
        loss(normalize(query[:, :d], dim=1), normalize(candidate[:, :d], dim=1), temperature=0.1, symmetric=symmetric)
        for d in (2, 5, 12)
    )
    assert isinstance(alone, Tensor)
    torch.testing.assert_close(together, alone)
    for a, b in zip(*(torch.autograd.grad(x, (query, candidate)) for x in (together, alone)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shortest", [1.0, 1e-15])
def test_an_engine_without_dims_is_called_once_for_each(shortest: float, symmetric: bool) -> None:
    query, candidate = torch.randn(9, 12, dtype=torch.float64), torch.randn(11, 12, dtype=torch.float64)
    for rows in (query, candidate):
        rows[:, :2] *= shortest
    options = LossOptions(
        margin=0.1,
        query_negatives=True,
        candidate_negatives=True,
        hardness=1.0,
        dims=[2, 5, 12],
        symmetric=symmetric,
    )
    problem, _ = prepare(InfoNCEBatch(query, candidate, 0.1), options)
    engine = tiled.symmetric if symmetric else tiled.one_direction
    coefficient = torch.rand(9, dtype=torch.float64)
    calls = []

    def narrow(each: Problem) -> tuple[Tensor, Gradients | None]:
        calls.append(each.query.shape[1])
        return engine(each, coefficient=coefficient)

    losses, gradients = by_dimension(problem, narrow)
    expected_losses, expected = engine(problem, coefficient=coefficient)
    assert calls == [2, 5, 12]
    by_definition = reference.infonce(
        query, candidate, temperature=0.1, margin=0.1, query_negatives=True, candidate_negatives=True, hardness=1.0,
        dims=[2, 5, 12], symmetric=symmetric, reduction="none",
    )  # fmt: skip
    torch.testing.assert_close(losses, by_definition, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses, expected_losses)
    assert gradients is not None
    assert expected is not None
    for name in ("query", "candidate", "temperature", "peers"):
        torch.testing.assert_close(getattr(gradients, name), getattr(expected, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"symmetric": True},
        {"margin": 0.1, "symmetric": True},
        {"dims": [4, 8]},
        {"query_negatives": True, "candidate_negatives": True},
        {"ids": True, "weight": True, "hardness": 1.0},
        {"ids": True, "symmetric": True},
    ],
    ids=str,
)
def test_memory_is_the_workspace_and_no_matrix(options: dict[str, Any], dtype: torch.dtype) -> None:
    query, candidate = unit_rows(4096, 8, dtype), unit_rows(4096, 8, dtype)
    workspace = 2 * 2**20
    given = {name for name in ("ids", "weight") if options.get(name)}
    options = {name: value for name, value in options.items() if name not in given}
    options |= arguments(given, (4096, 4096, 8))

    def run() -> None:
        grads(query, candidate, temperature=0.05, workspace_bytes=workspace, **options)

    of_embeddings = 4 * 4096 * 8
    release_workspace()
    most = 1e6 * harness.peak_megabytes(run, device="cpu")
    # Beside it a few chunks; the matrix would be 64 MiB.
    assert most < workspace + 4 * CHUNK_BYTES + 20 * of_embeddings
