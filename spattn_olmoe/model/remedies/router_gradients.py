"""Gradients of the router under tensor parallelism.

Each tensor-parallel rank routes its own slice of the sequence with a replica of the router's weights. OLMo-core takes
each replica's gradient as if it were already whole, so the replicas see different gradients and drift apart. Here the
local gradient is declared a part, which makes DTensor sum the parts.
"""

from __future__ import annotations

import torch.nn.functional as F
from olmo_core.nn.moe.router import MoELinearRouter
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from .release import require_tested_release


def apply() -> None:
    """Sum the router's gradient over tensor-parallel ranks."""
    require_tested_release(__name__)
    MoELinearRouter.get_expert_logits = get_expert_logits  # type: ignore[method-assign]


def get_expert_logits(self: MoELinearRouter, x: Tensor) -> Tensor:
    """Scores of the experts in float32, ``(..., num_experts)``."""
    weight: Tensor = self.weight
    if isinstance(weight, DTensor):
        weight = weight.to_local(grad_placements=[Partial() if p.is_replicate() else p for p in weight.placements])
    return F.linear(x.float(), weight.view(self.num_experts, self.d_model).float())
