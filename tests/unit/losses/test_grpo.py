"""The policy loss against the published formula, its forms, and what it learns on a bandit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmemb.losses.grpo import GRPO, Normalization, Scaling, Size, group_advantages

GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])
LENGTHS = (5, 2, 7, 1, 4, 7)
LONGEST = 7


def rollouts(seed: int = 0) -> dict[str, Tensor]:
    """Six rollouts of two groups with old, new and reference log-probabilities that differ, so that some are cut."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(6, LONGEST, generator=generator, dtype=torch.float64)
    return {
        "old": old,
        "new": old + 0.4 * torch.randn(6, LONGEST, generator=generator, dtype=torch.float64),
        "reference": old + 0.4 * torch.randn(6, LONGEST, generator=generator, dtype=torch.float64),
        "rewards": torch.randn(6, generator=generator, dtype=torch.float64),
        "mask": torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None],
    }


def published(
    given: dict[str, Tensor],
    new: Tensor,
    *,
    scaling: str,
    normalization: str,
    low: float,
    high: float,
    kl_weight: float,
) -> Tensor:
    """The formula of the GRPO, Dr. GRPO and DAPO papers, a token at a time."""
    total = torch.zeros((), dtype=torch.float64)
    tokens = sum(LENGTHS)
    for row in range(6):
        own = given["rewards"][GROUPS[row] == GROUPS]
        advantage = given["rewards"][row] - own.mean()
        if scaling == "group":
            advantage = advantage / (own.std() + 1e-4)
        if scaling == "batch":
            advantage = advantage / (given["rewards"].std() + 1e-4)
        for place in range(LENGTHS[row]):
            ratio = (new[row, place] - given["old"][row, place]).exp()
            kept = torch.clamp(ratio, 1 - low, 1 + high)
            loss = -torch.min(ratio * advantage, kept * advantage)
            gap = given["reference"][row, place] - new[row, place]
            loss = loss + kl_weight * (gap.exp() - gap - 1)
            divisor = {"sequence": 6 * LENGTHS[row], "token": tokens, "constant": 6 * 16}[normalization]
            total = total + loss / divisor
    return total


@pytest.mark.parametrize("kl_weight", [0.0, 0.04])
@pytest.mark.parametrize(
    ("scaling", "normalization", "high"),
    [("group", "sequence", 0.2), ("none", "constant", 0.2), ("group", "token", 0.28), ("batch", "token", 0.28)],
    ids=["grpo", "dr_grpo", "dapo", "batch"],
)
def test_loss_and_gradients_are_the_published_ones(
    scaling: Scaling, normalization: Normalization, high: float, kl_weight: float
) -> None:
    given = rollouts()
    options: dict[str, Any] = {"scaling": scaling, "normalization": normalization, "kl_weight": kl_weight}
    ours, theirs = given["new"].clone().requires_grad_(), given["new"].clone().requires_grad_()
    policy = GRPO(clip_low=0.2, clip_high=high, **options)
    advantage = policy.advantages(given["rewards"], GROUPS)
    size = Size.of(given["mask"], longest=16)
    found = policy(ours, given["old"], advantage, given["mask"], size=size, reference=given["reference"])
    expected = published(given, theirs, low=0.2, high=high, **options)
    found.loss.backward()
    expected.backward()
    assert float(found.loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=0)
    assert 0 < int(found.clipped) < sum(LENGTHS)
    assert (float(found.kl) > 0) is (kl_weight > 0)


@pytest.mark.parametrize("normalization", ["sequence", "token", "constant"])
def test_chunks_add_up_to_the_whole(normalization: Normalization) -> None:
    given = rollouts()
    policy = GRPO(normalization=normalization, kl_weight=0.1)
    advantage = policy.advantages(given["rewards"], GROUPS)
    size = Size.of(given["mask"], longest=16)

    def loss(rows: slice) -> float:
        part = {key: value[rows] for key, value in given.items()}
        return float(
            policy(part["new"], part["old"], advantage[rows], part["mask"], size=size, reference=part["reference"]).loss
        )

    assert loss(slice(0, 2)) + loss(slice(2, 6)) == pytest.approx(loss(slice(0, 6)), abs=1e-12)


@pytest.mark.parametrize("scaling", ["none", "group", "batch"])
def test_equal_rewards_give_no_gradient_at_all(scaling: Scaling) -> None:
    given = rollouts()
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.7, 0.7, 0.7])
    new = given["new"].float().requires_grad_()
    policy = GRPO(scaling=scaling)
    advantage = policy.advantages(rewards, GROUPS)
    assert advantage.tolist() == [0.0] * 6
    size = Size.of(given["mask"], longest=16)
    policy(new, given["old"].float(), advantage, given["mask"], size=size).loss.backward()
    assert new.grad is not None
    assert not new.grad.any()


def test_what_lies_outside_the_mask_does_not_matter() -> None:
    given = rollouts()
    policy = GRPO(kl_weight=0.1)
    advantage, size = policy.advantages(given["rewards"], GROUPS), Size.of(given["mask"], longest=16)
    broken = torch.where(given["mask"], given["new"], 1e9).requires_grad_()
    found = policy(broken, given["old"], advantage, given["mask"], size=size, reference=given["reference"])
    whole = policy(given["new"], given["old"], advantage, given["mask"], size=size, reference=given["reference"])
    found.loss.backward()
    assert float(found.loss) == float(whole.loss)
    assert broken.grad is not None
    assert broken.grad.isfinite().all()
    assert not broken.grad[~given["mask"]].any()


def test_a_group_of_one_and_no_rollouts_at_all() -> None:
    assert group_advantages(torch.tensor([3.0]), torch.tensor([0])).tolist() == [0.0]
    for scaling in ("none", "group", "batch"):
        empty = group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64), scaling=scaling)
        assert empty.shape == (0,)


def test_settings_out_of_range_are_refused() -> None:
    for name, value in {"clip_low": 1.0, "clip_high": -0.1, "kl_weight": -1.0}.items():
        with pytest.raises(ValueError, match=rf"grpo\.{name} is {value}; give"):
            GRPO(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("exploration", [0.0, 0.5])
def test_a_bandit_finds_its_best_arm_also_when_explored_off_policy(exploration: float) -> None:
    """Two arms, a noisy reward; with a fair coin mixed in, importance weights keep the gradient the policy's own."""
    generator = torch.Generator().manual_seed(3)
    logit = torch.tensor(-1.0, requires_grad=True)
    policy = GRPO(scaling="none")
    optimizer = torch.optim.SGD([logit], lr=1.0)
    for _ in range(150):
        own = torch.stack([-logit, logit]).log_softmax(0)
        drawn_from = exploration / 2 + (1 - exploration) * own.detach().exp()
        arms = torch.multinomial(drawn_from, 64, replacement=True, generator=generator)
        rewards = arms * 0.5 + 0.3 * torch.randn(64, generator=generator)
        groups = torch.arange(64) // 8
        old = own.detach()[arms]
        loss = policy(
            own[arms][:, None],
            old[:, None],
            policy.advantages(rewards, groups),
            torch.ones(64, 1, dtype=torch.bool),
            size=Size(64, 64, 1),
            weight=(old - drawn_from[arms].log()).exp(),
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 1 / (1 + math.exp(-2 * float(logit))) > 0.95


def test_importance_weights_make_the_explored_gradient_the_policys_own() -> None:
    """Expected gradients under exploration, by enumeration of both arms, equal those without it."""
    logit = torch.tensor(-1.2, dtype=torch.float64, requires_grad=True)
    rewards, policy = torch.tensor([0.0, 1.0], dtype=torch.float64), GRPO()
    gradients = []
    for exploration in (0.0, 0.5):
        own = torch.stack([-logit, logit]).log_softmax(0)
        drawn_from = exploration / 2 + (1 - exploration) * own.detach().exp()
        weight = own.detach().exp() / drawn_from
        losses = [
            policy(
                own[arm : arm + 1, None],
                own[arm : arm + 1, None].detach(),
                rewards[arm : arm + 1],
                torch.ones(1, 1, dtype=torch.bool),
                size=Size(1, 1, 1),
                weight=weight[arm : arm + 1],
            ).loss
            * drawn_from[arm]
            for arm in (0, 1)
        ]
        (gradient,) = torch.autograd.grad(torch.stack(losses).sum(), logit)
        gradients.append(float(gradient))
    assert gradients[0] == pytest.approx(gradients[1], abs=1e-12)
