"""The forward kernel: one program attends one tile of queries of one head to the keys that its intervals reach.

Online softmax after FlashAttention-2 (Dao, arXiv 2307.08691), in base 2. One loop visits the tiles of both intervals and
branches around the mask where a tile needs none: loads are pipelined through all of them, and a copy of the loop per
interval, or for full tiles, would need more registers than there are.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    DEAD_TILES,
    at_least_one,
    columns_between,
    fill,
    key_tiles,
    load_rows,
    locate,
    store_rows,
    store_zeros,
    tile_of,
)


@triton.jit(do_not_specialize=["B", "T"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    doc_start_ptr,
    plan_ptr,
    scale_log2,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    B,
    T,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SLOTS: tl.constexpr,
    DOCS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out (B, T, H, D)`` and ``lse (B, H, T)`` (base 2, -inf for a row without keys) of all rows of a plan.

    The grid is one-dimensional: programs of the plan, and within each the batch.
    """
    program = tl.program_id(0) // B
    batch = (tl.program_id(0) % B).to(tl.int64)
    offset, head, first_tile, end_tile = locate(plan_ptr, program, SLOTS)
    dead = head < 0
    head = tl.where(dead, -1 - head, head)
    out_base = out_ptr + (batch * T * H + head) * D
    lse_base = lse_ptr + (batch * H + head) * T

    if dead:
        start = (first_tile + (program - offset) * DEAD_TILES) * BM
        stop = tl.minimum(tl.minimum(start + DEAD_TILES * BM, end_tile * BM), T)
        store_zeros(out_base, H * D, start, stop, D, D_PAD, BM)
        fill(lse_base, start, stop, float("-inf"), BM)
    else:
        # Later tiles have more keys: longest first.
        first = (end_tile - 1 - (program - offset)) * BM
        last = tl.minimum(first + BM, T) - 1
        rows = first + tl.arange(0, BM)
        doc_start = tl.zeros((BM,), tl.int32)
        doc_first, doc_last = 0, 0
        if DOCS:
            doc_base = doc_start_ptr + batch * T
            doc_start = tl.load(doc_base + rows, mask=rows < T, other=0)
            doc_first, doc_last = tl.load(doc_base + first), tl.load(doc_base + last)
        lo0, hi0, begin0, tiles0 = key_tiles(plan_ptr, head, 0, first, last, doc_first, BN, SLOTS)
        lo1, hi1, begin1, tiles1 = key_tiles(plan_ptr, head, 1, first, last, doc_first, BN, SLOTS)
        q = load_rows(q_ptr + batch * q_stride_b + head.to(tl.int64) * q_stride_h, q_stride_t, first, T, D, D_PAD, BM)
        group = (head // GROUP).to(tl.int64)
        k_base = k_ptr + batch * k_stride_b + group * k_stride_h
        v_base = v_ptr + batch * v_stride_b + group * v_stride_h

        acc = tl.zeros((BM, D_PAD), tl.float32)
        row_max = tl.full((BM,), float("-inf"), tl.float32)
        row_sum = tl.zeros((BM,), tl.float32)
        for t in range(at_least_one(tiles0 + tiles1)):
            lo, hi, start = tile_of(t, tiles0, lo0, hi0, begin0, lo1, hi1, begin1, BN)
            k = load_rows(k_base, k_stride_t, start, T, D, D_PAD, BN)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if (start < tl.maximum(last - hi + 1, doc_last)) | (start + BN > first - lo + 1):  # else all are allowed
                earliest = tl.maximum(rows - hi + 1, doc_start)
                allowed = columns_between(earliest, rows - lo, start, BN)
                scores = tl.where(allowed, scores, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row may have no key yet
            weights = tl.math.exp2(scores * scale_log2 - shift[:, None])
            decay = tl.math.exp2(row_max - shift)
            row_sum = row_sum * decay + tl.sum(weights, 1)
            row_max = new_max
            acc = acc * decay[:, None]
            v = load_rows(v_base, v_stride_t, start, T, D, D_PAD, BN)
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)

        alive = row_sum > 0
        row_sum = tl.where(alive, row_sum, 1.0)
        acc = tl.where(alive[:, None], acc * (1.0 / row_sum)[:, None], 0.0)
        store_rows(out_base, H * D, first, T, acc, D, D_PAD, BM)
        lse = tl.where(alive, row_max + tl.math.log2(row_sum), float("-inf"))
        tl.store(lse_base + rows, lse, mask=rows < T)
