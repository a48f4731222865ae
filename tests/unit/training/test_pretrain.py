"""Next-token pretraining: the loss is the mean over response tokens, whatever the chunk size."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmemb.components.backbones.tiny import TinyBackbone
from mmemb.components.poolers.embed_token import EmbedToken
from mmemb.data.augment import PictureAugment
from mmemb.data.bundled import PretrainingSamples
from mmemb.interfaces import Model
from mmemb.training.joint.objective import Joint
from mmemb.training.objective import StepContext
from mmemb.training.pretrain import NextToken
from mmemb.types import ModelInputs, Pair


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(TinyBackbone(weights="random"), EmbedToken())


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    samples = PretrainingSamples(1)
    return [samples[index] for index in range(7)]


def step(model: Model, pairs: list[Pair], **settings: object) -> tuple[float, dict[str, torch.Tensor]]:
    """Returns the loss of one step and its gradients."""
    model.backbone.zero_grad()
    objective = NextToken(**settings)  # type: ignore[arg-type]
    logs = objective.step(model, objective.collate(model, pairs, 3), StepContext())
    named = model.backbone.named_parameters()
    return float(logs["loss"]), {name: value.grad.clone() for name, value in named if value.grad is not None}


def test_the_loss_is_the_mean_over_the_tokens_of_all_responses(model: Model, pairs: list[Pair]) -> None:
    losses = []
    for pair in pairs:
        inputs = model.backbone.prepare_response([pair.query], [pair.positive.text])
        labels = inputs.labels[0, 1:]
        logits = model.backbone.logits(model.backbone(inputs))[0, :-1]
        losses.append(F.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none"))
    loss, _ = step(model, pairs, chunk_size=3)
    assert loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_chunks_do_not_change_the_gradient(model: Model, pairs: list[Pair]) -> None:
    whole_loss, whole = step(model, pairs, chunk_size=7)
    for chunk_size in (1, 3):
        loss, gradients = step(model, pairs, chunk_size=chunk_size)
        assert loss == pytest.approx(whole_loss, rel=1e-5)
        assert gradients.keys() == whole.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, whole[name], atol=1e-5, rtol=1e-4)


def test_augmentation_depends_on_the_row_and_not_on_the_chunk(model: Model, pairs: list[Pair]) -> None:
    losses = {step(model, pairs, chunk_size=size, augment=PictureAugment())[0] for size in (2, 7)}
    assert max(losses) == pytest.approx(min(losses), rel=1e-5)
    assert min(losses) != step(model, pairs, chunk_size=7)[0]


def test_a_step_moves_each_chunk_itself(model: Model, pairs: list[Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    objective, moved = NextToken(chunk_size=3), []
    batch = objective.collate(model, pairs, 3)
    assert batch.to(torch.device("meta")) is batch
    assert not any(chunk.labels.is_meta for chunk in batch.chunks)
    of_class = ModelInputs.to

    def to(inputs: ModelInputs, device: torch.device) -> ModelInputs:
        moved.append((id(inputs), device))
        return of_class(inputs, device)

    monkeypatch.setattr(ModelInputs, "to", to)
    objective.step(model, batch, StepContext())
    assert moved == [(id(chunk), model.backbone.device) for chunk in batch.chunks]


@pytest.mark.parametrize("objective", [NextToken, Joint])
def test_a_chunk_holds_at_least_one_row(objective: type[NextToken | Joint]) -> None:
    with pytest.raises(ValueError, match=r"\.chunk_size is 0; give 1 or more"):
        objective(chunk_size=0)
