"""Held-out loss inside a run.

OLMo-core averages the loss over the tokens of a document, the last one too, which predicts nothing and counts as a loss of
zero: a document of ``n`` tokens seems to cost ``1 / n`` less than it does. Here the mean goes over the tokens that predict,
in both stacks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from olmo_core.train.train_module import OLMoDDPTrainModule, TransformerTrainModule
from torch import Tensor

from .release import require_tested_release

STOCK = {cls: cls.eval_batch for cls in (TransformerTrainModule, OLMoDDPTrainModule)}


def apply() -> None:
    """Make evaluators average over labelled positions only."""
    require_tested_release(__name__)
    for cls, stock in STOCK.items():
        cls.eval_batch = _over_labels(stock)  # type: ignore[method-assign]


def _over_labels(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def eval_batch(
        self: TransformerTrainModule | OLMoDDPTrainModule, batch: dict[str, Any], labels: Tensor | None = None
    ) -> Any:
        """The forward pass, after ``batch["label_mask"]`` was moved from tokens to the positions that predict them."""
        if "label_mask" in batch and labels is not None:
            batch["label_mask"] = labels != self.label_ignore_index
        return stock(self, batch, labels)

    return eval_batch
