"""Samples rollouts for policy gradients: many decisions and rationales per query.

The prompt of a query is encoded once. Its cache is forked for the rollouts that reason. All rollouts that skip
reasoning share the query's direct embedding. Rollouts keep what a policy gradient needs: the token ids, and their
log-probabilities under the distribution from which they were drawn.

The decisions of a query are drawn by systematic sampling. With probability p of reasoning, floor(G p) or ceil(G p) of
its G rollouts reason, each with marginal probability p. Thus every group gets its share of explored decisions, and
this does not depend on luck.

Shape legend: N queries, G rollouts per query, R = N x G rollouts, S fed columns, H hidden width, D embedding width.
L is the number of tokens in the longest rationale, with its end token. Rollout r belongs to query r // G.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from mmemb.common.checks import check_numbers
from mmemb.common.digests import seed_of
from mmemb.inference.encoder import evaluating
from mmemb.inference.prompts import embed_items, embed_states, encode_prompts, length_order, pad_tokens, thought_tokens
from mmemb.inference.token_loop import Sampler, Writing, Written, rationale_logits
from mmemb.interfaces import Backbone, Model
from mmemb.types import Item

SAMPLED = -1
"""Value in ``decision`` for a rollout whose decision is drawn at random."""


@dataclass
class Rollouts:
    """G rollouts of each of N queries, on the CPU.

    Attributes:
        group_size: G, the number of rollouts per query.
        temperature: sampling temperature of decision and rationale.
        decision_logits: [N, 2] float32, the model's logits of ``<think>`` and ``<emb>`` after the prompt.
        think_probability: [N] float32, probability with which ``<think>`` was drawn. It includes temperature and
            exploration.
        direct: [N, D] float32, the direct embedding of each query.
        think: [R] bool, the decision.
        forced: [R] bool, whether the decision was given and not drawn.
        decision_log_prob: [R] float32, log-probability of the decision under the distribution from which it was drawn.
            0 if the decision was forced.
        token_ids: [R, L] int64, every rationale token that the model chose, in order. This includes the end token,
            unless the budget ended the rationale. Zero after the last token.
        token_mask: [R, L] bool, True where ``token_ids`` holds a token.
        log_prob: [R, L] float32, log-probability of each token under the distribution from which it was drawn. Zero
            after the last token.
        truncated: [R] bool, whether the budget ended the rationale.
        tokens: [R] int64, tokens written, including ``<think>`` and ``</think>``. 0 if the rollout skipped reasoning.
        rationale: R texts, empty for rollouts that skipped reasoning.
        embedding: [R, D] float32, the reasoned embedding if the rollout reasoned, otherwise the direct one.
    """

    group_size: int
    temperature: float
    decision_logits: Tensor
    think_probability: Tensor
    direct: Tensor
    think: Tensor
    forced: Tensor
    decision_log_prob: Tensor
    token_ids: Tensor
    token_mask: Tensor
    log_prob: Tensor
    truncated: Tensor
    tokens: Tensor
    rationale: list[str]
    embedding: Tensor

    def __len__(self) -> int:
        """The number of rollouts, R."""
        return len(self.think)

    def to(self, device: torch.device | str) -> Rollouts:
        """Moves every tensor and returns a new object."""
        tensors = {each.name: getattr(self, each.name) for each in fields(self) if each.type == "Tensor"}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


@dataclass
class RolloutTokens:
    """The tokens after the prompts of R rollouts, right-padded, for a pass with gradients over the drawn tokens.

    Feed them with ``states, _ = backbone.extend(prefix, tokens, mask)``. The state of column j then predicts
    ``Rollouts.token_ids[:, j]`` (see `token_log_probs`), and the state of column ``emb_column`` gives the embedding.

    Attributes:
        tokens: [R, S] int64, ``<think> rationale </think> <emb>`` if the rollout reasoned, otherwise ``<emb>``.
        mask: [R, S] int64, 1 = real.
        emb_column: [R] int64, column of ``<emb>``.
    """

    tokens: Tensor
    mask: Tensor
    emb_column: Tensor


def rollout(
    model: Model,
    items: Sequence[Item],
    *,
    group_size: int,
    temperature: float,
    max_new_tokens: int,
    seed: int | Sequence[int],
    decision: Tensor | None = None,
    exploration: float = 0.0,
    margin_center: float = 0.0,
    margin_spread: float = 1.0,
    batch_size: int = 256,
) -> Rollouts:
    """Samples G decisions and rationales for each of N queries from the current model, in evaluation mode.

    Args:
        model: backbone and pooler.
        items: the queries.
        group_size: G, the number of rollouts per query.
        temperature: sampling temperature of decision and rationale, > 0.
        max_new_tokens: maximum number of tokens in a rationale. The backbone's own limit applies too.
        seed: one seed, from which each query derives its own, or one seed per query. The rollouts of a query depend on
            no other seed.
        decision: [N, G] or [R], given decisions. 1 or True means to reason, 0 or False to skip reasoning, and `SAMPLED`
            to draw the decision. None draws all decisions.
        exploration: mixes the decision with a fair coin. The probability of reasoning is
            ``exploration / 2 + (1 - exploration) p``, so both decisions have a probability of at least
            ``exploration / 2``.
        margin_center: difference of the decision logits at which the probability of reasoning is 1/2.
        margin_spread: divides the distance of the difference from that center:
            ``p = sigmoid((l_think - l_emb - center) / spread / temperature)``. A center of 0 and a spread of 1 give the
            model's own probability.
        batch_size: number of rollouts that are decoded together.

    Raises:
        ValueError: an argument is out of range or has the wrong shape.
    """
    _check(items, group_size, temperature, max_new_tokens, exploration, batch_size)
    seeds = [seed_of(seed, row) for row in range(len(items))] if isinstance(seed, int) else list(seed)
    if len(seeds) != len(items):
        raise ValueError(
            f"rollout: seed has length {len(seeds)} for {len(items)} queries; give one number, or one per query"
        )
    wanted = _wanted(decision, len(items), group_size)
    order = length_order(items)
    step = max(1, batch_size // group_size)
    parts = []
    with evaluating(model.backbone, model.pooler):
        for start in range(0, len(order), step):
            rows = order[start : start + step]
            parts.append(
                _group(
                    model,
                    [items[row] for row in rows],
                    [seeds[row] for row in rows],
                    wanted[rows],
                    temperature=temperature,
                    budget=min(max_new_tokens, model.backbone.max_rationale_tokens),
                    exploration=exploration,
                    margin=(margin_center, margin_spread),
                )
            )
    return _joined(parts, order, group_size, temperature, width=model.pooler.size)


def rollout_tokens(backbone: Backbone, rollouts: Rollouts, rows: Tensor | None = None) -> RolloutTokens:
    """Builds the tokens to feed after the prompts for another pass over the rollouts.

    Args:
        backbone: gives the ids of the special tokens.
        rollouts: the rollouts.
        rows: [r] int64, the rollouts to include. None: all rollouts.

    Returns:
        the tokens, on the device of the rollouts.
    """
    chosen = torch.arange(len(rollouts), device=rollouts.think.device) if rows is None else rows
    drawn = zip(
        rollouts.think[chosen].tolist(),
        rollouts.tokens[chosen].tolist(),
        rollouts.token_ids[chosen].tolist(),
        strict=True,
    )
    # Leave out ``<think>``, ``</think>`` and the end token. Any rationale was closed with ``</think>``.
    fed = [thought_tokens(backbone.token_id, ids[: count - 2] if think else None) for think, count, ids in drawn]
    tokens, mask = pad_tokens(fed, side="right", device=chosen.device)
    return RolloutTokens(tokens, mask, mask.sum(1) - 1)


def token_log_probs(backbone: Backbone, hidden: Tensor, token_ids: Tensor, *, temperature: float) -> Tensor:
    """Computes the log-probabilities [n] of rationale tokens [n] after states [n, H], with gradients.

    They are those of the distribution from which `rollout` draws.
    """
    logits = rationale_logits(backbone, hidden) / temperature
    return logits.log_softmax(dim=-1).gather(1, token_ids[:, None])[:, 0]


def _check(
    items: Sequence[Item],
    group_size: int,
    temperature: float,
    max_new_tokens: int,
    exploration: float,
    batch_size: int,
) -> None:
    if not items:
        raise ValueError("rollout: there are no queries; give at least one item")
    check_numbers("rollout", above=0, temperature=temperature)
    check_numbers("rollout", at_least=1, group_size=group_size, max_new_tokens=max_new_tokens, batch_size=batch_size)
    check_numbers("rollout", at_least=0, at_most=1, exploration=exploration)


def _wanted(decision: Tensor | None, queries: int, group_size: int) -> Tensor:
    """Returns the given decisions as [N, G] int64."""
    if decision is None:
        return torch.full((queries, group_size), SAMPLED)
    if decision.numel() != queries * group_size or decision.shape[0] not in (queries, queries * group_size):
        raise ValueError(
            f"rollout: decision has the shape {tuple(decision.shape)}; give ({queries}, {group_size}), that is, "
            "queries by rollouts"
        )
    wanted = decision.reshape(queries, group_size).cpu().long()
    if not bool(torch.isin(wanted, torch.tensor([SAMPLED, 0, 1])).all()):
        raise ValueError(
            f"rollout: decision has other values than 1 (reason), 0 (skip reasoning) and {SAMPLED} (draw at random)"
        )
    return wanted


@torch.no_grad()
def _group(
    model: Model,
    items: Sequence[Item],
    seeds: Sequence[int],
    wanted: Tensor,
    *,
    temperature: float,
    budget: int,
    exploration: float,
    margin: tuple[float, float],
) -> Rollouts:
    """Samples the rollouts of one batch of queries."""
    backbone, pooler = model.backbone, model.pooler
    device, group = backbone.device, wanted.shape[1]
    prompts = encode_prompts(model, items)
    decision_logits, direct = prompts.decision_logits.cpu(), prompts.direct()
    center, spread = margin
    own = ((decision_logits[:, 0] - decision_logits[:, 1] - center) / (spread * temperature)).sigmoid()
    probability = exploration / 2 + (1 - exploration) * own
    forced = wanted != SAMPLED
    drawn = torch.stack([_draw(float(p), group, seed) for p, seed in zip(probability, seeds, strict=True)])
    think = torch.where(forced, wanted == 1, drawn)
    taken = torch.where(think, probability[:, None], 1 - probability[:, None])
    embedding = direct.repeat_interleave(group, dim=0)
    rows = think.flatten().nonzero().flatten()
    total = think.numel()
    rationale, tokens = [""] * total, torch.zeros(total, dtype=torch.int64)
    truncated = torch.zeros(total, dtype=torch.bool)
    token_ids = torch.zeros(total, 0, dtype=torch.int64)
    log_prob = torch.zeros(total, 0)
    token_mask = torch.zeros(total, 0, dtype=torch.bool)
    if len(rows):
        row_seeds = [seed_of(seeds[row // group], row % group) for row in rows.tolist()]
        sampler = Sampler(steps=budget + 1, temperature=temperature, device=device)
        forks = backbone.fork(prompts.prefix, (rows // group).to(device))
        budgets = torch.full((len(rows),), budget, device=device)
        writing = Writing(backbone, sampler, longest=budget, embed=not pooler.needs_all_states, log_probs=True)
        writing.add(forks, budgets, row_seeds)
        writing.run()
        written = writing.written()
        rationale, tokens = _texts(backbone, written, rows, total)
        truncated[rows] = written.truncated
        token_ids, token_mask, log_prob = _actions(written, rows, total)
        if written.hidden is not None:
            embedding[rows.to(device)] = embed_states(pooler, written.hidden)
        else:
            thoughts = [rationale[row] for row in rows.tolist()]
            queries = [items[row // group] for row in rows.tolist()]
            embedding[rows.to(device)] = embed_items(model, queries, thoughts)
    return Rollouts(
        group_size=group,
        temperature=temperature,
        decision_logits=decision_logits,
        think_probability=probability,
        direct=direct.cpu(),
        think=think.flatten(),
        forced=forced.flatten(),
        decision_log_prob=torch.where(forced, 0.0, taken.log()).flatten(),
        token_ids=token_ids,
        token_mask=token_mask,
        log_prob=log_prob,
        truncated=truncated,
        tokens=tokens,
        rationale=rationale,
        embedding=embedding.cpu(),
    )


def _draw(probability: float, group: int, seed: int) -> Tensor:
    """Draws G decisions [G] by systematic sampling.

    They have equal marginal probability, and floor(G p) or ceil(G p) of them are True.
    """
    generator = torch.Generator().manual_seed(seed_of(seed, "decision"))
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    points = (torch.arange(group, dtype=torch.float64) + offset) / group
    return (points < probability)[torch.randperm(group, generator=generator)]


def _texts(backbone: Backbone, written: Written, rows: Tensor, total: int) -> tuple[list[str], Tensor]:
    rationale, tokens = [""] * total, torch.zeros(total, dtype=torch.int64)
    for row, ids in zip(rows.tolist(), written.token_ids, strict=True):
        rationale[row], tokens[row] = backbone.decode(ids), len(ids) + 2
    return rationale, tokens


def _actions(written: Written, rows: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the chosen tokens, their mask and their log-probabilities, all [total, L].

    Rows that wrote nothing stay zero.
    """
    assert written.log_prob is not None
    lengths = torch.tensor([len(ids) for ids in written.token_ids]) + (~written.truncated).long()
    longest = int(lengths.max())
    token_ids = torch.zeros(total, longest, dtype=torch.int64)
    log_prob, mask = torch.zeros(total, longest), torch.zeros(total, longest, dtype=torch.bool)
    token_ids[rows] = written.actions[:, :longest].cpu()
    log_prob[rows] = written.log_prob[:, :longest].cpu()
    mask[rows] = torch.arange(longest) < lengths[:, None]
    return token_ids, mask, log_prob


def _joined(parts: Sequence[Rollouts], order: Sequence[int], group: int, temperature: float, *, width: int) -> Rollouts:
    """Joins batches into rollouts in the original order. The joined batches hold the queries in the order ``order``."""
    back = torch.empty(len(order), dtype=torch.int64)
    back[torch.tensor(order)] = torch.arange(len(order))
    rows = (back[:, None] * group + torch.arange(group)).flatten()
    longest = max(part.token_ids.shape[1] for part in parts)

    def queries(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])[back]

    def each(name: str) -> Tensor:
        values = [getattr(part, name) for part in parts]
        if values[0].ndim == 2 and name != "embedding":
            values = [torch.nn.functional.pad(value, (0, longest - value.shape[1])) for value in values]
        return torch.cat(values)[rows]

    rationale = [text for part in parts for text in part.rationale]
    by_query = {name: queries(name) for name in ("decision_logits", "think_probability", "direct")}
    names = ("think", "forced", "decision_log_prob", "token_ids", "token_mask", "log_prob", "truncated", "tokens")
    return Rollouts(
        group_size=group,
        temperature=temperature,
        rationale=[rationale[row] for row in rows.tolist()],
        **by_query,
        **{name: each(name) for name in (*names, "embedding")},
    )
