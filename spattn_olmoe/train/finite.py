"""Whether what a run would save or resume from is finite."""

from __future__ import annotations

import torch
from olmo_core.distributed.utils import all_gather_object, get_local_tensor
from olmo_core.train.train_module import TrainModule


def find_non_finite(train_module: TrainModule) -> str | None:
    """The first weight or moment of the optimiser that is NaN or infinite on some rank; None if all are finite.

    All ranks call it together and get the same answer. Each reads its own part once, which a save does anyway.
    """
    return next((problem for problem in all_gather_object(_first(train_module)) if problem is not None), None)


@torch.no_grad()
def _first(train_module: TrainModule) -> str | None:
    model, optim = getattr(train_module, "model", None), getattr(train_module, "optim", None)
    if model is None:
        return None
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"weight {name}"
        for key, value in (optim.state.get(parameter, {}) if optim is not None else {}).items():
            if isinstance(value, torch.Tensor) and not _finite(value):
                return f"{key} of weight {name}"
    return None


def _finite(tensor: torch.Tensor) -> bool:
    local = get_local_tensor(tensor.detach())
    return not local.is_floating_point() or bool(local.isfinite().all())
