"""The control phase: the model learns from its own rollouts when to reason, and what to write (GRPO).

A step samples G rollouts per query, scores the embedding of each among the task's own candidates, and minimises

    L = decision_weight GRPO(decision) + rationale_weight GRPO(rationale tokens)
        + direct_weight InfoNCE(e_d, e_t) + reasoned_weight InfoNCE(e_r, e_t)

The advantage of a decision compares its total reward with all rollouts of the query. The advantage of a rationale
compares it only with the rollouts that reason too. So a rationale gets no credit for a query on which any reasoning
helps. Early in the phase a fair coin is mixed into the decision (the exploration floor). Importance weights
pi / (the probability that was drawn from), at most 1 / (1 - exploration), keep the gradient that of the policy. The
contrastive losses continue on the same rollouts, which keeps the embedding in place.

Cost of a step over N queries: N prompts and their rollouts without a graph, N targets twice, and one pass with
gradients over N prompts and the rollouts that reason. A KL term adds a second such pass without gradients. Memory
holds the graph of one chunk.

GRPO for the reasoning decision comes from the paper MMEmb-R1 (arXiv 2604.06156). The rewards, the separate advantages
and the exploration floor are our choice.

Legend: N queries, G rollouts per query, R = N G, L longest rationale, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from mmemb.common.checks import check_numbers
from mmemb.drawing.rollout_table import draw_rollouts
from mmemb.inference.encoder import Encoder, evaluating
from mmemb.inference.rollout import Rollouts, rollout
from mmemb.interfaces import Model, SetupContext
from mmemb.losses.collectives import all_sum, world_size
from mmemb.losses.grpo import GRPO, PolicyLoss, Size
from mmemb.losses.infonce import InfoNCE
from mmemb.training.contrast import PathLoss, contrast
from mmemb.training.control.batch import ControlBatch, control_batch
from mmemb.training.control.candidate_bank import CandidateBank
from mmemb.training.control.decision import Policy, sample, standardised
from mmemb.training.control.logs import measures, over_ranks, shown
from mmemb.training.control.plan import Plan
from mmemb.training.control.replay import ReferencePolicy, differentiable, replay
from mmemb.training.control.rewards import Format, Outcome, OverLength, Reward, Utility
from mmemb.training.objective import Objective, StepContext
from mmemb.types import Item, Pair


class Control(Objective, name="control"):
    """Applies GRPO to decision and rationale in the model's rollouts, with contrastive losses on the same batch.

    Args:
        rewards: what a rollout is worth. Rollouts are compared by the weighted sum.
        grpo: the policy loss.
        group_size: G, rollouts per query.
        temperature: sampling temperature of rationale tokens in rollouts. The decision has its own scale: the model
            reasons with probability sigmoid((l_think - l_emb - center) / spread). Center and spread are the median and
            the standard deviation of l_think - l_emb over the phase's queries at the start of the phase. So both
            decisions are equally likely at first.
        max_new_tokens: maximum number of rationale tokens per rollout.
        exploration: share of a fair coin in the drawn decision at the first step of the phase. It falls linearly.
        final_exploration: share of the fair coin at the last step of the phase.
        decision_weight: weight of the decision's policy loss.
        rationale_weight: weight of the rationale tokens' policy loss.
        direct_weight: weight of the direct path's InfoNCE.
        reasoned_weight: weight of the reasoned path's InfoNCE, over the rollouts that reason.
        infonce: the contrastive loss. null takes the loss of the joint phase, with its temperature.
        chunk_size: queries per backward pass, each with all its rollouts.
        iterations: updates on the same rollouts. Only the first includes the contrastive losses.
        bank_size: maximum number of candidates per task that rollouts are scored against.
        refresh_every: steps after which the candidates are embedded again.
        score_temperature: divides the cosines in the probability of a positive.
        rollout_batch_size: number of rollouts decoded together, and of candidates embedded together.
        show_every: steps between two tables of sampled rollouts in the run's log. 0 means no tables.

    Raises:
        ValueError: a number is out of its range, or there is no reward.
    """

    needs_candidates = True

    def __init__(
        self,
        *,
        rewards: list[Reward] | None = None,
        grpo: GRPO | None = None,
        group_size: int = 8,
        temperature: float = 1.0,
        max_new_tokens: int = 48,
        exploration: float = 0.5,
        final_exploration: float = 0.1,
        decision_weight: float = 1.0,
        rationale_weight: float = 0.5,
        direct_weight: float = 0.5,
        reasoned_weight: float = 0.5,
        infonce: InfoNCE | None = None,
        chunk_size: int = 16,
        iterations: int = 1,
        bank_size: int = 256,
        refresh_every: int = 20,
        score_temperature: float = 0.05,
        rollout_batch_size: int = 256,
        show_every: int = 20,
    ) -> None:
        super().__init__()
        check_numbers(
            "control",
            at_least=1,
            chunk_size=chunk_size,
            max_new_tokens=max_new_tokens,
            iterations=iterations,
            bank_size=bank_size,
            refresh_every=refresh_every,
            rollout_batch_size=rollout_batch_size,
        )
        check_numbers("control", at_least=2, group_size=group_size)  # one rollout cannot be compared
        check_numbers("control", at_least=0, show_every=show_every)
        check_numbers("control", above=0, temperature=temperature, score_temperature=score_temperature)
        check_numbers("control", at_least=0, at_most=1, exploration=exploration)
        check_numbers("control", at_least=0, at_most=exploration, final_exploration=final_exploration)
        self.rewards = [Utility(), Format(weight=0.1), OverLength(weight=0.1)] if rewards is None else rewards
        names = [reward.name for reward in self.rewards]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"control: the rewards are {names or 'none'}; give at least one, and each class once")
        self.grpo = grpo if grpo is not None else GRPO(scaling="batch")
        self.group_size = group_size
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.exploration = exploration
        self.final_exploration = final_exploration
        self.decision_weight = decision_weight
        self.rationale_weight = rationale_weight
        self.direct_weight = direct_weight
        self.reasoned_weight = reasoned_weight
        self.infonce = infonce
        self.chunk_size = chunk_size
        self.iterations = iterations
        self.bank_size = bank_size
        self.refresh_every = refresh_every
        self.score_temperature = score_temperature
        self.rollout_batch_size = rollout_batch_size
        self.show_every = show_every
        self._bank: CandidateBank | None = None
        self._queries: list[Item] = []
        self._policy: Policy | None = None
        self._reference: ReferencePolicy | None = None
        self._restored: dict[str, Any] = {}
        # In a tuple: an assigned module would become part of this one, and its temperature would be saved twice.
        self._previous: tuple[InfoNCE, ...] = ()

    # -- before the first step ---------------------------------------------------------------------------------------

    def setup(self, context: SetupContext) -> None:
        self._bank = CandidateBank(context.tasks, size=self.bank_size)
        self._queries = sample(context.tasks)
        found = getattr(context.previous, "infonce", None)
        self._previous = (found,) if isinstance(found, InfoNCE) else ()

    def collate(self, model: Model, pairs: Sequence[Pair], seed: int) -> ControlBatch:
        return control_batch(model.backbone, pairs, seed, chunk_size=self.chunk_size)

    # -- resume ------------------------------------------------------------------------------------------------------

    def phase_state(self) -> dict[str, Any]:
        if self._restored:
            return self._restored  # a run that stops before its first step passes on the state that it received
        if self._bank is None:
            return {}
        policy = None if self._policy is None else [self._policy.center, self._policy.spread]
        reference = self._reference.state() if self._reference else None
        return {"bank": self._bank.state(), "policy": policy, "reference": reference}

    def load_phase_state(self, state: dict[str, Any]) -> None:
        self._restored = state

    def _ready(self, model: Model, step: int) -> tuple[CandidateBank, Policy, ReferencePolicy | None]:
        """Returns the candidate bank (refreshed if due), the decision policy, and the reference if there is a KL."""
        if self._bank is None:
            raise ValueError("control: there are no candidates; call setup with the tasks before the first step")
        if self.grpo.kl_weight and self._reference is None:
            self._reference = ReferencePolicy(model.backbone)
            if step and self._restored.get("reference"):
                self._reference.load_state(self._restored["reference"])
        if step and self._restored:
            self._bank.load_state(self._restored["bank"])
            if self._restored["policy"] is not None:
                self._policy = Policy(*self._restored["policy"])
        self._restored = {}
        if step % self.refresh_every == 0 or not self._bank.ready:
            self._bank.refresh(Encoder(model.backbone, model.pooler, batch_size=self.rollout_batch_size))
        if self._policy is None:
            encoder = Encoder(model.backbone, model.pooler, batch_size=self.rollout_batch_size)
            self._policy = standardised(encoder, self._queries)
        return self._bank, self._policy, self._reference

    # -- a step ------------------------------------------------------------------------------------------------------

    def step(self, model: Model, batch: ControlBatch, context: StepContext) -> dict[str, Tensor]:
        bank, policy, reference = self._ready(model, context.step)
        share = min(context.step / max(context.steps - 1, 1), 1.0)
        exploration = self.exploration + (self.final_exploration - self.exploration) * share
        rollouts = rollout(
            model,
            [pair.query for pair in batch.pairs],
            group_size=self.group_size,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            seed=batch.seeds,
            exploration=exploration,
            margin_center=policy.center,
            margin_spread=policy.spread / self.temperature,
            batch_size=self.rollout_batch_size,
        )
        with evaluating(model.backbone, model.pooler):
            target = torch.cat([model.embed(inputs) for _, inputs in batch.chunks])
        outcome = self._outcome(bank, batch, rollouts, target[batch.positive].float().cpu())
        values = {reward.name: reward(outcome).float() for reward in self.rewards}
        total = torch.stack([reward.weight * values[reward.name] for reward in self.rewards]).sum(0)
        plan = self._plan(model, batch, rollouts, policy, outcome, total, target, reference)
        logs: dict[str, float | Tensor] = {"exploration": exploration}
        for iteration in range(self.iterations):
            if iteration:
                context.update()
            logs |= self._update(model, batch, plan, context, anchored=iteration == 0)
        if context.show is not None and self.show_every and context.step % self.show_every == 0:
            context.show("rollouts", draw_rollouts(shown(outcome, rollouts, policy, total)))
        return over_ranks(logs | measures(outcome, rollouts, policy, values, total), device=model.backbone.device)

    def _outcome(self, bank: CandidateBank, batch: ControlBatch, rollouts: Rollouts, positive: Tensor) -> Outcome:
        """Scores every rollout, and the direct embedding of every query, among the task's candidates."""
        count = len(batch.pairs)
        query = torch.arange(count).repeat_interleave(self.group_size)
        rows = torch.cat([query, torch.arange(count)])
        embedding = torch.cat([rollouts.embedding, rollouts.direct])
        scored = bank.score(batch.pairs, positive, embedding, rows, temperature=self.score_temperature)
        (log_probability, direct_log_probability), (rank, direct_rank) = (
            each.split([len(query), count]) for each in scored
        )
        return Outcome(
            pairs=batch.pairs,
            query=query,
            think=rollouts.think,
            tokens=rollouts.tokens,
            truncated=rollouts.truncated,
            rationale=rollouts.rationale,
            log_probability=log_probability,
            rank=rank,
            direct_log_probability=direct_log_probability[query],
            direct_rank=direct_rank[query],
        )

    def _plan(
        self,
        model: Model,
        batch: ControlBatch,
        rollouts: Rollouts,
        policy: Policy,
        outcome: Outcome,
        total: Tensor,
        target: Tensor,
        reference: ReferencePolicy | None,
    ) -> Plan:
        device, query = model.backbone.device, outcome.query
        thinking = rollouts.think.nonzero().flatten()
        decided = policy.log_prob(rollouts.decision_logits)[query, (~rollouts.think).long()]
        thought = torch.zeros(len(batch.pairs)).index_add(0, query[thinking], torch.ones(len(thinking)))
        rollouts = rollouts.to(device)
        paths = [
            PathLoss("direct", "direct", self.direct_weight, torch.arange(len(batch.pairs), device=device)),
            # Each query counts once, however many of its rollouts reason.
            PathLoss(
                "reasoned",
                "reasoned",
                self.reasoned_weight,
                query[thinking].to(device),
                (1 / thought[query[thinking]]).to(device),
            ),
        ]
        embeddings = {"direct": rollouts.direct, "reasoned": rollouts.embedding[thinking.to(device)], "target": target}
        plan = Plan(
            rollouts=rollouts,
            thinking=thinking.to(device),
            decision_advantage=self.grpo.advantages(total, query).to(device),
            rationale_advantage=self.grpo.advantages(total[thinking], query[thinking]).to(device),
            policy=policy,
            importance=(decided.to(device) - rollouts.decision_log_prob).exp(),
            contrast=contrast(self._infonce(), embeddings, batch, paths),
            references=None,
        )
        if reference is not None:
            with reference.model(model.backbone) as kept_close:
                plan.references = [
                    replay(Model(kept_close, model.pooler), prompt, rollouts, rows, source, items=None).log_prob
                    for (prompt, _), (_, rows, source) in zip(batch.chunks, plan.spans(batch), strict=True)
                ]
        return plan

    def _infonce(self) -> InfoNCE:
        if self.infonce is None:
            if not self._previous:
                raise ValueError("control: no earlier phase has a contrastive loss; give `infonce`")
            return self._previous[0]
        return self.infonce

    def _update(
        self, model: Model, batch: ControlBatch, plan: Plan, context: StepContext, *, anchored: bool
    ) -> dict[str, float | Tensor]:
        """Accumulates the gradients of one pass over all chunks; ``anchored`` includes the contrastive losses."""
        rollouts, group = plan.rollouts, self.group_size
        token_mask = rollouts.token_mask[plan.thinking]
        decided = torch.ones(len(rollouts), 1, dtype=torch.bool, device=token_mask.device)
        decision_size = Size.of(decided, longest=1)
        rationale_size = Size.of(token_mask, longest=self.max_new_tokens + 1)
        gradients = plan.contrast.gradients
        sums = torch.zeros(5, device=token_mask.device)  # two losses, KL, two counts of clipped tokens
        last = len(batch.chunks) - 1
        targets = thoughts = 0
        for index, ((prompt, target), (queries, rows, source)) in enumerate(
            zip(batch.chunks, plan.spans(batch), strict=True)
        ):
            with (
                nullcontext() if index == last else context.no_sync(),
                differentiable(model.backbone, model.pooler),
            ):
                items = [pair.query for pair in batch.pairs[queries]] if anchored else None
                found = replay(model, prompt, rollouts, rows, source, items=items)
                mine = slice(queries.start * group, queries.stop * group)
                own = slice(thoughts, thoughts + len(rows))
                decision = self._decision(plan, found.decision_logits, mine, decision_size)
                rationale = self._rationale(plan, found.log_prob, rows, own, index, rationale_size)
                terms = [self.decision_weight * decision.loss, self.rationale_weight * rationale.loss]
                if anchored:
                    assert found.direct is not None
                    terms.append((found.direct * gradients["direct"][queries]).sum())
                    if found.reasoned is not None:
                        terms.append((found.reasoned * gradients["reasoned"][own]).sum())
                    embedded = model.embed(target)
                    terms.append((embedded * gradients["target"][targets : targets + len(target)]).sum())
                    if index == last and plan.contrast.term is not None:
                        terms.append(plan.contrast.term)
                context.backward(torch.stack(terms).sum())
            losses = torch.stack([decision.loss, rationale.loss]).detach() / world_size()
            sums += torch.cat([losses, torch.stack([rationale.kl, decision.clipped, rationale.clipped])])
            targets, thoughts = targets + len(target), thoughts + len(rows)
        decision_loss, rationale_loss, kl, decision_clips, rationale_clips = all_sum(sums)
        loss = self.decision_weight * decision_loss + self.rationale_weight * rationale_loss
        logs: dict[str, float | Tensor] = {
            "loss": loss + plan.contrast.loss,
            "decision_loss": decision_loss,
            "rationale_loss": rationale_loss,
            "decision_clip_share": decision_clips / decision_size.tokens,
            "rationale_clip_share": rationale_clips / rationale_size.tokens,
        }
        if plan.references is not None:
            words = all_sum((rollouts.tokens[plan.thinking] - 2).clamp(min=0).sum().to(kl))
            logs["kl"] = kl / words.clamp(min=1)
        # Only the first pass logs a loss: later ones do not include the contrastive losses.
        return {**logs, **plan.contrast.logs} if anchored else {k: v for k, v in logs.items() if k != "loss"}

    def _decision(self, plan: Plan, logits: Tensor, rows: slice, size: Size) -> PolicyLoss:
        """Computes the policy loss of the decisions of a chunk's rollouts."""
        rollouts = plan.rollouts
        choice = (~rollouts.think[rows]).long()[:, None]
        now = plan.policy.log_prob(logits).repeat_interleave(self.group_size, dim=0).gather(1, choice)
        queries = slice(rows.start // self.group_size, rows.stop // self.group_size)
        old = plan.policy.log_prob(rollouts.decision_logits[queries])
        old = old.repeat_interleave(self.group_size, dim=0).gather(1, choice)
        mask = torch.ones_like(choice, dtype=torch.bool)
        return self.grpo(now, old, plan.decision_advantage[rows], mask, size=size, weight=plan.importance[rows])

    def _rationale(self, plan: Plan, log_prob: Tensor, rows: Tensor, own: slice, chunk: int, size: Size) -> PolicyLoss:
        """Computes the policy loss of the rationale tokens of those rollouts of a chunk that reason."""
        rollouts = plan.rollouts
        mask = rollouts.token_mask[rows]
        # The KL leaves out the end token: a base model without the joint phase does not know it.
        words = torch.arange(mask.shape[1], device=mask.device) < (rollouts.tokens[rows] - 2)[:, None]
        return self.grpo(
            log_prob,
            rollouts.log_prob[rows],
            plan.rationale_advantage[own],
            mask,
            size=size,
            reference=None if plan.references is None else plan.references[chunk],
            reference_mask=words,
            weight=plan.importance[rows],
        )
