"""Reformer's mask as the paper's released code has it: buckets by a hash of the *position* in place of LSH.

Source: Kitaev et al., arXiv 2001.04451; the hash and the sizes from the released code of arXiv 2511.09596.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Pattern, causal_pairs
from .longformer import PLAIN_CAUSAL_UP_TO
from .registry import register_pattern


@register_pattern("reformer")
@dataclass(frozen=True)
class Reformer(Pattern):
    """Query and key in the same or a neighbouring bucket (circularly), or ``d <= l``.

    Buckets are ``(3 x + 13 h + 7) mod nb``. Two positions' buckets differ by ``3 d mod nb``, so the mask depends on
    the distance alone, periodically, and is the same in every head.
    """

    @property
    def n_buckets(self) -> int:
        """``nb``: number of buckets."""
        bucket_size = max(1, min(64, max(1, self.seq_len // 8)))
        return max(2, self.seq_len // bucket_size)

    @property
    def local(self) -> int:
        """``l``: the largest local distance, inclusive."""
        return max(1, min(8, self.seq_len // 4))

    def allows(self, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if self.seq_len <= PLAIN_CAUSAL_UP_TO:
            return (q_idx >= kv_idx) & (h >= 0)
        nb = self.n_buckets
        apart = ((3 * q_idx + 13 * h + 7) % nb - (3 * kv_idx + 13 * h + 7) % nb).abs()
        near = apart <= 1
        if nb > 2:
            near = near | (apart == nb - 1)
        return near | (q_idx - kv_idx <= self.local)

    def _count_pairs_per_head(self, T: int) -> tuple[int, ...]:
        if self.seq_len <= PLAIN_CAUSAL_UP_TO:
            return self.n_heads * (causal_pairs(T),)
        d = torch.arange(T)
        step = (3 * d) % self.n_buckets
        near = (step <= 1) | (step == self.n_buckets - 1) | (d <= self.local)
        return self.n_heads * (int((near * (T - d)).sum()),)
