"""InfoNCE with all gradients in plain torch, one stripe of query rows at a time: the engine for any device.

    N queries   M candidates   D width   R rows of a stripe   T levels, see `mmemb.kernels.tiled.stripes`
    p_i, o_i and the rest as in `mmemb.kernels.problem`

A stripe holds complete rows, so one direction computes S = c dot once. The exponentials E of S give o, dQ = E K and
dK += E^T Q. The softmax's denominator multiplies the narrow side ([R, D]), not the wide one ([R, M]). That makes three
matrix products, the minimum.

The symmetric loss needs the log-sum-exp of every column before the first gradient, so it computes S twice: four
products. Stripes that fit in the workspace are kept from the first pass and save their part of the fourth. If no logit
can overflow, both directions share one exponential: G = E (a_i + b_j).

The sums leave out the positive: loss = log(1 + exp(o - p)), and G at the positive is -sigmoid(o - p). Small losses and
gradients then keep their relative precision. Log-sum-exp minus p would leave only the rounding of 1 / temperature.

Accumulation is in float32 (float64 for float64 input). Besides inputs and gradients, memory holds the workspace, a few
chunks, R x D temporaries and, for 16-bit inputs, O((N + M) D). On the CPU the workspace stays for the next call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmemb.kernels.problem import Columns, Gradients, Merge, Problem
from mmemb.kernels.tiled.stripes import Block, Stripes, leave_out_, within
from mmemb.kernels.tiled.sums import Sums

ROWS = 1024
"""Maximum number of rows of a stripe. 1024 measured best on a CPU: 1.03 to 1.11 times the bare products. 256 rows took
1.15 to 1.35 times."""

WORKSPACE_BYTES = 108 * 2**20
"""Default workspace: three stripes of 8192 float32 columns (the symmetric loss keeps two of them) and the chunks."""

SAFE_LOGIT = 55.0
"""Up to this bound no maximum is subtracted: exp(-55), exp(55) and sums of 2^40 of them are normal float32 numbers."""


def one_direction(
    problem: Problem, *, coefficient: Tensor | None, rows: int = ROWS, workspace_bytes: int | None = None
) -> tuple[Tensor, Gradients | None]:
    """Returns the losses [N] and, given coefficients [N], the gradients of sum(coefficient * loss)."""
    stripes = Stripes(problem, most_rows=rows, workspace_bytes=workspace_bytes or WORKSPACE_BYTES)
    limits = stripes.limits()
    losses = stripes.own.new_zeros(len(problem.query))
    sums = None if coefficient is None else Sums(stripes)
    for part in stripes.slices():
        for block in stripes.blocks:
            block.load(part)
        factors = []
        for level, own in enumerate(stripes.own[:, part]):
            total, shift = exponentials_(stripes, stripes.blocks, level, part, limits)
            loss = excess_loss(total.log() + shift - own)
            losses[part] += loss
            if coefficient is not None:
                # Softmax = E * exp(shift - log-sum-exp), and that is p + loss; with the positive's entry it sums to 0.
                wide = stripes.blocks[0].wide[level][: len(loss)]
                wide.scatter_(1, problem.positive[part, None], -total[:, None])
                factors.append(coefficient[part] * (shift - own - loss).exp())
        if sums is not None:
            sums.add(part, [factors] * len(stripes.blocks))
    stripes.workspace.keep()
    return losses, sums.result() if sums is not None else None


def symmetric(
    problem: Problem,
    *,
    coefficient: Tensor | None,
    rows: int = ROWS,
    merge: Merge | None = None,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Gradients | None]:
    """Does the same as `one_direction` for the mean of each query's loss and its positive's loss against all queries.

    Positives must be distinct. ``merge`` joins the columns with those of the queries of other ranks.
    """
    workspace_bytes = workspace_bytes or WORKSPACE_BYTES
    stripes = Stripes(problem, most_rows=rows, workspace_bytes=workspace_bytes)
    both = _BothDirections(stripes, coefficient, merge, workspace_bytes)
    row_excess, columns = both.log_sums()
    column_excess = torch.stack([c.others[problem.positive] for c in columns]) - stripes.own
    losses = (excess_loss(row_excess) + excess_loss(column_excess)).sum(0) / 2
    gradients = None if coefficient is None else both.gradients(row_excess, column_excess, columns, coefficient)
    stripes.workspace.keep()
    return losses, gradients


class _BothDirections:
    """The two passes of the symmetric loss and the values that they share."""

    def __init__(self, stripes: Stripes, coefficient: Tensor | None, merge: Merge | None, workspace_bytes: int) -> None:
        self.stripes, self.problem = stripes, stripes.problem
        self.merge = merge or (lambda columns: columns)
        self.main, *self.extra = stripes.blocks
        self.parts = stripes.slices()
        n, m = len(self.problem.query), len(self.problem.candidate)
        self.share = stripes.own.new_zeros(m)
        if coefficient is not None:
            self.share[self.problem.positive] = coefficient / 2
        self.limits = stripes.limits()
        self.column_limits = self._column_limits()
        self.shared = self.problem.bound <= SAFE_LOGIT and self.limits is None
        self.second = self.main.columns.new_empty(stripes.chunk, m)
        # When the second pass begins, the last stripe of the first is still there, and so are the stripes kept with it.
        self.buffers = [self.main.wide]
        if coefficient is not None and self.shared and self.problem.dims is None:
            free = workspace_bytes - stripes.rows * sum(block.bytes_per_row for block in stripes.blocks)
            keep = min(free // (stripes.rows * self.main.bytes_per_row), len(self.parts) - 1)
            shape = self.main.wide[0].shape
            self.buffers += [[stripes.workspace.take(self.main.columns, *shape)] for _ in range(keep)]
        self.first_kept = len(self.parts) - len(self.buffers) if self.shared and n else len(self.parts)

    def log_sums(self) -> tuple[Tensor, list[Columns]]:
        """First pass: returns o - p of the rows [T, N], and the columns of each level."""
        stripes, own = self.stripes, self.stripes.own
        m = len(self.share)
        column_own = [own.new_zeros(m).index_copy_(0, self.problem.positive, level) for level in own]
        others = own.new_full((stripes.levels, m), 0.0 if self.shared else -torch.inf)
        rows, extra = torch.full_like(own, -torch.inf), torch.full_like(own, -torch.inf)
        for number, part in enumerate(self.parts):
            self.main.wide = self.buffers[max(0, number - self.first_kept)]
            for block in stripes.blocks:
                block.load(part)
            for level in range(stripes.levels):
                of_columns = others[level]
                for chunk in stripes.chunks(part):
                    by_row, by_column = self._logits(level, part, chunk)
                    if self.shared:
                        by_row.exp_()
                        torch.sum(by_row, 1, out=rows[level, within(part, chunk)])
                        of_columns += by_row.sum(0)
                    else:
                        rows[level, within(part, chunk)] = by_row.logsumexp(1)
                        others[level] = torch.logaddexp(others[level], by_column.logsumexp(0))
                if self.extra:
                    total, shift = exponentials_(stripes, self.extra, level, part, self.limits)
                    extra[level, part] = total.log() + shift
        if self.shared:
            rows.log_()
            others.log_()
        if self.extra:
            rows = torch.logaddexp(rows, extra)
            others[:, self.problem.positive] = torch.logaddexp(others[:, self.problem.positive], extra)
        columns = [self.merge(Columns(*each, self.share)) for each in zip(others, column_own, strict=True)]
        return rows - own, columns

    def gradients(
        self, row_excess: Tensor, column_excess: Tensor, columns: list[Columns], coefficient: Tensor
    ) -> Gradients:
        """Second pass: returns the gradients."""
        problem, stripes, levels = self.problem, self.stripes, range(self.stripes.levels)
        share, half = columns[0].share, coefficient / 2
        row_sums = excess_loss(row_excess) + stripes.own  # [T, N] log-sum-exps with the positive; so are column_sums
        # A column that is no query's positive has no loss. +inf makes its softmax exactly 0, even if all is masked.
        column_sums = torch.stack([torch.logaddexp(c.others, c.own).where(share != 0, torch.inf) for c in columns])
        own_column_sums = column_sums[:, problem.positive]
        at_positive = -half * (row_excess.sigmoid() + column_excess.sigmoid())
        lower = torch.minimum(row_sums, own_column_sums)
        factors = half * ((lower - row_sums).exp_() + (lower - own_column_sums).exp_())
        row_weights, column_weights = half * (-row_sums).exp(), share * (-column_sums).exp()
        sums = Sums(stripes)
        for number, part in reversed(list(enumerate(self.parts))):
            kept = number >= self.first_kept
            self.main.wide = self.buffers[number - self.first_kept] if kept else self.buffers[0]
            for block in self.extra if kept else stripes.blocks:
                block.load(part)
            for level in levels:
                for chunk in stripes.chunks(part):
                    rows = within(part, chunk)
                    wide, second = self.main.wide[level][chunk], self.second[: chunk.stop - chunk.start]
                    if self.shared:
                        if not kept:
                            self.main.logits(level, part, chunk, None).exp_()
                        wide.mul_(torch.add(column_weights[level], row_weights[level, rows, None], out=second))
                    else:
                        _, by_column = self._logits(level, part, chunk)
                        torch.sub(by_column, column_sums[level], out=second).exp_().mul_(share)
                        wide.sub_(row_sums[level, rows, None]).exp_().mul_(half[rows, None]).add_(second)
                    for block in self.extra:
                        logits = block.logits(level, part, chunk, _chunk_limit(self.limits, level, rows))
                        logits.sub_(lower[level, rows, None]).exp_()
                own_rows = part.stop - part.start
                self.main.wide[level][:own_rows].scatter_(
                    1, problem.positive[part, None], at_positive[level, part, None]
                )
            of_extra = list(factors[:, part])
            sums.add(part, [[None for _ in levels]] + [of_extra for _ in self.extra])
        return sums.result()

    def _logits(self, level: int, part: slice, chunk: slice) -> tuple[Tensor, Tensor]:
        """A chunk of logits for the rows, in ``wide``, and for the columns. Without a margin both are the same."""
        logits = self.main.logits(level, part, chunk, None)
        if self.limits is None or self.column_limits is None:
            return logits, logits
        by_column = self.second[: len(logits)].copy_(logits)
        leave_out_(by_column, over=self.column_limits[level], mask=self.main.mask)
        leave_out_(logits, over=self.limits[level, within(part, chunk), None], mask=self.main.mask)
        return logits, by_column

    def _column_limits(self) -> Tensor | None:
        """[T, M] logits above which a column's negatives are left out, from its own query. None without a margin."""
        if self.limits is None:
            return None
        none = torch.full_like(self.share, -torch.inf)
        limits = [torch.zeros_like(self.share).index_copy_(0, self.problem.positive, level) for level in self.limits]
        return torch.stack([self.merge(Columns(none, each, self.share)).own for each in limits])


def exponentials_(
    stripes: Stripes, blocks: list[Block], level: int, part: slice, limits: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Writes exp(logits - shift) to the blocks' ``wide``. Returns row sums over all blocks and the shift, both [R]."""
    total, shift = stripes.own.new_zeros(2, part.stop - part.start)
    for chunk in stripes.chunks(part):
        limit = _chunk_limit(limits, level, within(part, chunk))
        logits = [block.logits(level, part, chunk, limit) for block in blocks]
        if stripes.problem.bound > SAFE_LOGIT:
            # A row may be all -inf. -inf minus a finite shift stays -inf.
            top = torch.stack([each.amax(1) for each in logits]).amax(0).clamp_min_(torch.finfo(total.dtype).min)
            for each in logits:
                each.sub_(top[:, None])
            shift[chunk] = top
        of_chunk = total[chunk]
        for each in logits:
            of_chunk += each.exp_().sum(1)
    return total, shift


def excess_loss(excess: Tensor) -> Tensor:
    """Returns log(1 + exp(o - p)), exact up to rounding for small and large values alike."""
    return torch.logaddexp(excess, torch.zeros_like(excess))


def _chunk_limit(limits: Tensor | None, level: int, rows: slice) -> Tensor | None:
    return None if limits is None else limits[level, rows, None]
