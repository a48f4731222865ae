"""InfoNCE with both embedding gradients by Triton kernels and library products, slab by slab: the engine for GPUs.

    N queries   M candidates   D width   slab: the R x C block of S that exists at once, in the embeddings' dtype
    p_i the positive's logit of query i   o_i log-sum-exp of its negatives   (formulas: `mmemb.kernels.problem`)

A float32 accumulator for 128 rows of dQ at D = 1024 takes half a megabyte and cannot stay on the chip. So gradients are
not accumulated tile by tile. A kernel writes a block of G = dL/dS, and two library products with float32 accumulation
add dQ += G K and dK += G^T Q. The cost, in products of N x M x D (2 U operations each):

- One direction with small logits: a kernel writes exp(S) and its row sums together, and the softmax's denominators
  multiply the narrow operands. 3 products (6 U).
- Otherwise, and for the symmetric loss: a first pass computes S and the log-sum-exps of rows and columns, a second
  computes S again and writes G. 4 products (8 U).

Every run gives the same bits: each value has one writer, sums have a fixed order, and tiles are fixed per chip
(`mmemb.kernels.triton.tiles`).

Memory besides inputs and outputs is the workspace, a slab's rows of dQ, some blocks of 4096 embeddings and, for 16-bit
input, both gradients in float32. The workspace holds the slab, its float32 copy if the library has no mixed products,
and the sums of its rows. It has room for the rows of at least one tile. Embeddings are padded with columns of zeros to
a width that is a multiple of 16, which changes no dot product. Their gradients have that width until they are returned.

As in the tiled engine, the sums leave out the positive: loss = log(1 + exp(o - p)), and G at the positive is
-sigmoid(o - p). Here the blocks of G leave it out too, and its part of dQ and dK is added in float32. G at the positive
is larger than at any negative. Rounded to 16 bits, it would keep rows from summing to 0. The missing amount, times the
embeddings' common mean, was the largest part of the error. For bfloat16 at a mean cosine of 0.9 (in the interpreter)
the error fell from 1e-2 of the gradients' norm to 2e-3.

The temperature's gradient is sum(G * (S - p)), summed before G is rounded. Rows of G sum to 0, so that equals
sum(G * S), and no large terms cancel.
"""

from __future__ import annotations

import functools
import subprocess
from dataclasses import replace

import torch
import triton
from torch import Tensor

from mmemb.kernels.engines import interpreted
from mmemb.kernels.problem import Columns, Gradients, Merge, Problem
from mmemb.kernels.tiled.engine import excess_loss
from mmemb.kernels.triton import tiles as _tiles
from mmemb.kernels.triton.gradients import Sums, add_product
from mmemb.kernels.triton.launch import FULL_ROW_SUMS, Launcher, aligned, blocks


@functools.cache
def no_launch() -> str | None:
    """Returns why kernels cannot be launched on this machine's GPU; None if nothing speaks against it.

    The check starts Triton's driver. Triton compiles a part of it with the machine's C compiler, and containers may
    have none. That part may already be in Triton's cache. Before version 3.7 Triton still needs the compiler then, for
    each kernel's launcher.
    """
    if interpreted():
        return "its interpreter (TRITON_INTERPRET=1) computes on the CPU"
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # compiler, loader or assertion: whatever fails, the other engine works
        reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
        if isinstance(error, subprocess.SubprocessError) or "compiler" in reason:
            reason += " (a C compiler and Python's headers are needed; CC names one)"
        return reason
    return None


def supports(query: Tensor) -> bool:
    """Whether this engine solves problems with such queries. It takes float64 only in the interpreter."""
    return _tiles.choose(query.device, query.dtype) is not None


def one_direction(
    problem: Problem, *, coefficient: Tensor | None, workspace_bytes: int | None = None
) -> tuple[Tensor, Gradients | None]:
    """Returns the losses [N] and, given coefficients [N], the gradients of sum(coefficient * loss)."""
    launcher = Launcher(problem, workspace_bytes)
    with launcher.device:
        extra = launcher.further_negatives()
        if coefficient is not None and launcher.full_rows:
            losses, totals, excess, gradients = _by_exponentials(launcher, coefficient, extra)
            gradients.add_positives(-coefficient * excess.sigmoid())
            gradients.add_further(coefficient, totals)  # needs a slab of its own; the first is freed by now
            return losses, gradients.result()
        others, _ = launcher.sums(launcher.main, columns=False)
        others = others if extra is None else torch.logaddexp(others, extra)
        excess = others - launcher.own
        losses = excess_loss(excess)
        if coefficient is None:
            return losses, None
        totals = torch.logaddexp(others, launcher.own)
        gradients = Sums(launcher, coefficient)
        gradients.add_main(coefficient, totals)
        gradients.add_positives(-coefficient * excess.sigmoid())
        gradients.add_further(coefficient, totals)
        return losses, gradients.result()


def symmetric(
    problem: Problem, *, coefficient: Tensor | None, merge: Merge | None = None, workspace_bytes: int | None = None
) -> tuple[Tensor, Gradients | None]:
    """Does the same as `one_direction` for the mean of each query's loss and its positive's loss against all queries.

    Positives must be distinct. ``merge`` joins the columns with those of the queries of other ranks.
    """
    launcher = Launcher(problem, workspace_bytes)
    with launcher.device:
        own, positive = launcher.own, problem.positive
        extra = launcher.further_negatives()
        column_own = launcher.empty(len(launcher.candidate)).zero_().index_copy_(0, positive, own)
        shares = torch.zeros_like(column_own)
        if coefficient is not None:
            shares[positive] = coefficient / 2
        if launcher.main.limit is not None:
            limit = torch.zeros_like(column_own).index_copy_(0, positive, launcher.main.limit)
            if merge is not None:
                limit = merge(Columns(torch.full_like(limit, -torch.inf), limit, shares)).own
            launcher.main = replace(launcher.main, column_limit=limit)
        row_others, column_others = launcher.sums(launcher.main, columns=True)
        if extra is not None:
            row_others = torch.logaddexp(row_others, extra)
            column_others[positive] = torch.logaddexp(column_others[positive], extra)
        columns = Columns(column_others, column_own, shares)
        if merge is not None:
            columns = merge(columns)
        row_excess, column_excess = row_others - own, columns.others[positive] - own
        losses = (excess_loss(row_excess) + excess_loss(column_excess)) / 2
        if coefficient is None:
            return losses, None
        half = coefficient / 2
        totals = torch.logaddexp(row_others, own)
        # A column's share may come from another rank and be larger than every coefficient here.
        gradients = Sums(launcher, torch.cat([coefficient, 2 * columns.share]))
        gradients.add_main(half, totals, columns)
        gradients.add_positives(-half * (row_excess.sigmoid() + column_excess.sigmoid()))
        # A further negative counts in both losses: exp(z - total) + exp(z - column's total).
        column_totals = torch.logaddexp(columns.others[positive], own)
        gradients.add_further(half, -torch.logaddexp(-totals, -column_totals))
        return losses, gradients.result()


def _by_exponentials(
    launcher: Launcher, coefficient: Tensor, extra: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Sums]:
    """Solves one direction in three products: the slab holds exp(s) of full rows.

    Returns the losses [N], their log-sum-exps [N], o - p [N] and the gradients of the main negatives.
    """
    n, m = len(launcher.query), len(launcher.candidate)
    losses, totals, excess = (launcher.empty(n) for _ in range(3))
    gradients = Sums(launcher, coefficient)
    rows = launcher.slab_rows(m, sums=FULL_ROW_SUMS)
    slab = launcher.query.new_empty(min(rows, n), aligned(m))
    for start, stop in blocks(n, rows):
        by_row, products = (launcher.empty(launcher.pieces(m), stop - start) for _ in range(2))
        powers = slab[: stop - start, :m]
        launcher.launch_sums(launcher.main, start, stop, by_row, None, products, powers)
        own, others = launcher.own[start:stop], by_row.logsumexp(0)
        if extra is not None:
            others = torch.logaddexp(others, extra[start:stop])
        excess[start:stop] = others - own
        losses[start:stop] = excess_loss(others - own)
        totals[start:stop] = torch.logaddexp(others, own)
        share = coefficient[start:stop] * (-totals[start:stop]).exp()
        gradients.slope += torch.dot(products.sum(0), share)
        product = add_product(launcher.empty(stop - start, launcher.query.shape[1]).zero_(), powers, launcher.candidate)
        gradients.query[start:stop] = product.mul_(share[:, None])
        narrow = (launcher.query[start:stop] * share[:, None]).to(launcher.dtype)
        add_product(gradients.candidate, powers.T, narrow)
    return losses, totals, excess, gradients
