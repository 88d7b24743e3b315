"""The backward kernels: dQ per tile of queries, then dK and dV per tile of keys. No atomics: the same bits every time.

After FlashAttention-2 (Dao, arXiv 2307.08691): weights are recomputed from the base-2 log-sum-exp of the forward.
The dQ kernel also computes ``delta``, the row sums of ``out * d_out`` that both need, so it runs first.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    DEAD_TILES,
    full_tile,
    key_tiles,
    load_rows,
    locate,
    masked_tile,
    query_tiles,
    store_rows,
    store_zeros,
    within,
)


@triton.jit
def _finite(lse):
    """0 for the -inf of a row without keys: its weights are 0 then, where they would be NaN."""
    return tl.where(lse == float("-inf"), 0.0, lse)


@triton.jit
def _query_gradient(
    dq,
    q,
    d_out,
    lse,
    delta,
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
    """Add what the keys ``start..start + BN`` contribute to the gradient of a query tile, but for the scale."""
    k = load_rows(k_base, k_stride, start, T, D, D_PAD, BN, MASKED)
    v = load_rows(v_base, v_stride, start, T, D, D_PAD, BN, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        keys = start + tl.arange(0, BN)
        allowed = within(rows[:, None], keys[None, :], lo, hi)
        if DOCS:
            allowed = allowed & (keys[None, :] >= doc_start[:, None])
        scores = tl.where(allowed, scores, float("-inf"))
    weights = tl.math.exp2(scores * scale_log2 - lse[:, None])
    d_weights = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
    d_scores = weights * (d_weights - delta[:, None])
    return tl.dot(d_scores.to(k.dtype), k, dq, input_precision=PRECISION)


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
    """``dq (B, T, H, D)`` of all rows of a plan and ``delta (B, H, T)`` of the rows in its live tiles."""
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
    else:
        first = (end_tile - 1 - (program - offset)) * BM
        last = tl.minimum(first + BM, T) - 1
        rows = first + tl.arange(0, BM)
        head64 = head.to(tl.int64)
        d_out_base = d_out_ptr + batch * d_out_stride_b + head64 * d_out_stride_h
        d_out = load_rows(d_out_base, d_out_stride_t, first, T, D, D_PAD, BM, True)
        out = load_rows(out_ptr + contiguous, H * D, first, T, D, D_PAD, BM, True)
        delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
        per_row = (batch * H + head) * T + rows
        tl.store(delta_ptr + per_row, delta, mask=rows < T)
        lse = _finite(tl.load(lse_ptr + per_row, mask=rows < T, other=0.0))

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
        q = load_rows(q_ptr + batch * q_stride_b + head64 * q_stride_h, q_stride_t, first, T, D, D_PAD, BM, True)
        group = (head // GROUP).to(tl.int64)
        k_base = k_ptr + batch * k_stride_b + group * k_stride_h
        v_base = v_ptr + batch * v_stride_b + group * v_stride_h

        dq = tl.zeros((BM, D_PAD), tl.float32)
        for t in range(masked0 + masked1):
            start, second = masked_tile(t, masked0, begin0, left0, full0, begin1, left1, full1, BN)
            lo, hi = tl.where(second, lo1, lo0), tl.where(second, hi1, hi0)
            dq = _query_gradient(
                dq, q, d_out, lse, delta, k_base, v_base, k_stride_t, v_stride_t, rows, doc_start, start, lo, hi, T,
                scale_log2, D, D_PAD, BN, True, DOCS, PRECISION,
            )  # fmt: skip
        for t in range(full0 + full1):
            start = full_tile(t, full0, begin0, left0, begin1, left1, BN)
            dq = _query_gradient(
                dq, q, d_out, lse, delta, k_base, v_base, k_stride_t, v_stride_t, rows, doc_start, start, 0, 0, T,
                scale_log2, D, D_PAD, BN, False, DOCS, PRECISION,
            )  # fmt: skip
        store_rows(dq_base, H * D, first, T, dq * scale, D, D_PAD, BM)


@triton.jit
def _key_gradients(
    dk,
    dv,
    k,
    v,
    q_base,
    d_out_base,
    q_stride,
    d_out_stride,
    lse_base,
    delta_base,
    keys,
    doc_end,
    start,
    lo,
    hi,
    T,
    scale_log2,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BM: tl.constexpr,
    MASKED: tl.constexpr,
    DOCS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what the queries ``start..start + BM`` contribute to the gradients of a key tile; dk but for the scale."""
    rows = start + tl.arange(0, BM)
    q = load_rows(q_base, q_stride, start, T, D, D_PAD, BM, MASKED)
    d_out = load_rows(d_out_base, d_out_stride, start, T, D, D_PAD, BM, MASKED)
    if MASKED:
        lse = _finite(tl.load(lse_base + rows, mask=rows < T, other=0.0))
        delta = tl.load(delta_base + rows, mask=rows < T, other=0.0)
    else:
        lse = tl.load(lse_base + rows)
        delta = tl.load(delta_base + rows)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    if MASKED:
        allowed = within(rows[None, :], keys[:, None], lo, hi)  # rows beyond T are zeros, and add zeros
        if DOCS:
            allowed = allowed & (rows[None, :] < doc_end[:, None])
        scores = tl.where(allowed, scores, float("-inf"))
    weights = tl.math.exp2(scores * scale_log2 - lse[None, :])
    dv = tl.dot(weights.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
    d_weights = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
    d_scores = weights * (d_weights - delta[None, :])
    dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


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
        doc_end = tl.zeros((BN,), tl.int32)
        doc_first, doc_last = T, T
        if DOCS:
            doc_base = doc_end_ptr + batch * T
            doc_end = tl.load(doc_base + keys, mask=keys < T, other=0)
            doc_first, doc_last = tl.load(doc_base + first), tl.load(doc_base + last)
        group64 = group.to(tl.int64)
        k = load_rows(k_ptr + batch * k_stride_b + group64 * k_stride_h, k_stride_t, first, T, D, D_PAD, BN, True)
        v = load_rows(v_ptr + batch * v_stride_b + group64 * v_stride_h, v_stride_t, first, T, D, D_PAD, BN, True)

        dk = tl.zeros((BN, D_PAD), tl.float32)
        dv = tl.zeros((BN, D_PAD), tl.float32)
        for member in range(GROUP):
            head = group * GROUP + member
            head64 = head.to(tl.int64)
            lo0, hi0, begin0, masked0, left0, full0 = query_tiles(
                plan_ptr, head, 0, first, last, doc_first, doc_last, BM, SLOTS
            )
            lo1, hi1, begin1, masked1, left1, full1 = query_tiles(
                plan_ptr, head, 1, first, last, doc_first, doc_last, BM, SLOTS
            )
            q_base = q_ptr + batch * q_stride_b + head64 * q_stride_h
            d_out_base = d_out_ptr + batch * d_out_stride_b + head64 * d_out_stride_h
            lse_base = lse_ptr + (batch * H + head) * T
            delta_base = delta_ptr + (batch * H + head) * T
            for t in range(masked0 + masked1):
                start, second = masked_tile(t, masked0, begin0, left0, full0, begin1, left1, full1, BM)
                lo, hi = tl.where(second, lo1, lo0), tl.where(second, hi1, hi0)
                dk, dv = _key_gradients(
                    dk, dv, k, v, q_base, d_out_base, q_stride_t, d_out_stride_t, lse_base, delta_base, keys, doc_end,
                    start, lo, hi, T, scale_log2, D, D_PAD, BM, True, DOCS, PRECISION,
                )  # fmt: skip
            for t in range(full0 + full1):
                start = full_tile(t, full0, begin0, left0, begin1, left1, BM)
                dk, dv = _key_gradients(
                    dk, dv, k, v, q_base, d_out_base, q_stride_t, d_out_stride_t, lse_base, delta_base, keys, doc_end,
                    start, 0, 0, T, scale_log2, D, D_PAD, BM, False, DOCS, PRECISION,
                )  # fmt: skip
        store_rows(dk_ptr + contiguous, G * D, first, T, dk * scale, D, D_PAD, BN)
        store_rows(dv_ptr + contiguous, G * D, first, T, dv, D, D_PAD, BN)
