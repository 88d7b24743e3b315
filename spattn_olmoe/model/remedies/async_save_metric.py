"""Ranks reduce the same metrics, whenever an asynchronous save ends.

OLMo-core records how long an asynchronous save took from the thread that saved, at whichever step its rank has reached by
then. Where that is another step on another rank, or after its last, the ranks reduce different metrics: one waits for a
collective that the others never begin. At the end of a run of several ranks that is common. The metric is left out.

In a pipeline ranks have metrics of their own layers, and OLMo-core puts a zero where one has none. The time of the last save is
recorded after a run's last step has been logged, alone, so that this step is logged once more with all losses of routers
zero. There the time of a save is left out too; other metrics that a callback records so late still have that effect.
"""

from __future__ import annotations

from typing import Any

from olmo_core.train import Trainer

from .release import require_tested_release

METRIC = "checkpoint/save_async_duration_s"
AFTER_THE_LAST_STEP = "checkpoint/save_duration_s"

_stock_record_metric = Trainer.record_metric


def apply() -> None:
    """Make ``Trainer.record_metric`` pass over :data:`METRIC`."""
    require_tested_release(__name__)
    Trainer.record_metric = record_metric  # type: ignore[method-assign]


def record_metric(self: Trainer, name: str, *args: Any, **kwargs: Any) -> None:
    """Record a metric of the current step."""
    in_pipeline = getattr(self.train_module, "pp_enabled", False)
    if name != METRIC and not (in_pipeline and name == AFTER_THE_LAST_STEP):
        _stock_record_metric(self, name, *args, **kwargs)
