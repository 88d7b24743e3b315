"""What the kernels share: which program computes what, which tiles it visits, and moving tiles of rows.

A tile is visited only if the distances of its pairs meet the head's intervals. The visited tiles of an interval are
consecutive; those in the middle hold allowed pairs only and need no mask. One loop visits the tiles of both intervals.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from . import tile_sizes

RECORD = tl.constexpr(4)
"""Integers per slot of a plan: first program, head, first tile, end of tiles."""

DEAD_TILES = tl.constexpr(tile_sizes.DEAD_TILES)


@triton.jit
def locate(plan_ptr, program, SLOTS: tl.constexpr):
    """The slot of a program in its plan, as ``(first program, head, first tile, end of tiles)``.

    One vector load and a count in place of a search; a negative head ``-1 - h`` stands for the dead tiles of ``h``.
    """
    ends = tl.load(plan_ptr + tl.arange(0, SLOTS))
    slot = tl.sum((ends <= program).to(tl.int32), axis=0)
    record_ptr = plan_ptr + SLOTS + slot * RECORD
    return tl.load(record_ptr), tl.load(record_ptr + 1), tl.load(record_ptr + 2), tl.load(record_ptr + 3)


@triton.jit
def interval(plan_ptr, head, index: tl.constexpr, SLOTS: tl.constexpr):
    """Interval ``[lo, hi)`` number ``index`` of a local head."""
    pair_ptr = plan_ptr + SLOTS * (1 + RECORD) + head * 4 + index * 2
    return tl.load(pair_ptr), tl.load(pair_ptr + 1)


@triton.jit
def key_tiles(plan_ptr, head, index: tl.constexpr, first, last, doc_first, BN: tl.constexpr, SLOTS: tl.constexpr):
    """Key tiles of one interval for the queries ``first..last``: ``(lo, hi, begin, tiles)``.

    :param doc_first: where the document of the first query starts.
    """
    lo, hi = interval(plan_ptr, head, index, SLOTS)
    begin = tl.maximum(first - hi + 1, doc_first)
    end = tl.where(lo < hi, last - lo + 1, begin)
    return lo, hi, begin, tl.cdiv(tl.maximum(end - begin, 0), BN)


@triton.jit
def query_tiles(plan_ptr, head, index: tl.constexpr, first, last, doc_last, BM: tl.constexpr, SLOTS: tl.constexpr):
    """Query tiles of one interval for the keys ``first..last``: ``(lo, hi, begin, tiles)``.

    :param doc_last: where the document of the last key ends, at most ``T``.
    """
    lo, hi = interval(plan_ptr, head, index, SLOTS)
    begin = first + lo
    end = tl.where(lo < hi, tl.minimum(last + hi, doc_last), begin)
    return lo, hi, begin, tl.cdiv(tl.maximum(end - begin, 0), BM)


@triton.jit
def at_least_one(tiles):
    """Trips of a loop over tiles: always one at least, fully masked where there is nothing to do.

    If the loop could be skipped, the accumulators would have a second definition, and ptxas would wait after every wgmma.
    """
    return tl.maximum(tiles, 1)


@triton.jit
def tile_of(t, tiles0, lo0, hi0, begin0, lo1, hi1, begin1, BLOCK: tl.constexpr):
    """Tile ``t`` of both intervals together: ``(lo, hi, start)`` of the one it belongs to."""
    second = t >= tiles0
    start = tl.where(second, begin1 - tiles0 * BLOCK, begin0) + t * BLOCK
    return tl.where(second, lo1, lo0), tl.where(second, hi1, hi0), start


@triton.jit
def within_cache(intervals_ptr, head, index: tl.constexpr, position, pad, S):
    """Keys of one interval for the query at ``position`` of a cache of ``S``, after its padding: ``(begin, length)``."""
    lo = tl.load(intervals_ptr + head * 4 + index * 2)
    hi = tl.load(intervals_ptr + head * 4 + index * 2 + 1)
    begin = tl.maximum(position - hi + 1, pad)
    length = tl.minimum(position - lo + 1, S) - begin
    return begin, tl.where(lo < hi, tl.maximum(length, 0), 0)


@triton.jit
def columns_between(first, last, start, BLOCK: tl.constexpr):
    """Which columns ``start..start + BLOCK`` of a tile lie in ``first..last``, bounds that every row has of its own.

    Two comparisons with bounds of the tile: LLVM turns the single unsigned one into slower code for bit fields.
    """
    column = tl.arange(0, BLOCK)[None, :]
    return (column >= (first - start)[:, None]) & (column <= (last - start)[:, None])


@triton.jit
def row_pointers(base, stride, start, D_PAD: tl.constexpr, ROWS: tl.constexpr):
    """Pointers to the rows ``start..start + ROWS`` of one head, ``(ROWS, D_PAD)``.

    The tile's own offset is 64 bits wide: a position times a stride may exceed 2^31 at 128k tokens. Offsets within a tile
    are unsigned, so that they take a register each and not two.
    """
    row, d = tl.arange(0, ROWS), tl.arange(0, D_PAD)
    offsets = (row[:, None] * stride + d[None, :]).to(tl.uint32)
    return base + start.to(tl.int64) * stride + offsets.to(tl.int64)


@triton.jit
def load_rows(base, stride, start, T, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr):
    """Rows ``start..start + ROWS`` of one head, ``(ROWS, D_PAD)``; zeros beyond ``T`` and beyond ``D``."""
    row, d = tl.arange(0, ROWS), tl.arange(0, D_PAD)
    pointers = row_pointers(base, stride, start, D_PAD, ROWS)
    mask = (start + row < T)[:, None]
    if D_PAD > D:
        mask = mask & (d < D)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_rows(base, stride, start, stop, x, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr):
    """Store ``x`` as the rows ``start..stop`` (at most ROWS) of one head."""
    row, d = tl.arange(0, ROWS), tl.arange(0, D_PAD)
    pointers = row_pointers(base, stride, start, D_PAD, ROWS)
    tl.store(pointers, x.to(base.dtype.element_ty), mask=(start + row < stop)[:, None] & (d < D)[None, :])


@triton.jit
def store_zeros(base, stride, start, stop, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr):
    """Zeros in the rows ``start..stop`` of one head."""
    zeros = tl.zeros((ROWS, D_PAD), tl.float32)
    for at in range(0, stop - start, ROWS):
        store_rows(base, stride, start + at, stop, zeros, D, D_PAD, ROWS)


@triton.jit
def fill(base, start, stop, value, ROWS: tl.constexpr):
    """One float32 number in the places ``start..stop`` of one head, of which there is one a row."""
    for at in range(start, stop, ROWS):
        rows = at + tl.arange(0, ROWS)
        tl.store(base + rows, tl.full((ROWS,), value, tl.float32), mask=rows < stop)
