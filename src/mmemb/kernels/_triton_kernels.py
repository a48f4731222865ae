"""The Triton kernels of InfoNCE: tiles of S = Q K^T / temperature, and what is made of a tile before it is dropped.

    N queries   M candidates   D width   a launch covers rows [first_row, last_row) x columns [first_column, last_column)
    Q [N, D]    K [M, D]       p_i the positive's logit of query i     BM x BN a tile, BK a step along D

Both kernels are persistent (as many programs as fit the chip walk the tiles, rows in groups so that tiles that run
together share their operands in cache) and differ in what follows the product, their epilogue:

- `sums_kernel`: log-sum-exps of the tile's rows and columns, written a tile each and reduced by the caller in a fixed
  order; on request the exponentials themselves and the rows' sums of exp(s) (s - p), for the one-direction loss.
- `gradient_kernel`: the tile of G = dL/dS, and the tile's share of the temperature's gradient.

The positive's logit is left out of the sums and comes in as ``own``; G at it comes in as ``at_positive``. Vectors come
in and go out in natural units; inside, logits are in base 2, the unit of the chip's exponential. No atomics: every value
has one writer, so two runs give the same bits.
"""

from __future__ import annotations

# The interpreter keeps bfloat16 as integers and gets its arithmetic wrong: WIDEN casts operands to float32 first.
# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile in the order that walks GROUP rows of tiles together."""
    in_group = GROUP * tiles_n
    first = tile // in_group * GROUP
    height = min(tiles_m - first, GROUP)
    return first + tile % in_group % height, tile % in_group // height


@triton.jit
def _product(
    query, candidate, row, column, last_row, last_column, width, zero,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Q[row : row + BM] K[column : column + BN]^T in the accumulator's dtype, that of ``zero``."""
    total = tl.zeros((BM, BN), zero.dtype)
    rows = (row + tl.arange(0, BM)).to(tl.int64)
    columns = (column + tl.arange(0, BN)).to(tl.int64)
    for start in range(0, width, BK):
        if DESCRIPTORS:
            q = query.load([row, start])
            k = candidate.load([column, start])
        else:
            depth = start + tl.arange(0, BK)
            inside = (depth < width)[None, :]
            q = tl.load(query + rows[:, None] * width + depth[None, :], (rows < last_row)[:, None] & inside, 0.0)
            k = tl.load(
                candidate + columns[:, None] * width + depth[None, :], (columns < last_column)[:, None] & inside, 0.0
            )
        if WIDEN:
            q = q.to(tl.float32)
            k = k.to(tl.float32)
        total = tl.dot(q, k.T, total, input_precision=PRECISION, out_dtype=zero.dtype)
    return total


@triton.jit
def _negatives(
    logits, rows, columns, last_row, last_column, positive, query_id, candidate_id, limit,
    IDS: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """Which entries of the tile [BM, BN] (logits in base 2) are negatives, and which are positives."""
    here = rows < last_row
    own = columns[None, :] == tl.load(positive + rows, here, -1)[:, None]
    kept = here[:, None] & (columns < last_column)[None, :] & (own == 0)
    if IDS:
        mine = tl.load(query_id + rows, here, 0)[:, None]
        kept = kept & (mine != tl.load(candidate_id + columns, columns < last_column, 0)[None, :])
    if LIMITED:
        kept = kept & (logits <= tl.load(limit + rows, here, 0.0)[:, None] * LOG2E)
    return kept, own


@triton.jit
def _logsumexp(logits, kept, AXIS: tl.constexpr):
    """Natural log-sum-exp of base-2 logits along an axis; -inf where nothing is kept."""
    top = tl.max(tl.where(kept, logits, float("-inf")), AXIS)
    shift = tl.where(top == float("-inf"), 0.0, top)
    powers = tl.exp2(logits - tl.expand_dims(shift, AXIS))
    return (shift + tl.log2(tl.sum(tl.where(kept, powers, 0.0), AXIS))) * LN2


@triton.jit
def sums_kernel(
    query, candidate, scale, own, positive, query_id, candidate_id, limit,
    row_sums, column_sums, row_products, exponentials,
    first_row, last_row, last_column, width, row_stride, exponential_stride,
    IDS: tl.constexpr, LIMITED: tl.constexpr, BOUNDED: tl.constexpr, COLUMNS: tl.constexpr, EXPONENTIALS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps of the negatives in each tile, by row and by column.

    Args:
        query: [N, D] contiguous, a pointer or a descriptor of [BM, BK] blocks; ``candidate`` [M, D] likewise.
        scale: one number in the accumulator's dtype, as all floating-point vectors below.
        own: [N] p, read with EXPONENTIALS. ``positive`` [N], ``query_id`` [N], ``candidate_id`` [M] int64.
        limit: [N] with LIMITED: negatives whose logit is above it are left out.
        row_sums: [tiles_n, rows], rows ``row_stride`` apart: a row's log-sum-exp within each column of tiles.
        column_sums: [tiles_m, M] with COLUMNS: a column's log-sum-exp within each row of tiles.
        row_products: as ``row_sums``, with EXPONENTIALS: sums of exp(s) (s - p).
        exponentials: [rows, M] in the embeddings' dtype, rows ``exponential_stride`` apart, with EXPONENTIALS: exp(s),
            0 where not a negative.
        BOUNDED: |s| is small enough for exp(s) without subtracting a maximum; EXPONENTIALS needs it.
    """
    factor = tl.load(scale) * LOG2E
    tiles_m = tl.cdiv(last_row - first_row, BM)
    tiles_n = tl.cdiv(last_column, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP)
        row, column = first_row + tile_m * BM, tile_n * BN
        product = _product(
            query, candidate, row, column, last_row, last_column, width, factor,
            BM, BN, BK, DESCRIPTORS, WIDEN, PRECISION,
        )  # fmt: skip
        logits = product * factor
        rows = row + tl.arange(0, BM)
        columns = column + tl.arange(0, BN)
        kept, _ = _negatives(
            logits, rows, columns, last_row, last_column, positive, query_id, candidate_id, limit, IDS, LIMITED
        )
        row_at = tile_n.to(tl.int64) * row_stride + rows - first_row
        column_at = tile_m.to(tl.int64) * last_column + columns
        if BOUNDED:
            powers = tl.where(kept, tl.exp2(logits), 0.0)
            tl.store(row_sums + row_at, tl.log2(tl.sum(powers, 1)) * LN2, rows < last_row)
            if COLUMNS:
                tl.store(column_sums + column_at, tl.log2(tl.sum(powers, 0)) * LN2, columns < last_column)
            if EXPONENTIALS:
                excess = logits - tl.load(own + rows, rows < last_row, 0.0)[:, None] * LOG2E
                tl.store(row_products + row_at, tl.sum(powers * excess, 1) * LN2, rows < last_row)
                at = (rows - first_row).to(tl.int64)[:, None] * exponential_stride + columns[None, :]
                inside = (rows < last_row)[:, None] & (columns < last_column)[None, :]
                tl.store(exponentials + at, powers.to(exponentials.dtype.element_ty), inside)
        else:
            tl.store(row_sums + row_at, _logsumexp(logits, kept, 1), rows < last_row)
            if COLUMNS:
                tl.store(column_sums + column_at, _logsumexp(logits, kept, 0), columns < last_column)


@triton.jit
def gradient_kernel(
    query, candidate, scale, own, positive, query_id, candidate_id, limit,
    row_share, row_total, at_positive, column_share, column_total, column_own,
    gradient, temperature,
    first_row, last_row, first_column, last_column, width, stride,
    IDS: tl.constexpr, LIMITED: tl.constexpr, COLUMNS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """G = share_i exp(s - total_i), with COLUMNS + share_j exp(s - total_j), at negatives; ``at_positive`` at positives.

    Args:
        query ... limit: as in `sums_kernel`.
        row_share: [N], coefficient of the row's loss; ``row_total`` [N], its log-sum-exp with the positive.
        at_positive: [N] G at the row's positive.
        column_share: [M], as of rows, with COLUMNS; ``column_total`` [M]; ``column_own`` [M] the logit of the query
            whose positive the column is.
        gradient: [rows, columns] in the embeddings' dtype, rows ``stride`` apart.
        temperature: [tiles] each tile's sum over its negatives of G's row part times s - p_i and G's column part times
            s - column_own_j: that is sum(G * S), as each part sums to 0 over its row or column.
    """
    factor = tl.load(scale) * LOG2E
    tiles_m = tl.cdiv(last_row - first_row, BM)
    tiles_n = tl.cdiv(last_column - first_column, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP)
        row, column = first_row + tile_m * BM, first_column + tile_n * BN
        product = _product(
            query, candidate, row, column, last_row, last_column, width, factor,
            BM, BN, BK, DESCRIPTORS, WIDEN, PRECISION,
        )  # fmt: skip
        logits = product * factor
        rows = row + tl.arange(0, BM)
        columns = column + tl.arange(0, BN)
        here, there = rows < last_row, columns < last_column
        kept, at_own = _negatives(
            logits, rows, columns, last_row, last_column, positive, query_id, candidate_id, limit, IDS, LIMITED
        )
        total = tl.load(row_total + rows, here, 0.0)[:, None] * LOG2E
        values = tl.where(kept, tl.exp2(logits - total) * tl.load(row_share + rows, here, 0.0)[:, None], 0.0)
        slope = values * (logits - tl.load(own + rows, here, 0.0)[:, None] * LOG2E)
        if COLUMNS:
            total = tl.load(column_total + columns, there, 0.0)[None, :] * LOG2E
            share = tl.load(column_share + columns, there, 0.0)[None, :]
            by_column = tl.where(kept, tl.exp2(logits - total) * share, 0.0)
            slope += by_column * (logits - tl.load(column_own + columns, there, 0.0)[None, :] * LOG2E)
            values += by_column
        tl.store(temperature + tile, tl.sum(tl.sum(slope, 1), 0) * LN2)
        values = tl.where(at_own, tl.load(at_positive + rows, here, 0.0)[:, None], values)
        at = (rows - first_row).to(tl.int64)[:, None] * stride + (columns - first_column)[None, :]
        tl.store(gradient + at, values.to(gradient.dtype.element_ty), here[:, None] & there[None, :])


@triton.jit
def own_kernel(
    query, candidate, scale, positive, own, last_row, width,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The positives' logits p [N], a block of BM rows a program."""
    factor = tl.load(scale)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    here = rows < last_row
    targets = tl.load(positive + rows, here, 0)
    total = tl.zeros((BM,), factor.dtype)
    for start in range(0, width, BK):
        depth = start + tl.arange(0, BK)
        inside = here[:, None] & (depth < width)[None, :]
        q = tl.load(query + rows.to(tl.int64)[:, None] * width + depth[None, :], inside, 0.0).to(factor.dtype)
        k = tl.load(candidate + targets[:, None] * width + depth[None, :], inside, 0.0).to(factor.dtype)
        total += tl.sum(q * k, 1)
    tl.store(own + rows, total * factor, here)
