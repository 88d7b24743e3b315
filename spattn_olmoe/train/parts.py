"""The parts of the model that a rank holds."""

from __future__ import annotations

from typing import Any

from olmo_core.train.train_module import TrainModule


def model_parts(train_module: TrainModule) -> list[Any]:
    """The modules that a rank trains: one, but for pipelines, whose ranks hold several stages; none where nothing trains."""
    parts = getattr(train_module, "model_parts", None)
    if parts is not None:
        return list(parts)
    model = getattr(train_module, "model", None)
    return [] if model is None else [model]
