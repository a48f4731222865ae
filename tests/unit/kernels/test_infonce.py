"""The tiled engine against the plain definition in float64, by value and by gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmemb.kernels import InfoNCEBatch, reference
from mmemb.kernels.engines import solve
from mmemb.kernels.infonce import Reduction
from mmemb.kernels.prepare import prepare
from mmemb.kernels.problem import work_dtype
from mmemb.kernels.tiled import engine as tiled
from tests.unit.kernels.cases import OPTIONS, arguments, error, grads, loss, oracle, split, unit_rows

SHAPES = [(1, 1, 1), (1, 7, 3), (2, 2, 384), (7, 7, 1), (13, 31, 17), (1031, 1031, 8), (1025, 2053, 5)]
"""One row, one column, primes, hard negatives (M > N), one more than a stripe."""

TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,  # 24 bits, sums of some thousand terms
    torch.bfloat16: 8e-3,  # the gradients are rounded to 8 bits on return; the input's rounding is in the oracle's too
    torch.float16: 1e-3,  # 11 bits on return
}


def options(name: str, n: int, m: int) -> dict[str, Any]:
    """Arguments beside the embeddings and the temperature."""
    positive = torch.randperm(m)[:n]
    ids = {"query_id": torch.randint(4, (n,)), "candidate_id": torch.randint(4, (m,))}
    cases: dict[str, dict[str, Any]] = {
        "plain": {},
        "positive": {"positive": positive},
        "weight": {"weight": torch.rand(n) + 0.1},
        "ids": ids,
        "all": {"positive": positive, "weight": torch.rand(n) + 0.1, **ids},
        "symmetric": {"symmetric": True},
        "symmetric all": {"symmetric": True, "positive": positive, "weight": torch.rand(n) + 0.1, **ids},
    }
    return cases[name]


@pytest.mark.parametrize("name", ["plain", "positive", "weight", "ids", "all", "symmetric", "symmetric all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients_equal_the_definition(shape: tuple[int, int, int], name: str) -> None:
    n, m, d = shape
    query, candidate = unit_rows(n, d, torch.float32), unit_rows(m, d, torch.float32)
    kwargs = options(name, n, m)
    expected = oracle(query, candidate, 0.05, **kwargs)
    given = grads(query, candidate, temperature=0.05, **kwargs)
    for field, value in given._asdict().items():
        assert error(value, getattr(expected, field)) < 1e-5, field


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.02, 1e-3])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_dtype_and_temperature(dtype: torch.dtype, temperature: float, symmetric: bool) -> None:
    query, candidate = unit_rows(61, 24, dtype), unit_rows(67, 24, dtype)
    exact = float(torch.tensor(temperature))  # what float32 makes of it
    expected = oracle(query, candidate, exact, symmetric=symmetric)
    given = grads(query, candidate, temperature=exact, symmetric=symmetric)
    # Logits of 1 / temperature carry the work dtype's relative error into exponents: eps / temperature, absolute.
    allowed = TOLERANCES[dtype] + 2 * torch.finfo(work_dtype(dtype)).eps / temperature
    assert given.loss.dtype == given.temperature_grad.dtype == work_dtype(dtype)
    assert given.query_grad.dtype == given.candidate_grad.dtype == dtype
    for field, value in given._asdict().items():
        assert error(value, getattr(expected, field)) < allowed, field


@pytest.mark.parametrize("temperature", [1.0, 0.05])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_of_any_norm_are_as_exact_as_the_loss(symmetric: bool, temperature: float) -> None:
    query, candidate = unit_rows(61, 24, torch.float32), unit_rows(67, 24, torch.float32)
    exact = float(torch.tensor(temperature))
    given = grads(query, candidate, temperature=exact, symmetric=symmetric)
    for value, wanted in zip(given, oracle(query, candidate, exact, symmetric=symmetric), strict=True):
        assert error(value, wanted, least=0.0) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_16_bit_rows_in_float32_are_not_rounded(dtype: torch.dtype) -> None:
    query, candidate = unit_rows(61, 24, dtype), unit_rows(67, 24, dtype)
    exact = float(torch.tensor(0.05))
    given = grads(query, candidate, temperature=exact, grad_dtype=torch.float32)
    for value, wanted in zip(given, oracle(query, candidate, exact), strict=True):
        assert value.dtype == torch.float32
        assert error(value, wanted) < 1e-5


def test_a_low_temperature_does_not_overflow() -> None:
    query = unit_rows(5, 4, torch.float32)
    given = grads(query, -query, temperature=1e-3, symmetric=True)
    assert all(bool(value.isfinite().all()) for value in given)
    assert float(given.loss) > 88  # where float32's exp overflows


@pytest.mark.parametrize("symmetric", [False, True])
def test_stripes_of_any_size_give_the_same(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    query, candidate = unit_rows(29, 6, torch.float64), unit_rows(37, 6, torch.float64)
    kwargs = options("all", 29, 37) | {"symmetric": symmetric}
    engine = tiled.symmetric if symmetric else tiled.one_direction
    whole = grads(query, candidate, temperature=0.1, **kwargs)
    name = engine.__name__
    monkeypatch.setattr(tiled, name, lambda problem, **given: engine(problem, rows=5, **given))
    striped = grads(query, candidate, temperature=0.1, **kwargs)
    for a, b in zip(whole, striped, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["all", "symmetric all"])
def test_gradcheck(reduction: Reduction, name: str) -> None:
    query, candidate = unit_rows(5, 3, torch.float64), unit_rows(8, 3, torch.float64)
    kwargs = options(name, 5, 8)
    temperature = torch.tensor(0.3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (query, candidate, temperature)]
    assert torch.autograd.gradcheck(lambda q, k, t: loss(q, k, temperature=t, reduction=reduction, **kwargs), leaves)


@pytest.mark.parametrize("symmetric", [False, True])
def test_no_reduction_gives_weighted_losses_and_takes_their_gradients(symmetric: bool) -> None:
    kwargs = options("all", 6, 9) | {"symmetric": symmetric, "reduction": "none"}
    leaves = [unit_rows(6, 5, torch.float64).requires_grad_(), unit_rows(9, 5, torch.float64).requires_grad_()]
    incoming = torch.randn(6, dtype=torch.float64)
    given, expected = (f(*leaves, temperature=0.2, **kwargs) for f in (loss, reference.infonce))
    torch.testing.assert_close(given, expected)
    for a, b in zip(*(torch.autograd.grad(x, leaves, incoming) for x in (given, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_loss_without_grad_equals_the_loss_with() -> None:
    query, candidate = unit_rows(6, 5, torch.float32).requires_grad_(), unit_rows(6, 5, torch.float32)
    with torch.no_grad():
        quiet = loss(query, candidate, temperature=0.1)
    loud = loss(query, candidate, temperature=0.1)
    assert not quiet.requires_grad
    assert loud.requires_grad
    assert torch.equal(quiet, loud.detach())


def test_autocast_does_not_lower_the_precision() -> None:
    query, candidate = unit_rows(40, 32, torch.float32), unit_rows(40, 32, torch.float32)
    expected = grads(query, candidate, temperature=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = grads(query, candidate, temperature=0.05)
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


def test_two_runs_are_bitwise_equal() -> None:
    query, candidate = unit_rows(1100, 16, torch.float32), unit_rows(1300, 16, torch.float32)
    kwargs = options("all", 1100, 1300)
    first, second = (grads(query, candidate, temperature=0.05, **kwargs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_candidate_with_the_query_id_is_no_negative() -> None:
    query = torch.eye(2)
    candidate = torch.cat([torch.eye(2), torch.eye(2)])  # rows 2 and 3 repeat the positives
    ids: dict[str, Any] = {"query_id": torch.tensor([7, 8]), "candidate_id": torch.tensor([7, 8, 7, 8])}
    masked = loss(query, candidate, temperature=1.0, **ids)
    torch.testing.assert_close(masked, torch.logsumexp(torch.tensor([0.0, -1.0, -1.0]), 0))


def test_a_changed_input_is_refused_in_the_backward_pass() -> None:
    query = unit_rows(4, 3, torch.float32).requires_grad_()
    candidate = unit_rows(4, 3, torch.float32)
    losses = loss(query, candidate, temperature=0.1, reduction="none")
    candidate.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


GOOD: dict[str, Any] = {"query": torch.ones(2, 3), "candidate": torch.ones(4, 3), "temperature": 0.1}
IDS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(2)}, r"query has shape \(2,\); allowed is \[rows, width\]"),
        ({"candidate": torch.ones(0, 3)}, r"candidate has shape \(0, 3\)"),
        ({"query": torch.ones(2, 3).int()}, r"query is torch.int32; allowed are torch.float32"),
        ({"candidate": torch.ones(4, 5)}, "query is 3 wide and candidate 5"),
        ({"candidate": torch.ones(4, 3).half()}, "query is torch.float32 and candidate torch.float16"),
        ({"candidate": torch.ones(4, 3, device="meta")}, "candidate is on meta and query on cpu"),
        ({"candidate": torch.ones(1, 3)}, "1 candidates for 2 queries; without positive="),
        ({"temperature": torch.ones(2)}, r"temperature is torch.float32 of shape \(2,\)"),
        ({"temperature": torch.tensor(1.0, device="meta")}, "temperature is on meta, where it has no value"),
        ({"temperature": torch.tensor([1.0]).to_sparse()}, "temperature has layout torch.sparse_coo"),
        ({"temperature": 0.0}, "temperature is 0.0; allowed are finite numbers above 0 whose reciprocal is one too"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": 1e-40}, "temperature is 1e-40; .* in torch.float32"),
        ({"temperature": 1e39}, r"temperature is 1e\+39; .* in torch.float32"),
        ({"temperature": torch.tensor([0.0])}, "temperature is 0.0"),
        ({"query": torch.tensor([[1.0, 2, 3], [0, float("nan"), 0]])}, "query has a row of norm nan in torch.float32"),
        ({"query": torch.full((2, 3), 1e20)}, "norm inf in torch.float32; allowed are finite"),
        ({"candidate": torch.full((4, 3), float("inf"))}, "candidate has a row of norm inf"),
        ({"query": torch.full((2, 3), 1e19), "candidate": torch.full((4, 3), 1e19)}, "logits may reach"),
        ({"positive": torch.tensor([0, 4])}, "positive has values 0 to 4; allowed are rows of candidate, 0 to 3"),
        ({"positive": torch.tensor([-1, 1])}, "positive has values -1 to 1"),
        ({"positive": IDS.int()}, r"positive is torch.int32 of shape \(2,\); allowed is torch.int64 of shape \(2,\)"),
        ({"positive": torch.tensor([1, 1]), "symmetric": True}, "positive names a candidate twice"),
        ({"query_id": IDS}, "query_id is given without candidate_id; give both or neither"),
        ({"candidate_id": torch.arange(4)}, "candidate_id is given without query_id"),
        ({"query_id": IDS, "candidate_id": IDS}, r"candidate_id is torch.int64 of shape \(2,\); .* shape \(4,\)"),
        ({"weight": torch.ones(3)}, r"weight is torch.float32 of shape \(3,\)"),
        ({"weight": torch.tensor([1.0, -1.0])}, "weight has minimum -1.0"),
        ({"weight": torch.zeros(2)}, "weight has minimum 0.0 and sum 0.0"),
        ({"weight": torch.tensor([1.0, float("nan")])}, "weight has minimum nan"),
        ({"reduction": "sum"}, "reduction is 'sum'; allowed are 'mean' and 'none'"),
        ({"margin": float("nan")}, "margin is nan; allowed are finite numbers, and None"),
        ({"margin": "x"}, "margin is x; allowed are finite numbers, and None"),
        ({"hardness": -1.0}, "hardness is -1.0; allowed are finite numbers of at least 0"),
        ({"hardness": None}, "hardness is None; allowed are finite numbers of at least 0"),
        ({"temperature": None}, "temperature is a NoneType; allowed is a number or a tensor"),
        ({"temperature": True}, "temperature is a bool; allowed is a number or a tensor"),
        ({"temperature": "0.1"}, "temperature is a str; allowed is a number or a tensor"),
        (
            {"temperature": torch.tensor(1j)},
            "temperature is torch.complex64 of .*; allowed is one real number",
        ),
        ({"symmetric": "no"}, "symmetric is 'no'; allowed are True and False"),
        ({"query_negatives": 1}, "query_negatives is 1; allowed are True and False"),
        ({"dims": 2}, "dims is 2; allowed are ascending integers from 1 to the embeddings' width"),
        ({"hardness": 1e38}, "logits may reach"),
        ({"dims": []}, r"dims is \[\]; allowed are ascending integers from 1 to the embeddings' width"),
        ({"dims": [2, 1]}, r"dims is \[2, 1\]"),
        ({"dims": [0, 1]}, r"dims is \[0, 1\]"),
        ({"dims": [1, 4]}, r"dims is \[1, 4\]; allowed are ascending integers from 1 to the width 3"),
        ({"dims": [1], "query": torch.tensor([[0.0, 1, 1]] * 2)}, "query has a row whose first 1 values have norm 0.0"),
        ({"workspace_bytes": 0}, "workspace_bytes is 0; allowed are integers of at least 1"),
        ({"workspace_bytes": 1e6}, "workspace_bytes is 1000000.0; allowed are integers of at least 1"),
        ({"query": [[1.0, 2, 3]]}, "query is a list; allowed is a tensor, which torch.as_tensor makes"),
        ({"candidate": None}, "candidate is a NoneType; allowed is a tensor"),
        ({"positive": [0, 1]}, "positive is a list; allowed is a tensor"),
        ({"query": torch.ones(2, 3).to_sparse()}, "query has layout torch.sparse_coo; .* which its to_dense"),
        ({"engine": "cuda"}, "engine is 'cuda'; allowed are 'triton', 'tiled' and None"),
    ],
    ids=str,
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    arguments = GOOD | change
    functions = [loss] if "reduction" in change else [loss, grads]
    for function in functions:
        with pytest.raises(ValueError, match=message) as caught:
            function(
                arguments["query"],
                arguments["candidate"],
                **{k: v for k, v in arguments.items() if k not in ("query", "candidate")},
            )
        assert "\n" not in str(caught.value)


def test_numbers_of_numpy_are_numbers() -> None:
    rows = unit_rows(4, 3, torch.float32)
    given = loss(rows, rows, temperature=np.float32(0.5), margin=np.float32(0.25), hardness=np.int64(1))
    torch.testing.assert_close(given, loss(rows, rows, temperature=0.5, margin=0.25, hardness=1.0))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, "float32"], ids=str)
def test_gradients_are_floating_point(dtype: Any) -> None:
    with pytest.raises(ValueError, match="grad_dtype is .*; allowed are floating point dtypes, and None"):
        grads(torch.eye(3), torch.eye(3), temperature=0.1, grad_dtype=dtype)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bound", [0.99 * tiled.SAFE_LOGIT, 1.01 * tiled.SAFE_LOGIT])
def test_with_and_without_a_maximum_subtracted(bound: float, symmetric: bool) -> None:
    query = unit_rows(9, 3, torch.float64)
    candidate = torch.cat([-query, query])  # logits from -bound to bound
    expected = oracle(query, candidate, 1 / bound, symmetric=symmetric)
    given = grads(query.float(), candidate.float(), temperature=1 / bound, symmetric=symmetric)
    for field, value in given._asdict().items():
        assert error(value, getattr(expected, field)) < 2e-5, field


@pytest.mark.parametrize("symmetric", [False, True])
def test_small_losses_keep_their_relative_precision(symmetric: bool) -> None:
    # A solved batch: losses of 1e-16, gradients of 1e-14, far below the rounding of a log-sum-exp of 40.
    query = torch.eye(6)
    expected = oracle(query.double(), query.double(), 0.025, symmetric=symmetric)
    given = grads(query, query, temperature=0.025, symmetric=symmetric)
    exact = 5 * torch.tensor(-40.0, dtype=torch.float64).exp()  # the oracle itself rounds to 7e-15 here
    torch.testing.assert_close(given.loss.double(), exact, rtol=1e-5, atol=0)
    off_diagonal = ~torch.eye(6, dtype=torch.bool)
    torch.testing.assert_close(
        given.query_grad.double()[off_diagonal], expected.query_grad[off_diagonal], rtol=1e-5, atol=0
    )
    torch.testing.assert_close(given.query_grad.sum(1), torch.zeros(6), rtol=0, atol=1e-20)


class NoFloat64(TorchDispatchMode):
    """A device that has no float64, as far as one without can be had."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        assert all(x.dtype != torch.float64 for x in tree_leaves(found) if isinstance(x, Tensor)), func
        return found


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dims", [None, [2, 5]], ids=str)
def test_float32_needs_no_float64(symmetric: bool, dims: list[int] | None) -> None:
    kwargs = arguments(frozenset(OPTIONS) - {"query_negatives", "dims", "symmetric"}, (6, 9, 5))
    options, given = split(kwargs | {"symmetric": symmetric, "dims": dims})
    with NoFloat64():
        query, candidate = torch.randn(6, 5), torch.randn(9, 5)
        problem, weight = prepare(InfoNCEBatch(query, candidate, torch.tensor(0.1), **given), options)
        solve(problem, options, coefficient=weight)


def test_an_index_that_float32_cannot_hold_is_checked_exactly() -> None:
    positive = torch.tensor([0, 2**40 + 1])
    with pytest.raises(ValueError, match=f"positive has values 0 to {2**40 + 1}"):
        loss(torch.ones(2, 3), torch.ones(4, 3), temperature=0.1, positive=positive)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    query, candidate = unit_rows(1031, 64, torch.float32), unit_rows(2053, 64, torch.float32)
    kwargs = options("symmetric all", 1031, 2053)
    expected = oracle(query, candidate, 0.05, **kwargs)
    moved: dict[str, Any] = {key: x.cuda() if isinstance(x, Tensor) else x for key, x in kwargs.items()}
    given = grads(query.cuda(), candidate.cuda(), temperature=0.05, **moved)
    for field, value in given._asdict().items():
        assert error(value.cpu(), getattr(expected, field)) < 1e-5, field
