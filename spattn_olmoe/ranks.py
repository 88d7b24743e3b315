"""Work that the ranks of a run share before it starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from olmo_core.distributed.utils import all_gather_object, get_rank, get_world_size

T = TypeVar("T")


def first_problem(items: Sequence[T], check: Callable[[T], str | None]) -> str | None:
    """What is wrong with the first item that has something wrong; every rank gets the same answer, None if nothing is.

    Each item is checked by one rank. The ranks meet after every item, so none waits for longer than one item takes:
    reading terabytes stays clear of the 15 minutes after which a process group gives up.

    :param check: says what is wrong with an item, in words; what it raises is the caller's.
    """
    ranks, rank = get_world_size(), get_rank()
    for first in range(0, len(items), ranks):
        mine = check(items[first + rank]) if first + rank < len(items) else None
        found = [problem for problem in all_gather_object(mine) if problem is not None]
        if found:
            return found[0]
    return None
