"""Locality-sensitive hashing of queries and keys: Reformer's buckets (Kitaev et al., arXiv 2001.04451), exactly.

A vector ``x`` of head ``h`` falls, in round ``r``, into the bucket ``argmax [x R; -x R]``, where ``R (D, buckets / 2)`` is
random: angular hashing, in which near directions often meet. A query attends the earlier keys that share its bucket in
at least one round, and itself only if there are none. Queries and keys are hashed by the same ``R``, each by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .base import BoundMask


class Hash(NamedTuple):
    """Random rotations: ``n_hashes`` rounds into ``n_buckets`` (an even number), for each of ``n_heads``, by ``seed``."""

    n_hashes: int
    n_buckets: int
    n_heads: int
    seed: int

    def buckets(self, x_BTHD: Tensor, heads: Sequence[int]) -> Tensor:
        """The bucket of every vector in every round, int64 ``(rounds, B, H, T)``; ``heads`` chooses the rotations, ``(H,)``."""
        D = x_BTHD.shape[-1]
        exact = torch.promote_types(x_BTHD.dtype, torch.float32)
        x = x_BTHD.detach().to(exact)
        rounds = []
        for rotation in _rotations(self, D, x.device)[:, list(heads)].to(exact):
            rotated = torch.einsum("bthd,hdc->bhtc", x, rotation)
            rounds.append(torch.cat([rotated, -rotated], dim=-1).argmax(-1))
        return torch.stack(rounds)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # made while generating, kept, and then wanted in training
def _rotations(hashing: Hash, D: int, device: torch.device) -> Tensor:
    """``(rounds, heads, D, buckets / 2)`` float32, the same on every device; a round is the same whatever their number."""
    generator = torch.Generator().manual_seed(hashing.seed)
    shape = hashing.n_heads, D, hashing.n_buckets // 2
    return torch.stack([torch.randn(shape, generator=generator) for _ in range(hashing.n_hashes)]).to(device)


@torch.compiler.disable  # sorts and caches; what it returns is read by the compiled mask
@torch.no_grad()
def bind(
    hashing: Hash,
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    *,
    heads: Sequence[int],
    q_start: Tensor | int,
    k_start: Tensor | int,
    first: Tensor | int,
) -> BoundMask:
    """The mask of these queries and keys, in O(T log T) time and O(T) memory.

    :param heads: the rotations of the call's heads, see :meth:`Hash.buckets`; the others as in :meth:`.Pattern.bind`.
    """
    B, T, H, _ = q_BTHD.shape
    S = k_BSGD.shape[1]
    device = q_BTHD.device
    of_query = hashing.buckets(q_BTHD, heads)
    of_key = hashing.buckets(k_BSGD.repeat_interleave(H // k_BSGD.shape[2], dim=2), heads)
    q_at, k_at = (torch.as_tensor(start, device=device).expand(B) for start in (q_start, k_start))

    # Position of the latest earlier key in the query's bucket: sort keys by (bucket, position), look the query up.
    span = S + 1
    i = q_at[:, None] - k_at[:, None] + torch.arange(T, device=device)  # (B, T), counted from the first key
    by_bucket, _ = (of_key * span + torch.arange(S, device=device)).sort(-1)
    place = torch.searchsorted(by_bucket, of_query * span + i[:, None].clamp(max=S)) - 1
    latest = by_bucket.gather(-1, place.clamp(min=0))
    found = (place >= 0) & (latest // span == of_query)
    lowest = torch.as_tensor(first, device=device).expand(B, T) - k_at[:, None]
    alone = ~(found & (latest % span >= lowest[:, None])).any(0)  # (B, H, T)

    of_query, of_key = of_query.to(torch.int32), of_key.to(torch.int32)  # what the mask reads at every pair
    shifted = isinstance(q_start, Tensor) or isinstance(k_start, Tensor) or q_start != 0 or k_start != 0

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        row, column = (q_idx - q_at[b], kv_idx - k_at[b]) if shifted else (q_idx, kv_idx)
        together = of_query[0, b, h, row] == of_key[0, b, h, column]
        for r in range(1, hashing.n_hashes):
            together = together | (of_query[r, b, h, row] == of_key[r, b, h, column])
        return ((kv_idx < q_idx) & together) | ((kv_idx == q_idx) & alone[b, h, row])

    def blocks(size: int) -> Tensor:
        some = torch.zeros(B, H, -(-T // size), -(-S // size), dtype=torch.bool, device=device)
        for query, key in zip(of_query, of_key, strict=True):
            rows, columns = (_present(x.long(), hashing.n_buckets, size) for x in (query, key))
            some |= (rows @ columns.transpose(-1, -2)) > 0
        diagonal = torch.ones(some.shape[-2:], dtype=torch.bool, device=device).tril()
        return (some | torch.eye(*some.shape[-2:], dtype=torch.bool, device=device)) & diagonal

    return BoundMask(mask_mod, blocks)


def _present(buckets: Tensor, n_buckets: int, size: int) -> Tensor:
    """Which buckets occur in each block of ``size`` tokens, float ``(B, H, blocks, n_buckets)`` of zeros and ones."""
    B, H, T = buckets.shape
    block = torch.arange(T, device=buckets.device) // size
    present = torch.zeros(B, H, -(-T // size) * n_buckets, device=buckets.device)
    return present.scatter_(-1, block * n_buckets + buckets, 1.0).unflatten(-1, (-1, n_buckets))
