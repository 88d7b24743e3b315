"""Which distances information can travel in L layers, exactly, from the masks alone.

In one layer information reaches a token from the tokens that some head attends, and from itself through the residual
stream. Over layers these relations are composed: what is reachable in L layers is a product of L matrices. Nothing is
trained; what a model makes of a path is another question, but what has no path cannot be learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..patterns import Pattern


@dataclass(frozen=True)
class Reach:
    """How a stack of masks connects positions at one length ``T``.

    :param hops: int ``(T,)``, by distance: the fewest attention layers on a path from *every* pair of positions at this
        distance (the largest of their minima), or 0 where some pair has none. Distance 0 needs none and is 0 as well.
    :param share: float64 ``(T,)``, by distance: the share of pairs at this distance that have a path.
    :param paths: float64 ``(T,)``, by distance: the mean number of paths; a path chooses in each layer a head that
        attends, or stays in the residual stream.
    """

    hops: Tensor
    share: Tensor
    paths: Tensor

    def bands(self, count: int) -> list[dict[str, float]]:
        """By ``count`` equally wide ranges of distance, 0 left out: share of reachable pairs, most hops, mean paths."""
        T = len(self.hops)
        pairs = torch.arange(T, 0, -1, dtype=torch.float64)
        out = []
        for b in range(count):
            lo, hi = max(1, -(-b * T // count)), -(-(b + 1) * T // count)
            weight = pairs[lo:hi] / pairs[lo:hi].sum()
            complete = bool((self.share[lo:hi] == 1).all())
            out.append(
                {
                    "share": float((self.share[lo:hi] * weight).sum()),
                    "hops": int(self.hops[lo:hi].max()) if complete else 0,
                    "paths": float((self.paths[lo:hi] * weight).sum()),
                }
            )
        return out


def reach(layers: Sequence[Pattern], T: int) -> Reach:
    """How information travels through a stack of layers with these masks, first layer first.

    O(layers x T^3) time and O(heads x T^2) memory: for T up to a few thousand.

    :raises ValueError: a pattern follows the content, so that it has no mask of its own; or there is no layer.
    """
    if not layers:
        raise ValueError("reachability needs at least one layer")
    paths = torch.eye(T, dtype=torch.float64)  # paths[i, j]: from j to i so far
    hops = torch.full((T, T), torch.inf, dtype=torch.float64).fill_diagonal_(0)
    for pattern in layers:
        heads = _heads(pattern, T)
        attended = heads > 0
        hops = torch.minimum(hops, _one_more(attended, hops))
        paths = (heads + torch.eye(T, dtype=torch.float64)) @ paths
    return _by_distance(hops, paths)


def _heads(pattern: Pattern, T: int) -> Tensor:
    """How many heads attend each pair, float64 ``(T, T)``: sums of at most ``n_heads``, exact."""
    step = max(1, 2**24 // (pattern.n_heads * T))
    rows = [pattern.mask_rows(i, min(i + step, T), T).sum(0) for i in range(0, T, step)]
    return torch.cat(rows).double()


def _one_more(attended: Tensor, hops: Tensor) -> Tensor:
    """Fewest hops when this layer adds one: the least over the keys of a query, number of hops by number of hops."""
    out = torch.full_like(hops, torch.inf)
    for count in sorted(hops[hops.isfinite()].unique().tolist(), reverse=True):
        reached = attended.float() @ (hops == count).float() > 0
        out[reached] = count + 1
    return out


def _by_distance(hops: Tensor, paths: Tensor) -> Reach:
    T = len(hops)
    diagonals = [hops.diagonal(-d) for d in range(T)]
    share = torch.tensor([d.isfinite().double().mean() for d in diagonals], dtype=torch.float64)
    most = torch.tensor([int(d.max()) if d.isfinite().all() else 0 for d in diagonals])
    return Reach(most, share, torch.stack([paths.diagonal(-d).mean() for d in range(T)]))
