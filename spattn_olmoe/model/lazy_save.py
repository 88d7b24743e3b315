"""A checkpoint in OLMo-core's format whose tensors are made one at a time, as each is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from olmo_core.distributed.checkpoint.filesystem import RemoteFileSystemWriter
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save


def save_lazily(folder: Path, state: Mapping[str, Any], make: Callable[[str], Tensor]) -> None:
    """Write a state dict in which a tensor on the meta device stands for one that ``make`` makes by its key.

    :param state: flat, keys as in the checkpoint; values that are no tensors are written as they are.
    """
    save(
        dict(state),
        storage_writer=RemoteFileSystemWriter(folder, thread_count=1),
        planner=_Lazily(state, make),
        no_dist=True,
    )


def described(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What stands for a tensor that is made later."""
    return torch.empty(size, dtype=dtype, device="meta")


class _Lazily(DefaultSavePlanner):
    def __init__(self, state: Mapping[str, Any], make: Callable[[str], Tensor]):
        super().__init__()
        self.state, self.make = state, make

    def lookup_object(self, index: MetadataIndex) -> Any:
        value = self.state[index.fqn]
        if not isinstance(value, Tensor):
            return value
        made = self.make(index.fqn)
        assert (made.shape, made.dtype) == (value.shape, value.dtype), index.fqn
        return made
