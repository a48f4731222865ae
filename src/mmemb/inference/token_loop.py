"""Runs the token loop: rows that reason continue from the cache of their prompt, one token per step.

A row passes through four phases: writing (the rationale), closing (``</think>`` is fed), embedding (``<emb>`` is fed)
and done. A rationale of L tokens therefore takes L + 3 steps: ``<think>``, its tokens, ``</think>``, ``<emb>``. A row
whose budget ends is closed like any other, so ``<emb>`` is never missing. Finished rows stay in the batch until there
are enough of them to justify a copy of the cache without them.

A few rows write much longer than the rest, and a step with few rows costs about as much as a step with many. Therefore
the loop does not wait for the last rows of a batch: further rows may join them, and all finish together.

The results of a step stay on the device. The host reads them after every step on a CPU, and after every few steps
elsewhere, so that it can run ahead of an accelerator.

Shape legend: R rows, n rows still in the cache, L longest rationale, V vocabulary, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmemb.inference.prompts import thought_tokens
from mmemb.interfaces import Backbone, Prefix
from mmemb.types import EMB, THINK

COMPACT_SHARE = 0.25
"""Share of finished rows at which the cache is copied without them.

The copy costs about as much as the memory reads of attention in one step.
"""

_WRITING, _CLOSING, _EMBEDDING, _DONE = range(4)


@dataclass
class Written:
    """The rationales of R rows.

    Attributes:
        token_ids: for each row, a tuple with the ids of its rationale, without the end token.
        truncated: [R] bool on the CPU, whether the budget ended the rationale.
        hidden: [R, H], the state at ``<emb>``. None if not requested.
        actions: [R, L + 1] int64 on the device, every token that was chosen, including the end token if the model chose
            one. Zero after the last token.
        log_prob: [R, L + 1] float32 on the device, log-probability of each action under the distribution from which it
            was drawn. Zero after the last action. None if not requested.
    """

    token_ids: list[tuple[int, ...]]
    truncated: Tensor
    hidden: Tensor | None
    actions: Tensor
    log_prob: Tensor | None


class Sampler:
    """Chooses the likeliest token, or samples one by inverse transform with one uniform number per row and step.

    The numbers of a row come from its own seed, so its text does not depend on other rows.

    Args:
        steps: maximum number of tokens that a row chooses.
        temperature: divides the logits. 0 takes the likeliest token.
        device: device of the logits.
    """

    def __init__(self, *, steps: int, temperature: float, device: torch.device) -> None:
        self.steps, self.temperature = steps, temperature
        self.uniforms = torch.zeros(0, steps, dtype=torch.float64, device=device)  # [R, steps], if temperature > 0

    def add(self, seeds: Sequence[int]) -> None:
        """Adds rows, with one seed per row."""
        if self.temperature > 0:
            drawn = [torch.rand(self.steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            self.uniforms = torch.cat([self.uniforms, torch.stack(drawn).to(self.uniforms)])

    def __call__(self, logits: Tensor, rows: Tensor, step: Tensor) -> Tensor:
        """Chooses token ids [n] from logits [n, V] for rows [n], each at its own step [n]."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        cumulative = (logits.double() / self.temperature).softmax(dim=-1).cumsum(dim=-1)
        # Scaling by the total keeps the draw below it despite rounding. right=True skips tokens of probability 0.
        drawn = self.uniforms[rows, step][:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, drawn, right=True).flatten()


def rationale_logits(backbone: Backbone, hidden: Tensor) -> Tensor:
    """Computes the logits [n, V] float32 of the next rationale token after states [n, H].

    ``<think>`` and ``<emb>`` get a logit of minus infinity, because a rationale has no second decision.
    """
    logits = backbone.logits(hidden).float()
    banned = torch.tensor([backbone.token_id(THINK), backbone.token_id(EMB)], device=logits.device)
    return logits.index_fill(-1, banned, -torch.inf)


@dataclass
class _Rows:
    """The rows in the cache. Every tensor has one entry per row."""

    prefix: Prefix
    index: Tensor  # number of the row among all rows ever added
    budgets: Tensor
    feed: Tensor
    phase: Tensor
    count: Tensor  # tokens of the rationale so far
    ended: Tensor  # bool: the model ended the rationale, not the budget
    column: Tensor  # column of the first action that is not stored yet
    states: Tensor  # [n, H], the state at ``<emb>`` once it has been fed
    tokens: list[Tensor] = field(default_factory=list, init=False)  # actions not stored yet, one entry per step
    chances: list[Tensor] = field(default_factory=list, init=False)

    def tensors(self) -> list[Tensor]:
        """Returns every tensor except the prefix, in the order of the fields."""
        return [
            self.index,
            self.budgets,
            self.feed,
            self.phase,
            self.count,
            self.ended,
            self.column,
            self.states,
        ]

    def select(self, backbone: Backbone, left: Tensor) -> _Rows:
        """Returns some of the rows. All actions must be stored before."""
        return _Rows(backbone.fork(self.prefix, left), *(each[left] for each in self.tensors()))

    def join(self, backbone: Backbone, other: _Rows) -> _Rows:
        """Returns the rows of both. All actions must be stored before."""
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return _Rows(backbone.join([self.prefix, other.prefix]), *(torch.cat(pair) for pair in pairs))


class Writing:
    """Writes the rationales of many rows.

    Call `add` with some rows and `run` until few are left. If the backbone joins prefixes, add more rows before the
    others are done.

    Args:
        backbone: the model.
        sampler: chooses the next token.
        longest: L, the largest budget of any row.
        embed: whether to feed ``</think> <emb>`` as well and keep the state at ``<emb>``. Otherwise a row is done after
            its last token.
        log_probs: whether to keep the log-probability of every action.
        think: False leaves out ``<think>``, so that a model that never learned the token writes directly after its
            prompt.
    """

    def __init__(
        self,
        backbone: Backbone,
        sampler: Sampler,
        *,
        longest: int,
        embed: bool,
        log_probs: bool = False,
        think: bool = True,
    ) -> None:
        self.backbone, self.sampler, self.embed, self.log_probs, self.think = backbone, sampler, embed, log_probs, think
        device = backbone.device
        self.opening, end_think, emb = thought_tokens(backbone.token_id, [])  # those of an empty rationale
        # An instruct model may end its turn with its own special token before it has learned ``</think>``.
        self.ends = sorted({end_think, *backbone.special_ids} - {self.opening, emb})
        self._ends_rationale: Tensor | None = None  # [V] bool, made when V is known
        self._forced = torch.tensor(
            [end_think, emb, end_think, end_think], device=device
        )  # the token to feed after each phase
        self._look_every = 1 if device.type == "cpu" else 4
        self._rows: _Rows | None = None
        self._anyone_writes = False
        self._kept = _Kept(longest, backbone.hidden_size, device)

    def __len__(self) -> int:
        """The number of rows that were not done at the last check."""
        return 0 if self._rows is None else len(self._rows.index)

    def add(self, prefix: Prefix, budgets: Tensor, seeds: Sequence[int]) -> None:
        """Adds rows. Rows that are not done yet continue together with them.

        Args:
            prefix: the prompts of the rows. Do not use it again.
            budgets: int64, maximum number of tokens in each rationale.
            seeds: seeds of the sampling, one per row.
        """
        self.sampler.add(seeds)
        rows = _Rows(
            prefix=prefix,
            index=self._kept.add(len(budgets)),
            budgets=budgets,
            feed=torch.full_like(budgets, self.opening),
            phase=torch.full_like(budgets, _WRITING),
            count=torch.zeros_like(budgets),
            ended=torch.zeros_like(budgets, dtype=torch.bool),
            column=torch.zeros_like(budgets),
            states=prefix.hidden,
        )
        self._anyone_writes = True
        if not self.think:
            self._choose(rows, prefix.hidden)
        if self._rows is not None:
            for each in (self._rows, rows):
                self._kept.place(each)
            rows = self._rows.join(self.backbone, rows)
        self._rows = rows

    def run(self, *, leave: int = 0) -> None:
        """Runs steps until at most ``leave`` rows are not done."""
        step = 0
        while self._rows is not None and len(self) > leave:
            hidden, self._rows.prefix = self.backbone.extend(self._rows.prefix, self._rows.feed[:, None])
            self._choose(self._rows, hidden[:, -1])
            step += 1
            if step % self._look_every == 0:
                self._look(leave)

    def written(self) -> Written:
        """Returns what all rows wrote, in the order in which they were added. Call `run` to the end before."""
        return self._kept.written(embed=self.embed, log_probs=self.log_probs)

    def _choose(self, rows: _Rows, hidden: Tensor) -> None:
        """Takes the states [n, H] after the last fed token and chooses the next token to feed."""
        if self.embed:
            rows.states = torch.where((rows.phase == _EMBEDDING)[:, None], hidden, rows.states)
        rows.feed = self._forced[rows.phase]
        if not self._anyone_writes:
            rows.phase = (rows.phase + 1).clamp_(max=_DONE)
            return
        logits = rationale_logits(self.backbone, hidden)
        if self._ends_rationale is None:
            self._ends_rationale = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
            self._ends_rationale[self.ends] = True
        token = self.sampler(logits, rows.index, rows.count)
        rows.tokens.append(token)
        if self.log_probs:
            rows.chances.append(_chance(logits, token, self.sampler.temperature))
        writing, stops = rows.phase == _WRITING, self._ends_rationale[token]
        rows.ended = rows.ended | (writing & stops)
        going = writing & ~stops & (rows.count < rows.budgets)
        rows.count = rows.count + going
        rows.feed = torch.where(going, token, rows.feed)
        rows.phase = torch.where(going, rows.phase, (rows.phase + (1 if self.embed else _DONE)).clamp_(max=_DONE))

    def _look(self, leave: int) -> None:
        """Finds the rows that are done.

        Removes them from the cache if they are many enough, or if at most ``leave`` rows are not done.
        """
        rows = self._rows
        assert rows is not None
        in_phase = torch.bincount(rows.phase, minlength=_DONE + 1).tolist()
        self._anyone_writes = in_phase[_WRITING] > 0
        done = in_phase[_DONE]
        if done >= COMPACT_SHARE * len(rows.index) or len(rows.index) - done <= leave:
            self._kept.place(rows)
            left = (rows.phase != _DONE).nonzero().flatten()
            self._rows = rows.select(self.backbone, left) if len(left) else None


def _chance(logits: Tensor, token: Tensor, temperature: float) -> Tensor:
    """Computes the log-probabilities [n] of tokens [n] from logits [n, V]."""
    return (logits / temperature).log_softmax(dim=-1).gather(1, token[:, None])[:, 0]


class _Kept:
    """Stores what R rows wrote.

    A step only appends to a list. The columns are stored when rows leave the cache or join it.

    Args:
        longest: maximum number of tokens in a rationale.
        width: H, the width of the hidden states.
        device: device of the tensors.
    """

    def __init__(self, longest: int, width: int, device: torch.device) -> None:
        # Rows that have closed their rationale continue to choose tokens until they leave the cache. The last column
        # takes the tokens beyond the width.
        self.actions = torch.zeros(0, longest + 2, dtype=torch.int64, device=device)
        self.log_prob = torch.zeros(0, longest + 2, device=device)
        self.count = torch.zeros(0, dtype=torch.int64, device=device)
        self.ended = torch.zeros(0, dtype=torch.bool, device=device)
        self.hidden: Tensor | None = None  # [R, H], made when its dtype is known
        self.width = width

    def add(self, rows: int) -> Tensor:
        """Makes room for more rows and returns their indices."""
        first = len(self.count)
        for name in ("actions", "log_prob", "count", "ended"):
            old = getattr(self, name)
            setattr(self, name, torch.cat([old, old.new_zeros(rows, *old.shape[1:])]))
        return torch.arange(first, first + rows, device=self.count.device)

    def place(self, rows: _Rows) -> None:
        """Stores everything that the rows wrote, before some of them leave the cache or others join."""
        if rows.tokens:
            steps = torch.arange(len(rows.tokens), device=rows.column.device)
            columns = (rows.column[:, None] + steps).clamp_(max=self.actions.shape[1] - 1)
            self.actions[rows.index[:, None], columns] = torch.stack(rows.tokens, dim=1)
            if rows.chances:
                self.log_prob[rows.index[:, None], columns] = torch.stack(rows.chances, dim=1)
            rows.column = rows.column + len(rows.tokens)
            rows.tokens, rows.chances = [], []
        self.count[rows.index], self.ended[rows.index] = rows.count, rows.ended
        if self.hidden is None:
            self.hidden = rows.states.new_zeros(0, self.width)
        missing = len(self.count) - len(self.hidden)
        if missing:
            self.hidden = torch.cat([self.hidden, self.hidden.new_zeros(missing, self.width)])
        self.hidden[rows.index] = rows.states

    def written(self, *, embed: bool, log_probs: bool) -> Written:
        """Returns the rationales. Entries after the last action of a row are zero."""
        columns = self.actions.shape[1] - 1
        real = torch.arange(columns, device=self.actions.device) < (self.count + self.ended)[:, None]
        actions = self.actions[:, :columns] * real
        lengths = self.count.tolist()
        return Written(
            token_ids=[tuple(row[:length]) for row, length in zip(actions.tolist(), lengths, strict=True)],
            truncated=~self.ended.cpu(),
            hidden=self.hidden if embed else None,
            actions=actions,
            log_prob=self.log_prob[:, :columns].where(real, 0.0) if log_probs else None,
        )
