"""The kernels as PyTorch operators, so that torch.compile, selective checkpointing and FSDP2 can see through them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ...patterns.base import IntervalTable
from .backward import dkdv_kernel, dq_kernel
from .decode import decode_kernel, merge_kernel
from .forward import forward_kernel
from .schedule import interval_tensor, key_plan, query_plan, width
from .tile_sizes import config, decode_config, generation_of, padded


@torch.library.custom_op("spattn_olmoe::banded_forward", mutates_args=())
def banded_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: Sequence[int],
    scale: float,
    doc_start: Tensor | None,
    doc_end: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention over distance intervals.

    :param q: ``(B, T, H, D)``; ``k`` and ``v``: ``(B, T, G, D)``.
    :param intervals: ``lo, hi, lo, hi`` of each local head, flat.
    :param scale: not negative.
    :param doc_start: for every token the position at which its document starts, int32 ``(B, T)``; ``doc_end``: the
        position after its last token, for the backward pass.
    :returns: the output ``(B, T, H, D)``, and the base-2 log-sum-exp of every row's scores, float32 ``(B, H, T)``.
    """
    B, T, H, D = q.shape
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    doc_start = contiguous(doc_start)
    out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    tile = config("forward", generation_of(q.device), q.element_size(), padded(D))
    plan = query_plan(unflatten(intervals), T, tile.BM, q.device)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        forward_kernel[(plan.programs * B,)](
            q, k, v, out, lse, doc_start, plan.table, scale * math.log2(math.e),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], B, T,
            H=H, GROUP=H // k.shape[2], D=D, D_PAD=padded(D), BM=tile.BM, BN=tile.BN, SLOTS=plan.slots,
            DOCS=doc_start is not None, PRECISION=precision(q.dtype), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out, lse


@torch.library.custom_op("spattn_olmoe::banded_backward", mutates_args=())
def banded_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    intervals: Sequence[int],
    scale: float,
    doc_start: Tensor | None,
    doc_end: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`banded_forward` in q, k and v. Deterministic: every sum has one order."""
    B, T, H, D = q.shape
    G = k.shape[2]
    d_out, q, k, v = (rows_contiguous(x) for x in (d_out, q, k, v))
    out, lse, doc_start, doc_end = out.contiguous(), lse.contiguous(), contiguous(doc_start), contiguous(doc_end)
    dq = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty((B, T, G, D), dtype=q.dtype, device=q.device) for _ in range(2))
    delta = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    heads = unflatten(intervals)
    strides = [size for x in (q, k, v, d_out) for size in x.stride()[:3]]
    shape: dict[str, Any] = {"H": H, "GROUP": H // G, "D": D, "D_PAD": padded(D), "PRECISION": precision(q.dtype)}
    scales = scale, scale * math.log2(math.e)

    tile = config("dq", generation_of(q.device), q.element_size(), padded(D))
    plan = query_plan(heads, T, tile.BM, q.device)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        dq_kernel[(plan.programs * B,)](
            q, k, v, out, d_out, lse, delta, dq, doc_start, plan.table, *scales, *strides, B, T,
            **shape, BM=tile.BM, BN=tile.BN, SLOTS=plan.slots, DOCS=doc_start is not None,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    tile = config("dkdv" if G == H else "dkdv_grouped", generation_of(q.device), q.element_size(), padded(D))
    plan = key_plan(heads, H // G, T, tile.BN, q.device)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        dkdv_kernel[(plan.programs * B,)](
            q, k, v, d_out, lse, delta, dk, dv, doc_end, plan.table, *scales, *strides, B, T,
            **shape, BM=tile.BM, BN=tile.BN, SLOTS=plan.slots, DOCS=doc_end is not None,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return dq, dk, dv


@banded_forward.register_fake
def _(q, k, v, intervals, scale, doc_start, doc_end):
    B, T, H, D = q.shape
    return q.new_empty((B, T, H, D)), q.new_empty((B, H, T), dtype=torch.float32)


@banded_backward.register_fake
def _(d_out, q, k, v, out, lse, intervals, scale, doc_start, doc_end):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, intervals, scale, doc_start, doc_end = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, doc_start, doc_end)
    ctx.mark_non_differentiable(lse)
    ctx.intervals, ctx.scale = intervals, scale


def _backward(ctx: Any, d_out: Tensor, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, doc_start, doc_end = ctx.saved_tensors
    dq, dk, dv = banded_backward(d_out, q, k, v, out, lse, ctx.intervals, ctx.scale, doc_start, doc_end)
    return dq, dk, dv, None, None, None, None


banded_forward.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("spattn_olmoe::banded_decode", mutates_args=())
def banded_decode(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, leftpad: Tensor | None, intervals: Sequence[int], scale: float
) -> Tensor:
    """Attention of a few queries over distance intervals of a cache. No gradients, no host synchronisation.

    :param q: ``(B, T, H, D)``; ``k`` and ``v``: ``(B, S, G, D)``, of any floating dtype.
    :param start: position of the first query in the cache, int of one element or ``(B,)``.
    :param leftpad: keys before it are not attended, int ``(B,)``.
    :param intervals: ``lo, hi, lo, hi`` of each local head, flat.
    """
    B, T, H, D = q.shape
    S = k.shape[1]
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    leftpad = contiguous(leftpad)
    heads = unflatten(intervals)
    d_pad = padded(D)
    tile = decode_config(d_pad)
    splits = _splits(B * T * H, max(width(pair, S) for pair in heads), q.device)
    out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    partial = out
    if splits > 1:
        partial = torch.empty((B, T, H, splits, d_pad + 2), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        decode_kernel[(splits, H, B * T)](
            q, k, v, out, partial, start, leftpad, interval_tensor(heads, q.device), scale * math.log2(math.e),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], start.stride(0) if start.numel() > 1 else 0, T, S,
            H=H, GROUP=H // k.shape[2], D=D, D_PAD=d_pad, BN=tile.BN, SPLITS=splits,
            PADDED=leftpad is not None, num_warps=tile.warps,
        )  # fmt: skip
        if splits > 1:
            merge_kernel[(H, B * T)](partial, out, H=H, D=D, D_PAD=d_pad, SPLITS=splits, num_warps=tile.warps)

    return out


@banded_decode.register_fake
def _(q, k, v, start, leftpad, intervals, scale):
    return q.new_empty(q.shape)


MAX_SPLITS = 32
KEYS_PER_SPLIT = 256
"""Do not split below this many keys: merging would cost more than it saves."""


def _splits(rows: int, keys: int, device: torch.device) -> int:
    """Programs that share one query's keys, a power of two: enough to fill the GPU, each with enough to do.

    :param rows: queries times heads; ``keys``: the most keys that one of them has.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    wanted = min(4 * processors // rows, keys // KEYS_PER_SPLIT, MAX_SPLITS)
    return 1 << max(wanted.bit_length() - 1, 0)


def unflatten(intervals: Sequence[int]) -> IntervalTable:
    """``lo, hi, lo, hi`` of each head as pairs of intervals."""
    fours = (intervals[i : i + 4] for i in range(0, len(intervals), 4))
    return tuple(((a, b), (c, d)) for a, b, c, d in fours)


def rows_contiguous(x: Tensor) -> Tensor:
    """``x`` with consecutive elements in its last dimension, as the kernels read it: a copy where it has not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    """What the kernels read without strides."""
    return None if x is None else x.contiguous()


def precision(dtype: torch.dtype) -> str:
    """How the kernels multiply float32: exactly, or in TF32 where PyTorch's own matrix products may."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def is_interpreted() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1, with which the kernels run on a CPU (slowly, for tests)."""
    return not isinstance(forward_kernel, triton.JITFunction)
