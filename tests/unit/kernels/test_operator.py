"""The operator under autograd and the compiler."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from mmemb.kernels import InfoNCEBatch, LossOptions, infonce, infonce_with_grads, operator
from tests.unit.kernels.cases import OPTIONS, arguments, grads, loss, oracle, split, unit_rows


def leaves(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, candidates, temperature."""
    made = [unit_rows(5, 4, dtype), unit_rows(8, 4, dtype), torch.tensor(0.1, dtype=dtype)]
    return [leaf.requires_grad_() for leaf in made]


def flat(query: Tensor, candidate: Tensor, temperature: Tensor, **arguments: Any) -> tuple[Any, ...]:
    """The operator's arguments, all but the reduction and whether gradients are wanted."""
    options, rest = split(arguments)
    return operator.flat(InfoNCEBatch(query, candidate, temperature, **rest), options)


def test_the_operators_arguments_are_the_fields_of_both_structures() -> None:
    schema = torch.ops.mmemb.infonce.default._schema
    names = [field.name for part in (InfoNCEBatch, LossOptions) for field in fields(part)]
    assert [argument.name for argument in schema.arguments] == [*names, "reduction", "gradients"]
    backward = torch.ops.mmemb.infonce_backward.default._schema
    assert [argument.name for argument in backward.arguments] == ["grad", *names, "reduction", "gradients"]


def test_options_and_tensors_come_out_of_the_operator_as_they_went_in() -> None:
    options = LossOptions(margin=0.1, dims=[2, 4], symmetric=True, engine="tiled", workspace_bytes=1000)
    batch = InfoNCEBatch(*leaves(), weight=torch.ones(5))
    arguments = [list(x) if isinstance(x, tuple) else x for x in operator.flat(batch, options)]
    found, restored = operator._restored((*arguments, "mean", True))
    assert restored == options
    assert operator._restored((*arguments, "mean", True))[1] is restored  # built and checked once
    assert all(getattr(found, field.name) is getattr(batch, field.name) for field in fields(batch))


@pytest.mark.slow
@pytest.mark.parametrize(("reduction", "gradients"), [("mean", True), ("mean", False), ("none", False)])
@pytest.mark.parametrize("everything", [False, True])
def test_opcheck(reduction: str, gradients: bool, everything: bool) -> None:
    given = flat(*leaves(), **arguments(frozenset(OPTIONS) if everything else frozenset(), (5, 8, 4)))
    torch.library.opcheck(torch.ops.mmemb.infonce.default, (*given, reduction, gradients))


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_of_what_the_backward_pass_calls(transposed: bool) -> None:
    query, candidate, temperature = (leaf.detach() for leaf in leaves())
    if transposed:
        query, candidate = query.T.contiguous().T, candidate.T.contiguous().T
    gradients = torch.randn(5, 4), torch.randn(8, 4), torch.tensor(2.0)
    chain = torch.ops.mmemb.infonce_chain.default
    torch.library.opcheck(chain, (torch.tensor(3.0), query, candidate, temperature, *gradients))
    backward = torch.ops.mmemb.infonce_backward.default
    given = flat(query, candidate, temperature, query_negatives=True)
    torch.library.opcheck(backward, (torch.randn(5), *given, "none", False))


@pytest.mark.slow
@pytest.mark.parametrize(("reduction", "gradients"), [("mean", True), ("none", False)])
@pytest.mark.parametrize("query_negatives", [False, True])
def test_opcheck_of_transposed_embeddings(reduction: str, gradients: bool, query_negatives: bool) -> None:
    query, candidate = (torch.randn(4, rows).T.requires_grad_() for rows in (5, 8))
    given = flat(query, candidate, leaves()[2], query_negatives=query_negatives)
    torch.library.opcheck(torch.ops.mmemb.infonce.default, (*given, reduction, gradients))


def test_gradients_are_contiguous_whatever_the_inputs_are() -> None:
    query, candidate = torch.randn(4, 5).T, torch.randn(4, 8).T
    for query_negatives in (False, True):
        found = grads(query, candidate, temperature=0.1, query_negatives=query_negatives)
        assert all(each.is_contiguous() for each in found)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break(reduction: Any) -> None:
    options, rest = split(arguments(frozenset(OPTIONS), (5, 8, 4)))

    def by_autograd(query: Tensor, candidate: Tensor, temperature: Tensor) -> Tensor:
        return infonce(
            query * 1.0, candidate, temperature=temperature, reduction=reduction, options=options, **rest
        ).sum()

    def directly(query: Tensor, candidate: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
        return infonce_with_grads(InfoNCEBatch(query, candidate, temperature, **rest), options)

    inputs = leaves()
    expected = torch.autograd.grad(by_autograd(*inputs), inputs)
    given = torch.autograd.grad(torch.compile(by_autograd, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b)
    compiled = torch.compile(directly, fullgraph=True, backend="aot_eager")(*inputs)
    for a, b in zip(compiled, directly(*inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused(reduction: Any) -> None:
    query, candidate, temperature = leaves()
    value = loss(query, candidate, temperature=temperature, reduction=reduction).sum()
    (first,) = torch.autograd.grad(value, query, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once; a second derivative was asked for"):
        (value + first.square().sum()).backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_each_input_may_be_the_only_one_with_a_gradient(reduction: Any) -> None:
    whole = leaves()
    value = loss(whole[0], whole[1], temperature=whole[2], reduction=reduction).sum()
    expected = torch.autograd.grad(value, whole)
    for number, gradient in enumerate(expected):
        inputs = [leaf.detach().clone().requires_grad_(number == i) for i, leaf in enumerate(whole)]
        loss(inputs[0], inputs[1], temperature=inputs[2], reduction=reduction).sum().backward()
        torch.testing.assert_close(inputs[number].grad, gradient)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_incoming_gradient_may_be_larger_than_float16_holds(reduction: Any) -> None:
    inputs = [unit_rows(5, 4, torch.float16).requires_grad_(), unit_rows(8, 4, torch.float16).requires_grad_()]
    expected = grads(*inputs, temperature=1.0)
    losses = loss(*inputs, temperature=1.0, reduction=reduction)
    (losses.mean() * 2.0**16).backward()  # a gradient scaler's first factor; float16 ends at 65504
    for leaf, gradient in zip(inputs, expected[1:3], strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.double() / 2**16, gradient.double(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_too_small_for_float16_are_scaled_before_they_are_rounded(reduction: Any) -> None:
    rows = torch.eye(8, dtype=torch.float16)  # gradients of 5e-9; float16 begins at 6e-8
    inputs = [rows.clone().requires_grad_(), rows.clone().requires_grad_()]
    expected = oracle(rows, rows, 0.05)
    (loss(*inputs, temperature=0.05, reduction=reduction).mean() * 2.0**16).backward()
    for leaf, gradient in zip(inputs, expected[1:3], strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.double() / 2**16, gradient, rtol=1e-3, atol=0)
    wide = grads(rows, rows, temperature=0.05, grad_dtype=torch.float32)
    torch.testing.assert_close(wide.query_grad.double(), expected.query_grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("options", [frozenset[str](), frozenset(OPTIONS)], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_16_bits_are_rounded_once(dtype: torch.dtype, options: frozenset[str]) -> None:
    query, candidate = unit_rows(23, 17, dtype), unit_rows(31, 17, dtype)
    kwargs = arguments(options, (23, 31, 17)) | {"temperature": 0.05}
    given = grads(query, candidate, **kwargs)
    exact = grads(query.float(), candidate.float(), **kwargs)
    assert torch.equal(given.query_grad, exact.query_grad.to(dtype))
    assert torch.equal(given.candidate_grad, exact.candidate_grad.to(dtype))


def test_the_temperatures_gradient_has_its_shape_and_dtype() -> None:
    temperature = torch.full((1,), 0.1, dtype=torch.float64, requires_grad=True)
    query = unit_rows(3, 4, torch.bfloat16)
    loss(query, query, temperature=temperature).backward()
    assert temperature.grad is not None
    assert temperature.grad.shape == (1,)
    assert temperature.grad.dtype == torch.float64
