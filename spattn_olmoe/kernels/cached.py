"""Attention of a few new queries against a KV cache, as generation does it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..patterns import Pattern


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
) -> Tensor:
    """Attend ``T`` new queries to a cache that already holds their own keys and values.

    :param q_BTHD: queries at the positions ``start .. start + T`` of the cache.
    :param k_BSGD: key cache, ``S`` positions of which those from ``start + T`` on are not read.
    :param start: position of the first query: an int, or a 0-dimensional tensor, which is not waited for.
    :param leftpad: padding tokens before each sequence, int ``(B,)``. They are attended by no one, and positions
        count from behind them.
    :returns: ``(B, T, H, D)``; zeros for queries that have no key.
    :raises ValueError: the pattern follows the length of its input, for which a cache is not valid.
    """
    if pattern.band_length == "input":
        raise ValueError(
            "attention.band_length='input' changes the mask with every new token, so a KV cache is not valid: "
            "generate with use_cache=false, or use band_length='train'"
        )
    T, H = q_BTHD.shape[1:3]
    device = q_BTHD.device
    i = (start + torch.arange(T, device=device))[None, None, :, None]
    j = torch.arange(k_BSGD.shape[1], device=device)[None, None, None, :]
    if leftpad is not None:
        pad = leftpad.to(device)[:, None, None, None]
        i, j = i - pad, j - pad
    h = (head_offset + torch.arange(H, device=device))[None, :, None, None]
    mask = pattern.mask_mod(torch.zeros_like(h), h, i, j) & (j >= 0)
    mask = mask.expand(-1, H, T, k_BSGD.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BSGD, v_BSGD))
    out = F.scaled_dot_product_attention(
        q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask, scale=scale, enable_gqa=H != k_BSGD.shape[2]
    )
    # CUDA's fused SDPA kernels do not promise zeros for a row without keys.
    return out.masked_fill(~mask.any(-1, keepdim=True), 0.0).transpose(1, 2)
