"""The token loop: rows that think go on from their prompts' cache, a token a step, until each has its embedding.

A row passes four phases: writing (the rationale), closing (``</think>`` is fed), embedding (``<emb>`` is fed) and done.
A rationale of L tokens therefore takes L + 3 steps (``<think>``, its tokens, ``</think>``, ``<emb>``), and a row whose
budget ends is closed like any other: a missing ``<emb>`` cannot happen. Rows that are done stay in the batch until
enough of them are worth a copy of the cache without them.

Everything a step decides stays on the device; the host looks at it once a step on a CPU and every few steps elsewhere,
so that it can run ahead of an accelerator.

Shape legend: R rows, n rows still in the cache, L longest rationale, V vocabulary, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmemb.interfaces import Backbone, Prefix
from mmemb.types import EMB, END_THINK, THINK

COMPACT_SHARE = 0.25
"""Share of finished rows that is worth a copy of the cache: the copy costs about what one step's attention reads."""

_WRITING, _CLOSING, _EMBEDDING, _DONE = range(4)


@dataclass
class Written:
    """R rationales.

    Attributes:
        token_ids: what was written, a tuple of ids a row, the end token left out.
        truncated: [R] bool on the CPU, the budget ended the rationale.
        hidden: [R, H], the state at ``<emb>``; None if not asked for.
        actions: [R, L + 1] int64 on the device, every token that was chosen, the end token included where the model
            chose one; zero beyond.
        log_prob: [R, L + 1] float32 on the device, log-probability of each action under the distribution it was drawn
            from; zero beyond. None if not asked for.
    """

    token_ids: list[tuple[int, ...]]
    truncated: Tensor
    hidden: Tensor | None
    actions: Tensor
    log_prob: Tensor | None


class Sampler:
    """Chooses tokens: the likeliest, or by inverse transform sampling with one uniform number a row and step.

    A row's numbers come from its own seed, so its text does not depend on its neighbours.

    Args:
        seeds: one a row.
        steps: most tokens a row chooses.
        temperature: divides the logits; 0 takes the likeliest token.
        device: where the logits live.
    """

    def __init__(self, seeds: Sequence[int], *, steps: int, temperature: float, device: torch.device) -> None:
        self.temperature = temperature
        self.uniforms: Tensor | None = None
        if temperature > 0:
            drawn = [torch.rand(steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            self.uniforms = torch.stack(drawn).to(device, torch.float64)  # [R, steps]

    def __call__(self, logits: Tensor, rows: Tensor, step: int) -> Tensor:
        """Token ids [n] of logits [n, V] for rows [n] at a step."""
        if self.uniforms is None:
            return logits.argmax(dim=-1)
        cumulative = (logits.double() / self.temperature).softmax(dim=-1).cumsum(dim=-1)
        # Scaling by the total keeps the draw below it whatever the rounding; right=True skips tokens without mass.
        drawn = self.uniforms[rows, step][:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, drawn, right=True).flatten()


def rationale_logits(backbone: Backbone, hidden: Tensor) -> Tensor:
    """Logits [n, V] float32 of the next rationale token after states [n, H]: a rationale holds no second decision."""
    logits = backbone.logits(hidden).float()
    banned = torch.tensor([backbone.token_id(THINK), backbone.token_id(EMB)], device=logits.device)
    return logits.index_fill(-1, banned, -torch.inf)


def write(
    backbone: Backbone,
    prefix: Prefix,
    budgets: Tensor,
    sampler: Sampler,
    *,
    embed: bool,
    log_probs: bool = False,
    think: bool = True,
) -> Written:
    """Feeds ``<think>`` to R prompts and lets each write until it closes its rationale or its budget ends.

    Args:
        backbone: the model.
        prefix: R prompts; used up.
        budgets: [R] int64, most tokens of each rationale.
        sampler: chooses the next token.
        embed: feed ``</think> <emb>`` as well and return the state there; else a row is done with its last token.
        log_probs: return the log-probability of every action as well.
        think: False leaves ``<think>`` out: a model that was never taught the token writes right after its prompt.
    """
    device = budgets.device
    opening, end_think, emb = (backbone.token_id(token) for token in (THINK, END_THINK, EMB))
    # An instruct model may end its turn with its own special token before it has learned ``</think>``.
    ends = torch.tensor(sorted({end_think, *backbone.special_ids} - {opening, emb}), device=device)
    look_every = 1 if device.type == "cpu" else 4
    total, longest = len(budgets), int(budgets.max())
    actions = torch.zeros(total, longest + 1, dtype=torch.int64, device=device)
    chances = torch.zeros(total, longest + 1, device=device) if log_probs else None
    count = torch.zeros(total, dtype=torch.int64, device=device)
    truncated = torch.zeros(total, dtype=torch.bool, device=device)
    states: Tensor | None = None
    rows = torch.arange(total, device=device)  # rows still in the cache
    phase = torch.full((total,), _WRITING, device=device)
    feed = torch.full((total,), opening, device=device)
    step, anyone_writes = 0, True
    while True:
        if step or think:
            hidden, prefix = backbone.extend(prefix, feed[:, None])
            hidden = hidden[:, -1]
        else:
            hidden = prefix.hidden
        if embed:
            states = hidden.new_zeros(total, hidden.shape[-1]) if states is None else states
            states[rows] = torch.where((phase == _EMBEDDING)[:, None], hidden, states[rows])
        forced = torch.where(phase == _CLOSING, emb, end_think)
        if anyone_writes:
            writing = phase == _WRITING
            logits = rationale_logits(backbone, hidden)
            token = sampler(logits, rows, step)
            stopped = torch.isin(token, ends)
            over = step >= budgets[rows]
            going = writing & ~stopped & ~over
            chosen = writing & (stopped | ~over)
            actions[rows, step] = torch.where(chosen, token, 0)
            if chances is not None:
                scaled = (logits / sampler.temperature).log_softmax(dim=-1)
                chances[rows, step] = torch.where(chosen, scaled.gather(1, token[:, None])[:, 0], 0.0)
            count[rows] += going
            truncated[rows] |= writing & ~stopped & over
            feed = torch.where(going, token, forced)
            after = torch.where(phase == _WRITING, _CLOSING if embed else _DONE, (phase + 1).clamp(max=_DONE))
            phase = torch.where(going, _WRITING, after)
        else:
            feed, phase = forced, (phase + 1).clamp(max=_DONE)
        step += 1
        anyone_writes = anyone_writes and step <= longest
        if step % look_every:
            continue
        alive = phase != _DONE
        left = int(alive.sum())
        if not left:
            break
        anyone_writes = anyone_writes and bool((phase == _WRITING).any())
        if len(rows) - left >= COMPACT_SHARE * len(rows):
            keep = alive.nonzero().flatten()
            prefix, rows, feed, phase = backbone.fork(prefix, keep), rows[keep], feed[keep], phase[keep]
    lengths = count.tolist()
    token_ids = [tuple(row[:length]) for row, length in zip(actions.tolist(), lengths, strict=True)]
    return Written(token_ids, truncated.cpu(), states, actions, chances)
