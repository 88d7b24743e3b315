"""Longformer's mask as the paper's released code has it: a local window and a few global tokens.

Source: Beltagy et al., arXiv 2004.05150; sizes from the released code of arXiv 2511.09596.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Pattern, causal_pairs
from .registry import register_pattern

PLAIN_CAUSAL_UP_TO = 4
"""Band lengths up to which the released Longformer, BigBird and Reformer are plain causal attention."""


@register_pattern("longformer")
@dataclass(frozen=True)
class Longformer(Pattern):
    """``d <= w``, or the query or the key is one of the first ``g`` tokens. The same in every head."""

    @property
    def window(self) -> int:
        """``w``: the largest local distance, inclusive."""
        return max(1, min(256, self.band_length // 4))

    @property
    def n_global(self) -> int:
        """``g``: how many leading tokens are global."""
        return max(1, min(16, max(1, self.band_length // 32)))

    def allows(self, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if self.band_length <= PLAIN_CAUSAL_UP_TO:
            return (q_idx >= kv_idx) & (h >= 0)
        local = q_idx - kv_idx <= self.window
        return (local | (q_idx < self.n_global) | (kv_idx < self.n_global)) & (h >= 0)

    def _count_pairs_per_head(self, T: int) -> tuple[int, ...]:
        if self.band_length <= PLAIN_CAUSAL_UP_TO:
            return self.n_heads * (causal_pairs(T),)
        return self.n_heads * (int(window_and_global_pairs(T, self.window, self.n_global).sum()),)


def window_and_global_pairs(T: int, window: int, n_global: int) -> Tensor:
    """Keys that each of ``T`` queries attends by a local window or by global tokens, int ``(T,)``."""
    i = torch.arange(T)
    local_only = i - torch.clamp(i - window, min=n_global) + 1  # keys from the window that are not global
    return torch.where(i < n_global, i + 1, n_global + local_only)
