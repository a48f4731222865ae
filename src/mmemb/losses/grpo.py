"""Group-relative policy optimisation: advantages within groups, a clipped ratio per token, a KL to a reference.

    A_i    = (r_i - mean of the group) / scale
    rho_it = pi(o_it) / pi_old(o_it)
    l_it   = -min(rho_it A_i, clip(rho_it, 1 - clip_low, 1 + clip_high) A_i) + kl_weight KL_it
    KL_it  = exp(d_it) - d_it - 1   with   d_it = log pi_ref(o_it) - log pi(o_it)

GRPO (arXiv 2402.03300) divides by the group's standard deviation and averages l over tokens, then over rollouts. Dr.
GRPO (arXiv 2503.20783) drops the deviation and divides by a constant length. DAPO (arXiv 2503.14476) averages over all
tokens and clips asymmetrically. The KL estimator is the non-negative one of Schulman (2020).

Legend: R rollouts, L tokens of the longest. Everything is one pass over [R, L]. Nothing is kept between calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmemb.common.checks import check_numbers
from mmemb.losses.collectives import all_sum, world_size
from mmemb.registry import Component

Scaling = Literal["none", "group", "batch"]
Normalization = Literal["sequence", "token", "constant"]

_EPSILON = 1e-4
"""Added to a standard deviation, as the published implementations do."""


@dataclass(frozen=True)
class Size:
    """The counts that divide a policy loss, over all chunks and ranks of a step.

    Attributes:
        rollouts: R.
        tokens: tokens that count.
        longest: L_max, the constant length of Dr. GRPO.
    """

    rollouts: float
    tokens: float
    longest: int

    @classmethod
    def of(cls, mask: Tensor, *, longest: int) -> Size:
        """Counts the rollouts of all ranks, given this rank's mask [R, L] bool of tokens that count."""
        counts = all_sum(torch.tensor([float(len(mask)), float(mask.sum())], dtype=torch.float64, device=mask.device))
        return cls(max(float(counts[0]), 1.0), max(float(counts[1]), 1.0), longest)


@dataclass
class PolicyLoss:
    """A policy loss, and the values to report with it.

    Attributes:
        loss: 0-d, with a graph.
        kl: sum of the KL estimates over tokens, 0-d, detached; 0 without a reference.
        clipped: number of tokens whose ratio was clipped (the clipped term is the smaller one), 0-d.
    """

    loss: Tensor
    kl: Tensor
    clipped: Tensor


def group_advantages(rewards: Tensor, groups: Tensor, *, scaling: Scaling = "group") -> Tensor:
    """Returns rewards relative to their group's mean, exactly 0 in a group whose rewards are equal.

    Args:
        rewards: [R] float.
        groups: [R] int64, from 0, the group of each rollout. All rollouts of a group are on one rank.
        scaling: divide by nothing (``none``), by the group's standard deviation (``group``), or by the deviation of all
            rewards of the step, over all ranks (``batch``). Both deviations are unbiased, plus 1e-4.

    Returns:
        [R], in the dtype of the rewards.
    """
    if not len(rewards) and scaling != "batch":
        return rewards.clone()
    values = rewards.double()
    count = int(groups.max()) + 1 if len(groups) else 0
    size = values.new_zeros(count).index_add(0, groups, torch.ones_like(values))
    mean = values.new_zeros(count).index_add(0, groups, values) / size.clamp(min=1)
    highest = values.new_full((count,), -torch.inf).scatter_reduce(0, groups, values, "amax")
    lowest = values.new_full((count,), torch.inf).scatter_reduce(0, groups, values, "amin")
    # The mean of equal numbers may have a rounding error, which dividing by a deviation of 0 would blow up.
    advantages = torch.where((highest > lowest)[groups], values - mean[groups], 0.0)
    if scaling == "group":
        variance = values.new_zeros(count).index_add(0, groups, advantages**2) / (size - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt()[groups] + _EPSILON)
    elif scaling == "batch":
        one = values.new_tensor([float(len(values)), float(values.sum())])
        total, summed = all_sum(one)
        squares = all_sum(((values - summed / total.clamp(min=1)) ** 2).sum())
        advantages = advantages / ((squares / (total - 1).clamp(min=1)).sqrt() + _EPSILON)
    return advantages.to(rewards.dtype)


class GRPO(Component, kind="policy_loss", name="grpo"):
    """The clipped policy loss in its published forms.

    ``scaling: group`` with ``normalization: sequence`` is GRPO. ``none`` with ``constant`` is Dr. GRPO. ``group`` with
    ``token`` and ``clip_high: 0.28`` is DAPO.

    Args:
        scaling: what divides the advantages, see `group_advantages`.
        normalization: ``sequence`` averages over a rollout's tokens, then over rollouts. ``token`` averages over the
            tokens of all rollouts. ``constant`` divides the sum by rollouts times the longest possible length.
        clip_low: ratios are clipped this far below 1.
        clip_high: ratios are clipped this far above 1.
        kl_weight: weight of the KL to the reference.

    Raises:
        ValueError: a bound or weight is negative, or ``clip_low`` is not below 1.
    """

    def __init__(
        self,
        *,
        scaling: Scaling = "group",
        normalization: Normalization = "token",
        clip_low: float = 0.2,
        clip_high: float = 0.28,
        kl_weight: float = 0.0,
    ) -> None:
        check_numbers("grpo", at_least=0, below=1, clip_low=clip_low)
        check_numbers("grpo", at_least=0, clip_high=clip_high, kl_weight=kl_weight)
        self.scaling: Scaling = scaling
        self.normalization: Normalization = normalization
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.kl_weight = kl_weight

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """Returns `group_advantages` with this scaling."""
        return group_advantages(rewards, groups, scaling=self.scaling)

    def __call__(
        self,
        log_prob: Tensor,
        old_log_prob: Tensor,
        advantage: Tensor,
        mask: Tensor,
        *,
        size: Size,
        reference: Tensor | None = None,
        reference_mask: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> PolicyLoss:
        """Returns the loss of some rollouts of a step.

        Summed over all rollouts and averaged over ranks, as DDP does, it is the loss of the step.

        Args:
            log_prob: [R, L], log pi, with a graph.
            old_log_prob: [R, L], log-probabilities when the tokens were drawn.
            advantage: [R].
            mask: [R, L] bool, tokens that count.
            size: of the whole step.
            reference: [R, L], log pi_ref; None for no KL.
            reference_mask: [R, L] bool, tokens whose KL counts; default all of ``mask``.
            weight: [R], importance weights of rollouts that another distribution drew. They multiply the clipped term.
        """
        ratio = torch.where(mask, log_prob - old_log_prob, 0.0).exp()
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        signed = advantage[:, None]
        gain = torch.minimum(ratio * signed, clipped * signed)
        if weight is not None:
            gain = gain * weight[:, None]
        per_token = -gain
        kl = torch.zeros((), device=log_prob.device)
        if reference is not None and self.kl_weight:
            near = mask if reference_mask is None else mask & reference_mask
            difference = torch.where(near, reference - log_prob, 0.0)
            estimate = difference.exp() - difference - 1
            per_token = per_token + self.kl_weight * estimate
            kl = estimate.detach().sum()
        per_token = torch.where(mask, per_token, 0.0)
        if self.normalization == "sequence":
            loss = (per_token.sum(1) / mask.sum(1).clamp(min=1)).sum() / size.rollouts
        elif self.normalization == "token":
            loss = per_token.sum() / size.tokens
        else:
            loss = per_token.sum() / (size.rollouts * size.longest)
        cut = mask & (clipped * signed < ratio * signed)
        return PolicyLoss(loss * world_size(), kl, cut.sum())
