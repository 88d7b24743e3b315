"""The definition of correct: dense attention under the pattern's mask, any pattern, any dtype, any device."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import Call
from .documents import document_starts


def run(call: Call) -> Tensor:
    """Attention over the whole ``(B, H, T, T)`` score matrix. O(T^2) memory: for tests and small inputs."""
    return masked_attention(*call[:3], visible(call), call.scale)


def visible(call: Call) -> Tensor:
    """The mask of a call, documents included: bool ``(1, H, T, T)``.

    ``(B, H, T, T)`` where rows of the batch differ: with documents, or under a pattern that follows the content.
    """
    q_BTHD, k_BTGD, _, pattern, cu_doc_lens, _, head_offset = call
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


def sdpa(call: Call, **kwargs: Any) -> Tensor:
    """PyTorch's attention under a mask that its ``kwargs`` state, by whichever kernel it picks."""
    q, k, v = (x.transpose(1, 2) for x in call[:3])
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, scale=call.scale, enable_gqa=gqa, **kwargs).transpose(1, 2)


def nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Zeros like ``q``, through which all three still get gradients (zeros): attention where no row has a key."""
    return torch.zeros_like(q) + sum(x[:0].sum() for x in (q, k, v))
