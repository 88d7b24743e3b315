"""Attention of a few new queries against a KV cache, as generation does it."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..patterns import Pattern
from .dispatch import attention, triton_unsuitable
from .scale import positive_scale

DECODE_QUERIES = 1
"""The most new queries for which ``impl="auto"`` takes the decode kernel, which reads the cache for each anew."""


def cached_attention(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    pattern: Pattern,
    *,
    start: Tensor | int,
    leftpad: Tensor | None = None,
    scale: float | None = None,
    head_offset: int = 0,
    impl: str = "auto",
) -> Tensor:
    """Attend ``T`` new queries to a cache that already holds their own keys and values.

    :param q_BTHD: queries at the positions ``start .. start + T`` of the cache.
    :param k_BSGD: key cache, ``S`` positions of which those from ``start + T`` on are not read.
    :param start: position of the first query: an int, or a tensor, which is not waited for (and so not looked at: it
        must be in the cache), of no dimension or ``(B,)`` where every sequence has a length of its own.
    :param leftpad: padding tokens before each sequence, int ``(B,)``. They are attended by no one, and positions
        count from their end.
    :param impl: ``sdpa``: PyTorch's attention under a mask. ``cpu``, for one query, and ``triton``, without gradients, read
        only the keys that a query's distances reach. ``auto``: ``triton`` on CUDA for a single query; on a CPU ``cpu``
        for one, and attention without a cache for a prompt that fills it from its start; else ``sdpa``.
    :returns: ``(B, T, H, D)``; zeros for queries that have no key.
    :raises ValueError: shapes that do not fit, an ``impl`` that cannot serve the call, or a pattern that follows the
        length of its input, for which a cache is not valid.
    """
    if pattern.follows_input:
        raise ValueError(
            "attention.follows_input=true changes the mask with every new token, so a KV cache is not valid: "
            "generate with use_cache=false, or use follows_input=False"
        )
    _check(q_BTHD, k_BSGD, v_BSGD, pattern, start, leftpad, head_offset)
    q_BTHD, scale = positive_scale(q_BTHD, scale)
    T, on_cpu = q_BTHD.shape[1], q_BTHD.device.type == "cpu"
    if on_cpu:  # where looking costs nothing
        start = int(start) if isinstance(start, Tensor) and start.numel() == 1 else start
        leftpad = leftpad if leftpad is not None and leftpad.any() else None
    if impl == "auto":
        if on_cpu and T > 1 and isinstance(start, int) and start == 0 and leftpad is None:
            k, v = (x[:, :T].to(q_BTHD.dtype) for x in (k_BSGD, v_BSGD))
            return attention(q_BTHD, k, v, pattern, scale=scale, head_offset=head_offset)
        fast = "cpu" if on_cpu else "triton"
        decoding = 0 < T <= DECODE_QUERIES and len(q_BTHD) > 0
        impl = fast if decoding and not _unsuitable(fast, q_BTHD, k_BSGD, v_BSGD, pattern, start) else "sdpa"
    elif reason := _unsuitable(impl, q_BTHD, k_BSGD, v_BSGD, pattern, start):
        raise ValueError(f"impl={impl!r} {reason}")
    if impl == "sdpa":
        return _masked(q_BTHD, k_BSGD, v_BSGD, pattern, start, leftpad, scale, head_offset)
    if impl == "cpu":
        assert isinstance(start, int)
        return _slices(q_BTHD, k_BSGD, v_BSGD, pattern, start, leftpad, scale, head_offset)
    from . import triton as banded

    device = q_BTHD.device
    start = start.to(device) if isinstance(start, Tensor) else torch.full((), start, device=device)
    pad = None if leftpad is None else leftpad.to(device)
    return banded.decode(
        q_BTHD, k_BSGD, v_BSGD, pattern, start=start, leftpad=pad, scale=scale, head_offset=head_offset
    )


def _masked(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    pattern: Pattern,
    start: Tensor | int,
    leftpad: Tensor | None,
    scale: float,
    head_offset: int,
) -> Tensor:
    T, H = q_BTHD.shape[1:3]
    device = q_BTHD.device
    if not isinstance(start, Tensor):
        k_BSGD, v_BSGD = k_BSGD[:, : start + T], v_BSGD[:, : start + T]
    B, S = k_BSGD.shape[:2]
    # Positions count from the end of the padding.
    k_start = 0 if leftpad is None else -leftpad.to(device)
    q_start = (start.to(device).flatten() if isinstance(start, Tensor) else start) + k_start
    i = _column(q_start) + torch.arange(T, device=device)[None, None, :, None]
    j = _column(k_start) + torch.arange(S, device=device)[None, None, None, :]
    # A mask alone does not keep what is unwritten out: its weight is zero, and zero times NaN is NaN.
    unread = (j < 0) | (j >= _column(q_start) + T)
    if leftpad is not None or isinstance(start, Tensor):
        k_BSGD, v_BSGD = (x.masked_fill(unread[:, 0, 0, :, None, None], 0.0) for x in (k_BSGD, v_BSGD))
    bound = pattern.bind(q_BTHD, k_BSGD, head_offset=head_offset, q_start=q_start, k_start=k_start)
    b = torch.arange(B if pattern.follows_content else 1, device=device)[:, None, None, None]
    h = torch.arange(H, device=device)[:, None, None]
    mask = bound.mask_mod(b, h, i, j) & ~unread
    mask = mask.expand(-1, H, T, S)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BSGD, v_BSGD))
    out = F.scaled_dot_product_attention(
        q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask, scale=scale, enable_gqa=H != k_BSGD.shape[2]
    )
    # CUDA's fused SDPA kernels do not promise zeros for a row without keys.
    return out.masked_fill(~mask.any(-1, keepdim=True), 0.0).transpose(1, 2)


def _slices(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    pattern: Pattern,
    start: int,
    leftpad: Tensor | None,
    scale: float,
    head_offset: int,
) -> Tensor:
    """One query against the slices of the cache that its distances reach: neighbouring heads with the same ones together.

    Padding moves queries and keys alike, so that distances are those of the cache's places.
    """
    assert pattern.table is not None
    H, group = q_BTHD.shape[2], q_BTHD.shape[2] // k_BSGD.shape[2]
    reached = [
        tuple((max(0, start - hi + 1), start - lo + 1) for lo, hi in head if lo < hi and lo <= start)
        for head in pattern.table[head_offset : head_offset + H]
    ]
    out = torch.zeros_like(q_BTHD)
    for (spans, _), heads in itertools.groupby(range(H), key=lambda h: (reached[h], h // group if group > 1 else 0)):
        first, *rest = heads
        at = slice(first, first + len(rest) + 1)
        if not spans:
            continue
        groups = slice(first // group, (at.stop - 1) // group + 1)
        k, v = ([x[:, a:b, groups].to(q_BTHD.dtype) for a, b in spans] for x in (k_BSGD, v_BSGD))
        keys, values = (x[0] if len(x) == 1 else torch.cat(x, dim=1) for x in (k, v))
        mask = None
        if leftpad is not None:
            places = torch.cat([torch.arange(a, b) for a, b in spans])
            mask = places >= leftpad[:, None]
            keys, values = (x.masked_fill(~mask[..., None, None], 0.0) for x in (keys, values))
            mask = mask[:, None, None]
        q, k_BGSD, v_BGSD = (x.transpose(1, 2) for x in (q_BTHD[:, :, at], keys, values))
        part = F.scaled_dot_product_attention(q, k_BGSD, v_BGSD, attn_mask=mask, scale=scale, enable_gqa=group > 1)
        if mask is not None:
            part = part.masked_fill(~mask.any(-1, keepdim=True), 0.0)
        out[:, :, at] = part.transpose(1, 2)
    return out


def _unsuitable(impl: str, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, start: Tensor | int) -> str | None:
    """Why an implementation cannot serve a call, as the end of a sentence; None where it can."""
    if impl == "cpu":
        return _slices_unsuitable(q, pattern, start)
    if impl == "triton":
        return _decode_unsuitable(q, k, v, pattern)
    return None if impl == "sdpa" else "is unknown (known: auto, cpu, sdpa, triton)"


def _slices_unsuitable(q: Tensor, pattern: Pattern, start: Tensor | int) -> str | None:
    """Why slices of the cache cannot serve a call, as the end of a sentence; None where they can."""
    if pattern.table is None:
        return f"reads distance intervals, which {pattern.name!r} is not made of"
    if q.device.type != "cpu" or not isinstance(start, int) or q.shape[1] != 1:
        return "reads slices of a cache on a CPU, for one query at one place in all sequences: use impl='auto'"
    return None


def _column(start: Tensor | int) -> Tensor | int:
    """One number a sequence, as it meets heads, queries and keys."""
    return start.reshape(-1, 1, 1, 1) if isinstance(start, Tensor) else start


def _decode_unsuitable(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> str | None:
    """Why the decode kernel cannot serve a call, as the end of a sentence; None where it can."""
    if pattern.table is None:
        return f"computes distance intervals, which {pattern.name!r} is not made of"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "decodes without gradients: call it under torch.no_grad(), or use impl='sdpa'"
    reasons = (triton_unsuitable(q.device.type, dtype, q.shape[3]) for dtype in {q.dtype, k.dtype, v.dtype})
    return next((reason for reason in reasons if reason), None)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    start: Tensor | int,
    leftpad: Tensor | None,
    head_offset: int,
) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]):
        raise ValueError(
            f"q {tuple(q.shape)} must be (batch, length, heads, head_dim), k {tuple(k.shape)} and v {tuple(v.shape)} "
            "(batch, cache, kv_heads, head_dim)"
        )
    B, _, H, _ = q.shape
    if H % k.shape[2]:
        raise ValueError(f"n_heads={H} must be a multiple of n_kv_heads={k.shape[2]}")
    if head_offset < 0 or head_offset + H > pattern.n_heads:
        raise ValueError(f"heads {head_offset} to {head_offset + H} are not among the {pattern.n_heads} of {pattern}")
    if not isinstance(start, Tensor) and not 0 <= start <= k.shape[1] - q.shape[1]:
        raise ValueError(
            f"start={start}: {q.shape[1]} queries from there on do not fit a cache of {k.shape[1]} positions"
        )
    if isinstance(start, Tensor) and start.shape not in ((), (1,), (B,)):
        raise ValueError(f"start must have no dimension or be ({B},), not {tuple(start.shape)}")
    if leftpad is not None and leftpad.shape != (B,):
        raise ValueError(f"leftpad must be ({B},), one number a sequence, not {tuple(leftpad.shape)}")
