"""Tile sizes, warps and pipeline stages that are shipped, per kernel and GPU generation.

Chosen by compiling ahead of time: the largest tiles that keep their registers (``python -m
spattn_olmoe.kernels.banded.aot`` prints registers, stack and shared memory of each). BM is the lever on narrow bands:
a tile visits ``W + BM`` keys for the ``W`` that a query attends.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """``BM`` queries by ``BN`` keys a tile; warps and software pipeline stages of a program."""

    BM: int
    BN: int
    warps: int
    stages: int


HALF: dict[str, dict[int, Config]] = {
    "forward": {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(128, 32, 8, 2)},
    "dq": {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 2), 256: Config(64, 32, 8, 2)},
    "dkdv": {64: Config(64, 128, 8, 2), 128: Config(64, 128, 8, 2), 256: Config(32, 64, 8, 2)},
}
"""bfloat16 and float16, by the largest padded head_dim that an entry serves."""

FULL: dict[str, dict[int, Config]] = {
    "forward": {64: Config(64, 32, 4, 2), 128: Config(64, 32, 8, 2), 256: Config(32, 32, 8, 1)},
    "dq": {64: Config(64, 32, 4, 2), 128: Config(64, 32, 8, 2), 256: Config(32, 32, 8, 1)},
    "dkdv": {64: Config(32, 64, 4, 2), 128: Config(32, 64, 8, 2), 256: Config(32, 32, 8, 1)},
}
"""float32."""


def config(kernel: str, itemsize: int, d_pad: int) -> Config:
    """The shipped configuration of ``forward``, ``dq`` or ``dkdv`` for elements of so many bytes."""
    table = (HALF if itemsize == 2 else FULL)[kernel]
    return next(entry for largest, entry in table.items() if d_pad <= largest)


def padded(head_dim: int) -> int:
    """head_dim rounded up to the power of two that the kernels compute with, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())
