"""BigBird's mask as the paper's released code has it: window, global tokens, and a stride in place of random links.

Source: Zaheer et al., arXiv 2007.14062; sizes and the stride from the released code of arXiv 2511.09596.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Pattern, causal_pairs
from .longformer import PLAIN_CAUSAL_UP_TO, window_and_global_pairs
from .registry import register_pattern


@register_pattern("bigbird")
@dataclass(frozen=True)
class BigBird(Pattern):
    """``d <= w``, or query or key among the first ``g``, or ``d`` a multiple of ``s`` beyond the window."""

    @property
    def window(self) -> int:
        """``w``: the largest local distance, inclusive."""
        return max(1, min(128, max(1, self.seq_len // 8)))

    @property
    def n_global(self) -> int:
        """``g``: how many leading tokens are global."""
        return max(1, min(8, max(1, self.seq_len // 64)))

    @property
    def stride(self) -> int:
        """``s``: every ``s``-th distance beyond the window is attended."""
        return max(16, self.seq_len // 32)

    def allows(self, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if self.seq_len <= PLAIN_CAUSAL_UP_TO:
            return (q_idx >= kv_idx) & (h >= 0)
        d = q_idx - kv_idx
        strided = (d > self.window) & (d % self.stride == 0)
        return ((d <= self.window) | (q_idx < self.n_global) | (kv_idx < self.n_global) | strided) & (h >= 0)

    def _count_pairs_per_head(self, T: int) -> tuple[int, ...]:
        if self.seq_len <= PLAIN_CAUSAL_UP_TO:
            return self.n_heads * (causal_pairs(T),)
        i = torch.arange(T)
        farthest = torch.clamp(i - self.n_global, min=0) // self.stride  # strided distances that reach no global key
        strided = torch.clamp(farthest - self.window // self.stride, min=0)
        return self.n_heads * (int((window_and_global_pairs(T, self.window, self.n_global) + strided).sum()),)
