"""The Triton kernels of InfoNCE: they multiply tiles of S = Q K^T / temperature and reduce or convert each at once.

    N queries   M candidates   D width   BM x BN a tile, BK a step along D   p_i the positive's logit of query i
    Q [N, D]    K [M, D]       a launch covers a block: rows [first_row, last_row), columns [first_column, last_column)

The two large kernels are persistent: there are as many programs as the chip runs at once, and each takes tile after
tile. Rows of tiles come in groups, so that tiles that run together share their operands in cache. The kernels differ
in what follows the product:

- `sums_kernel` writes the log-sum-exps of the tile's rows and columns. The caller reduces them in a fixed order. For
  the one-direction loss it also writes the exponentials and the rows' sums of exp(s) (s - p).
- `gradient_kernel` writes the tile of G = dL/dS, and the tile's share of the temperature's gradient.

The sums and G leave out the positive; its logit comes from `own_kernel`. Inputs and outputs are in natural units.
Inside, logits are in base 2, the unit of the chip's exponential. There are no atomics: every value has one writer, so
two runs give the same bits.
"""

from __future__ import annotations

# The interpreter keeps bfloat16 as integers, gets its arithmetic wrong, and truncates where chips round. With WIDEN,
# operands are cast to float32 first, and results are rounded.
# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Below all logits, whose bound is a quarter of the largest float32. Finite, so that exp2 of it times anything is 0.
FLOOR = tl.constexpr(-2e38)


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile, in an order that takes GROUP rows of tiles together."""
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
def _piece(tile, INDEX: tl.constexpr, PARTS: tl.constexpr):
    """The BN / PARTS columns of a tile [BM, BN] from INDEX * BN / PARTS on; PARTS is 1, 2, 4 or 8.

    The accumulator is spread over the threads so that this moves no data. Per vector along the columns, a thread needs
    a quarter as many registers as the piece has columns. So epilogues work piece by piece.
    """
    if PARTS == 8:
        tile = _half(tile, INDEX // 4)
    if PARTS >= 4:
        tile = _half(tile, INDEX // 2 % 2)
    if PARTS >= 2:
        tile = _half(tile, INDEX % 2)
    return tile


@triton.jit
def _half(tile, INDEX: tl.constexpr):
    left, right = tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))
    if INDEX == 0:
        return left
    return right


@triton.jit
def _negatives(
    logits, rows, columns, here, there, positive, query_id, candidate_id, LOWEST: tl.constexpr, IDS: tl.constexpr
):  # fmt: skip
    """The piece's logits [BM, BN] in base 2, with LOWEST at what is no negative."""
    kept = columns[None, :] != tl.load(positive + rows, here, -1).to(tl.int32)[:, None]
    kept = kept & here[:, None] & there[None, :]
    if IDS:
        mine = tl.load(query_id + rows, here, 0)[:, None]
        kept = kept & (mine != tl.load(candidate_id + columns, there, 0)[None, :])
    return tl.where(kept, logits, LOWEST)


@triton.jit
def _within(logits, limit, at, inside, AXIS: tl.constexpr, LOWEST: tl.constexpr, LIMITED: tl.constexpr):
    """The logits [BM, BN]. With LIMITED, LOWEST above the limit of the row (AXIS 1) or of the column (AXIS 0)."""
    if LIMITED:
        most = tl.expand_dims(tl.load(limit + at, inside, 0.0), AXIS) * LOG2E
        logits = tl.where(logits <= most, logits, LOWEST)
    return logits


@triton.jit
def _narrow(values, dtype: tl.constexpr, WIDEN: tl.constexpr):
    """The values in a narrower dtype, rounded to nearest, ties to even."""
    if WIDEN:
        bits = values.to(tl.uint32, bitcast=True)
        values = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return values.to(dtype)


@triton.jit
def _logsumexp(logits, AXIS: tl.constexpr):
    """Natural log-sum-exp of base-2 logits along an axis."""
    top = tl.max(logits, AXIS)
    shift = tl.where(top == float("-inf"), 0.0, top)  # all -inf stays -inf
    return (shift + tl.log2(tl.sum(tl.exp2(logits - tl.expand_dims(shift, AXIS)), AXIS))) * LN2


@triton.jit
def sums_kernel(
    query, candidate, scale, own, positive, query_id, candidate_id, limit, column_limit,
    row_sums, column_sums, row_products, exponentials,
    first_row, last_row, last_column, width, row_stride, exponential_stride,
    IDS: tl.constexpr, LIMITED: tl.constexpr, BOUNDED: tl.constexpr, COLUMNS: tl.constexpr, EXPONENTIALS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes the log-sum-exps of the negatives in each piece of each tile, by row and by column.

    Args:
        query: [N, D] contiguous, a pointer or a descriptor of [BM, BK] blocks; ``candidate`` [M, D] likewise.
        scale: one number in the accumulator's dtype, which all floating-point vectors below have too.
        own: [N] p times (c + b) / c; read with EXPONENTIALS.
        positive: [N] int64; ``query_id`` [N] and ``candidate_id`` [M] likewise.
        limit: [N], read with LIMITED. The row's sums leave out negatives with a logit above it. With COLUMNS,
            ``column_limit`` [M] does the same for the column's sums.
        row_sums: [tiles_n * PARTS, rows], rows ``row_stride`` apart: a row's log-sum-exp within each piece.
        column_sums: [tiles_m, M], written with COLUMNS: a column's log-sum-exp within each row of tiles.
        row_products: as ``row_sums``, written with EXPONENTIALS: sums of exp(s) (s - own).
        exponentials: [rows, M] in the embeddings' dtype, rows ``exponential_stride`` apart, written with EXPONENTIALS:
            exp(s), and 0 at what is no negative.
        BOUNDED: |s| is small enough for exp(s) without subtracting a maximum. EXPONENTIALS needs it.
    """
    factor = tl.load(scale) * LOG2E
    # If a maximum is subtracted, a row of -inf alone must differ from a row of low logits.
    lowest: tl.constexpr = FLOOR if BOUNDED else float("-inf")
    tiles_m = tl.cdiv(last_row - first_row, BM)
    tiles_n = tl.cdiv(last_column, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP)
        row = tile_m * BM  # within the block
        product = _product(
            query, candidate, first_row + row, tile_n * BN, last_row, last_column, width, factor,
            BM, BN, BK, DESCRIPTORS, WIDEN, PRECISION,
        )  # fmt: skip
        inner = row + tl.arange(0, BM)
        rows = first_row + inner
        here = rows < last_row
        for part in tl.static_range(PARTS):
            logits = _piece(product, part, PARTS) * factor
            columns = (tile_n * PARTS + part) * (BN // PARTS) + tl.arange(0, BN // PARTS)
            there = columns < last_column
            logits = _negatives(
                logits, rows, columns, here, there, positive, query_id, candidate_id, lowest, IDS
            )  # fmt: skip
            by_row = _within(logits, limit, rows, here, 1, lowest, LIMITED)
            row_at = (tile_n * PARTS + part).to(tl.int64) * row_stride + inner
            column_at = tile_m.to(tl.int64) * last_column + columns
            if BOUNDED:
                powers = tl.exp2(by_row)
                tl.store(row_sums + row_at, tl.log2(tl.sum(powers, 1)) * LN2, here)
                if EXPONENTIALS:
                    excess = by_row - tl.load(own + rows, here, 0.0)[:, None] * LOG2E
                    tl.store(row_products + row_at, tl.sum(powers * excess, 1) * LN2, here)
                    at = inner.to(tl.int64)[:, None] * exponential_stride + columns[None, :]
                    inside = here[:, None] & there[None, :]
                    tl.store(exponentials + at, _narrow(powers, exponentials.dtype.element_ty, WIDEN), inside)
                if COLUMNS:
                    if LIMITED:
                        powers = tl.exp2(_within(logits, column_limit, columns, there, 0, lowest, LIMITED))
                    tl.store(column_sums + column_at, tl.log2(tl.sum(powers, 0)) * LN2, there)
            else:
                tl.store(row_sums + row_at, _logsumexp(by_row, 1), here)
                if COLUMNS:
                    by_column = _within(logits, column_limit, columns, there, 0, lowest, LIMITED)
                    tl.store(column_sums + column_at, _logsumexp(by_column, 0), there)


@triton.jit
def gradient_kernel(
    query, candidate, scale, own, positive, query_id, candidate_id, limit, column_limit,
    row_share, row_total, column_share, column_total, column_own,
    gradient, temperature,
    first_row, last_row, first_column, last_column, width, stride,
    IDS: tl.constexpr, LIMITED: tl.constexpr, COLUMNS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes G = share_i exp(s - total_i), with COLUMNS + share_j exp(s - total_j), at negatives, and 0 elsewhere.

    Args:
        query ... column_limit: as in `sums_kernel`.
        row_share: [N] coefficient of the row's loss.
        row_total: [N] log-sum-exp of the row, positive included.
        column_share: [M] as ``row_share``, for columns; read with COLUMNS, like the next two.
        column_total: [M] as ``row_total``, for columns.
        column_own: [M] as ``own``, of the query whose positive the column is.
        gradient: [rows, columns] in the embeddings' dtype, rows ``stride`` apart.
        temperature: [tiles] each tile's sum over its negatives of G's row part times s - own_i, plus G's column part
            times s - column_own_j. That is sum(G * S), since each part sums to 0 over its row or column.
    """
    factor = tl.load(scale) * LOG2E
    tiles_m = tl.cdiv(last_row - first_row, BM)
    tiles_n = tl.cdiv(last_column - first_column, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP)
        row, column = tile_m * BM, tile_n * BN  # within the block
        product = _product(
            query, candidate, first_row + row, first_column + column, last_row, last_column, width, factor,
            BM, BN, BK, DESCRIPTORS, WIDEN, PRECISION,
        )  # fmt: skip
        rows = first_row + row + tl.arange(0, BM)
        here = rows < last_row
        slopes = tl.zeros((BM,), factor.dtype)
        for part in tl.static_range(PARTS):
            logits = _piece(product, part, PARTS) * factor
            inner = column + part * (BN // PARTS) + tl.arange(0, BN // PARTS)
            columns = first_column + inner
            there = columns < last_column
            logits = _negatives(
                logits, rows, columns, here, there, positive, query_id, candidate_id, FLOOR, IDS
            )  # fmt: skip
            by_row = _within(logits, limit, rows, here, 1, FLOOR, LIMITED)
            total = tl.load(row_total + rows, here, 0.0)[:, None] * LOG2E
            share = tl.load(row_share + rows, here, 0.0)[:, None]
            values = tl.exp2(by_row - total) * share
            slopes += tl.sum(values * (by_row - tl.load(own + rows, here, 0.0)[:, None] * LOG2E), 1)
            if COLUMNS:
                total = tl.load(column_total + columns, there, 0.0)[None, :] * LOG2E
                share = tl.load(column_share + columns, there, 0.0)[None, :]
                by_column = _within(logits, column_limit, columns, there, 0, FLOOR, LIMITED)
                terms = tl.exp2(by_column - total) * share
                slopes += tl.sum(terms * (by_column - tl.load(column_own + columns, there, 0.0)[None, :] * LOG2E), 1)
                values += terms
            at = (row + tl.arange(0, BM)).to(tl.int64)[:, None] * stride + inner[None, :]
            tl.store(gradient + at, _narrow(values, gradient.dtype.element_ty, WIDEN), here[:, None] & there[None, :])
        # As a matrix of one column: Triton 3.7 cannot sum a vector in a kernel that uses sm_100's tensor cores.
        tl.store(temperature + tile + tl.arange(0, 1), tl.sum(slopes[:, None], 0) * LN2)


@triton.jit
def own_kernel(
    query, candidate, scale, positive, own, last_row, width,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Writes the positives' logits p [N], one block of BM rows per program."""
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
