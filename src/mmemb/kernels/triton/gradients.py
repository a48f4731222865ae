"""Sums up the gradients of the Triton engine: a kernel makes blocks of G, the library multiplies with them."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor
from triton import cdiv

from mmemb.kernels.problem import Columns, Gradients
from mmemb.kernels.tiled.sums import add_rows_
from mmemb.kernels.triton import tiles as _tiles
from mmemb.kernels.triton.kernels import gradient_kernel
from mmemb.kernels.triton.launch import Launcher, Part, aligned, blocks, multiplies_mixed

HALF_PEAK = 14
"""Exponent of the largest |G| in float16, base 2. G is scaled to it, since float16 cannot hold 1 / N^2."""


POSITIVE_ROWS = 4096
"""Rows per step of `Sums.add_positives`, which holds a few such blocks of embeddings in the work dtype."""


class Sums:
    """Sums of the gradients with respect to c * dot, times `boost`. ``slope`` is sum(G * z) over negatives' logits z.

    Args:
        launcher: the problem's launcher.
        largest: values, of which one is at least as large as any |G|.
    """

    def __init__(self, launcher: Launcher, largest: Tensor) -> None:
        self.launcher = launcher
        problem, query = launcher.problem, launcher.query
        tiles = _tiles.choose_for_gradient(query.device, query.dtype)
        assert tiles is not None
        self.tiles = tiles
        self.query = launcher.empty(*launcher.query.shape).zero_()
        self.candidate = launcher.empty(*launcher.candidate.shape).zero_()
        self.peers = None if problem.peers is None else launcher.empty(len(problem.peers.query), query.shape[1]).zero_()
        self.slope = launcher.empty(1).zero_()[0]
        self.boost = torch.ones_like(self.slope)
        if launcher.dtype == torch.float16 and len(largest):
            self.boost = (HALF_PEAK - largest.abs().amax().clamp_min(2.0**-100).log2()).floor().exp2()

    def add_main(self, share: Tensor, totals: Tensor, columns: Columns | None = None) -> None:
        """Adds the part of the queries' negatives among the candidates."""
        self._add(self.launcher.main, self.query, self.candidate, share, totals, columns)

    def add_positives(self, values: Tensor) -> None:
        """Adds the positives' part, given G [N] at them. Never in 16 bits: rows of G would no longer sum to 0."""
        launcher, work = self.launcher, self.query.dtype
        for start, stop in blocks(len(values), POSITIVE_ROWS):
            share, own = (values[start:stop] * self.boost)[:, None], launcher.problem.positive[start:stop]
            self.query[start:stop] += launcher.candidate[own].to(work).mul_(share)
            add_rows_(self.candidate, own, launcher.query[start:stop] * share)

    def add_further(self, share: Tensor, totals: Tensor) -> None:
        """Adds the further negatives' part, for rows of G = share exp(z - total)."""
        for name, part in self.launcher.parts.items():
            if name == "peers":
                assert self.peers is not None
                self._add(part, self.query, self.peers, share, totals)
                continue
            left = torch.zeros_like(self.query)
            self._add(part, left, self.candidate, share, totals)
            add_rows_(self.candidate, part.own, left)

    def _add(
        self,
        part: Part,
        left: Tensor,
        right: Tensor,
        share: Tensor,
        totals: Tensor,
        columns: Columns | None = None,
    ) -> None:
        """Adds G right to ``left`` [N, D] and G^T left to ``right`` [L, D], block by block."""
        launcher, tiles = self.launcher, self.tiles
        row_vectors = [(share * self.boost).contiguous(), totals.contiguous()]
        column_vectors = [totals, totals, totals]  # not read
        if columns is not None:
            # A column that is no query's positive has no loss. +inf makes its softmax exactly 0, even if all of it is
            # left out.
            total = torch.logaddexp(columns.others, columns.own).where(columns.share != 0, torch.inf)
            column_vectors = [columns.share * self.boost, total, columns.own * launcher.stretch]
        n, m = len(part.left), len(part.right)
        if n == 0:  # Triton refuses descriptors of empty tensors
            return
        operands, options = launcher.operands(part, tiles), launcher.options(part, tiles)
        rows, width = self._block(n, m)
        slab = launcher.query.new_empty(min(rows, n), aligned(min(width, m)))
        for row, last_row in blocks(n, rows):
            for column, last_column in blocks(m, width):
                count = cdiv(last_row - row, tiles.rows) * cdiv(last_column - column, tiles.columns)
                slopes = launcher.empty(count)
                values = slab[: last_row - row, : last_column - column]
                gradient_kernel[launcher.grid(count)](
                    *operands, *row_vectors, *column_vectors, values, slopes, row, last_row, column, last_column,
                    part.left.shape[1], slab.stride(0), COLUMNS=columns is not None, **options,
                )  # fmt: skip
                self.slope += slopes.sum() / self.boost
                add_product(left[row:last_row], values, part.right[column:last_column])
                add_product(right[column:last_column], values.T, part.left[row:last_row])

    def _block(self, n: int, m: int) -> tuple[int, int]:
        """Rows and columns of a slab in whole tiles. Near square, which moves the fewest bytes of dQ and dK."""
        tiles = self.tiles
        items = self.launcher.workspace_bytes // self.launcher.slab_item
        side = isqrt(items)
        if n < side:
            side = items // max(n, 1)
        width = max(tiles.columns, side // tiles.columns * tiles.columns)
        return max(tiles.rows, self.launcher.slab_rows(min(width, m))), width

    def result(self) -> Gradients:
        """Returns the gradients. Call it once, at the end."""
        problem = self.launcher.problem
        scale = problem.scale / self.boost
        width = problem.query.shape[1]
        query, candidate = (rows[:, :width].mul_(scale) for rows in (self.query, self.candidate))
        peers = None if self.peers is None else self.peers[:, :width].mul_(scale)
        # d loss / d c = sum(G * dot) = slope / (c + b), and c = 1 / temperature.
        temperature = -self.slope * problem.scale.square() / problem.negative_scale
        return Gradients(query, candidate, temperature, peers)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Does total [R, D] += left [R, L] right [L, D] in place, accumulating in the dtype of the total."""
    if left.dtype == total.dtype:
        return total.addmm_(left, right)
    if multiplies_mixed(left.device, left.dtype):
        return torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    return total.addmm_(left.to(total.dtype), right.to(total.dtype))
