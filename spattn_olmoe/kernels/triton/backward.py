"""The backward kernels: dQ per tile of queries, then dK and dV per tile of keys. No atomics: the same bits every time.

After FlashAttention-2 (Dao, arXiv 2307.08691): weights are recomputed from the base-2 log-sum-exp of the forward.
The dQ kernel also computes ``delta``, the row sums of ``out * d_out`` that both need, so it runs first. One loop visits the
tiles of both intervals, as in the forward kernel. Weights are masked after they are computed: those of a row without
keys, whose log-sum-exp is -inf, are all masked.
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
    query_tiles,
    store_rows,
    store_zeros,
    tile_of,
)


@triton.jit(do_not_specialize=["B", "T"])
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    d_out_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    doc_start_ptr,
    plan_ptr,
    scale,
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
    d_out_stride_b,
    d_out_stride_t,
    d_out_stride_h,
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
    """``dq (B, T, H, D)`` and ``delta (B, H, T)`` of all rows of a plan."""
    program = tl.program_id(0) // B
    batch = (tl.program_id(0) % B).to(tl.int64)
    offset, head, first_tile, end_tile = locate(plan_ptr, program, SLOTS)
    dead = head < 0
    head = tl.where(dead, -1 - head, head)
    contiguous = (batch * T * H + head) * D
    dq_base = dq_ptr + contiguous

    if dead:
        start = (first_tile + (program - offset) * DEAD_TILES) * BM
        stop = tl.minimum(tl.minimum(start + DEAD_TILES * BM, end_tile * BM), T)
        store_zeros(dq_base, H * D, start, stop, D, D_PAD, BM)
        fill(delta_ptr + (batch * H + head) * T, start, stop, 0.0, BM)
    else:
        first = (end_tile - 1 - (program - offset)) * BM
        last = tl.minimum(first + BM, T) - 1
        rows = first + tl.arange(0, BM)
        head64 = head.to(tl.int64)
        d_out_base = d_out_ptr + batch * d_out_stride_b + head64 * d_out_stride_h
        d_out = load_rows(d_out_base, d_out_stride_t, first, T, D, D_PAD, BM)
        out = load_rows(out_ptr + contiguous, H * D, first, T, D, D_PAD, BM)
        q = load_rows(q_ptr + batch * q_stride_b + head64 * q_stride_h, q_stride_t, first, T, D, D_PAD, BM)
        per_row = (batch * H + head) * T + rows
        lse = tl.load(lse_ptr + per_row, mask=rows < T, other=0.0)

        doc_start = tl.zeros((BM,), tl.int32)
        doc_first, doc_last = 0, 0
        if DOCS:
            doc_base = doc_start_ptr + batch * T
            doc_start = tl.load(doc_base + rows, mask=rows < T, other=0)
            doc_first, doc_last = tl.load(doc_base + first), tl.load(doc_base + last)
        lo0, hi0, begin0, tiles0 = key_tiles(plan_ptr, head, 0, first, last, doc_first, BN, SLOTS)
        lo1, hi1, begin1, tiles1 = key_tiles(plan_ptr, head, 1, first, last, doc_first, BN, SLOTS)
        delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)  # after every load: it waits for some
        tl.store(delta_ptr + per_row, delta, mask=rows < T)
        group = (head // GROUP).to(tl.int64)
        k_base = k_ptr + batch * k_stride_b + group * k_stride_h
        v_base = v_ptr + batch * v_stride_b + group * v_stride_h

        dq = tl.zeros((BM, D_PAD), tl.float32)
        for t in range(at_least_one(tiles0 + tiles1)):
            lo, hi, start = tile_of(t, tiles0, lo0, hi0, begin0, lo1, hi1, begin1, BN)
            k = load_rows(k_base, k_stride_t, start, T, D, D_PAD, BN)
            v = load_rows(v_base, v_stride_t, start, T, D, D_PAD, BN)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            weights = tl.math.exp2(scores * scale_log2 - lse[:, None])
            if (start < tl.maximum(last - hi + 1, doc_last)) | (start + BN > first - lo + 1):  # else all are allowed
                earliest = tl.maximum(rows - hi + 1, doc_start)
                weights = tl.where(columns_between(earliest, rows - lo, start, BN), weights, 0.0)
            d_weights = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
            d_scores = weights * (d_weights - delta[:, None])
            dq = tl.dot(d_scores.to(k.dtype), k, dq, input_precision=PRECISION)
        store_rows(dq_base, H * D, first, T, dq * scale, D, D_PAD, BM)


@triton.jit(do_not_specialize=["B", "T"])
def dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    d_out_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    doc_end_ptr,
    plan_ptr,
    scale,
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
    d_out_stride_b,
    d_out_stride_t,
    d_out_stride_h,
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
    """``dk`` and ``dv (B, T, G, D)`` of all rows of a plan, summed over the query heads of each group in order."""
    program = tl.program_id(0) // B
    batch = (tl.program_id(0) % B).to(tl.int64)
    offset, group, first_tile, end_tile = locate(plan_ptr, program, SLOTS)
    dead = group < 0
    group = tl.where(dead, -1 - group, group)
    G: tl.constexpr = H // GROUP
    contiguous = (batch * T * G + group) * D

    if dead:
        start = (first_tile + (program - offset) * DEAD_TILES) * BN
        stop = tl.minimum(tl.minimum(start + DEAD_TILES * BN, end_tile * BN), T)
        store_zeros(dk_ptr + contiguous, G * D, start, stop, D, D_PAD, BN)
        store_zeros(dv_ptr + contiguous, G * D, start, stop, D, D_PAD, BN)
    else:
        # Earlier tiles have more queries: longest first.
        first = (first_tile + program - offset) * BN
        last = tl.minimum(first + BN, T) - 1
        keys = first + tl.arange(0, BN)
        doc_end = tl.full((BN,), T, tl.int32)
        doc_first, doc_last = T, T
        if DOCS:
            doc_base = doc_end_ptr + batch * T
            doc_end = tl.load(doc_base + keys, mask=keys < T, other=0)
            doc_first, doc_last = tl.load(doc_base + first), tl.load(doc_base + last)
        group64 = group.to(tl.int64)
        k = load_rows(k_ptr + batch * k_stride_b + group64 * k_stride_h, k_stride_t, first, T, D, D_PAD, BN)
        v = load_rows(v_ptr + batch * v_stride_b + group64 * v_stride_h, v_stride_t, first, T, D, D_PAD, BN)

        dk = tl.zeros((BN, D_PAD), tl.float32)
        dv = tl.zeros((BN, D_PAD), tl.float32)
        for member in range(GROUP):
            head = group * GROUP + member
            head64 = head.to(tl.int64)
            lo0, hi0, begin0, tiles0 = query_tiles(plan_ptr, head, 0, first, last, doc_last, BM, SLOTS)
            lo1, hi1, begin1, tiles1 = query_tiles(plan_ptr, head, 1, first, last, doc_last, BM, SLOTS)
            q_base = q_ptr + batch * q_stride_b + head64 * q_stride_h
            d_out_base = d_out_ptr + batch * d_out_stride_b + head64 * d_out_stride_h
            row0 = (tl.program_id(0) % B * H + head) * T  # 2^31 rows have no room on a GPU
            for t in range(at_least_one(tiles0 + tiles1)):
                lo, hi, start = tile_of(t, tiles0, lo0, hi0, begin0, lo1, hi1, begin1, BM)
                rows = start + tl.arange(0, BM)
                q = load_rows(q_base, q_stride_t, start, T, D, D_PAD, BM)
                d_out = load_rows(d_out_base, d_out_stride_t, start, T, D, D_PAD, BM)
                d_weights = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
                scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                lse = tl.load(lse_ptr + (row0 + rows), mask=rows < T, other=0.0)
                weights = tl.math.exp2(scores * scale_log2 - lse[None, :])
                if (start < last + lo) | (start + BM > tl.minimum(first + hi, doc_first)):  # else all are allowed
                    latest = tl.minimum(keys + hi, doc_end) - 1
                    weights = tl.where(columns_between(keys + lo, latest, start, BM), weights, 0.0)
                delta = tl.load(delta_ptr + (row0 + rows), mask=rows < T, other=0.0)  # not sooner: registers
                d_scores = weights * (d_weights - delta[None, :])
                dv = tl.dot(weights.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
                dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision=PRECISION)
        store_rows(dk_ptr + contiguous, G * D, first, T, dk * scale, D, D_PAD, BN)
        store_rows(dv_ptr + contiguous, G * D, first, T, dv, D, D_PAD, BN)
