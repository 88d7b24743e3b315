"""SPAttention with sinks: the first tokens of a sequence are attended by every head at any distance.

Heads that have nothing to attend to put their weight on the first tokens (Xiao et al., "Efficient Streaming Language Models
with Attention Sinks", arXiv 2309.17453). Bands take those tokens away from all heads but one, and rows near the start have no
key at all; with a sink every row has one.

A sink is a position and no distance, so this mask is no list of intervals: FlexAttention and masked attention compute it, the
interval kernels do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .bands import SPAttention
from .base import Interval, IntervalTable, Pattern, merge_intervals
from .intervals import in_table
from .registry import register_pattern


@register_pattern("spattention_sinks")
@dataclass(frozen=True)
class SPAttentionSinks(Pattern):
    """:class:`.bands.SPAttention`, and in every head the keys ``j < sinks``.

    :param sinks: how many tokens at the start, of the input: a later document of packed data has none of its own.
    :param local_sharing: as in SPAttention.
    """

    sinks: int = 4
    local_sharing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_whole("sinks", at_least=1)
        _ = self._bands  # which checks its own option

    @property
    def _bands(self) -> SPAttention:
        return SPAttention(self.n_heads, self.band_length, local_sharing=self.local_sharing)

    @torch.compiler.assume_constant_result  # told every field, as Pattern.natural_table explains
    def _table_of_bands(self, _fields: int) -> IntervalTable:
        table = self._bands.natural_table
        assert table is not None  # bands are intervals
        return table

    def allows(self, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx < self.sinks) | in_table(self._table_of_bands(hash(self)), h, q_idx - kv_idx)

    def dead_rows(self, T: int | None = None) -> int:
        """None: every query attends the first token."""
        return 0

    def _count_pairs_per_head(self, T: int) -> tuple[int, ...]:
        """In closed form: the pairs of the bands, and of each sink the distances that no band covers."""
        bands = self._bands
        inside = bands.attended_pairs_per_head(T)
        return tuple(
            pairs + sum(T - j - _covered(bands.head_intervals(h), T - j) for j in range(min(self.sinks, T)))
            for h, pairs in enumerate(inside)
        )


def _covered(intervals: list[Interval], length: int) -> int:
    """How many distances below ``length`` the intervals hold."""
    return sum(max(0, min(hi, length) - lo) for lo, hi in merge_intervals(intervals))
