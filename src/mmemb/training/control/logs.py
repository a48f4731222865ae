"""Computes what a step of the control phase logs about its rollouts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmemb.drawing.rollout_table import RolloutRow
from mmemb.inference.rollout import Rollouts
from mmemb.losses.collectives import all_sum, world_size
from mmemb.training.control.decision import Policy
from mmemb.training.control.rewards import Outcome

SHOWN = 12
"""Number of rollouts per table."""


def measures(
    outcome: Outcome, rollouts: Rollouts, policy: Policy, values: dict[str, Tensor], total: Tensor
) -> dict[str, float]:
    """Measures a step's rollouts: rewards, their spread, entropy, cost, and regret against the oracle decision."""
    logs = {}
    for name, value in {**values, "total": total}.items():
        logs[f"reward/{name}"], logs[f"reward_spread/{name}"] = value.mean(), value.std()
    groups = total.view(-1, rollouts.group_size)
    logs["zero_spread_share"] = (groups.amax(1) == groups.amin(1)).float().mean()
    log_prob = policy.log_prob(rollouts.decision_logits)
    think = log_prob[:, 0].exp()
    logs["decision_entropy"] = -(log_prob.exp() * log_prob).sum(1).mean()
    logs["think_probability"] = think.mean()
    logs["invocation_rate"] = outcome.think.float().mean()
    logs["tokens_per_query"] = outcome.tokens.float().mean()
    logs["truncated_share"] = outcome.truncated.float().mean()
    # Reward of the better decision minus the policy's expected reward, over queries with rollouts of both kinds.
    reasoned, direct = (outcome.mean_by_query(total, rows) for rows in (outcome.think, ~outcome.think))
    regret = torch.maximum(reasoned, direct) - (think * reasoned + (1 - think) * direct)
    known = regret.isfinite()
    logs["regret"] = regret[known].mean() if known.any() else torch.zeros(())
    utility = outcome.mean_by_query(outcome.log_probability - outcome.direct_log_probability, outcome.think)
    pays = utility[utility.isfinite()] > 0
    logs["utility_positive_share"] = pays.float().mean() if len(pays) else torch.zeros(())
    return {name: float(value) for name, value in logs.items()}


def over_ranks(logs: Mapping[str, float | Tensor], *, device: torch.device) -> dict[str, Tensor]:
    """Averages the values over the ranks. All ranks must log the same names."""
    values = torch.stack(
        [torch.as_tensor(value, dtype=torch.float32, device=device).detach() for value in logs.values()]
    )
    return dict(zip(logs, all_sum(values) / world_size(), strict=True))


def shown(outcome: Outcome, rollouts: Rollouts, policy: Policy, total: Tensor) -> list[RolloutRow]:
    """Picks rollouts to look at: the first rollout of evenly spaced queries."""
    count = min(SHOWN, len(outcome.pairs))
    think = policy.log_prob(rollouts.decision_logits)[:, 0].exp()
    rows = []
    for number in range(count):
        query = (2 * number + 1) * len(outcome.pairs) // (2 * count)
        row = query * rollouts.group_size
        rows.append(
            RolloutRow(
                pair=outcome.pairs[query],
                thought=bool(outcome.think[row]),
                think_probability=float(think[query]),
                rationale=outcome.rationale[row],
                tokens=int(outcome.tokens[row]),
                direct_rank=float(outcome.direct_rank[row]),
                rank=float(outcome.rank[row]),
                reward=float(total[row]),
            )
        )
    return rows
