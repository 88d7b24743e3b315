"""Reformer (Kitaev et al., arXiv 2001.04451): its buckets, and the mask that stands for them in the released code.

``buckets="position"`` is the stand-in of the released code of arXiv 2511.09596: buckets by a hash of the *position*.
``buckets="lsh"`` is Reformer's attention itself: buckets by locality-sensitive hashing of queries and keys (:mod:`.lsh`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import lsh
from .base import BoundMask, Pattern, causal_pairs
from .longformer import PLAIN_CAUSAL_UP_TO
from .registry import register_pattern


@register_pattern("reformer")
@dataclass(frozen=True)
class Reformer(Pattern):
    """Query and key in one bucket.

    With ``"position"``: in the same or a neighbouring bucket (circularly), or ``d <= l``. Buckets are
    ``(3 x + 13 h + 7) mod nb``. Two positions' buckets differ by ``3 d mod nb``, so the mask depends on the distance
    alone, periodically, and is the same in every head.

    With ``"lsh"``: in the same bucket in one of ``n_hashes`` rounds; a query attends itself only if it attends nothing
    else. The mask follows the content, and its pairs are an expected number: as if vectors fell into buckets evenly and
    independently. They do not when the model has learned to use them, so that is no bound: dense attention is one.

    :param buckets: ``"position"`` or ``"lsh"``.
    :param n_hashes: rounds of hashing. Read with ``"lsh"``, as are the next two.
    :param bucket_size: tokens of an average bucket, by default ``N // 8`` and at most 64.
    :param seed: of the random rotations, from 0.
    """

    buckets: str = "position"
    n_hashes: int = 4
    bucket_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.buckets not in ("position", "lsh"):
            raise ValueError(f"attention.buckets={self.buckets!r}: must be 'position' or 'lsh'")
        self.check_read("buckets", "lsh", ("n_hashes", "bucket_size", "seed"))
        self.check_whole("n_hashes", at_least=1, at_most=64)
        self.check_whole("seed", at_least=0)
        if self.bucket_size is not None:
            self.check_whole("bucket_size", at_least=1)

    @property
    def n_buckets(self) -> int:
        """``nb``: number of buckets; even with ``"lsh"``, where every direction has an opposite one."""
        n = max(2, self.band_length // (self.bucket_size or max(1, min(64, self.band_length // 8))))
        return n + n % 2 if self.follows_content else n

    @property
    def local(self) -> int:
        """``l``: the largest local distance, inclusive. Of the stand-in."""
        return max(1, min(8, self.band_length // 4))

    @property
    def follows_content(self) -> bool:
        return self.buckets == "lsh"

    def bind(self, q_BTHD: Tensor, k_BSGD: Tensor, *, head_offset: int = 0, **where: Any) -> BoundMask:
        if not self.follows_content:
            return super().bind(q_BTHD, k_BSGD, head_offset=head_offset, **where)
        heads = self._order[head_offset : head_offset + q_BTHD.shape[2]]
        hashing = lsh.Hash(self.n_hashes, self.n_buckets, self.n_heads, self.seed)
        given = {"q_start": 0, "k_start": 0, "first": 0} | where
        return lsh.bind(hashing, q_BTHD, k_BSGD, heads=heads, **given)

    def allows(self, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if self.band_length <= PLAIN_CAUSAL_UP_TO:
            return (q_idx >= kv_idx) & (h >= 0)
        nb = self.n_buckets
        apart = ((3 * q_idx + 13 * h + 7) % nb - (3 * kv_idx + 13 * h + 7) % nb).abs()
        near = apart <= 1
        if nb > 2:
            near = near | (apart == nb - 1)
        return near | (q_idx - kv_idx <= self.local)

    def dead_rows(self, T: int | None = None) -> int:
        return 0 if self.follows_content else super().dead_rows(T)

    def _count_pairs_per_head(self, T: int) -> tuple[int, ...]:
        if self.follows_content:
            apart = (1 - 1 / self.n_buckets) ** self.n_hashes  # probability that no round brings two vectors together
            alone = (1 - apart**T) / (1 - apart)  # queries that meet none of the keys before them
            return self.n_heads * (round((1 - apart) * T * (T - 1) / 2 + alone),)
        if self.band_length <= PLAIN_CAUSAL_UP_TO:
            return self.n_heads * (causal_pairs(T),)
        d = torch.arange(T)
        step = (3 * d) % self.n_buckets
        near = (step <= 1) | (step == self.n_buckets - 1) | (d <= self.local)
        return self.n_heads * (int((near * (T - d)).sum()),)
