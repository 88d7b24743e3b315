"""Distance intervals as strips: how heads, rows and documents become few products of equal shape on a CPU.

A head that attends the distances ``[lo, hi)`` is a sliding window of ``hi - lo`` between the queries from ``lo`` on and
the keys up to ``T - lo``. Such a pair of shifted sequences, of one row or document, is a *strip*. Strips of one width
lie side by side in a *stack*, cut into chunks of ``C``: chunk ``c`` of the queries of all of them meets the chunks
``c - reach`` to ``c`` of their keys in one batched product, under one mask.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor

from ..patterns.base import Interval, IntervalTable

Span = tuple[int, int, int, int]
"""Rows ``first..last`` of the batch and tokens ``start..stop`` of them, which attend no others."""


class Strips(NamedTuple):
    """The strips of some rows and neighbouring heads with one interval, in a span.

    :param second: whether it is the second interval of these heads.
    """

    rows: slice
    heads: slice
    queries: slice
    keys: slice
    second: bool

    @property
    def size(self) -> int:
        """Strips, one for each row and head."""
        return (self.rows.stop - self.rows.start) * (self.heads.stop - self.heads.start)

    @property
    def length(self) -> int:
        """Queries of each strip."""
        return self.queries.stop - self.queries.start


class Block(NamedTuple):
    """One product: chunk ``chunk`` of the strips ``first..last`` and the ``before`` chunks of keys before it."""

    first: int
    last: int
    chunk: int
    before: int


class Stack(NamedTuple):
    """Strips of one width, the longest first.

    :param chunk: ``C``, tokens of a chunk.
    :param chunks: of the longest strip.
    :param mask: additive, ``(1, C, keys)`` for the most keys that a chunk meets; fewer are its last columns.
    """

    strips: tuple[Strips, ...]
    chunk: int
    chunks: int
    mask: Tensor
    blocks: tuple[Block, ...]

    @property
    def size(self) -> int:
        """Strips of the stack."""
        return sum(strips.size for strips in self.strips)

    @property
    def scores(self) -> int:
        """Scores that are computed, attended or not."""
        return sum((b.last - b.first) * (b.before + 1) for b in self.blocks) * self.chunk**2


def chunk_of(width: int) -> int:
    """Tokens of a chunk by the width of the band: measured."""
    return 32 if width <= 64 else 64 if width <= 1024 else 128


@functools.lru_cache(maxsize=128)
def stacks(
    heads: IntervalTable,
    spans: tuple[Span, ...],
    dtype: torch.dtype,
    *,
    block: int,
    tokens: int,
) -> tuple[Stack, ...]:
    """Everything that heads with these intervals attend within these spans.

    :param block: scores that a block has at most, if one strip has no more.
    :param tokens: that a stack has at most, if one strip has no more.
    """
    by_width: dict[int, list[Strips]] = defaultdict(list)
    for first, last, start, stop in spans:
        for second in (False, True):
            for members, lo, hi in _runs(tuple(head[second] for head in heads), stop - start):
                queries, keys = slice(start + lo, stop), slice(start, stop - lo)
                by_width[hi - lo].append(Strips(slice(first, last), members, queries, keys, second))
    found = []
    for width, strips in by_width.items():
        strips.sort(key=lambda s: -s.length)
        found += [_stack(some, width, dtype, block) for some in _batches(strips, chunk_of(width), tokens)]
    return tuple(found)


def _runs(intervals: tuple[Interval, ...], length: int) -> list[tuple[slice, int, int]]:
    """Neighbouring heads with the same interval, if a sequence of this length has a pair in it."""
    runs: list[tuple[slice, int, int]] = []
    for h, (lo, hi) in enumerate(intervals):
        if lo >= min(hi, length):
            continue
        if runs and runs[-1] == (slice(runs[-1][0].start, h), lo, hi):
            runs[-1] = (slice(runs[-1][0].start, h + 1), lo, hi)
        else:
            runs.append((slice(h, h + 1), lo, hi))
    return runs


def _batches(strips: list[Strips], chunk: int, tokens: int) -> list[list[Strips]]:
    """Strips in order, cut so that each batch has no more than ``tokens`` with its shorter strips padded."""
    batches: list[list[Strips]] = []
    room = 0
    for s in strips:
        first, last = s.rows.start, s.rows.stop
        while first < last:
            n_heads = s.heads.stop - s.heads.start
            if room < n_heads:
                batches.append([])
                room = max(n_heads, tokens // (-(-s.length // chunk) * chunk))
            rows = min(last - first, room // n_heads)
            batches[-1].append(s._replace(rows=slice(first, first + rows)))
            first, room = first + rows, room - rows * n_heads
    return batches


@torch.inference_mode(False)  # made while generating, kept, and then wanted by a backward pass
def _stack(strips: list[Strips], width: int, dtype: torch.dtype, block: int) -> Stack:
    C = chunk_of(width)
    counts = [s.size for s in strips]
    chunks = [-(-s.length // C) for s in strips]
    reach = min(-(-(width - 1) // C), chunks[0] - 1)
    blocks = []
    for c in range(chunks[0]):
        before = min(c, reach)
        together = max(1, block // (C * C * (before + 1)))
        reached = sum(count for count, n in zip(counts, chunks, strict=True) if n > c)
        blocks += [Block(i, min(i + together, reached), c, before) for i in range(0, reached, together)]
    return Stack(tuple(strips), C, chunks[0], _mask(C, reach, width, dtype), tuple(blocks))


@functools.lru_cache(maxsize=64)
def _mask(chunk: int, reach: int, width: int, dtype: torch.dtype) -> Tensor:
    d = reach * chunk + torch.arange(chunk)[:, None] - torch.arange((reach + 1) * chunk)
    return torch.zeros(1, *d.shape, dtype=dtype).masked_fill_((d < 0) | (d >= width), float("-inf"))
