"""Balanced distance bands: SPAttention, its ablations, and the dense baseline.

Source: Zhao et al., "Making Every Head Count", arXiv 2511.09596: Eq. 2-4 for the bands, Figure 2 for the ablations;
the inclusive local window (``d <= W_h``) from the authors' released code.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import UNBOUNDED, Interval
from .intervals import IntervalPattern
from .registry import register_pattern


def band(n_heads: int, band_length: int, h: int) -> tuple[int, int]:
    """Start ``S_h`` and width ``W_h`` of head ``h``'s band (Eq. 2-3). Widths differ by at most one token."""
    base, extra = divmod(band_length, n_heads)
    return h * base + min(h, extra), base + (h < extra)


@dataclass(frozen=True)
class BandedPattern(IntervalPattern):
    """A pattern that is made of each head's band ``[S_h, S_h + W_h)``."""

    def band(self, h: int) -> tuple[int, int]:
        """Start ``S_h`` and width ``W_h`` of head ``h``'s band."""
        return band(self.n_heads, self.band_length, h)


@register_pattern("standard")
@dataclass(frozen=True)
class Standard(IntervalPattern):
    """Dense causal attention in every head: the baseline."""

    def head_intervals(self, h: int) -> list[Interval]:
        return [(0, UNBOUNDED)]


@register_pattern("spattention")
@dataclass(frozen=True)
class SPAttention(BandedPattern):
    """Each head attends its own distance band (Eq. 4).

    :param local_sharing: every head also attends a local window of its band's width, ``d <= W_h``, as in the
        authors' released code; this is what the paper's tables measured.
    """

    local_sharing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_flag("local_sharing")

    def head_intervals(self, h: int) -> list[Interval]:
        start, width = self.band(h)
        local = [(0, width + 1)] if self.local_sharing else []
        return [*local, (start, start + width)]


@register_pattern("eball")
@dataclass(frozen=True)
class ExclusiveBands(BandedPattern):
    """EBALL (Figure 2b): SPAttention without local sharing, which is Eq. 4 to the letter."""

    def head_intervals(self, h: int) -> list[Interval]:
        start, width = self.band(h)
        return [(start, start + width)]


@register_pattern("gbhalf")
@dataclass(frozen=True)
class GappedBands(BandedPattern):
    """GBHALF (Figure 2c): only the first half of each band, ``W_h // 2`` distances, which leaves gaps."""

    def head_intervals(self, h: int) -> list[Interval]:
        start, width = self.band(h)
        return [(start, start + width // 2)]


@register_pattern("sliding_window")
@dataclass(frozen=True)
class SlidingWindow(BandedPattern):
    """Sliding window (Figure 2a; "LocalOnly" in the released code): every head attends ``d <= W_h``."""

    def head_intervals(self, h: int) -> list[Interval]:
        _, width = self.band(h)
        return [(0, width + 1)]
