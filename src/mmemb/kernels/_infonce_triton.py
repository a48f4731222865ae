"""InfoNCE with both embedding gradients by Triton kernels and library products, slab by slab: the engine of GPUs.

    N queries   M candidates   D width   R x C a block of S that exists at once: the slab, in the embeddings' dtype
    p_i the positive's logit of query i   o_i log-sum-exp of its negatives   (`mmemb.kernels.problem` has the formulas)

A 128-row float32 accumulator of dQ at D = 1024 fills half a megabyte and cannot stay on the chip, so gradients are not
accumulated tile by tile: a kernel writes a block of G = dL/dS, and two library products make dQ += G K and dK += G^T Q
of it, with float32 accumulation. Counted in products of N x M x D:

- one direction, small logits: exp(S) is written as its row sums are made, and the softmax's denominators are folded
  into the narrow operands: 3 products (6U).
- otherwise, and for the symmetric loss: a first pass makes the log-sum-exps of rows and columns from one S, the second
  makes S again and writes G: 4 products (8U).

Bits are the same in every run: every value has one writer, sums have a fixed order, tiles are fixed a chip
(`mmemb.kernels._tiles`). Memory beyond inputs and outputs: the workspace and, for 16-bit input, float32 [M, D].

As in the tiled engine the positive is kept out of the sums (loss = log(1 + exp(o - p)), G at it = -sigmoid(o - p)).
The temperature's gradient is sum(G * S), summed before G is rounded, with S less p: rows of G sum to 0, so that is the
same, and no large terms cancel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from triton import cdiv
from triton.tools.tensor_descriptor import TensorDescriptor

from mmemb.kernels import _tiles
from mmemb.kernels._infonce_tiled import SAFE_LOGIT, excess_loss
from mmemb.kernels._tiles import Tiles
from mmemb.kernels._triton_kernels import gradient_kernel, own_kernel, positive_kernel, sums_kernel
from mmemb.kernels.problem import WORKSPACE_BYTES, Columns, Gradients, Merge, Problem

GROUP = 8
"""Rows of tiles that are walked together: their operands stay in the second-level cache."""

ALIGNMENT = 64
"""Rows of the slab begin at multiples of this many elements, as library products like them to."""

FULL_ROWS = 512
"""Fewer rows of full length in the slab do not pay: dK [M, D] would be read and written too often (an estimate from
bandwidths: at 512 rows that traffic takes as long as one and a half products)."""

HALF_PEAK = 14
"""Largest |G| in float16, as a power of two; G is scaled to it, since float16 cannot hold 1 / N^2."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of ``left`` [N, D] against rows of ``right`` [L, D]: some of the negatives of N queries, by one rule.

    Attributes:
        left: queries, or what stands for them.
        right: rows of negatives.
        own: [N] int64, the row of ``right`` that is no negative of the query (its positive, itself).
        left_id: [N] int64 or None; equal ids are no negatives. ``right_id``: [L].
        limit: [N] or None; larger logits are no negatives.
    """

    left: Tensor
    right: Tensor
    own: Tensor
    left_id: Tensor | None
    right_id: Tensor | None
    limit: Tensor | None


def supports(problem: Problem, *, symmetric: bool) -> bool:
    """Whether this engine solves the problem: all but Matryoshka sums, and float64 only in the interpreter."""
    return problem.dims is None and _tiles.choose(problem.query.device, problem.query.dtype) is not None


def one_direction(
    problem: Problem, *, coefficient: Tensor | None, workspace_bytes: int | None = None
) -> tuple[Tensor, Gradients | None]:
    """Losses [N] of the queries and, given coefficients [N], the gradients of sum(coefficient * loss)."""
    engine = _Engine(problem, workspace_bytes)
    with engine.device:
        extra = engine.further_negatives()
        if coefficient is not None and engine.full_rows:
            return engine.exponentials(coefficient, extra)
        others, _ = engine.sums(engine.main, columns=False)
        others = others if extra is None else torch.logaddexp(others, extra)
        losses = excess_loss(others - engine.own)
        if coefficient is None:
            return losses, None
        totals = torch.logaddexp(others, engine.own)
        gradients = _Gradients(engine, coefficient)
        at_positive = -coefficient * (others - engine.own).sigmoid()
        gradients.add_main(coefficient, totals, at_positive)
        gradients.add_further(coefficient, totals)
        return losses, gradients.result()


def symmetric(
    problem: Problem, *, coefficient: Tensor | None, merge: Merge | None = None, workspace_bytes: int | None = None
) -> tuple[Tensor, Gradients | None]:
    """As `one_direction`, for the mean of each query's loss and its positive's loss against all queries.

    Positives are distinct. ``merge`` joins the columns with those of further queries elsewhere.
    """
    engine = _Engine(problem, workspace_bytes)
    with engine.device:
        own, positive = engine.own, problem.positive
        extra = engine.further_negatives()
        row_others, column_others = engine.sums(engine.main, columns=True)
        if extra is not None:
            row_others = torch.logaddexp(row_others, extra)
            column_others[positive] = torch.logaddexp(column_others[positive], extra)
        shares = torch.zeros_like(column_others)
        if coefficient is not None:
            shares[positive] = coefficient / 2
        columns = Columns(column_others, torch.zeros_like(column_others).index_copy_(0, positive, own), shares)
        if merge is not None:
            columns = merge(columns)
        row_excess, column_excess = row_others - own, columns.others[positive] - own
        losses = (excess_loss(row_excess) + excess_loss(column_excess)) / 2
        if coefficient is None:
            return losses, None
        half = coefficient / 2
        totals = torch.logaddexp(row_others, own)
        gradients = _Gradients(engine, coefficient)
        gradients.add_main(half, totals, -half * (row_excess.sigmoid() + column_excess.sigmoid()), columns)
        # A further negative counts in both losses: exp(z - total) + exp(z - column's total).
        column_totals = torch.logaddexp(columns.others[positive], own)
        gradients.add_further(half, -torch.logaddexp(-totals, -column_totals))
        return losses, gradients.result()


class _Engine:
    """One problem in the kernels' form, and the launches that make its sums."""

    def __init__(self, problem: Problem, workspace_bytes: int | None) -> None:
        tiles = _tiles.choose(problem.query.device, problem.query.dtype)
        assert tiles is not None
        self.problem = problem
        self.tiles: Tiles = tiles
        self.dtype = problem.query.dtype
        self.workspace_bytes = WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes
        self.query, self.candidate = problem.query.contiguous(), problem.candidate.contiguous()
        self.device: AbstractContextManager[Any] = (
            torch.cuda.device(problem.query.device) if problem.query.is_cuda else nullcontext()
        )
        self.scale = problem.negative_scale.contiguous()
        self.ids = problem.query_id is not None
        with self.device:
            self.own = self._own()  # [N] p
        self.stretch = problem.negative_scale / problem.scale  # from positives' logits to negatives'
        limit = None if problem.margin is None else self.stretch * self.own + problem.negative_scale * problem.margin
        self.main = self.part(self.query, self.candidate, problem.positive, problem.candidate_id, limit)
        self.parts: dict[str, _Part] = {}
        if problem.peers is not None:
            peers = problem.peers
            self.parts["peers"] = self.part(self.query, peers.query.contiguous(), peers.own, peers.id, limit)
        if problem.candidate_negatives:
            left = self.candidate[problem.positive]
            self.parts["candidate"] = self.part(left, self.candidate, problem.positive, problem.candidate_id, limit)

    def part(self, left: Tensor, right: Tensor, own: Tensor, right_id: Tensor | None, limit: Tensor | None) -> _Part:
        return _Part(left, right, own.contiguous(), self.problem.query_id, right_id, limit)

    @property
    def full_rows(self) -> bool:
        """Whether the one-direction loss is made from exponentials of full rows, at 6U."""
        # float16 cannot hold exp(s).
        fits = self.slab_rows(len(self.candidate)) >= min(FULL_ROWS, len(self.query))
        return self.problem.bound <= SAFE_LOGIT and self.dtype != torch.float16 and fits

    def slab_rows(self, columns: int) -> int:
        """Most rows of a slab so many columns wide, whole tiles; 0 if not even one tile fits."""
        rows = self.workspace_bytes // (aligned(columns) * self.dtype.itemsize)
        return rows // self.tiles.rows * self.tiles.rows

    def pieces(self, columns: int) -> int:
        """Pieces of tiles in a row of tiles so many columns wide."""
        return cdiv(columns, self.tiles.columns) * self.tiles.parts

    def empty(self, *shape: int) -> Tensor:
        return self.query.new_empty(shape, dtype=self.problem.work_dtype)

    def _own(self) -> Tensor:
        own = self.empty(len(self.query))
        rows, depth = 32, min(128, 2 ** (self.query.shape[1] - 1).bit_length())
        if len(own):
            arguments = self.query, self.candidate, self.problem.scale.contiguous(), self.problem.positive.contiguous()
            own_kernel[(cdiv(len(own), rows),)](*arguments, own, len(own), self.query.shape[1], BM=rows, BK=depth)
        return own

    def further_negatives(self) -> Tensor | None:
        """x [N] in logarithms: log-sum-exp of the further negatives, None if the problem has none."""
        extra = None
        for part in self.parts.values():
            others, _ = self.sums(part, columns=False)
            extra = others if extra is None else torch.logaddexp(extra, others)
        return extra

    def sums(self, part: _Part, *, columns: bool) -> tuple[Tensor, Tensor]:
        """Log-sum-exp of the part's rows [N] and, if asked for, of its columns [L] (else -inf)."""
        n, m = len(part.left), len(part.right)
        pieces = self.pieces(m)
        row_others, column_others = self.empty(n), self.empty(m).fill_(-torch.inf)
        # The reductions keep about two copies of what they reduce.
        a_tile = (pieces * self.tiles.rows + (m if columns else 0)) * 3 * row_others.element_size()
        rows = max(1, self.workspace_bytes // a_tile) * self.tiles.rows
        for start, stop in blocks(n, rows):
            by_row = self.empty(pieces, stop - start)
            by_column = self.empty(cdiv(stop - start, self.tiles.rows) if columns else 0, m)
            self.launch_sums(part, start, stop, by_row, by_column if columns else None)
            row_others[start:stop] = by_row.logsumexp(0)
            if columns:
                column_others = torch.logaddexp(column_others, by_column.logsumexp(0))
        return row_others, column_others

    def launch_sums(
        self,
        part: _Part,
        start: int,
        stop: int,
        by_row: Tensor,
        by_column: Tensor | None,
        products: Tensor | None = None,
        exponentials: Tensor | None = None,
    ) -> None:
        tiles = cdiv(stop - start, self.tiles.rows) * cdiv(len(part.right), self.tiles.columns)
        sums_kernel[self.grid(tiles)](
            *self.operands(part),
            by_row,
            by_row if by_column is None else by_column,
            by_row if products is None else products,
            by_row if exponentials is None else exponentials,
            start,
            stop,
            len(part.right),
            part.left.shape[1],
            by_row.stride(0),
            1 if exponentials is None else exponentials.stride(0),
            BOUNDED=self.problem.bound <= SAFE_LOGIT,
            COLUMNS=by_column is not None,
            EXPONENTIALS=exponentials is not None,
            **self.options(part),
        )

    def place(self, values: Tensor, block: Tensor, own: Tensor, row: int, column: int) -> None:
        """Writes the rows' values [N] at ``own`` [N] into the block of S that begins at this row and column."""
        n, m = block.shape
        positive_kernel[(cdiv(n, 128),)](block, own, values, row, row + n, column, column + m, block.stride(0), BM=128)

    def operands(self, part: _Part) -> tuple[Any, ...]:
        """The arguments that both kernels begin with; stand-ins for what is absent."""
        own = (self.own * self.stretch).contiguous()
        return (
            self.loadable(part.left, self.tiles.rows),
            self.loadable(part.right, self.tiles.columns),
            self.scale,
            own,
            part.own,
            part.own if part.left_id is None else part.left_id.contiguous(),
            part.own if part.right_id is None else part.right_id.contiguous(),
            own if part.limit is None else part.limit,
        )

    def loadable(self, rows: Tensor, block: int) -> Any:
        return TensorDescriptor.from_tensor(rows, [block, self.tiles.depth]) if self.descriptors(rows) else rows

    def descriptors(self, *tensors: Tensor) -> bool:
        """Whether the chip's copy engine can read these: it wants 16-byte alignment."""
        aligned_rows = self.query.shape[1] * self.dtype.itemsize % 16 == 0
        return self.tiles.descriptors and aligned_rows and all(x.data_ptr() % 16 == 0 for x in tensors)

    def options(self, part: _Part) -> dict[str, Any]:
        """Compile-time choices that both kernels share."""
        tiles = self.tiles
        return {
            "IDS": part.left_id is not None,
            "LIMITED": part.limit is not None,
            "BM": tiles.rows,
            "BN": tiles.columns,
            "BK": tiles.depth,
            "PARTS": tiles.parts,
            "GROUP": GROUP,
            "DESCRIPTORS": self.descriptors(part.left, part.right),
            "WIDEN": not self.query.is_cuda and self.dtype == torch.bfloat16,
            "PRECISION": tiles.precision,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }

    def grid(self, tiles: int) -> tuple[int]:
        """As many programs as the chip runs at once."""
        device = self.query.device
        programs = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
        return (min(tiles, programs),)

    def exponentials(self, coefficient: Tensor, extra: Tensor | None) -> tuple[Tensor, Gradients]:
        """`one_direction` at 6U: the slab holds exp(s) of full rows."""
        n, m = len(self.query), len(self.candidate)
        losses, totals, at_positive = self.empty(3, n)
        gradients = _Gradients(self, coefficient)
        rows = self.slab_rows(m)
        slab = self.query.new_empty(min(rows, n), aligned(m))
        for start, stop in blocks(n, rows):
            by_row, products = self.empty(2, self.pieces(m), stop - start)
            powers = slab[: stop - start, :m]
            self.launch_sums(self.main, start, stop, by_row, None, products, powers)
            own, others = self.own[start:stop], by_row.logsumexp(0)
            if extra is not None:
                others = torch.logaddexp(others, extra[start:stop])
            losses[start:stop] = excess_loss(others - own)
            totals[start:stop] = torch.logaddexp(others, own)
            at_positive[start:stop] = -others.exp()
            self.place(at_positive, powers, self.main.own, start, 0)
            share = coefficient[start:stop] * (-totals[start:stop]).exp()
            gradients.slope += torch.dot(products.sum(0), share)
            product = add_product(self.empty(stop - start, self.query.shape[1]).zero_(), powers, self.candidate)
            gradients.query[start:stop] = product.mul_(share[:, None])
            narrow = (self.query[start:stop] * share[:, None]).to(self.dtype)
            add_product(gradients.candidate, powers.T, narrow)
        gradients.add_further(coefficient, totals)
        return losses, gradients.result()


class _Gradients:
    """The gradients while they are summed up, as of c * dot times `boost`; ``slope`` is sum(G * z) for negatives z."""

    def __init__(self, engine: _Engine, coefficient: Tensor) -> None:
        self.engine = engine
        problem = engine.problem
        self.query = engine.empty(*engine.query.shape).zero_()
        self.candidate = engine.empty(*engine.candidate.shape).zero_()
        self.peers = None if problem.peers is None else engine.empty(*problem.peers.query.shape).zero_()
        self.slope = engine.empty(1).zero_()[0]
        self.boost = torch.ones_like(self.slope)
        if engine.dtype == torch.float16 and len(coefficient):
            self.boost = (HALF_PEAK - coefficient.abs().amax().clamp_min(2.0**-100).log2()).floor().exp2()

    def add_main(self, share: Tensor, totals: Tensor, at_positive: Tensor, columns: Columns | None = None) -> None:
        self._add(self.engine.main, self.query, self.candidate, share, totals, at_positive, columns)

    def add_further(self, share: Tensor, totals: Tensor) -> None:
        """The further negatives' part, for rows of G = share exp(z - total)."""
        for name, part in self.engine.parts.items():
            if name == "peers":
                assert self.peers is not None
                self._add(part, self.query, self.peers, share, totals)
                continue
            left = torch.zeros_like(self.query)
            self._add(part, left, self.candidate, share, totals)
            # Sorted by row, where index_add_ would add in any order.
            self.candidate.index_put_((part.own,), left, accumulate=True)

    def _add(
        self,
        part: _Part,
        left: Tensor,
        right: Tensor,
        share: Tensor,
        totals: Tensor,
        at_positive: Tensor | None = None,
        columns: Columns | None = None,
    ) -> None:
        """Adds G right to ``left`` [N, D] and G^T left to ``right`` [L, D], block by block."""
        engine, tiles = self.engine, self.engine.tiles
        row_vectors = [(share * self.boost).contiguous(), totals.contiguous()]
        if at_positive is not None:
            at_positive = (at_positive * self.boost).contiguous()
        column_vectors = [totals, totals, totals]  # stand-ins
        if columns is not None:
            # A column that is nobody's positive has no loss: +inf makes its softmax exactly 0, also where all of it is
            # left out.
            total = torch.logaddexp(columns.others, columns.own).where(columns.share != 0, torch.inf)
            column_vectors = [columns.share * self.boost, total, columns.own * engine.stretch]
        n, m = len(part.left), len(part.right)
        operands, options = engine.operands(part), engine.options(part)
        rows, width = self._block(n, m)
        slab = engine.query.new_empty(min(rows, n), aligned(min(width, m)))
        for row, last_row in blocks(n, rows):
            for column, last_column in blocks(m, width):
                count = cdiv(last_row - row, tiles.rows) * cdiv(last_column - column, tiles.columns)
                slopes = engine.empty(count)
                values = slab[: last_row - row, : last_column - column]
                gradient_kernel[engine.grid(count)](
                    *operands, *row_vectors, *column_vectors, values, slopes, row, last_row, column, last_column,
                    part.left.shape[1], slab.stride(0), COLUMNS=columns is not None, **options,
                )  # fmt: skip
                if at_positive is not None:
                    engine.place(at_positive, values, part.own, row, column)
                self.slope += slopes.sum() / self.boost
                add_product(left[row:last_row], values, part.right[column:last_column])
                add_product(right[column:last_column], values.T, part.left[row:last_row])

    def _block(self, n: int, m: int) -> tuple[int, int]:
        """Rows and columns of a slab, whole tiles: near square, which moves the fewest bytes of dQ and dK."""
        tiles = self.engine.tiles
        side = isqrt(self.engine.workspace_bytes // self.engine.dtype.itemsize)
        if n < side:
            side = self.engine.workspace_bytes // (self.engine.dtype.itemsize * max(n, 1))
        width = max(tiles.columns, side // tiles.columns * tiles.columns)
        return max(tiles.rows, self.engine.slab_rows(min(width, m))), width

    def result(self) -> Gradients:
        problem, dtype = self.engine.problem, self.engine.dtype
        scale = problem.scale / self.boost
        peers = None if self.peers is None else self.peers.mul_(scale)
        # d loss / d c = sum(G * dot) = slope / (c + b), and c = 1 / temperature.
        temperature = -self.slope * problem.scale.square() / problem.negative_scale
        return Gradients(self.query.mul_(scale).to(dtype), self.candidate.mul_(scale).to(dtype), temperature, peers)


def aligned(columns: int) -> int:
    """Elements from one row of a slab to the next."""
    return cdiv(columns, ALIGNMENT) * ALIGNMENT


def blocks(length: int, size: int) -> Iterator[tuple[int, int]]:
    """[0, length) in runs of ``size``, as start and end."""
    for start in range(0, length, size):
        yield start, min(start + size, length)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total [R, D] += left [R, L] right [L, D] in place, accumulated in the total's dtype whatever the factors'."""
    if left.dtype == total.dtype:
        return total.addmm_(left, right)
    if left.is_cuda and torch.version.hip is None:
        return torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    return total.addmm_(left.to(total.dtype), right.to(total.dtype))
