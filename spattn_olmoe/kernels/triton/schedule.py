"""Which programs a kernel runs: for every head the tiles that hold a pair, and after them the tiles to fill with zeros.

A plan is O(H) integers, whatever the length. It is made on the host once per (intervals, length, tile) and kept.

Programs start in the plan's order, so the longest come first: with as many tiles as multiprocessors, a long one that starts
last is waited for. Most tiles of a band are equally long; where it begins (for keys: ends) they grow shorter, and are cut
into stretches that are sorted with those of the other heads.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from ...patterns.base import Interval, IntervalTable
from .tile_sizes import DEAD_TILES

STRETCHES = 4
"""Stretches into which the tiles of unequal length of a head are cut. A plan has ``STRETCHES + 2`` slots a head."""
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
    longest: int
    """Pairs of a row of its longest tile."""

    @property
    def programs(self) -> int:
        tiles = max(self.end - self.first, 0)
        return -(-tiles // DEAD_TILES) if self.dead else tiles


@functools.lru_cache(maxsize=256)
def query_plan(heads: IntervalTable, T: int, tile: int, device: torch.device) -> Plan:
    """Programs over query tiles. A head's first ``lo`` queries have no key, and its first ``hi`` fewer than the others."""
    n_tiles = -(-T // tile)
    slots = []
    for h, pair in enumerate(heads):
        first = nearest(pair, T) // tile if nearest(pair, T) < T else n_tiles
        level = min(max(-(-(farthest(pair, T) - 1) // tile), first), n_tiles)
        for begin, end in itertools.pairwise([*_cut(first, level), n_tiles]):
            slots.append(_Slot(h, begin, end, False, width(pair, min(end * tile, T))))
        slots.append(_Slot(h, 0, first, True, 0))
    return _plan(slots, heads, device)


@functools.lru_cache(maxsize=256)
def key_plan(heads: IntervalTable, group: int, T: int, tile: int, device: torch.device) -> Plan:
    """Programs over key tiles, per group of ``group`` query heads. The last ``lo`` keys have no query."""
    n_tiles = -(-T // tile)
    slots = []
    for g in range(len(heads) // group):
        pairs = heads[g * group : (g + 1) * group]
        live = -(-(T - min(nearest(pair, T) for pair in pairs)) // tile)
        level = min(max((T + 1 - max(farthest(pair, T) for pair in pairs)) // tile, 0), live)
        for begin, end in itertools.pairwise([0, *_cut(level, live)]):
            slots.append(_Slot(g, begin, end, False, sum(width(pair, T - begin * tile) for pair in pairs)))
        slots.append(_Slot(g, live, n_tiles, True, 0))
    return _plan(slots, heads, device)


def _cut(first: int, end: int) -> list[int]:
    """Where the ``STRETCHES`` equal parts of ``first..end`` begin and end."""
    return [first + (end - first) * k // STRETCHES for k in range(STRETCHES + 1)]


@functools.lru_cache(maxsize=256)
def interval_tensor(heads: IntervalTable, device: torch.device) -> Tensor:
    """The intervals of the local heads, int32 ``(H, 2, 2)``, kept on the device."""
    return torch.tensor(heads, dtype=torch.int32, device=device)


def nearest(pair: tuple[Interval, Interval], T: int) -> int:
    """The nearest distance that a head attends; ``T`` if it attends none below ``T``."""
    return min((min(lo, T) for lo, hi in pair if lo < hi), default=T)


def farthest(pair: tuple[Interval, Interval], T: int) -> int:
    """The distance from which on a head attends none below ``T``; 0 if it attends none at all."""
    return max((min(hi, T) for lo, hi in pair if lo < hi), default=0)


def width(pair: tuple[Interval, Interval], T: int) -> int:
    """How many distances below ``T`` a head attends: the most keys that a query has."""
    return sum(max(min(hi, T) - lo, 0) for lo, hi in pair)


def _plan(slots: list[_Slot], heads: IntervalTable, device: torch.device) -> Plan:
    slots = sorted(slots, key=lambda slot: (slot.dead, -slot.longest))
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
