"""Held-out loss inside a run.

OLMo-core averages the loss over the tokens of a document, the last one too, which predicts nothing and counts as a loss of
zero: a document of ``n`` tokens seems to cost ``1 / n`` less than it does. Here the mean goes over the tokens that predict.
"""

from __future__ import annotations

from typing import Any

from olmo_core.train.train_module import TransformerTrainModule
from torch import Tensor

from .release import require_tested_release

_stock_eval_batch = TransformerTrainModule.eval_batch


def apply() -> None:
    """Make evaluators average over labelled positions only."""
    require_tested_release(__name__)
    TransformerTrainModule.eval_batch = eval_batch  # type: ignore[method-assign]


def eval_batch(self: TransformerTrainModule, batch: dict[str, Any], labels: Tensor | None = None) -> Any:
    """The stock forward pass, after ``batch["label_mask"]`` was moved from tokens to the positions that predict them."""
    if "label_mask" in batch and labels is not None:
        batch["label_mask"] = labels != self.label_ignore_index
    return _stock_eval_batch(self, batch, labels)
