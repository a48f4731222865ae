"""The logits of the tiled engine: the blocks of a problem, and one stripe of their rows at a time.

    N queries   M candidates   L columns of a block   D width   R rows of a stripe   C rows of a chunk
    T levels: one, or one for each of ``dims``

A block is one kind of negative: rows A [N, D] against columns B [L, D]. One column per row is no negative. Every
problem has the block of the candidates. Peers and candidate negatives are one more block each, if the problem has them.

Levels share their products: the dot products of a prefix are those of the next shorter prefix plus a segment's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmemb.kernels.problem import Problem
from mmemb.kernels.tiled.workspace import Workspace

CHUNK_BYTES = 2 * 2**20
"""Elementwise operations process a stripe in chunks of this size, so that the next one finds its input in cache."""


class Block:
    """One kind of negative: rows A [N, D] against columns B [L, D]. Reused buffers hold the logits of one stripe.

    Args:
        problem: the problem.
        source: [N or M, D] the queries or the candidates, from which A's rows are taken.
        index: [N] int64, the rows of ``source`` that are A; None if A is all of it.
        columns: B [L, D].
        none: [N] int64, for each row the column that is no negative.
        ids: [L] int64 or None.
        of_peers: whether B are the problem's peers; otherwise they are its candidates.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        source: Tensor,
        index: Tensor | None,
        columns: Tensor,
        none: Tensor,
        ids: Tensor | None,
        of_peers: bool = False,
    ) -> None:
        self.problem, self.source, self.index, self.none, self.ids = problem, source, index, none, ids
        self.of_peers = of_peers
        self.columns = columns.to(problem.work_dtype)
        self.row_norms: Tensor | None = None  # [T, N] reciprocals; column_norms are [T, L] reciprocals
        self.column_norms: Tensor | None = None
        if problem.dims is not None:
            norms = reciprocal_norms(source, problem.dims, dtype=problem.work_dtype)
            self.row_norms = norms if index is None else norms[:, index]
            self.column_norms = reciprocal_norms(columns, problem.dims, dtype=problem.work_dtype)

    @property
    def bytes_per_row(self) -> int:
        """Bytes of the buffers per row of a stripe."""
        buffers = 1 if self.problem.dims is None else 2 * len(self.problem.dims)
        return len(self.columns) * self.columns.element_size() * buffers

    def reserve(self, workspace: Workspace, rows: int, chunk: int) -> None:
        """Takes the buffers for stripes of ``rows`` rows in chunks of ``chunk`` rows."""
        shape = len(self.problem.dims or (0,)), rows, len(self.columns)
        self.wide = list(workspace.take(self.columns, *shape))
        self.dots = self.wide if self.problem.dims is None else list(workspace.take(self.columns, *shape))
        masked = self.ids is not None or self.problem.margin is not None
        self.mask = self.columns.new_empty(chunk if masked else 0, shape[-1], dtype=torch.bool)

    def rows(self, part: slice) -> Tensor:
        """Returns A's rows [R, D] in the work dtype."""
        rows = self.source[part] if self.index is None else self.source[self.index[part]]
        return rows.to(self.problem.work_dtype)

    def load(self, part: slice) -> None:
        """Multiplies a stripe. Without ``dims`` it also sets the positives to -inf, which `logits` relies on."""
        rows, count = self.rows(part), part.stop - part.start
        if self.problem.dims is None:
            logits = torch.mm(rows * self.problem.negative_scale, self.columns.T, out=self.wide[0][:count])
            logits.scatter_(1, self.none[part, None], -torch.inf)
            return
        previous = None
        for segment, dots in zip(segments(self.problem.dims), self.dots, strict=True):
            left, right, out = rows[:, segment], self.columns[:, segment].T, dots[:count]
            previous = (
                torch.mm(left, right, out=out) if previous is None else torch.addmm(previous, left, right, out=out)
            )

    def logits(self, level: int, part: slice, chunk: slice, limit: Tensor | None) -> Tensor:
        """Returns a chunk [C, L] of the loaded stripe in ``wide``, with -inf for what is left out.

        Call it once per chunk and level: it changes the stripe.

        Args:
            level: one of the T.
            part: rows of the problem.
            chunk: rows of the stripe.
            limit: [C, 1] logits above which a row's negatives are left out, or None.
        """
        logits = self.wide[level][chunk]
        rows = within(part, chunk)
        if self.row_norms is not None and self.column_norms is not None:
            torch.mul(self.dots[level][chunk], self.column_norms[level], out=logits)
            logits.mul_((self.row_norms[level, rows] * self.problem.negative_scale)[:, None])
            logits.scatter_(1, self.none[rows, None], -torch.inf)
        if limit is not None:
            leave_out_(logits, over=limit, mask=self.mask)
        if self.ids is not None and self.problem.query_id is not None:
            same = torch.eq(self.problem.query_id[rows, None], self.ids, out=self.mask[: len(logits)])
            logits.masked_fill_(same, -torch.inf)
        return logits


class Stripes:
    """All blocks of a problem, and all values that are known before the first stripe.

    Attributes:
        blocks: the block of the candidates first.
        levels: T.
        rows: R.
        chunk: C.
        own: [T, N] the positives' logits p.
        workspace: the buffers; the caller keeps them at the end of its call.
    """

    def __init__(self, problem: Problem, *, most_rows: int, workspace_bytes: int) -> None:
        self.problem = problem
        self.blocks = blocks(problem)
        self.levels = len(problem.dims or (0,))
        n, item = len(problem.query), problem.scale.element_size()
        self.rows = max(1, min(most_rows, n, workspace_bytes // sum(block.bytes_per_row for block in self.blocks)))
        widest = max(len(block.columns) for block in self.blocks)
        self.chunk = max(1, min(self.rows, CHUNK_BYTES // (widest * item)))
        self.workspace = Workspace(workspace_bytes)
        for block in self.blocks:
            block.reserve(self.workspace, self.rows, self.chunk)
        self.own = self._own()

    def slices(self) -> list[slice]:
        """Returns the rows of each stripe."""
        n = len(self.problem.query)
        return [slice(start, min(start + self.rows, n)) for start in range(0, n, self.rows)]

    def chunks(self, part: slice) -> Iterator[slice]:
        """Yields the rows of each chunk of a stripe, counted from the stripe's first row."""
        count = part.stop - part.start
        for start in range(0, count, self.chunk):
            yield slice(start, min(start + self.chunk, count))

    def limits(self) -> Tensor | None:
        """Returns the logits [T, N] above which a query's negatives are left out; None without a margin."""
        return self.problem.limits(self.own)

    def _own(self) -> Tensor:
        problem, block = self.problem, self.blocks[0]
        own = problem.scale.new_empty(self.levels, len(problem.query))
        for part in self.slices():
            positive = problem.positive[part]
            products = block.columns.index_select(0, positive).mul_(block.rows(part))
            if block.row_norms is None or block.column_norms is None:
                own[0, part] = products.sum(1)
            else:
                dots = torch.stack([products[:, segment].sum(1) for segment in segments(problem.dims or ())])
                own[:, part] = dots.cumsum(0) * block.row_norms[:, part] * block.column_norms[:, positive]
        return own.mul_(problem.scale)


def blocks(problem: Problem) -> list[Block]:
    """Returns one block per kind of negative of a problem, the candidates first."""
    query, candidate = problem.query, problem.candidate
    found = [
        Block(
            problem,
            source=query,
            index=None,
            columns=candidate,
            none=problem.positive,
            ids=problem.candidate_id,
        )
    ]
    if problem.peers is not None:
        peers = problem.peers
        found.append(
            Block(problem, source=query, index=None, columns=peers.query, none=peers.own, ids=peers.id, of_peers=True)
        )
    if problem.candidate_negatives:
        found.append(
            Block(
                problem,
                source=candidate,
                index=problem.positive,
                columns=candidate,
                none=problem.positive,
                ids=problem.candidate_id,
            )
        )
    return found


def segments(dims: tuple[int, ...]) -> list[slice]:
    """Returns the columns that each prefix adds to the one before."""
    return [slice(start, stop) for start, stop in zip((0, *dims), dims, strict=False)]


def reciprocal_norms(rows: Tensor, dims: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
    """Returns 1 / length of every row's prefixes, [T, rows]."""
    squares = [torch.linalg.vector_norm(rows[:, part], dim=1, dtype=dtype).square_() for part in segments(dims)]
    return torch.stack(squares).cumsum(0).rsqrt_()


def within(part: slice, chunk: slice) -> slice:
    """Returns a chunk's rows, counted from the problem's first row."""
    return slice(part.start + chunk.start, part.start + chunk.stop)


def leave_out_(logits: Tensor, *, over: Tensor, mask: Tensor) -> Tensor:
    """Sets logits above ``over`` (broadcast) to -inf. ``mask`` is a buffer for the comparison."""
    return logits.masked_fill_(torch.gt(logits, over, out=mask[: len(logits)]), -torch.inf)
