"""Bands of equal area: widths chosen so that every head has equally many pairs, instead of equally many distances.

A distance ``d`` occurs ``N - d`` times in ``N`` tokens, so of bands of equal width the nearest has about ``2H`` times the
pairs of the farthest, and with heads spread over ranks the rank with the near bands decides how long a step takes. The rule
is that of flash-sparse-attn's windows and of CoWindow attention (arXiv 2609.32704): the first ``h`` of ``H`` bands hold the
share ``h / H`` of all pairs, hence end at about ``N (1 - sqrt(1 - h / H))``.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from .base import Interval, causal_pairs
from .intervals import IntervalPattern
from .registry import register_pattern


@functools.lru_cache(maxsize=64)
def equal_area_edges(n_heads: int, band_length: int, start: int = 0) -> tuple[int, ...]:
    """Where ``n_heads`` consecutive bands between distance ``start`` and ``N`` begin and end, ``n_heads + 1`` numbers.

    Each edge is the distance at which the bands before it come nearest to their share of the pairs. In whole numbers, so
    that a mask is the same on every machine. Bands are empty where there are more heads than distances.
    """
    start = min(start, band_length)
    total = causal_pairs(band_length - start)
    return tuple(band_length - _nearest_triangle(total * (n_heads - h), n_heads) for h in range(n_heads + 1))


def _nearest_triangle(area: int, parts: int) -> int:
    """The ``x`` whose ``x (x + 1) / 2`` is nearest to ``area / parts``; the larger of two that are equally near."""
    x = (math.isqrt(8 * (area // parts) + 1) - 1) // 2
    below, above = (abs(parts * causal_pairs(y) - area) for y in (x, x + 1))
    return x if below < above else x + 1


@register_pattern("equal_area")
@dataclass(frozen=True)
class EqualArea(IntervalPattern):
    """Exclusive bands of equal area: every distance below ``N`` belongs to one head, and all heads have as many pairs.

    :param local_sharing: every head also attends the distances up to ``N // H``, and the bands share out the rest.
    """

    local_sharing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_flag("local_sharing")

    def head_intervals(self, h: int) -> list[Interval]:
        window = self.band_length // self.n_heads + 1 if self.local_sharing else 0
        edges = equal_area_edges(self.n_heads, self.band_length, window)
        return [(0, window), (edges[h], edges[h + 1])]
