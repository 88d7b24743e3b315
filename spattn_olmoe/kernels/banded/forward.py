"""The forward kernel: one program attends one tile of queries of one head to the keys that its intervals reach.

Online softmax after FlashAttention-2 (Dao, arXiv 2307.08691), in base 2. Masked tiles and full tiles have a loop each,
over both intervals together: two loops compile without spills where a copy per interval would not.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import DEAD_TILES, full_tile, key_tiles, load_rows, locate, masked_tile, store_rows, store_zeros, within


@triton.jit
def _attend(
    q,
    acc,
    row_max,
    row_sum,
    k_base,
    v_base,
    k_stride,
    v_stride,
    rows,
    doc_start,
    start,
    lo,
    hi,
    T,
    scale_log2,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BN: tl.constexpr,
    MASKED: tl.constexpr,
    DOCS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take the keys ``start..start + BN`` into the running softmax of a query tile."""
    k = load_rows(k_base, k_stride, start, T, D, D_PAD, BN, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        keys = start + tl.arange(0, BN)
        allowed = within(rows[:, None], keys[None, :], lo, hi)
        if DOCS:
            allowed = allowed & (keys[None, :] >= doc_start[:, None])
        scores = tl.where(allowed, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    shift = new_max
    if MASKED:  # a row may have no key yet
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.math.exp2(scores * scale_log2 - shift[:, None])
    decay = tl.math.exp2(row_max - shift)
    row_sum = row_sum * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    v = load_rows(v_base, v_stride, start, T, D, D_PAD, BN, MASKED)
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, new_max, row_sum


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
        for at in range(start, stop, BM):
            rows = at + tl.arange(0, BM)
            tl.store(lse_base + rows, tl.full((BM,), float("-inf"), tl.float32), mask=rows < stop)
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
        lo0, hi0, begin0, masked0, left0, full0 = key_tiles(
            plan_ptr, head, 0, first, last, doc_first, doc_last, BN, SLOTS
        )
        lo1, hi1, begin1, masked1, left1, full1 = key_tiles(
            plan_ptr, head, 1, first, last, doc_first, doc_last, BN, SLOTS
        )
        q = load_rows(
            q_ptr + batch * q_stride_b + head.to(tl.int64) * q_stride_h, q_stride_t, first, T, D, D_PAD, BM, True
        )
        group = (head // GROUP).to(tl.int64)
        k_base = k_ptr + batch * k_stride_b + group * k_stride_h
        v_base = v_ptr + batch * v_stride_b + group * v_stride_h

        acc = tl.zeros((BM, D_PAD), tl.float32)
        row_max = tl.full((BM,), float("-inf"), tl.float32)
        row_sum = tl.zeros((BM,), tl.float32)
        for t in range(masked0 + masked1):
            start, second = masked_tile(t, masked0, begin0, left0, full0, begin1, left1, full1, BN)
            lo, hi = tl.where(second, lo1, lo0), tl.where(second, hi1, hi0)
            acc, row_max, row_sum = _attend(
                q, acc, row_max, row_sum, k_base, v_base, k_stride_t, v_stride_t, rows, doc_start, start, lo, hi, T,
                scale_log2, D, D_PAD, BN, True, DOCS, PRECISION,
            )  # fmt: skip
        for t in range(full0 + full1):
            start = full_tile(t, full0, begin0, left0, begin1, left1, BN)
            acc, row_max, row_sum = _attend(
                q, acc, row_max, row_sum, k_base, v_base, k_stride_t, v_stride_t, rows, doc_start, start, 0, 0, T,
                scale_log2, D, D_PAD, BN, False, DOCS, PRECISION,
            )  # fmt: skip

        alive = row_sum > 0
        acc = acc / tl.where(alive, row_sum, 1.0)[:, None]
        store_rows(out_base, H * D, first, T, acc, D, D_PAD, BM)
        lse = tl.where(alive, row_max + tl.math.log2(tl.where(alive, row_sum, 1.0)), float("-inf"))
        tl.store(lse_base + rows, lse, mask=rows < T)
