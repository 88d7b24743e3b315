"""Opening a checkpoint runs no code of it.

OLMo-core unpickles a checkpoint's index, its tensors and its trainer states with nothing refused, so that whoever wrote a
checkpoint runs code where it is loaded. Here its readers get :mod:`..unpickling`'s functions in the place of pickle's and
PyTorch's.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from olmo_core.distributed.checkpoint import filesystem
from olmo_core.distributed.checkpoint.filesystem import RemoteFileSystemReader
from olmo_core.train import checkpoint
from torch.distributed.checkpoint import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.planner import ReadItem

from .. import unpickling
from .release import require_tested_release
from .substitute import Substitute

_stock_read_data = RemoteFileSystemReader.read_data


def apply() -> None:
    """Exchange ``pickle.load`` and ``torch.load`` in the two modules that read checkpoints, and nowhere else.

    :raises OLMoConfigurationError: another release of OLMo-core, which may read them elsewhere.
    """
    require_tested_release(__name__)
    filesystem.pickle = Substitute(pickle, load=unpickling.read_index)  # type: ignore[assignment]
    filesystem.torch = Substitute(torch, load=unpickling.load_tensor)  # type: ignore[assignment]
    checkpoint.torch = Substitute(torch, load=unpickling.load_state)  # type: ignore[assignment]
    RemoteFileSystemReader.read_data = read_data  # type: ignore[method-assign]


def read_data(self: RemoteFileSystemReader, plan: LoadPlan, planner: LoadPlanner) -> Any:
    """The stock reader, with values that are no tensors looked at before PyTorch's planner unpickles them."""
    load_bytes = planner.load_bytes

    def load_plain_bytes(read_item: ReadItem, value: io.BytesIO) -> None:
        unpickling.check_plain(value)
        load_bytes(read_item, value)

    planner.load_bytes = load_plain_bytes  # type: ignore[method-assign]
    try:
        return _stock_read_data(self, plan, planner)
    finally:
        del planner.load_bytes
