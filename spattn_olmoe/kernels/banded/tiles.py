"""What the kernels share: which program computes what, which tiles it visits, and moving tiles of rows.

A tile is visited only if the distances of its pairs meet the head's intervals. The visited tiles of an interval are
consecutive; those in the middle hold allowed pairs only and need no mask.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

RECORD = tl.constexpr(4)
"""Integers per slot of a plan: first program, head, first tile, end of tiles."""

DEAD_TILES = tl.constexpr(8)
"""Tiles that one program fills with zeros where nothing is attended."""


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
def split(begin, end, full_begin, full_end, BLOCK: tl.constexpr):
    """Cut ``[begin, end)`` into tiles of ``BLOCK``: ``(masked tiles, masked tiles on the left, full tiles)``.

    Full tiles lie within ``[full_begin, full_end)``. They are consecutive, between the masked ones.
    """
    count = tl.cdiv(tl.maximum(end - begin, 0), BLOCK)
    left = tl.cdiv(tl.maximum(full_begin - begin, 0), BLOCK)
    full = tl.minimum(tl.maximum(full_end - begin, 0) // BLOCK, count) - left
    full = tl.maximum(full, 0)
    left = tl.where(full > 0, left, count)
    return count - full, left, full


@triton.jit
def key_tiles(
    plan_ptr, head, index: tl.constexpr, first, last, doc_first, doc_last, BN: tl.constexpr, SLOTS: tl.constexpr
):
    """Key tiles of one interval for the queries ``first..last``: ``(lo, hi, begin, masked, left, full)``.

    :param doc_first: where the document of the first query starts; ``doc_last``: of the last one.
    """
    lo, hi = interval(plan_ptr, head, index, SLOTS)
    begin = tl.maximum(first - hi + 1, doc_first)
    end = tl.where(lo < hi, last - lo + 1, begin)
    masked, left, full = split(begin, end, tl.maximum(last - hi + 1, doc_last), first - lo + 1, BN)
    return lo, hi, begin, masked, left, full


@triton.jit
def query_tiles(
    plan_ptr, head, index: tl.constexpr, first, last, doc_first, doc_last, BM: tl.constexpr, SLOTS: tl.constexpr
):
    """Query tiles of one interval for the keys ``first..last``: ``(lo, hi, begin, masked, left, full)``.

    :param doc_first: where the document of the first key ends (at most ``T``); ``doc_last``: of the last one.
    """
    lo, hi = interval(plan_ptr, head, index, SLOTS)
    begin = first + lo
    end = tl.where(lo < hi, tl.minimum(last + hi, doc_last), begin)
    masked, left, full = split(begin, end, last + lo, tl.minimum(first + hi, doc_first), BM)
    return lo, hi, begin, masked, left, full


@triton.jit
def masked_tile(t, masked0, begin0, left0, full0, begin1, left1, full1, BLOCK: tl.constexpr):
    """Start of masked tile ``t`` of both intervals, and whether it is of the second."""
    second = t >= masked0
    u = tl.where(second, t - masked0, t)
    left = tl.where(second, left1, left0)
    skipped = tl.where(u >= left, tl.where(second, full1, full0), 0)
    return tl.where(second, begin1, begin0) + (u + skipped) * BLOCK, second


@triton.jit
def full_tile(t, full0, begin0, left0, begin1, left1, BLOCK: tl.constexpr):
    """Start of full tile ``t`` of both intervals."""
    second = t >= full0
    u = tl.where(second, t - full0, t)
    return tl.where(second, begin1 + left1 * BLOCK, begin0 + left0 * BLOCK) + u * BLOCK


@triton.jit
def within_cache(intervals_ptr, head, index: tl.constexpr, position, pad, S):
    """Keys of one interval for the query at ``position`` of a cache of ``S``, behind its padding: ``(begin, length)``."""
    lo = tl.load(intervals_ptr + head * 4 + index * 2)
    hi = tl.load(intervals_ptr + head * 4 + index * 2 + 1)
    begin = tl.maximum(position - hi + 1, pad)
    length = tl.minimum(position - lo + 1, S) - begin
    return begin, tl.where(lo < hi, tl.maximum(length, 0), 0)


@triton.jit
def within(rows, keys, lo, hi):
    """Where ``lo <= rows - keys < hi``: one unsigned comparison, below ``lo`` wraps around to far above."""
    return ((rows - lo) - keys).to(tl.uint32) < (hi - lo).to(tl.uint32)


@triton.jit
def load_rows(base, stride, start, T, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, RAGGED: tl.constexpr):
    """Rows ``start..start + ROWS`` of one head, ``(ROWS, D_PAD)``; zeros beyond ``T`` (if RAGGED) and beyond ``D``.

    The tile's own offset is 64 bits wide: a position times a stride may exceed 2^31 at 128k tokens.
    """
    row, d = tl.arange(0, ROWS), tl.arange(0, D_PAD)
    pointers = base + start.to(tl.int64) * stride + (row[:, None] * stride + d[None, :])
    if RAGGED and D_PAD > D:
        x = tl.load(pointers, mask=(start + row < T)[:, None] & (d < D)[None, :], other=0.0)
    elif RAGGED:
        x = tl.load(pointers, mask=(start + row < T)[:, None], other=0.0)
    elif D_PAD > D:
        x = tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def store_rows(base, stride, start, stop, x, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr):
    """Store ``x`` as the rows ``start..stop`` (at most ROWS) of one head."""
    row, d = tl.arange(0, ROWS), tl.arange(0, D_PAD)
    pointers = base + start.to(tl.int64) * stride + (row[:, None] * stride + d[None, :])
    tl.store(pointers, x.to(base.dtype.element_ty), mask=(start + row < stop)[:, None] & (d < D)[None, :])


@triton.jit
def store_zeros(base, stride, start, stop, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr):
    """Zeros in the rows ``start..stop`` of one head."""
    zeros = tl.zeros((ROWS, D_PAD), tl.float32)
    for at in range(0, stop - start, ROWS):
        store_rows(base, stride, start + at, stop, zeros, D, D_PAD, ROWS)
