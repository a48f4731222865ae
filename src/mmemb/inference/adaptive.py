"""Decodes adaptively: one prefill of the prompt serves both paths, and nothing is encoded twice.

The state after the prompt gives the logits of the decision: ``<think>`` against ``<emb>``. One more token, ``<emb>`` on
a fork of the cache, gives the direct embedding. Rows that reason continue from the same cache. They write one token
per step until ``</think>`` or until their budget ends. Then ``</think> <emb>`` is fed, and the state at ``<emb>`` gives
the embedding. Therefore ``<emb>`` is never missing.

The cost for B prompts of T tokens, of which R reason for L tokens, is:

- one forward pass over B x T and one over B x 1,
- one copy of the cache,
- L + 3 forward passes over at most R x 1, because the batch shrinks as rows finish.

Several batches share these steps: the last rows of one batch continue together with the rows of the next. Poolers that
read every state (``needs_all_states``) are an exception. A cache keeps no hidden states, so their rows are encoded
again as plain text.

Shape legend: B rows, R rows that reason, M bank embeddings, V vocabulary, H hidden width, D embedding width.
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
from mmemb.inference.token_loop import Sampler, Writing, Written
from mmemb.interfaces import Backbone, Controller, Model
from mmemb.types import Decision, Encoded, Item, PrefillState


@dataclass(frozen=True)
class Sampled:
    """A rationale that the backbone wrote.

    Attributes:
        text: the rationale.
        tokens: its length, without ``<think>`` and ``</think>``.
        finish_reason: ``stop`` if the model wrote ``</think>``, ``length`` if the budget ended the rationale.
        token_ids: ids of the tokens written.
    """

    text: str
    tokens: int
    finish_reason: str
    token_ids: tuple[int, ...] = ()


@dataclass
class AdaptivePaths:
    """The result of one adaptive pass over B items, with both paths separate.

    Attributes:
        state: what the prefill found, on the CPU. ``state.direct`` holds the direct embeddings [B, D].
        decision: which rows reasoned, on the CPU.
        embedding: [B, D] float32 on the CPU. The reasoned embedding if the row reasoned, otherwise the direct one.
        rationale: B texts, empty for rows that skipped reasoning.
        token_ids: B rationales as token ids.
        tokens: [B] int64, tokens written, including ``<think>`` and ``</think>``. 0 if the row skipped reasoning.
        truncated: [B] bool, whether the budget ended the rationale.
        direct_seconds: time spent on prompts and direct embeddings, in seconds.
        think_seconds: time spent on rationales and their embeddings, in seconds.
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
        """Returns the public view, with one embedding per row."""
        return Encoded(
            embedding=self.embedding,
            thought=self.decision.think,
            probability=self.decision.probability,
            rationale=self.rationale,
            tokens=self.tokens,
            truncated=self.truncated,
        )


def confidence_over(direct: Tensor, bank: Tensor, *, temperature: float) -> Tensor:
    """Computes the largest softmax probability of each embedding over a bank, [B] in [0, 1].

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
    """Lets the backbone write a rationale for every item.

    ``<think>`` is forced. Then the model writes until ``</think>`` or until the budget ends. Any other special token in
    ``backbone.special_ids`` ends the rationale, as ``</think>`` does.

    The text of a row depends on its item and its own seed, not on other rows or the batch size. For several samples,
    give the same item object several times. It is prefilled once per batch.

    Args:
        backbone: the model. Its training mode does not change.
        items: the items.
        max_new_tokens: maximum number of tokens in a rationale, without ``<think>`` and ``</think>``.
        temperature: sampling temperature. 0 is greedy.
        seed: one seed, from which each row derives its own, or one seed per row.
        batch_size: number of rows that are decoded together.
        think: False leaves out ``<think>``, so that a model that never learned the token writes directly after its
            prompt.

    Raises:
        ValueError: the temperature, the budget or the number of seeds is not valid.
    """
    check_numbers("sample", at_least=0, temperature=temperature)
    check_numbers("sample", at_least=1, max_new_tokens=max_new_tokens)
    seeds = [seed_of(seed, row) for row in range(len(items))] if isinstance(seed, int) else list(seed)
    if len(seeds) != len(items):
        raise ValueError(
            f"sample: seed has length {len(seeds)} for {len(items)} items; give one number, or one per item"
        )
    # One step more than the budget: the last draw shows whether the model itself would have stopped.
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
    """Encodes B items, at least one, reasons where the controller decides so, and keeps both paths.

    Args:
        model: backbone and pooler. They should be in eval mode (`mmemb.inference.encoder.Encoder` sets it).
        items: the items.
        controller: decides after the prefill, one batch at a time.
        budget: maximum number of rationale tokens per row, without ``<think>`` and ``</think>``. The smallest of this
            budget, the controller's and the backbone's own limit applies. The returned decision holds that value.
        bank: [M, D] embeddings over which the confidence is computed. None skips the confidence.
        confidence_temperature: temperature of the softmax over the bank.
        temperature: sampling temperature of the rationales. 0 is greedy.
        seed: seed of the sampling: one seed, or one seed per row.
        batch_size: number of prompts that are encoded together. The cache also holds up to half as many rows of
            earlier batches. None encodes all prompts at once.
        reached: called after each batch with the number of prompts encoded so far.
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
        _add_rationales(paths, model, items, thinking, writing.written(), batch_size=size)
    paths.direct_seconds = direct_seconds
    paths.think_seconds = think_seconds + time.perf_counter() - started
    return paths


def _add_rationales(
    paths: AdaptivePaths,
    model: Model,
    items: Sequence[Item],
    rows: Sequence[int],
    written: Written,
    *,
    batch_size: int,
) -> None:
    """Puts the rationales of some rows, and the embeddings after them, in place."""
    for row, ids in zip(rows, written.token_ids, strict=True):
        paths.rationale[row], paths.token_ids[row] = model.backbone.decode(ids), ids
        paths.tokens[row] = len(ids) + 2
    paths.truncated[rows] = written.truncated
    if written.hidden is not None:
        paths.embedding[rows] = embed_states(model.pooler, written.hidden).to(paths.embedding)
        return
    for first in range(0, len(rows), batch_size):
        some = rows[first : first + batch_size]
        again = embed_items(model, [items[row] for row in some], [paths.rationale[row] for row in some])
        paths.embedding[some] = again.to(paths.embedding)


def _stragglers(backbone: Backbone, batch_size: int) -> int:
    """Returns how many rows of a batch may stay unfinished, to continue together with the next batch."""
    return batch_size // 2 if backbone.joins_prefixes else 0


def _on_cpu(state: PrefillState) -> PrefillState:
    """Returns a copy of the state on the CPU."""
    confidence = None if state.confidence is None else state.confidence.cpu()
    return PrefillState(state.decision_logits.cpu(), state.direct.cpu(), confidence)


def _without_rationales(states: Sequence[PrefillState], decisions: Sequence[Decision]) -> AdaptivePaths:
    """Joins batches, with the direct embedding for every row. Rationales are filled in later."""
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
