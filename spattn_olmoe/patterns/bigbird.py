"""BigBird (Zaheer et al., arXiv 2007.14062): its random links, and the mask that stands for it in the released code.

``random_links="stride"`` is the stand-in of the released code of arXiv 2511.09596: a window, global tokens, and a stride
in place of random links. ``random_links="seeded"`` is BigBird itself, in blocks as its paper computes it, made causal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Pattern, causal_pairs
from .longformer import PLAIN_CAUSAL_UP_TO, window_and_global_pairs
from .registry import register_pattern

GLOBAL_BLOCKS, WINDOW_BLOCKS, RANDOM_BLOCKS = 2, 3, 3
"""What a block of queries attends, in blocks: the base model of arXiv 2007.14062, whose blocks have 64 tokens of 4096."""


@register_pattern("bigbird")
@dataclass(frozen=True)
class BigBird(Pattern):
    """A window, leading global tokens, and links to farther keys.

    :param random_links: ``"stride"``: every ``s``-th distance, the released code's stand-in. ``"seeded"``: every block
        of queries attends :data:`RANDOM_BLOCKS` earlier blocks that ``seed`` draws for each head.
    :param seed: of the random links, from 0. Read with ``"seeded"``.
    :param block_size: tokens of a block, by default ``N // 64`` and at most 64. Read with ``"seeded"``.
    """

    random_links: str = "stride"
    seed: int = 0
    block_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.random_links not in ("stride", "seeded"):
            raise ValueError(f"attention.random_links={self.random_links!r}: must be 'stride' or 'seeded'")
        self.check_read("random_links", "seeded", ("seed", "block_size"))
        self.check_whole("seed", at_least=0)
        if self.block_size is not None:
            self.check_whole("block_size", at_least=1)

    @property
    def window(self) -> int:
        """``w``: the largest local distance, inclusive. Of the stand-in."""
        return max(1, min(128, max(1, self.band_length // 8)))

    @property
    def n_global(self) -> int:
        """``g``: how many leading tokens are global. Of the stand-in."""
        return max(1, min(8, max(1, self.band_length // 64)))

    @property
    def stride(self) -> int:
        """``s``: every ``s``-th distance beyond the window is attended. Of the stand-in."""
        return max(16, self.band_length // 32)

    @property
    def block(self) -> int:
        """``b``: tokens of a block of the real BigBird."""
        return self.block_size or max(1, min(64, self.band_length // 64))

    def allows(self, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if self.random_links == "seeded":
            return self._block_allows(h, q_idx // self.block, kv_idx // self.block)
        if self.band_length <= PLAIN_CAUSAL_UP_TO:
            return (q_idx >= kv_idx) & (h >= 0)
        d = q_idx - kv_idx
        strided = (d > self.window) & (d % self.stride == 0)
        return ((d <= self.window) | (q_idx < self.n_global) | (kv_idx < self.n_global) | strided) & (h >= 0)

    def _block_allows(self, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether a block of queries attends a block of keys: near, global or linked.

        The links are drawn among the blocks between the global ones and the window, without replacement: Floyd's
        algorithm (Bentley and Floyd, Communications of the ACM 30(9), 1987), with a hash for random numbers. So they
        depend on seed, head and block alone: not on the length of the input, the device or what was asked before.
        """
        allowed = (query - key < WINDOW_BLOCKS) | (key < GLOBAL_BLOCKS)
        candidates = query - (WINDOW_BLOCKS - 1) - GLOBAL_BLOCKS
        state = _mix(_mix(_mix(torch.full_like(h, self.seed, dtype=torch.int64)) + h) + query)
        drawn: list[Tensor] = []
        for n in range(RANDOM_BLOCKS):
            last = candidates - RANDOM_BLOCKS + n  # draw from 0..last; last itself if the draw was drawn before
            link = _mix(state + n) % torch.clamp(last + 1, min=1)
            for before in drawn:
                link = torch.where(link == before, -1, link)
            link = torch.where(link < 0, last, link)
            link = torch.where(last < 0, -1, link)  # fewer candidates than links
            allowed = allowed | ((link >= 0) & (key - GLOBAL_BLOCKS == link))
            drawn.append(link)
        return allowed

    def _count_pairs_per_head(self, T: int) -> tuple[int, ...]:
        i = torch.arange(T)
        if self.random_links == "seeded":
            b, block = self.block, i // self.block
            window = i - torch.clamp((block - WINDOW_BLOCKS + 1) * b, min=GLOBAL_BLOCKS * b) + 1
            linked = torch.clamp(block - (WINDOW_BLOCKS - 1) - GLOBAL_BLOCKS, min=0, max=RANDOM_BLOCKS) * b
            in_global = torch.clamp(i + 1, max=GLOBAL_BLOCKS * b)
            return self.n_heads * (int((in_global + torch.clamp(window, min=0) + linked).sum()),)
        if self.band_length <= PLAIN_CAUSAL_UP_TO:
            return self.n_heads * (causal_pairs(T),)
        farthest = torch.clamp(i - self.n_global, min=0) // self.stride  # strided distances that reach no global key
        strided = torch.clamp(farthest - self.window // self.stride, min=0)
        return self.n_heads * (int((window_and_global_pairs(T, self.window, self.n_global) + strided).sum()),)


_32_BITS = 2**32 - 1
_ODD = 0x45D9F3B  # below 2**31, so that no product overflows int64


def _mix(x: Tensor) -> Tensor:
    """A hash of non-negative int64 to 32 bits: two rounds of xorshift and multiplication."""
    x = x & _32_BITS
    for _ in range(2):
        x = ((x ^ (x >> 16)) * _ODD) & _32_BITS
    return x ^ (x >> 16)
