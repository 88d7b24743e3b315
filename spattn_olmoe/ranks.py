"""Work that ranks share, as torchrun starts them: checks before a run, batches of an evaluation."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from olmo_core.distributed.utils import all_gather_object, get_rank, get_world_size
from tqdm import tqdm

T = TypeVar("T")
Batch = TypeVar("Batch")
Result = TypeVar("Result")


def launched() -> tuple[int, int]:
    """How many processes a launcher has started in all, and on how many machines."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return ranks, ranks // int(os.environ.get("LOCAL_WORLD_SIZE", str(ranks)))


def first_problem(items: Sequence[T], check: Callable[[T], str | None]) -> str | None:
    """What is wrong with the first item that has something wrong; every rank gets the same answer, None if nothing is.

    Each item is checked by one rank. The ranks meet after every item, so none waits for longer than one item takes:
    reading terabytes stays clear of the 15 minutes after which a process group gives up.

    :param check: tells what is wrong with an item, in words; what it raises is the caller's.
    """
    ranks, rank = get_world_size(), get_rank()
    for first in range(0, len(items), ranks):
        mine = check(items[first + rank]) if first + rank < len(items) else None
        found = [problem for problem in all_gather_object(mine) if problem is not None]
        if found:
            return found[0]
    return None


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Join the ranks that torchrun started, if it did, for as long as the context lasts."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo")  # only host objects are exchanged, so gloo is enough
    try:
        yield
    finally:
        dist.destroy_process_group()


def share_out(
    batches: Sequence[Batch], compute: Callable[[Batch], Sequence[Result]], *, description: str, quiet: bool = False
) -> Iterator[Result]:
    """The results of all batches in their order, on every rank; each rank computes every ``world_size``-th batch.

    The batches are those of one rank, in the same order, so the results are the same too, bit for bit on like devices.
    One rank alone yields results as they come.
    """
    n, me = get_world_size(), get_rank()
    own = tqdm(batches[me::n], desc=description, disable=quiet or me != 0)
    if n == 1:
        for batch in own:
            yield from compute(batch)
        return
    shares = all_gather_object([list(compute(batch)) for batch in own])
    for i in range(len(batches)):
        yield from shares[i % n][i // n]
