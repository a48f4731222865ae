"""The loss module: temperature, clamp, and agreement of its two ways to a gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from mmemb.losses import InfoNCE


def test_the_temperature_is_stored_as_its_logarithm() -> None:
    loss = InfoNCE(temperature=0.07)
    assert set(loss.state_dict()) == {"log_temperature"}
    assert loss.log_temperature.item() == pytest.approx(math.log(0.07))
    assert loss.temperature.item() == pytest.approx(0.07)


def test_a_fixed_temperature_is_no_parameter_but_is_saved() -> None:
    loss = InfoNCE(temperature=0.07, learnable=False)
    assert list(loss.parameters()) == []
    assert float(loss.state_dict()["log_temperature"]) == pytest.approx(math.log(0.07))
    assert loss.temperature_term(loss.with_grads(torch.eye(3), torch.eye(3))) is None


def test_a_temperature_that_left_its_range_is_clamped_and_can_come_back() -> None:
    loss = InfoNCE(temperature=0.05, minimum=0.02, maximum=0.5)
    with torch.no_grad():
        loss.log_temperature.fill_(math.log(0.001))
    assert loss.temperature.item() == pytest.approx(0.02)
    loss(-torch.eye(3), torch.eye(3)).backward()  # wrong answers: a higher temperature lowers the loss
    assert loss.log_temperature.grad is not None
    assert float(loss.log_temperature.grad) < 0


@pytest.mark.parametrize("symmetric", [False, True])
def test_with_grads_equals_autograd(symmetric: bool) -> None:
    loss = InfoNCE(symmetric=symmetric).double()
    query, candidate = (normalize(torch.randn(n, 5).double(), dim=1).requires_grad_() for n in (6, 9))
    kwargs = {
        "positive": torch.tensor([3, 0, 8, 1, 2, 5]),
        "query_id": torch.randint(3, (6,)),
        "candidate_id": torch.randint(3, (9,)),
        "weight": torch.rand(6),
    }
    expected = loss(query, candidate, **kwargs)
    gradients = torch.autograd.grad(expected, [query, candidate, loss.log_temperature])
    result = loss.with_grads(query.detach(), candidate.detach(), **kwargs)
    term = loss.temperature_term(result)
    assert term is not None
    term.backward()
    torch.testing.assert_close(result.loss, expected.detach())
    for given, wanted in zip((*result[1:3], loss.log_temperature.grad), gradients, strict=True):
        torch.testing.assert_close(given, wanted)


@pytest.mark.parametrize(
    "arguments", [{"temperature": 0.0}, {"minimum": 1e-4}, {"temperature": 2.0}, {"maximum": math.inf}], ids=str
)
def test_a_range_without_sense_is_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"allowed is 0.001 <= minimum <= temperature <= maximum"):
        InfoNCE(**arguments)  # type: ignore[arg-type]
