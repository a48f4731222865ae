"""Sums up the gradients of the tiled engine, stripe by stripe.

    G [R, L] = d loss / d (dot * scale) of a block's stripe = factor [R] * wide [R, L]

With one level, dA = G B and dB = G^T A, both times the scale. With T levels on normalised prefixes of rows a, b:

    H = sum over prefixes that reach a segment of G_ij / (|a_i| |b_j|)
    segment of dA_i = H B - a_i sum over those prefixes of (sum_j G_ij cos_ij) / |a_i|^2;  dB_j likewise

The two products of the widest level serve all levels then. The temperature's gradient costs no product: sum(G * S) is
sum(A * dA), or the sum of G * cos.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmemb.kernels.problem import Gradients
from mmemb.kernels.tiled.stripes import Block, Stripes, segments


class Sums:
    """Gradients summed over stripes. Call `add` once per stripe and `result` once, at the end."""

    def __init__(self, stripes: Stripes) -> None:
        problem, columns = stripes.problem, stripes.blocks[0].columns
        self.problem, self.stripes = problem, stripes
        self.query = torch.empty_like(problem.query, dtype=columns.dtype)
        self.candidate = torch.zeros_like(columns)
        self.peers = None if problem.peers is None else columns.new_zeros(problem.peers.query.shape)
        self.temperature = columns.new_zeros(())
        levels = 0 if problem.dims is None else stripes.levels
        self.along = [
            columns.new_zeros(levels, len(block.columns)) for block in stripes.blocks
        ]  # column sums of G * cos
        widest = max(len(block.columns) for block in stripes.blocks)
        self.chunk = columns.new_empty(stripes.chunk if levels else 0, widest)

    def add(self, part: slice, factors: Sequence[Sequence[Tensor | None]]) -> None:
        """Adds the stripe in every block's ``wide``, whose values are overwritten. Call it once per part.

        Args:
            part: rows of the problem.
            factors: [R] by block and level; None stands for 1.
        """
        for number, block in enumerate(self.stripes.blocks):
            out = self.query[part] if number == 0 else None
            if self.problem.dims is None:
                gradient = self._level(block, part, factors[number][0], out)
            else:
                gradient = self._levels(number, part, factors[number], self.problem.dims, out)
            if block.index is not None:
                add_rows_(self.candidate, block.index[part], gradient)
            elif number > 0:
                self.query[part] += gradient

    def result(self) -> Gradients:
        """Returns the gradients."""
        problem = self.problem
        for block, along in zip(self.stripes.blocks, self.along, strict=True):
            if problem.dims is not None and block.column_norms is not None:
                target, norms = self._target(block), block.column_norms
                for dim, sums, norm in zip(problem.dims, along, norms, strict=True):
                    target[:, :dim].addcmul_(
                        block.columns[:, :dim], (sums * norm.square() * problem.scale)[:, None], value=-1
                    )
        # The sum holds -sum(G * S). S = dot * scale, so the temperature's gradient is that times the scale.
        return Gradients(self.query, self.candidate, self.temperature * problem.scale, self.peers)

    def _target(self, block: Block) -> Tensor:
        """The tensor to which the gradients of the block's columns are added."""
        return self.peers if block.of_peers and self.peers is not None else self.candidate

    def _level(self, block: Block, part: slice, factor: Tensor | None, out: Tensor | None) -> Tensor:
        wide, rows = block.wide[0][: part.stop - part.start], block.rows(part)
        weight = self.problem.scale if factor is None else (self.problem.scale * factor)[:, None]
        product = torch.mm(wide, block.columns, out=out).mul_(weight)
        self.temperature -= torch.linalg.vecdot(product.flatten(), rows.flatten())
        self._target(block).addmm_(wide.T, rows * weight)
        return product

    def _levels(
        self, number: int, part: slice, factors: Sequence[Tensor | None], dims: tuple[int, ...], out: Tensor | None
    ) -> Tensor:
        block, scale, count = self.stripes.blocks[number], self.problem.scale, part.stop - part.start
        assert block.row_norms is not None
        assert block.column_norms is not None
        rows, target = block.rows(part), self._target(block)
        gradient = torch.zeros_like(rows) if out is None else out.zero_()
        corrections = []
        for level in reversed(range(len(dims))):
            norm = block.row_norms[level, part]
            factor = factors[level]
            row_factor = norm if factor is None else norm * factor
            along = torch.empty_like(norm)
            for chunk in self.stripes.chunks(part):
                wide = block.wide[level][chunk].mul_(block.column_norms[level]).mul_(row_factor[chunk, None])
                products = torch.mul(wide, block.dots[level][chunk], out=self.chunk[: len(wide), : wide.shape[1]])
                along[chunk] = products.sum(1)
                self.along[number][level] += products.sum(0)
                if level + 1 < len(dims):
                    wide.add_(block.wide[level + 1][chunk])
            self.temperature -= along.sum() * scale
            corrections.append((dims[level], along * norm.square()))
            segment, wide = segments(dims)[level], block.wide[level][:count]
            gradient[:, segment] = torch.mm(wide, block.columns[:, segment])
            target[:, segment].addmm_(wide.T, rows[:, segment] * scale)
        for dim, correction in corrections:
            gradient[:, :dim].addcmul_(rows[:, :dim], correction[:, None], value=-1)
        return gradient.mul_(scale)


def add_rows_(target: Tensor, index: Tensor, rows: Tensor) -> None:
    """Does target[index] += rows, in the same order in every run, even if an index repeats."""
    if target.device.type == "cpu":
        target.index_add_(0, index, rows)
    else:
        target.index_put_((index,), rows, accumulate=True)  # sorts; index_add_ would race
