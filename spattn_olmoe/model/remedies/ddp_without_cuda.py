"""The stack ``ddp`` on machines without CUDA.

Its blocks order their work on CUDA streams and events, copy counts to pinned memory and want them on the host or on a GPU,
whether there is one or not. Where CUDA is absent, and only there, these modules of OLMo-core see streams and events that do
nothing: a CPU computes in order. Everything else is upstream's forward and backward as written.
"""

from __future__ import annotations

import contextlib
from typing import Any

import olmo_core.utils
import torch
from olmo_core.nn.ddp import block
from olmo_core.nn.moe import utils as moe_utils
from olmo_core.nn.moe.v2 import ep_sync_1d, no_ep, routed_experts
from olmo_core.train.train_module.transformer.pipeline import pipeline_schedule
from torch import Tensor

from .release import require_tested_release
from .substitute import Substitute


class InOrder:
    """A stream, and an event of one, where work is done in the order in which it is asked for."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def wait_stream(self, stream: InOrder) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: InOrder) -> None:
        """Nothing to wait for."""

    def record_event(self, event: InOrder | None = None) -> InOrder:
        """An event that has happened."""
        return self if event is None else event

    def synchronize(self) -> None:
        """Nothing to wait for."""


def apply() -> None:
    """Give these modules streams that do nothing, where there is no CUDA."""
    require_tested_release(__name__)
    if torch.cuda.is_available():
        return
    stream = InOrder()
    cuda = Substitute(
        torch.cuda,
        Stream=InOrder,
        Event=InOrder,
        current_stream=lambda *args: stream,
        stream=lambda stream: contextlib.nullcontext(),
        current_device=lambda: "cpu",
    )
    without: Any = Substitute(torch, cuda=cuda)
    for module in (block, no_ep, ep_sync_1d, moe_utils, olmo_core.utils, pipeline_schedule):
        module.torch = without  # type: ignore[attr-defined]
    no_ep.async_copy_to_cpu = ep_sync_1d.async_copy_to_cpu = copy_to_cpu
    routed_experts.REQUIRES_HOST_SIDE_SPLIT_SIZES = True  # type: ignore[assignment]


def copy_to_cpu(buffer: Tensor, event: Any = None, return_event: bool = True) -> tuple[Tensor, InOrder, InOrder]:
    """A copy on the host, with a stream and an event that are done."""
    return buffer.clone(), InOrder(), InOrder()
