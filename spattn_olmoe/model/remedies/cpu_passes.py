"""Normalisation, rotary embedding and cross entropy on a CPU, with fewer passes over memory.

Each is a handful of element-wise operations, and on a CPU each operation reads and writes its tensors once more: together a
sixth of a small model's step, most of it in gradients that autograd makes operation by operation. Here forward passes
compute what OLMo-core computes, and gradients are written by hand. Other devices, other dtypes and tensors split over ranks
keep OLMo-core's own.
"""

from __future__ import annotations

from typing import Any, cast

import olmo_core.nn.lm_head as lm_head
import torch
from olmo_core.nn.layer_norm import RMSNorm
from olmo_core.nn.rope import RotaryEmbedding
from torch import Tensor
from torch.autograd.function import once_differentiable

from .release import require_tested_release

STOCK_NORM = RMSNorm.forward
STOCK_ROPE = RotaryEmbedding._apply_rotary_pos_emb
STOCK_LOSS = lm_head.cross_entropy_loss

ROWS = 256
"""Rows of logits at a time: with a vocabulary of some thousands they stay in a core's cache."""


def apply() -> None:
    """Exchange the three where they are looked up."""
    require_tested_release(__name__)
    RMSNorm.forward = norm  # type: ignore[method-assign]
    RotaryEmbedding._apply_rotary_pos_emb = rotate  # type: ignore[method-assign]
    lm_head.cross_entropy_loss = cross_entropy_loss


def _served(*tensors: Tensor | None) -> bool:
    """Whether these are plain float32 tensors of a CPU, where gradients may be wanted."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    plain = (Tensor, torch.nn.Parameter)
    return all(x is not None and type(x) in plain and x.is_cpu and x.dtype == torch.float32 for x in tensors)


def norm(self: RMSNorm, x: Tensor) -> Tensor:
    """``x / rms(x) * weight`` over the last dimension."""
    if self.bias is not None or not _served(x, self.weight):
        return STOCK_NORM(self, x)
    return cast(Tensor, _Norm.apply(x, self.weight, self.eps))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        shares = grads[0] * normed
        d_weight = shares.flatten(0, -2).sum(0)
        # The part of the gradient along x itself changes its length alone, which the division takes away.
        along = (shares @ weight).div_(x.shape[-1]).unsqueeze_(-1)
        return torch.mul(grads[0], weight).sub_(normed.mul_(along)).mul_(inverse), d_weight, None


def rotate(self: RotaryEmbedding, pos_sin: Tensor, pos_cos: Tensor, t: Tensor) -> Tensor:
    """Turn the pairs ``(t[i], t[i + D / 2])`` by the angles given, ``(..., D)`` of equal halves."""
    if pos_sin.shape[-1] != t.shape[-1] or not _served(t, pos_sin, pos_cos):
        return cast(Tensor, STOCK_ROPE(self, pos_sin, pos_cos, t))
    half = t.shape[-1] // 2
    return cast(Tensor, _Rotation.apply(t, pos_sin[..., :half], pos_cos[..., :half]))


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        ctx.save_for_backward(sin, cos)
        return _rotated(t, sin, cos)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sin, cos = ctx.saved_tensors
        return _rotated(grads[0], -sin, cos), None, None  # back by the same angles


def _rotated(t: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    out = torch.empty_like(t, memory_format=torch.contiguous_format)
    (first, second), (out_first, out_second) = t.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    compute_z_loss: bool = False,
    z_loss_multiplier: float = 1e-4,
) -> tuple[Tensor, Tensor | None]:
    """OLMo-core's cross entropy and z-loss, of ``(rows, vocabulary)`` logits and ``(rows,)`` labels."""
    if reduction not in ("sum", "mean") or not _served(logits):
        return STOCK_LOSS(
            logits,
            labels,
            ignore_index=ignore_index,
            reduction=cast(Any, reduction),
            compute_z_loss=compute_z_loss,
            z_loss_multiplier=z_loss_multiplier,
        )
    counted = labels != ignore_index
    lse, label_logits = cast(tuple[Tensor, Tensor], _LogSumExp.apply(logits, labels.where(counted, 0)))
    divisor = counted.sum() if reduction == "mean" else 1
    loss = (lse - label_logits).where(counted, 0).sum() / divisor
    if not compute_z_loss:
        return loss, None
    return loss, z_loss_multiplier * (lse.square().where(counted, 0).sum() / divisor)


class _LogSumExp(torch.autograd.Function):
    """Of every row its log-sum-exp and one of its entries."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        lse = torch.cat([rows.logsumexp(-1) for rows in logits.split(ROWS)])
        ctx.save_for_backward(logits, lse, at)
        return lse, logits.gather(-1, at[:, None]).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, lse, at = ctx.saved_tensors
        d_lse, d_at = (grad[:, None] for grad in grads)
        d_logits = torch.empty_like(logits)
        parts = (x.split(ROWS) for x in (logits, lse[:, None], d_lse, d_logits))
        for rows, total, d_total, out in zip(*parts, strict=True):
            torch.sub(rows, total, out=out).exp_().mul_(d_total)
        return d_logits.scatter_add_(-1, at[:, None], d_at), None
