"""Whether tensors are made of numbers, in one pass over each."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from olmo_core.distributed.utils import get_local_tensor


@torch.no_grad()
def first_non_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity in this rank's part of it; None if none does.

    A sum is finite only if every term is, and takes a fraction of the time of looking at each (a fortieth on a CPU in
    float32). Where it is not, it may have overflowed, and each term is looked at. A GPU is waited for once.
    """
    local = [
        (name, part)
        for name, tensor in tensors
        if (part := get_local_tensor(tensor.detach())).is_floating_point() and not part.is_meta
    ]
    sums: dict[torch.device, list[torch.Tensor]] = {}
    for _, tensor in local:
        sums.setdefault(tensor.device, []).append(tensor.sum().double())
    finite = {device: iter(torch.stack(own).isfinite().tolist()) for device, own in sums.items()}
    for name, tensor in local:
        if not next(finite[tensor.device]) and not bool(tensor.isfinite().all()):
            return name
    return None
