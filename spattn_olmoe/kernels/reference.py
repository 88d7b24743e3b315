"""The definition of correct: dense attention under the pattern's mask, any pattern, any dtype, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..patterns import Pattern
from .documents import document_starts


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
    """Attention over the whole ``(B, H, T, T)`` score matrix. O(T^2) memory: for tests and small inputs."""
    mask = visible(pattern, q_BTHD, k_BTGD, cu_doc_lens, head_offset)
    return masked_attention(q_BTHD, k_BTGD, v_BTGD, mask, scale)


def visible(pattern: Pattern, q_BTHD: Tensor, k_BTGD: Tensor, cu_doc_lens: Tensor | None, head_offset: int) -> Tensor:
    """The mask of q's heads, from ``head_offset`` on, documents included: bool ``(1, H, T, T)``.

    ``(B, H, T, T)`` where rows of the batch differ: with documents, or under a pattern that follows the content.
    """
    B, T, H, _ = q_BTHD.shape
    position = torch.arange(T, device=q_BTHD.device)
    start = None if cu_doc_lens is None else document_starts(cu_doc_lens, B, T)
    bound = pattern.bind(q_BTHD, k_BTGD, head_offset=head_offset, first=0 if start is None else start)
    b = torch.arange(B if pattern.follows_content else 1, device=q_BTHD.device)[:, None, None, None]
    h = torch.arange(H, device=q_BTHD.device)[:, None, None]
    mask = bound.mask_mod(b, h, position[:, None], position).expand(len(b), H, T, T)
    return mask if start is None else mask & (position >= start[:, None, :, None])


def masked_attention(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax attention under a mask that broadcasts to ``(B, H, T, S)``; exact zeros where a row has no key.

    Scores and softmax are in the inputs' dtype, at least float32. Head ``h`` reads key/value head ``h // (H / G)``.
    """
    H, G = q_BTHD.shape[2], k_BSGD.shape[2]
    exact = torch.promote_types(q_BTHD.dtype, torch.float32)
    k, v = (x.to(exact).repeat_interleave(H // G, dim=2) for x in (k_BSGD, v_BSGD))
    scores = torch.einsum("bthd,bshd->bhts", q_BTHD.to(exact), k) * scale
    # The softmax of a row of -inf is NaN, and so is its gradient: such rows get finite scores, and weights of zero.
    dead = ~mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~mask, float("-inf")).masked_fill(dead, 0.0)
    weights = torch.softmax(scores, dim=-1).masked_fill(~mask, 0.0)
    return torch.einsum("bhts,bshd->bthd", weights, v).to(q_BTHD.dtype)


def nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Zeros like ``q``, through which all three still get gradients (zeros): attention where no row has a key."""
    return torch.zeros_like(q) + sum(x[:0].sum() for x in (q, k, v))
