"""Several ranks, as torchrun starts them: each has the whole model and computes its share of the batches.

The batches are those of one rank, in the same order, so the results are the same too, bit for bit on like devices.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from olmo_core.distributed.utils import all_gather_object, get_rank, get_world_size
from tqdm import tqdm

Batch = TypeVar("Batch")
Result = TypeVar("Result")


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Join the ranks that torchrun started, if it did, for as long as the context lasts."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo")  # what ranks exchange are numbers on the host
    try:
        yield
    finally:
        dist.destroy_process_group()


def share_out(
    batches: Sequence[Batch], compute: Callable[[Batch], Sequence[Result]], *, description: str, quiet: bool = False
) -> Iterator[Result]:
    """The results of all batches in their order, on every rank; each rank computes every ``world_size``-th batch.

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
