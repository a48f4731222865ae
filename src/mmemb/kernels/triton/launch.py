"""Launches of the Triton kernels for one InfoNCE problem: what is against what, in which blocks, with which tiles.

N queries   M candidates   L rows of negatives   D width, padded
c = 1 / temperature        b = hardness          p the positives' logits
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from triton import cdiv
from triton.tools.tensor_descriptor import TensorDescriptor

from mmemb.kernels.problem import WORKSPACE_BYTES, Problem
from mmemb.kernels.tiled.engine import SAFE_LOGIT
from mmemb.kernels.triton import tiles as _tiles
from mmemb.kernels.triton.kernels import own_kernel, sums_kernel
from mmemb.kernels.triton.tiles import Tiles

GROUP = 8
"""Rows of tiles that run together: their operands stay in the second-level cache."""

ALIGNMENT = 64
"""Rows of the slab begin at multiples of this many elements, which makes library products faster."""

FULL_ROWS = 512
"""Minimum number of full rows in the slab. With fewer, dK [M, D] would be read and written too often. Estimated from
bandwidths: at 512 rows that traffic takes as long as one and a half products."""

FULL_ROW_SUMS = 4
"""Arrays of sums by piece in memory with a slab of full rows: two, plus the next two or the reduction's two copies."""


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of negative of N queries: rows of ``left`` [N, D] against rows of ``right`` [L, D].

    Attributes:
        left: the queries, or their positives if candidates are negatives of those.
        right: the rows of negatives.
        own: [N] int64, the row of ``right`` that is no negative of the query: its positive or itself.
        left_id: [N] int64 or None. Rows with equal ids are no negatives.
        right_id: [L] int64 or None.
        limit: [N] or None. Larger logits are no negatives of the query.
        column_limit: [L] or None. Larger logits are no negatives of the column's own query (symmetric loss).
    """

    left: Tensor
    right: Tensor
    own: Tensor
    left_id: Tensor | None
    right_id: Tensor | None
    limit: Tensor | None
    column_limit: Tensor | None = None


class Launcher:
    """One problem in the form that the kernels take, and the launches that make its sums."""

    def __init__(self, problem: Problem, workspace_bytes: int | None) -> None:
        tiles = _tiles.choose(problem.query.device, problem.query.dtype)
        assert tiles is not None
        self.problem = problem
        self.tiles: Tiles = tiles
        self.dtype = problem.query.dtype
        self.workspace_bytes = WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes
        self.query, self.candidate = plain(problem.query), plain(problem.candidate)
        self.device: AbstractContextManager[Any] = (
            torch.cuda.device(problem.query.device) if problem.query.is_cuda else nullcontext()
        )
        self.scale = problem.negative_scale.contiguous()
        with self.device:
            self.own = self._own()  # [N] p
        self.stretch = problem.negative_scale / problem.scale  # turns a positive's logit into a negative's
        limit = problem.limits(self.own)
        self.main = self.part(self.query, self.candidate, problem.positive, problem.candidate_id, limit)
        self.parts: dict[str, Part] = {}
        if problem.peers is not None:
            peers = problem.peers
            self.parts["peers"] = self.part(self.query, plain(peers.query), peers.own, peers.id, limit)
        if problem.candidate_negatives:
            left = self.candidate[problem.positive]
            self.parts["candidate"] = self.part(left, self.candidate, problem.positive, problem.candidate_id, limit)

    def part(self, left: Tensor, right: Tensor, own: Tensor, right_id: Tensor | None, limit: Tensor | None) -> Part:
        return Part(left, right, own.contiguous(), self.problem.query_id, right_id, limit)

    @property
    def full_rows(self) -> bool:
        """Whether one direction is solved in three products, from exponentials of full rows."""
        # float16 cannot hold exp(s).
        fits = self.slab_rows(len(self.candidate), sums=FULL_ROW_SUMS) >= max(1, min(FULL_ROWS, len(self.query)))
        return self.problem.bound <= SAFE_LOGIT and self.dtype != torch.float16 and fits

    @property
    def slab_item(self) -> int:
        """Bytes per element of the slab, with its copy in the work dtype if the products need one."""
        work = self.problem.work_dtype
        copied = self.dtype != work and not multiplies_mixed(self.query.device, self.dtype)
        return self.dtype.itemsize + copied * work.itemsize

    def slab_rows(self, columns: int, *, sums: int = 0) -> int:
        """Returns the maximum number of rows of a slab, in whole tiles; 0 if not even one tile fits.

        Args:
            columns: number of columns of the slab.
            sums: number of arrays of the rows' sums by piece that are in memory with it.
        """
        a_row = aligned(columns) * self.slab_item + sums * self.pieces(columns) * self.problem.work_dtype.itemsize
        return self.workspace_bytes // a_row // self.tiles.rows * self.tiles.rows

    def pieces(self, columns: int) -> int:
        """Returns the number of pieces in a row of tiles with so many columns."""
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
        """Returns log x [N], the log-sum-exp of the further negatives; None if the problem has none."""
        extra = None
        for part in self.parts.values():
            others, _ = self.sums(part, columns=False)
            extra = others if extra is None else torch.logaddexp(extra, others)
        return extra

    def sums(self, part: Part, *, columns: bool) -> tuple[Tensor, Tensor]:
        """Returns the log-sum-exp of the part's rows [N] and, if ``columns``, of its columns [L]; otherwise -inf."""
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
        part: Part,
        start: int,
        stop: int,
        by_row: Tensor,
        by_column: Tensor | None,
        products: Tensor | None = None,
        exponentials: Tensor | None = None,
    ) -> None:
        tiles = cdiv(stop - start, self.tiles.rows) * cdiv(len(part.right), self.tiles.columns)
        sums_kernel[self.grid(tiles)](
            *self.operands(part, self.tiles),
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
            **self.options(part, self.tiles),
        )

    def operands(self, part: Part, tiles: Tiles) -> tuple[Any, ...]:
        """Returns the first arguments of both kernels. Missing tensors are replaced by others, which are not read."""
        own = (self.own * self.stretch).contiguous()
        return (
            loadable(part.left, tiles.rows, tiles),
            loadable(part.right, tiles.columns, tiles),
            self.scale,
            own,
            part.own,
            part.own if part.left_id is None else part.left_id.contiguous(),
            part.own if part.right_id is None else part.right_id.contiguous(),
            own if part.limit is None else part.limit,
            own if part.column_limit is None else part.column_limit,
        )

    def options(self, part: Part, tiles: Tiles) -> dict[str, Any]:
        """Returns the compile-time arguments that both kernels share."""
        return {
            "IDS": part.left_id is not None,
            "LIMITED": part.limit is not None,
            "BM": tiles.rows,
            "BN": tiles.columns,
            "BK": tiles.depth,
            "PARTS": tiles.parts,
            "GROUP": GROUP,
            "DESCRIPTORS": tiles.descriptors,
            "WIDEN": not self.query.is_cuda and self.dtype == torch.bfloat16,
            "PRECISION": tiles.precision,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }

    def grid(self, tiles: int) -> tuple[int]:
        """Returns the number of programs: one per tile, at most as many as the chip runs at once."""
        device = self.query.device
        programs = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
        return (min(tiles, programs),)


def loadable(rows: Tensor, block: int, tiles: Tiles) -> Any:
    """Returns the object from which the kernels load blocks of rows: a descriptor or the tensor."""
    return TensorDescriptor.from_tensor(rows, [block, tiles.depth]) if tiles.descriptors else rows


def multiplies_mixed(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the library multiplies such 16-bit factors into a float32 sum without copies in float32."""
    refused = dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation
    return device.type == "cuda" and torch.version.hip is None and not refused


def plain(rows: Tensor) -> Tensor:
    """Returns the rows contiguous in memory, at an address that the copy engine accepts. Copies only if it has to.

    The width is the next multiple of `mmemb.kernels.triton.tiles.STEP`. Added columns are 0.
    """
    if missing := -rows.shape[1] % _tiles.STEP:
        return pad(rows, (0, missing))
    rows = rows.contiguous()
    return rows.clone() if rows.data_ptr() % 16 else rows


def aligned(columns: int) -> int:
    """Returns the number of elements from one row of a slab to the next."""
    return cdiv(columns, ALIGNMENT) * ALIGNMENT


def blocks(length: int, size: int) -> Iterator[tuple[int, int]]:
    """Yields [0, length) in blocks of ``size``, as start and end."""
    for start in range(0, length, size):
        yield start, min(start + size, length)
