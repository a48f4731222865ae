"""Adaptive decoding: one prefill of the prompt serves both paths, and nothing is encoded twice.

The state after the prompt gives the decision's logits (``<think>`` against ``<emb>``); one more position (``<emb>``, on
a fork of the cache) gives the direct embedding. Rows that think go on from the same cache, one token a step, until
``</think>`` or their budget; then ``</think> <emb>`` is fed and the embedding is the state at ``<emb>``. So a missing
``<emb>`` cannot happen.

Cost for B prompts of T tokens of which R think for L tokens: one forward over B x T, one over B x 1, one copy of the
cache, and L + 3 forwards over at most R x 1 (the batch is compacted as rows finish). Several batches share these steps:
the last rows of one go on with those of the next. Poolers that look at every state (``needs_all_states``) are the
exception: a cache keeps no hidden states, so their rows are encoded again as plain text.

Shape legend: B rows, R rows that think, M bank embeddings, V vocabulary, H hidden width, D embedding width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmemb.common.checks import check_numbers
from mmemb.common.digests import seed_of
from mmemb.inference.prompts import embed_items, embed_states, encode_prompts, length_order, prefill
from mmemb.inference.token_loop import Sampler, Writing
from mmemb.interfaces import Backbone, Controller, Model
from mmemb.types import Decision, Encoded, Item, PrefillState


@dataclass(frozen=True)
class Sampled:
    """A rationale the backbone wrote.

    Attributes:
        text: the rationale.
        tokens: its length; ``<think>`` and ``</think>`` do not count.
        finish_reason: ``stop`` (the model wrote ``</think>``) or ``length`` (the budget ended it).
        token_ids: the tokens written.
    """

    text: str
    tokens: int
    finish_reason: str
    token_ids: tuple[int, ...] = ()


@dataclass
class AdaptivePaths:
    """What one adaptive pass over B items found, both paths apart.

    Attributes:
        state: what the prefill knew; ``state.direct`` holds the direct embeddings [B, D], on the CPU.
        decision: who thought, on the CPU.
        embedding: [B, D] float32 on the CPU, from ``<emb>`` after the rationale where the row thought, else direct.
        rationale: B texts, empty where the row did not think.
        token_ids: B rationales as token ids.
        tokens: [B] int64, tokens written, ``<think>`` and ``</think>`` included; 0 where the row did not think.
        truncated: [B] bool, the budget ended the rationale.
        direct_seconds: time of prompts and direct embeddings.
        think_seconds: time of rationales and their embeddings.
    """

    state: PrefillState
    decision: Decision
    embedding: Tensor
    rationale: list[str]
    token_ids: list[tuple[int, ...]]
    tokens: Tensor
    truncated: Tensor
    direct_seconds: float = 0.0
    think_seconds: float = 0.0

    def encoded(self) -> Encoded:
        """The public view: one embedding a row."""
        return Encoded(
            embedding=self.embedding,
            thought=self.decision.think,
            probability=self.decision.probability,
            rationale=self.rationale,
            tokens=self.tokens,
            truncated=self.truncated,
        )


def confidence_over(direct: Tensor, bank: Tensor, *, temperature: float) -> Tensor:
    """Largest softmax probability of each embedding over a bank, [B] in [0, 1].

    Args:
        direct: [B, D] normalised.
        bank: [M, D] normalised.
        temperature: divides the cosines.
    """
    return (direct @ bank.to(direct).T / temperature).softmax(dim=-1).amax(dim=-1)


@torch.no_grad()
def sample(
    backbone: Backbone,
    items: Sequence[Item],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int | Sequence[int],
    batch_size: int,
    think: bool = True,
) -> list[Sampled]:
    """Lets the backbone think about every item: ``<think>`` is forced, then it writes until ``</think>`` or the budget.

    Another special token (of ``backbone.special_ids``) ends the rationale as ``</think>`` does.

    A row's text depends on its item and its own seed, not on its neighbours or the batch size. An item given several
    times (the same object, for several samples) is prefilled once a batch.

    Args:
        backbone: the model; its training mode is left as it is.
        items: the items.
        max_new_tokens: most tokens of a rationale, its brackets not counted.
        temperature: of sampling; 0 is greedy.
        seed: one seed, from which row i draws its own; or one seed a row.
        batch_size: rows decoded together.
        think: False leaves ``<think>`` out: a model that was never taught the token writes right after its prompt.

    Raises:
        ValueError: temperature, budget or the number of seeds makes no sense.
    """
    check_numbers("sample", at_least=0, temperature=temperature)
    check_numbers("sample", at_least=1, max_new_tokens=max_new_tokens)
    seeds = [seed_of(seed, row) for row in range(len(items))] if isinstance(seed, int) else list(seed)
    if len(seeds) != len(items):
        raise ValueError(f"sample: {len(seeds)} seeds for {len(items)} items; give one seed, or one an item")
    # One step more than the budget: the last draw says whether the model itself would have stopped.
    sampler = Sampler(steps=max_new_tokens + 1, temperature=temperature, device=backbone.device)
    writing = Writing(backbone, sampler, longest=max_new_tokens, embed=False, think=think)
    order = length_order(items)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        unique = {id(items[row]): items[row] for row in rows}
        prefix = prefill(backbone, list(unique.values()))
        if len(unique) < len(rows):
            place = {key: index for index, key in enumerate(unique)}
            source = torch.tensor([place[id(items[row])] for row in rows], device=backbone.device)
            prefix = backbone.fork(prefix, source)
        budgets = torch.full((len(rows),), max_new_tokens, device=backbone.device)
        writing.add(prefix, budgets, [seeds[row] for row in rows])
        writing.run(leave=_stragglers(backbone, batch_size))
    writing.run()
    written = writing.written()
    sampled: dict[int, Sampled] = {}
    for row, ids, cut in zip(order, written.token_ids, written.truncated.tolist(), strict=True):
        sampled[row] = Sampled(backbone.decode(ids), len(ids), "length" if cut else "stop", ids)
    return [sampled[row] for row in range(len(items))]


@torch.no_grad()
def adaptive_paths(
    model: Model,
    items: Sequence[Item],
    controller: Controller,
    *,
    budget: int,
    bank: Tensor | None = None,
    confidence_temperature: float = 0.05,
    temperature: float = 0.0,
    seed: int | Sequence[int] = 0,
    batch_size: int | None = None,
    reached: Callable[[int], None] | None = None,
) -> AdaptivePaths:
    """Encodes B items, at least one, thinking where the controller says so, and keeps both paths.

    Args:
        model: backbone and pooler, best in eval mode (`mmemb.inference.encoder.Encoder` sees to it).
        items: the items.
        controller: decides from the prefill, a batch at a time.
        budget: most rationale tokens of a row, brackets not counted; a controller's smaller budget holds, and so does
            the backbone's own limit. The decision returned has the smallest of the three.
        bank: [M, D] reference embeddings for the confidence; None leaves it out.
        confidence_temperature: of the softmax over the bank.
        temperature: of the rationale's sampling; 0 is greedy.
        seed: of the sampling, one or one a row.
        batch_size: prompts encoded together; the cache holds up to half as many rows of earlier batches beside them.
            None: all at once.
        reached: is told after each batch how many prompts have been encoded.
    """
    backbone, pooler = model.backbone, model.pooler
    device, size, all_states = backbone.device, batch_size or len(items), pooler.needs_all_states
    budget = min(budget, backbone.max_rationale_tokens)
    writing = Writing(
        backbone,
        Sampler(steps=budget + 1, temperature=temperature, device=device),
        longest=budget,
        embed=not all_states,
    )
    states: list[PrefillState] = []
    decisions: list[Decision] = []
    thinking: list[int] = []
    direct_seconds = think_seconds = 0.0
    for start in range(0, len(items), size):
        started = time.perf_counter()
        batch = items[start : start + size]
        prompts = encode_prompts(model, batch)
        prefix, direct = prompts.prefix, prompts.direct()
        state = PrefillState(
            decision_logits=prompts.decision_logits,
            direct=direct,
            confidence=None if bank is None else confidence_over(direct, bank, temperature=confidence_temperature),
        )
        decision = controller.decide(state)
        decision = replace(decision, budget=decision.budget.clamp(max=budget))
        decisions.append(Decision(decision.think.cpu(), decision.probability.float().cpu(), decision.budget.cpu()))
        states.append(_on_cpu(state))
        decided = time.perf_counter()
        here = decision.think.to(device).nonzero().flatten()
        if len(here):
            rows = [start + row for row in here.tolist()]
            thinking += rows
            if len(rows) < len(batch):
                prefix = backbone.fork(prefix, here)
            seeds = [seed_of(seed, row) if isinstance(seed, int) else seed[row] for row in rows]
            writing.add(prefix, decision.budget.to(device)[here], seeds)
        del prefix, prompts
        writing.run(leave=_stragglers(backbone, size))
        direct_seconds += decided - started
        think_seconds += time.perf_counter() - decided
        if reached is not None:
            reached(start + len(batch))
    started = time.perf_counter()
    writing.run()
    paths = _without_rationales(states, decisions)
    if thinking:
        written = writing.written()
        for row, ids in zip(thinking, written.token_ids, strict=True):
            paths.rationale[row], paths.token_ids[row], paths.tokens[row] = backbone.decode(ids), ids, len(ids) + 2
        paths.truncated[thinking] = written.truncated
        if written.hidden is not None:
            paths.embedding[thinking] = embed_states(pooler, written.hidden).to(paths.embedding)
        else:
            for first in range(0, len(thinking), size):
                rows = thinking[first : first + size]
                thoughts = [paths.rationale[row] for row in rows]
                again = embed_items(model, [items[row] for row in rows], thoughts)
                paths.embedding[rows] = again.to(paths.embedding)
    paths.direct_seconds = direct_seconds
    paths.think_seconds = think_seconds + time.perf_counter() - started
    return paths


def _stragglers(backbone: Backbone, batch_size: int) -> int:
    """Rows of a batch that need not be waited for: the next batch's join them."""
    return batch_size // 2 if backbone.joins_prefixes else 0


def _on_cpu(state: PrefillState) -> PrefillState:
    """The same on the CPU."""
    confidence = None if state.confidence is None else state.confidence.cpu()
    return PrefillState(state.decision_logits.cpu(), state.direct.cpu(), confidence)


def _without_rationales(states: Sequence[PrefillState], decisions: Sequence[Decision]) -> AdaptivePaths:
    """Batches joined, as if nobody had thought."""
    direct = torch.cat([state.direct for state in states])
    confidences = [state.confidence for state in states if state.confidence is not None]
    rows = len(direct)
    return AdaptivePaths(
        state=PrefillState(
            decision_logits=torch.cat([state.decision_logits for state in states]),
            direct=direct,
            confidence=torch.cat(confidences) if confidences else None,
        ),
        decision=Decision(
            *(torch.cat([getattr(each, name) for each in decisions]) for name in ("think", "probability", "budget"))
        ),
        embedding=direct.clone(),
        rationale=[""] * rows,
        token_ids=[()] * rows,
        tokens=torch.zeros(rows, dtype=torch.int64),
        truncated=torch.zeros(rows, dtype=torch.bool),
    )
