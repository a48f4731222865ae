"""The loss module: temperature, clamp, and agreement of its two ways to a gradient."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from mmemb.kernels import InfoNCEBatch, LossOptions
from mmemb.losses import InfoNCE
from mmemb.training.contrast import PathLoss, contrast
from tests.distributed.ranks import OPTIONS


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


@pytest.mark.parametrize("learnable", [True, False])
def test_in_a_16_bit_model_the_temperature_stays_float32(learnable: bool) -> None:
    loss = InfoNCE(temperature=0.05, learnable=learnable).to(torch.bfloat16)
    assert float(loss.temperature) == pytest.approx(0.05, rel=1e-6)
    assert loss.half().log_temperature.dtype == torch.float32
    assert loss.double().log_temperature.dtype == torch.float64
    assert loss.half().log_temperature.dtype == torch.float32
    assert loss.to("meta").log_temperature.is_meta


def test_the_temperature_of_a_16_bit_model_learns() -> None:
    loss = InfoNCE(temperature=0.05).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-3)
    rows = torch.eye(3, dtype=torch.bfloat16)
    for _ in range(5):
        optimizer.zero_grad()
        loss(rows.roll(1, 0), rows).backward()  # wrong answers: a higher temperature lowers the loss
        optimizer.step()
    assert float(loss.temperature) > 0.0502


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": [2.5]}, r"dims is \[2.5\]; allowed are ascending integers"),
        ({"dims": 3}, "dims is 3; allowed are ascending integers"),
        ({"dims": [4, 2]}, r"dims is \[4, 2\]; allowed are ascending integers"),
        ({"hardness": -1.0}, "hardness is -1"),
        ({"margin": math.nan}, "margin is nan"),
        ({"symmetric": "no"}, "symmetric is 'no'; allowed are True and False"),
        ({"engine": "cuda"}, "engine is 'cuda'; allowed are 'triton', 'tiled' and None"),
        ({"gather_dtype": "float16"}, "gather_dtype is 'float16'; allowed are 'bfloat16' and null"),
        ({"workspace_mib": 0}, "workspace_mib is 0"),
        ({"workspace_mib": 2.5}, "workspace_mib is 2.5; allowed are integers of at least 1, and null"),
        ({"learnable": "no"}, "learnable is 'no'; allowed are True and False"),
    ],
)
def test_what_no_embedding_could_satisfy_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InfoNCE(**options)


def test_a_width_that_no_memory_holds_is_allowed_until_embeddings_are_seen() -> None:
    loss = InfoNCE(dims=[2, 10**12])
    with pytest.raises(ValueError, match="allowed are ascending integers from 1 to the width 3"):
        loss(torch.eye(3), torch.eye(3))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["plain", *OPTIONS])
def test_with_grads_equals_autograd(symmetric: bool, options: dict[str, Any]) -> None:
    loss = InfoNCE(symmetric=symmetric, **options).double()
    query, candidate = (normalize(torch.randn(n, 6).double(), dim=1).requires_grad_() for n in (6, 9))
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


def test_every_option_is_one_of_the_module_and_every_tensor_one_of_a_call() -> None:
    of_the_module = set(inspect.signature(InfoNCE).parameters)
    assert {field.name for field in fields(LossOptions)} - of_the_module == {"workspace_bytes"}  # in MiB, for people
    assert "workspace_mib" in of_the_module
    tensors = {field.name for field in fields(InfoNCEBatch)} - {"temperature"}  # the module's own
    for call in (InfoNCE.forward, InfoNCE.with_grads):
        assert tensors == set(inspect.signature(call).parameters) - {"self"}


def test_a_symmetric_loss_with_several_rows_of_one_query_says_what_to_change() -> None:
    rows = torch.eye(3)
    identities = SimpleNamespace(query_id=torch.arange(3), candidate_id=torch.arange(3), positive=torch.arange(3))
    repeated = torch.tensor([0, 2, 2])
    paths = [PathLoss("direct", "direct", 1.0, torch.arange(3)), PathLoss("reasoned", "reasoned", 1.0, repeated)]
    embeddings = {"direct": rows, "reasoned": rows, "target": rows}
    assert contrast(InfoNCE(), embeddings, identities, paths).loss.isfinite()
    assert contrast(InfoNCE(symmetric=True), embeddings, identities, paths[:1]).loss.isfinite()
    message = "infonce.symmetric is true and several rows of the reasoned path .* set symmetric to false.* not `all`"
    with pytest.raises(ValueError, match=message):
        contrast(InfoNCE(symmetric=True), embeddings, identities, paths)


@pytest.mark.parametrize(
    "arguments", [{"temperature": 0.0}, {"minimum": 1e-4}, {"temperature": 2.0}, {"maximum": math.inf}], ids=str
)
def test_a_range_without_sense_is_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"allowed is 0.001 <= minimum <= temperature <= maximum"):
        InfoNCE(**arguments)  # type: ignore[arg-type]
