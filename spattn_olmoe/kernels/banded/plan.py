"""Which programs a kernel runs: for every head the tiles that hold a pair, and after them the tiles to fill with zeros.

A plan is O(H) integers, whatever the length. It is made on the host once per (intervals, length, tile) and kept.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ...patterns.base import Interval
from ..fastest import HeadIntervals

DEAD_TILES = 8  # what tiles.DEAD_TILES says to the kernels
_NEVER = 2**31 - 1


class Plan(NamedTuple):
    """The table that :func:`tiles.locate` reads, and how many programs it describes."""

    table: Tensor
    programs: int
    slots: int


class _Slot(NamedTuple):
    """Consecutive programs of one head (or, for keys, one group): its tiles ``first..end``, live or dead."""

    owner: int
    first: int
    end: int
    dead: bool

    @property
    def programs(self) -> int:
        tiles = max(self.end - self.first, 0)
        return -(-tiles // DEAD_TILES) if self.dead else tiles


@functools.lru_cache(maxsize=256)
def query_plan(heads: HeadIntervals, T: int, tile: int, device: torch.device) -> Plan:
    """Programs over query tiles. A head's first ``lo`` queries have no key; the heaviest heads come first."""
    n_tiles = -(-T // tile)
    first = [nearest(pair, T) // tile if nearest(pair, T) < T else n_tiles for pair in heads]
    order = sorted(range(len(heads)), key=lambda h: -width(heads[h], T))
    slots = [_Slot(h, first[h], n_tiles, dead=False) for h in order]
    slots += [_Slot(h, 0, first[h], dead=True) for h in order]
    return _plan(slots, heads, device)


@functools.lru_cache(maxsize=256)
def key_plan(heads: HeadIntervals, group: int, T: int, tile: int, device: torch.device) -> Plan:
    """Programs over key tiles, per group of ``group`` query heads. The last ``lo`` keys have no query."""
    n_tiles = -(-T // tile)
    members = [heads[g : g + group] for g in range(0, len(heads), group)]
    live = [-(-(T - min(nearest(pair, T) for pair in pairs)) // tile) for pairs in members]
    order = sorted(range(len(members)), key=lambda g: -sum(width(pair, T) for pair in members[g]))
    slots = [_Slot(g, 0, live[g], dead=False) for g in order]
    slots += [_Slot(g, live[g], n_tiles, dead=True) for g in order]
    return _plan(slots, heads, device)


@functools.lru_cache(maxsize=256)
def interval_tensor(heads: HeadIntervals, device: torch.device) -> Tensor:
    """The intervals of the local heads, int32 ``(H, 2, 2)``, kept on the device."""
    return torch.tensor(heads, dtype=torch.int32, device=device)


def nearest(pair: tuple[Interval, Interval], T: int) -> int:
    """The nearest distance that a head attends; ``T`` if it attends none below ``T``."""
    return min((min(lo, T) for lo, hi in pair if lo < hi), default=T)


def width(pair: tuple[Interval, Interval], T: int) -> int:
    """How many distances below ``T`` a head attends: the most keys that a query has."""
    return sum(max(min(hi, T) - lo, 0) for lo, hi in pair)


def _plan(slots: list[_Slot], heads: HeadIntervals, device: torch.device) -> Plan:
    size = 1 << (len(slots) - 1).bit_length()
    ends, records, programs = [], [], 0
    for slot in slots:
        records += [programs, -1 - slot.owner if slot.dead else slot.owner, slot.first, slot.end]
        programs += slot.programs
        ends.append(programs)
    padding = size - len(slots)
    flat = [bound for pair in heads for interval in pair for bound in interval]
    table = ends + [_NEVER] * padding + records + [0] * (4 * padding) + flat
    return Plan(torch.tensor(table, dtype=torch.int32, device=device), programs, size)
