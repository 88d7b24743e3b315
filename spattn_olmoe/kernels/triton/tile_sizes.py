"""Tile sizes, warps and pipeline stages that are shipped, per kernel and GPU generation.

Chosen by compiling ahead of time: large tiles that keep their registers and whose products stay asynchronous
(``python scripts/benchmark.py compile_kernels`` prints registers, stack, shared memory and more of each). BM is the lever on
narrow bands: a tile visits ``W + BM`` keys for the ``W`` that a query attends.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

DEAD_TILES = 8
"""Tiles that one program fills with zeros where nothing is attended."""


class Config(NamedTuple):
    """``BM`` queries by ``BN`` keys a tile; warps and software pipeline stages of a program."""

    BM: int
    BN: int
    warps: int
    stages: int


def generation(capability: tuple[int, int]) -> str:
    """GPUs that share configurations: by tensor core, and by the shared memory that a program may use."""
    if capability[0] == 9:
        return "sm90"
    if capability[0] in (10, 11):
        return "sm100"
    return "sm80" if capability in ((8, 0), (8, 7)) else "sm86"  # 99 KiB: 8.6, 8.9, 12.x


@functools.cache
def generation_of(device: torch.device) -> str:
    """The generation of a device; ``"interpreter"`` for the CPU."""
    return generation(torch.cuda.get_device_capability(device)) if device.type == "cuda" else "interpreter"


def config(kernel: str, generation: str, itemsize: int, d_pad: int) -> Config:
    """The shipped configuration of a kernel for elements of ``itemsize`` bytes.

    :param kernel: ``forward``, ``dq``, ``dkdv``, or ``dkdv_grouped``, whose loop over query heads costs registers.
    """
    kernels = SHIPPED[generation][itemsize]
    table = kernels.get(kernel) or kernels[kernel.removesuffix("_grouped")]
    return next(entry for largest, entry in table.items() if d_pad <= largest)


def decode_config(d_pad: int) -> Config:
    """Decoding: one query, and as many keys at a time as fit the registers of four warps. No pipeline: no product."""
    return Config(BM=1, BN=max(16, 8192 // d_pad), warps=4, stages=1)


def padded(head_dim: int) -> int:
    """head_dim rounded up to the power of two that the kernels compute with, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


_FLOAT32: dict[str, dict[int, Config]] = {
    "forward": {64: Config(64, 32, 8, 2), 256: Config(16, 16, 8, 1)},
    "dq": {64: Config(64, 32, 8, 2), 128: Config(32, 32, 4, 2), 256: Config(16, 16, 8, 1)},
    "dkdv": {64: Config(16, 32, 4, 2), 256: Config(16, 32, 8, 1)},
}
"""Exact float32 products use no tensor core and many registers: small tiles, for checking results, not for speed. With
head_dim above 128 even the smallest tile of dQ spills some."""

_INTERPRETED: dict[str, dict[int, Config]] = {
    "forward": {256: Config(64, 32, 4, 1)},
    "dq": {256: Config(64, 32, 4, 1)},
    "dkdv": {256: Config(32, 64, 4, 1)},
}

SHIPPED: dict[str, dict[int, dict[str, dict[int, Config]]]] = {
    "sm80": {
        2: {
            "forward": {128: Config(128, 64, 8, 3), 256: Config(64, 64, 8, 2)},
            "dq": {64: Config(128, 64, 8, 3), 128: Config(64, 64, 4, 2), 256: Config(64, 32, 8, 2)},
            "dkdv": {64: Config(32, 128, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 8, 2)},
        },
        4: _FLOAT32,
    },
    "sm86": {
        2: {
            "forward": {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 2), 256: Config(64, 32, 8, 2)},
            "dq": {64: Config(128, 64, 8, 3), 128: Config(64, 64, 4, 2), 256: Config(32, 32, 4, 2)},
            "dkdv": {64: Config(32, 128, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(16, 32, 8, 2)},
        },
        4: _FLOAT32,
    },
    "sm90": {
        2: {
            "forward": {128: Config(128, 64, 8, 3), 256: Config(128, 32, 8, 3)},
            "dq": {128: Config(128, 64, 8, 3), 256: Config(128, 32, 8, 2)},
            "dkdv": {128: Config(64, 128, 8, 3), 256: Config(16, 64, 8, 2)},
            "dkdv_grouped": {64: Config(64, 128, 8, 3), 128: Config(32, 128, 8, 2), 256: Config(16, 64, 8, 2)},
        },
        4: _FLOAT32,
    },
    "sm100": {
        2: {
            "forward": {128: Config(128, 64, 8, 3), 256: Config(128, 32, 8, 2)},
            "dq": {128: Config(128, 64, 8, 3), 256: Config(64, 32, 8, 1)},
            "dkdv": {128: Config(64, 128, 8, 2), 256: Config(32, 32, 8, 2)},
            "dkdv_grouped": {64: Config(64, 128, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 8, 2)},
        },
        4: _FLOAT32,
    },
    "interpreter": {2: _INTERPRETED, 4: _INTERPRETED},
}
"""By :func:`generation`, bytes of an element, kernel, and the largest padded head_dim that an entry serves."""
