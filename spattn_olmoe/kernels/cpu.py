"""Attention on a CPU: every chunk of queries meets only the keys that its head's distances reach.

Heads with the same intervals go together. Their queries are cut into chunks, and one call of PyTorch's SDPA attends
each chunk to its window of keys, which is a strided view: chunk ``c`` of a head with interval ``[lo, hi)`` needs the
keys ``c * CHUNK - hi + 1`` to ``(c + 1) * CHUNK - lo``, equally many for every chunk. Patterns that are no distance
intervals use SDPA under a dense mask, a byte for each head, query and key, and for each row of the batch where the mask
follows the content.
"""

from __future__ import annotations

import functools
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor

from ..patterns import Pattern, interval_table
from ..patterns.base import Interval
from .documents import document_spans
from .reference import nothing, visible

CHUNK = 64
"""Queries that share one window of keys: of 32, 64 and 128 the fastest at N = 256 to 2048."""


def run(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    pattern: Pattern,
    *,
    cu_doc_lens: Tensor | None,
    scale: float,
    head_offset: int,
) -> Tensor:
    """Attention and gradients through SDPA on windows. Memory O(T * band), not O(T^2), for interval patterns."""
    B, T, H, _ = q_BTHD.shape
    table = interval_table(pattern)
    if table is None:
        mask = visible(pattern, q_BTHD, k_BTGD, cu_doc_lens, head_offset)
        return _sdpa(q_BTHD, k_BTGD, v_BTGD, scale, attn_mask=mask)

    heads = table[head_offset : head_offset + H]
    if cu_doc_lens is None:
        return _intervals(q_BTHD, k_BTGD, v_BTGD, heads, scale)
    # A mask of distances within documents is that mask on each document by itself.
    rows: list[list[Tensor]] = [[] for _ in range(B)]
    for row, start, stop in document_spans(cu_doc_lens, B, T):
        q, k, v = (x[row : row + 1, start:stop] for x in (q_BTHD, k_BTGD, v_BTGD))
        rows[row].append(_intervals(q, k, v, heads, scale))
    return torch.cat([torch.cat(parts, dim=1) for parts in rows])


def _sdpa(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, scale: float, **kwargs) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTGD, v_BTGD))
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=gqa, **kwargs).transpose(1, 2)


def _intervals(
    q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, heads: tuple[tuple[Interval, Interval], ...], scale: float
) -> Tensor:
    T, H = q_BTHD.shape[1:3]
    group = H // k_BTGD.shape[2]
    alike: dict[tuple[Interval, ...], list[int]] = defaultdict(list)
    for h, pair in enumerate(heads):
        alike[tuple((lo, min(hi, T)) for lo, hi in pair if lo < min(hi, T))].append(h)

    out: list[Tensor | None] = [None] * H
    for intervals, members in alike.items():
        if len(members) == H:
            q, k, v = q_BTHD, k_BTGD.repeat_interleave(group, dim=2), v_BTGD.repeat_interleave(group, dim=2)
        else:
            shared = [h // group for h in members]
            q, k, v = q_BTHD[:, :, members], k_BTGD[:, :, shared], v_BTGD[:, :, shared]
        if not intervals:
            attended = nothing(q, k, v)
        elif intervals == ((0, T),):
            attended = _sdpa(q, k, v, scale, is_causal=True)
        else:
            attended = _windows(q, k, v, intervals, scale)
        if len(members) == H:
            return attended
        for h, head in zip(members, attended.unbind(2), strict=True):
            out[h] = head
    return torch.stack([head for head in out if head is not None], dim=2)


def _windows(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, intervals: tuple[Interval, ...], scale: float) -> Tensor:
    """Attention of heads that share one list of intervals (not empty, clipped to T)."""
    B, T, H, D = q_BTHD.shape
    n_chunks = -(-T // CHUNK)
    padding = n_chunks * CHUNK - T
    reach = max(hi for _, hi in intervals)
    first = intervals[0][0] // CHUNK  # no query of an earlier chunk has a key
    full = max(first, min(n_chunks, -(-(reach - 1) // CHUNK)))  # from this chunk on no window starts before position 0

    q = F.pad(q_BTHD.transpose(1, 2), (0, 0, 0, padding)).unflatten(2, (n_chunks, CHUNK))
    k, v = (F.pad(x.transpose(1, 2), (0, 0, reach - 1, padding)) for x in (k_BTHD, v_BTHD))

    def windows(x: Tensor, start: int, stop: int) -> Tensor:
        """Keys or values of chunks ``start..stop``, ``(B, H, stop - start, keys, D)``; ``reach - 1`` pads precede x."""
        parts = []
        for lo, hi in intervals:
            length = hi - lo + CHUNK - 1
            begin = start * CHUNK + reach - hi
            part = x[:, :, begin : begin + (stop - start - 1) * CHUNK + length]
            parts.append(part.unfold(2, length, CHUNK).transpose(3, 4))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)

    pieces = [q.new_zeros(B, H, first * CHUNK, D)] if first else []
    for start, stop in ((first, full), (full, n_chunks)):
        if start < stop:
            mask = _window_mask(intervals, start, stop if stop == full else start + 1, q.dtype)
            chunks = q[:, :, start:stop], windows(k, start, stop), windows(v, start, stop)
            qs, ks, vs = (x.flatten(0, 1) for x in chunks)
            piece = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=mask, scale=scale)
            pieces.append(piece.view(B, H, -1, D))
    return torch.cat(pieces, dim=2)[:, :, :T].transpose(1, 2)


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)  # made while generating, kept, and then wanted by a backward pass
def _window_mask(intervals: tuple[Interval, ...], start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Additive mask of chunks ``start..stop`` against their windows, ``(1, stop - start, CHUNK, keys)``.

    Four dimensions, or SDPA would not take its flash kernel.
    """
    chunk = torch.arange(start, stop)[:, None, None] * CHUNK
    i = chunk + torch.arange(CHUNK)[:, None]
    parts = []
    for lo, hi in intervals:
        j = chunk - hi + 1 + torch.arange(hi - lo + CHUNK - 1)
        d = i - j
        parts.append((lo <= d) & (d < hi) & (j >= 0))
    allowed = torch.cat(parts, dim=-1)
    return torch.zeros(1, *allowed.shape, dtype=dtype).masked_fill_(~allowed, float("-inf"))
