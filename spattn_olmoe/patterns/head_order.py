"""Which head gets which band: permutations of heads that give every rank the same work.

Tensor and Ulysses context parallelism give rank ``r`` of ``n`` the ``H / n`` heads from ``r * H / n`` on. Heads differ in
the pairs they attend, by an order of magnitude and more with exclusive bands, and the slowest rank sets the pace of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NATURAL = "natural"
"""Head ``h`` has band ``h``: the paper's order."""

BALANCED = "balanced"
"""The order that :func:`balanced_order` makes of the heads' attended pairs."""


def balanced_order(loads: Sequence[int]) -> tuple[int, ...]:
    """An order of heads in which equal runs of consecutive heads carry nearly equal loads, for many degrees at once.

    Heads are dealt to groups like cards, heaviest first and back and forth, so that a heavy head comes with a light one;
    groups are then dealt to groups of groups, and so on. With ``H`` a power of two every power of two up to ``H`` is a
    degree at which the heaviest rank exceeds the lightest by no more than the heaviest head exceeds the lightest, and at
    most degrees by far less. Equal loads stay in their order.

    :param loads: attended pairs of each head in the natural order, ``(H,)``.
    :returns: the natural head at each place.
    """
    if len(set(loads)) <= 1:
        return tuple(range(len(loads)))
    groups: list[tuple[int, ...]] = [(h,) for h in range(len(loads))]
    while len(groups) > 1:
        factor = next(p for p in range(2, len(groups) + 1) if len(groups) % p == 0)
        groups = _dealt(groups, len(groups) // factor, loads)
    return groups[0]


def _dealt(groups: list[tuple[int, ...]], n: int, loads: Sequence[int]) -> list[tuple[int, ...]]:
    """Groups joined to ``n`` larger ones of equal size."""
    heaviest_first = sorted(groups, key=lambda group: -sum(loads[h] for h in group))
    hands: list[tuple[int, ...]] = [()] * n
    for i, group in enumerate(heaviest_first):
        turn, place = divmod(i, n)
        hands[place if turn % 2 == 0 else n - 1 - place] += group
    return hands


def rank_loads(loads: Sequence[int], degree: int) -> list[int]:
    """What each of ``degree`` ranks carries: sums of runs of ``H / degree`` consecutive heads."""
    size = len(loads) // degree
    return [sum(loads[r * size : (r + 1) * size]) for r in range(degree)]


def imbalance(loads: Sequence[int], degree: int) -> float:
    """The load of the busiest rank over the mean of all: 1.0 is perfectly balanced."""
    ranks = rank_loads(loads, degree)
    return max(ranks) * degree / sum(ranks)


def checked_order(value: Any, n_heads: int) -> tuple[int, ...]:
    """A permutation of the heads, as a tuple.

    :raises ValueError: it is none.
    """
    ints = isinstance(value, (list, tuple)) and all(type(x) is int for x in value)
    if ints and sorted(value) == list(range(n_heads)):
        return tuple(value)
    raise ValueError(
        f"attention.head_order={value!r}: must be natural, balanced, or a list of the heads 0 to {n_heads - 1} in some order"
    )
