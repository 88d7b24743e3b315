"""Gradients of experts under expert parallelism.

An expert of an expert-parallel group of ``n`` ranks collects the gradients of all their tokens: a sum, where every other
parameter gets the mean over data-parallel ranks. OLMo-core leaves out the division, so experts' gradients are ``n`` times
too large. Here the gradient of an expert's weights is divided as it leaves the matrix product.
"""

from __future__ import annotations

from typing import Any

import torch
from olmo_core.nn.moe.mlp import DroplessMoEMLP, MoEMLPBase
from torch import Tensor
from torch.distributed import DeviceMesh

from . import grouped_gemm
from .release import require_tested_release

_stock_apply_ep = MoEMLPBase.apply_ep
_DEGREE = "expert_parallel_degree"


def apply() -> None:
    """Divide dropless experts' gradients by the degree of expert parallelism."""
    require_tested_release(__name__)
    MoEMLPBase.apply_ep = apply_ep  # type: ignore[method-assign]
    DroplessMoEMLP.gmm = gmm  # type: ignore[method-assign]


def apply_ep(self: MoEMLPBase, ep_mesh: DeviceMesh) -> None:
    """Shard the experts as before, and remember over how many ranks."""
    _stock_apply_ep(self, ep_mesh)
    setattr(self, _DEGREE, ep_mesh.size())


@torch._dynamo.disable()
def gmm(self: DroplessMoEMLP, x: Tensor, w: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """The grouped product, with the gradient of ``w`` divided by the degree."""
    degree = getattr(self, _DEGREE, 1)
    return grouped_gemm.gmm(self, x, _DivideGradient.apply(w, degree) if degree > 1 else w, batch_sizes, trans_b)


class _DivideGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, divisor: int) -> Tensor:
        ctx.divisor = divisor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] / ctx.divisor, None
