"""Metrics that come late are not recorded, so that all ranks reduce the same ones.

OLMo-core records how long an asynchronous save took from the thread that saved, at whichever step its rank has reached by
then. Where that is another step on another rank, or after its last, the ranks reduce different metrics: one waits for a
collective that the others never begin. At the end of a run of several ranks that is common. The metric is left out.

In a pipeline ranks have metrics of their own layers, and OLMo-core puts a zero where one has none. A save logs the metrics of its
step so far, and what callbacks record of that step afterwards is logged in a second round, in which all losses of routers are
zero. There nothing more is recorded of a step whose metrics have been logged.
"""

from __future__ import annotations

from typing import Any

from olmo_core.train import Trainer

from .release import require_tested_release

METRIC = "checkpoint/save_async_duration_s"

_stock_record_metric = Trainer.record_metric
_stock_log_metrics = Trainer._log_metrics


def apply() -> None:
    """Make ``Trainer.record_metric`` pass over :data:`METRIC`, and in a pipeline over steps that have been logged."""
    require_tested_release(__name__)
    Trainer.record_metric = record_metric  # type: ignore[method-assign]
    Trainer._log_metrics = log_metrics  # type: ignore[method-assign]


def record_metric(self: Trainer, name: str, *args: Any, **kwargs: Any) -> None:
    """Record a metric of the current step."""
    in_pipeline = getattr(self.train_module, "pp_enabled", False)
    logged = in_pipeline and self.global_step == getattr(self, "_last_logged_step", None)
    if name != METRIC and not logged:
        _stock_record_metric(self, name, *args, **kwargs)


def log_metrics(self: Trainer) -> None:
    """Reduce and log what has been recorded, and remember of which step it is."""
    if self._metrics:
        self._last_logged_step = max(self._metrics)  # type: ignore[attr-defined]
    _stock_log_metrics(self)
