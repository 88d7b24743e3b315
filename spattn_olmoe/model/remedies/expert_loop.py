"""Experts one by one, with work that grows with the tokens and not with the square of the experts.

Where there is no grouped product, OLMo-core slices each expert's rows and weights from the whole. The backward pass of
every slice fills a zero tensor of the whole: with 64 experts most of a step. Here each product writes its own part of the
result, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from olmo_core.nn.moe.mlp import DroplessMoEMLP
from torch import Tensor
from torch.autograd.function import once_differentiable

from .release import require_tested_release


def apply() -> None:
    """Give :class:`DroplessMoEMLP` this loop."""
    require_tested_release(__name__)
    DroplessMoEMLP.gmm = gmm  # type: ignore[method-assign]


@torch._dynamo.disable()
def gmm(self: DroplessMoEMLP, x: Tensor, w: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """Multiply consecutive groups of rows of ``x`` with one matrix each.

    :param x: ``(rows, in)``, rows sorted by expert.
    :param w: ``(experts, in, out)``, or ``(experts, out, in)`` with ``trans_b``.
    :param batch_sizes: rows per expert, ``(experts,)``.
    """
    return looped_product(x, w, batch_sizes.tolist(), trans_b)


def looped_product(x: Tensor, w: Tensor, sizes: list[int], trans_b: bool) -> Tensor:
    """:func:`gmm` with the sizes as numbers."""
    return _LoopedProduct.apply(x, w.transpose(1, 2) if trans_b else w, sizes)


class _LoopedProduct(torch.autograd.Function):
    """``(rows, in)`` by ``(experts, in, out)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.sizes = sizes
        out = x.new_empty(len(x), w.shape[2])
        for rows, matrix, part in zip(x.split(sizes), w, out.split(sizes), strict=True):
            torch.mm(rows, matrix, out=part)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        d_out = grads[0]
        wants_x, wants_w, _ = ctx.needs_input_grad
        dx, dw = (torch.empty_like(t) if wanted else None for t, wanted in ((x, wants_x), (w, wants_w)))
        start = 0
        for e, size in enumerate(ctx.sizes):
            rows = slice(start, start + size)
            if dx is not None:
                torch.mm(d_out[rows], w[e].T, out=dx[rows])
            if dw is not None:
                torch.mm(x[rows].T, d_out[rows], out=dw[e])  # zeros where an expert has no rows
            start += size
        return dx, dw, None
