"""Whether what a run would save or resume from is finite."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from olmo_core.distributed.utils import all_gather_object
from olmo_core.train.train_module import TrainModule

from ..model.finite import first_non_finite


def find_non_finite(train_module: TrainModule) -> str | None:
    """The first weight or moment of the optimiser that is NaN or infinite on some rank; None if all are finite.

    All ranks call it together and get the same answer. Each reads its own part once: a tenth of what their checksums take.
    """
    return next(
        (found for found in all_gather_object(first_non_finite(_state(train_module))) if found is not None), None
    )


def _state(train_module: TrainModule) -> Iterator[tuple[str, torch.Tensor]]:
    model, optim = getattr(train_module, "model", None), getattr(train_module, "optim", None)
    for name, parameter in model.named_parameters() if model is not None else ():
        yield f"weight {name}", parameter
        for key, value in (optim.state.get(parameter, {}) if optim is not None else {}).items():
            if isinstance(value, torch.Tensor):
                yield f"{key} of weight {name}", value
