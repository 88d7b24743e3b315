"""Patterns made of distance intervals: stated once, by head, and the mask and everything else follow from them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Interval, IntervalTable, Pattern


@dataclass(frozen=True)
class IntervalPattern(Pattern):
    """A pattern whose heads attend at most two intervals of distance each. A subclass states :meth:`head_intervals`."""

    @abstractmethod
    def head_intervals(self, h: int) -> list[Interval]:
        """The distances that head ``h`` attends, half-open ``[lo, hi)``; they may touch, overlap or be empty.

        An interval without an upper end has :data:`.base.UNBOUNDED`, which is also the largest number allowed: kernels
        add it to a position in int32.
        """

    def allows(self, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        table = self.natural_table
        assert table is not None  # head_intervals is stated
        return in_table(table, h, q_idx - kv_idx)


def in_table(table: IntervalTable, h: Tensor, d: Tensor) -> Tensor:
    """Whether the distance ``d >= 0`` lies in one of the two intervals of head ``h``."""
    allowed = _within([first for first, _ in table], h, d)
    if any(hi > lo for _, (lo, hi) in table):
        allowed = allowed | _within([second for _, second in table], h, d)
    return allowed


def _within(intervals: list[Interval], h: Tensor, d: Tensor) -> Tensor:
    """Whether the distance ``d >= 0`` lies in the interval of head ``h``."""
    lo, hi = zip(*intervals, strict=True)
    below = d < _of_head(h, hi)
    return below & (d >= _of_head(h, lo)) if any(lo) else below


def _of_head(h: Tensor, values: tuple[int, ...]) -> Tensor | int:
    """``values[h]`` for a tensor of heads. Comparisons only, which FlexAttention traces on any device.

    They are on ``h``, which is one number in a program of a kernel and ``H`` numbers in a dense mask: the pairs
    themselves are compared with two numbers an interval, whatever the number of heads.
    """
    if len(set(values)) == 1:  # no comparison, and in a dense mask one plane for all heads
        return values[0]
    out = torch.full_like(h, values[0])
    for head in range(1, len(values)):
        # A step from the head before covers all heads from there on, so heads that are alike cost nothing.
        if values[head] != values[head - 1]:
            out = torch.where(h >= head, values[head], out)
    return out
