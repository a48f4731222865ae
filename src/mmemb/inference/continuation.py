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
    ends = sorted({end_think, *backbone.special_ids} - {opening, emb})
    ends_rationale: Tensor | None = None  # [V] bool, made when V is known
    forced = torch.tensor([end_think, emb, end_think, end_think], device=device)  # what is fed after each phase
    look_every = 1 if device.type == "cpu" else 4
    smallest, longest = int(budgets.min()), int(budgets.max())
    kept = _Kept(len(budgets), longest, device)
    rows = torch.arange(len(budgets), device=device)  # rows still in the cache; what follows is [n], one each
    phase, count = torch.full_like(budgets, _WRITING), torch.zeros_like(budgets)
    ended = torch.zeros_like(budgets, dtype=torch.bool)
    feed = torch.full_like(budgets, opening)
    states: Tensor | None = None
    step, anyone_writes = 0, True
    while True:
        if step or think:
            hidden, prefix = backbone.extend(prefix, feed[:, None])
            hidden = hidden[:, -1]
        else:
            hidden = prefix.hidden
        if embed:
            here = (phase == _EMBEDDING)[:, None]
            states = hidden if states is None else torch.where(here, hidden, states)
        feed = forced[phase]
        if anyone_writes:
            logits = rationale_logits(backbone, hidden)
            if ends_rationale is None:
                ends_rationale = torch.zeros(logits.shape[1], dtype=torch.bool, device=device)
                ends_rationale[ends] = True
            token = sampler(logits, rows, step)
            kept.keep(token, _chance(logits, token, sampler.temperature) if log_probs else None)
            writing, stops = phase == _WRITING, ends_rationale[token]
            ended |= writing & stops
            if step >= smallest:
                stops = stops | (budgets <= step)
            going = writing & ~stops
            count += going
            feed = torch.where(going, token, feed)
            phase = torch.where(going, phase, (phase + (1 if embed else _DONE)).clamp_(max=_DONE))
        else:
            phase = (phase + 1).clamp_(max=_DONE)
        step += 1
        anyone_writes = anyone_writes and step <= longest
        if step % look_every:
            continue
        in_phase = torch.bincount(phase, minlength=_DONE + 1).tolist()
        anyone_writes = anyone_writes and in_phase[_WRITING] > 0
        if in_phase[_DONE] >= COMPACT_SHARE * len(rows):
            kept.place(rows, count, ended, states)
            if in_phase[_DONE] == len(rows):
                return kept.written(embed=embed, log_probs=log_probs)
            left = (phase != _DONE).nonzero().flatten()
            prefix = backbone.fork(prefix, left)
            rows, feed, phase, budgets = rows[left], feed[left], phase[left], budgets[left]
            count, ended = count[left], ended[left]
            states = None if states is None else states[left]


def _chance(logits: Tensor, token: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [n] of tokens [n] among logits [n, V]."""
    return (logits / temperature).log_softmax(dim=-1).gather(1, token[:, None])[:, 0]


class _Kept:
    """What R rows wrote: a step only appends to a list, and columns are put in place when rows leave the cache.

    Args:
        rows: R.
        longest: most tokens of a rationale.
        device: where the tensors live.
    """

    def __init__(self, rows: int, longest: int, device: torch.device) -> None:
        self.actions = torch.zeros(rows, longest + 1, dtype=torch.int64, device=device)
        self.log_prob = torch.zeros(rows, longest + 1, device=device)
        self.count = torch.zeros(rows, dtype=torch.int64, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.hidden: Tensor | None = None
        self.columns = 0  # in place
        self._tokens: list[Tensor] = []
        self._chances: list[Tensor] = []

    def keep(self, token: Tensor, chance: Tensor | None) -> None:
        """Keeps a column of the rows in the cache: tokens [n] and their log-probabilities [n]."""
        self._tokens.append(token)
        if chance is not None:
            self._chances.append(chance)

    def place(self, rows: Tensor, count: Tensor, ended: Tensor, states: Tensor | None) -> None:
        """Puts everything of the rows [n] in the cache in place, before some of them leave it."""
        if self._tokens:
            columns = slice(self.columns, self.columns + len(self._tokens))
            self.actions[rows, columns] = torch.stack(self._tokens, dim=1)
            if self._chances:
                self.log_prob[rows, columns] = torch.stack(self._chances, dim=1)
            self.columns = columns.stop
            self._tokens, self._chances = [], []
        self.count[rows], self.ended[rows] = count, ended
        if states is not None:
            if self.hidden is None:
                self.hidden = states.new_zeros(len(self.count), states.shape[1])
            self.hidden[rows] = states

    def written(self, *, embed: bool, log_probs: bool) -> Written:
        """The rationales; what stands behind a row's last action is cleared."""
        column = torch.arange(self.actions.shape[1], device=self.actions.device)
        real = column < (self.count + self.ended)[:, None]
        actions = self.actions * real
        lengths = self.count.tolist()
        return Written(
            token_ids=[tuple(row[:length]) for row, length in zip(actions.tolist(), lengths, strict=True)],
            truncated=~self.ended.cpu(),
            hidden=self.hidden if embed else None,
            actions=actions,
            log_prob=self.log_prob.where(real, 0.0) if log_probs else None,
        )
