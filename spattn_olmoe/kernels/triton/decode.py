"""The decode kernel: one query against a KV cache, of which it reads the keys that its head's intervals reach.

Bound by memory, so scores are sums of products in registers and no tensor core is used. The keys of a query are split
among several programs where there are too few queries to fill the GPU (Flash-Decoding), and merged by a second kernel.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import within_cache


@triton.jit(do_not_specialize=["T", "S"])
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    partial_ptr,
    start_ptr,
    leftpad_ptr,
    intervals_ptr,
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
    start_stride,
    T,
    S,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Grid ``(SPLITS, H, B * T)``. With one split ``out (B, T, H, D)``, else ``partial (B, T, H, SPLITS, D_PAD + 2)``:
    the weighted values, then the largest score (base 2), then the sum of weights."""
    part, head, query = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch = (query // T).to(tl.int64)
    d = tl.arange(0, D_PAD)
    position = tl.load(start_ptr + batch * start_stride).to(tl.int32) + query % T
    pad = 0
    if PADDED:
        pad = tl.load(leftpad_ptr + batch).to(tl.int32)
    begin0, length0 = within_cache(intervals_ptr, head, 0, position, pad, S)
    begin1, length1 = within_cache(intervals_ptr, head, 1, position, pad, S)
    share = tl.cdiv(tl.cdiv(length0 + length1, SPLITS), BN) * BN
    stop = tl.minimum((part + 1) * share, length0 + length1)

    group = (head // GROUP).to(tl.int64)
    k_base = k_ptr + batch * k_stride_b + group * k_stride_h
    v_base = v_ptr + batch * v_stride_b + group * v_stride_h
    q_row = q_ptr + batch * q_stride_b + (query % T).to(tl.int64) * q_stride_t + head.to(tl.int64) * q_stride_h
    q = tl.load(q_row + d, mask=d < D, other=0.0).to(tl.float32)

    acc = tl.zeros((D_PAD,), tl.float32)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for at in range(part * share, stop, BN):
        index = at + tl.arange(0, BN)
        keys = tl.where(index < length0, begin0 + index, begin1 + index - length0).to(tl.int64)
        mask = (index < stop)[:, None] & (d < D)[None, :]
        k = tl.load(k_base + keys[:, None] * k_stride_t + d[None, :], mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_base + keys[:, None] * v_stride_t + d[None, :], mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(index < stop, tl.sum(k * q[None, :], 1) * scale_log2, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 0))
        weights = tl.math.exp2(scores - new_largest)
        decay = tl.math.exp2(largest - new_largest)
        acc = acc * decay + tl.sum(weights[:, None] * v, 0)
        total = total * decay + tl.sum(weights, 0)
        largest = new_largest

    row = query.to(tl.int64) * H + head
    if SPLITS == 1:
        acc = acc / tl.where(total > 0, total, 1.0)
        tl.store(out_ptr + row * D + d, acc.to(out_ptr.dtype.element_ty), mask=d < D)
    else:
        partial = partial_ptr + (row * SPLITS + part) * (D_PAD + 2)
        tl.store(partial + d, acc)
        tl.store(partial + D_PAD, largest)
        tl.store(partial + D_PAD + 1, total)


@triton.jit
def merge_kernel(partial_ptr, out_ptr, H: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, SPLITS: tl.constexpr):
    """Merge the splits of every row of ``partial`` into ``out``; zeros for a row without keys. Grid ``(H, B * T)``."""
    row = tl.program_id(1).to(tl.int64) * H + tl.program_id(0)
    split, d = tl.arange(0, SPLITS), tl.arange(0, D_PAD)
    partial = partial_ptr + (row * SPLITS + split) * (D_PAD + 2)
    largest = tl.load(partial + D_PAD)
    top = tl.max(largest, 0)
    share = tl.where(largest == float("-inf"), 0.0, tl.math.exp2(largest - top))
    total = tl.sum(share * tl.load(partial + D_PAD + 1), 0)
    acc = tl.sum(share[:, None] * tl.load(partial[:, None] + d[None, :]), 0)
    acc = acc / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * D + d, acc.to(out_ptr.dtype.element_ty), mask=d < D)
