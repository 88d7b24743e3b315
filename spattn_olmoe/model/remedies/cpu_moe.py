"""Dropless MoE on a CPU.

OLMo-core permutes tokens to experts and back with Triton kernels only, so a dropless MoE fails on a CPU. Here the two
operations look at the tensor's device: CUDA goes to OLMo-core's kernels as before, a CPU to plain indexing.
"""

from __future__ import annotations

from olmo_core.ops import moe as ops
from torch import Tensor

from .release import require_tested_release

_cuda_gather, _cuda_scatter = ops.gather, ops.scatter


def apply() -> None:
    """Make ``olmo_core.ops.moe.gather`` and ``scatter`` work on CPU tensors."""
    require_tested_release(__name__)
    ops.gather, ops.scatter = gather, scatter


def gather(x: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, top_k: int) -> Tensor:
    """Copy each token to its ``top_k`` places, grouped by expert: ``(N, d)`` to ``(N * top_k, d)``.

    ``indices[p]`` is the assignment ``token * top_k + choice`` that stands at place ``p``.
    """
    if x.is_cuda:
        return _cuda_gather(x, indices, bin_ids, bins, top_k)
    return x.index_select(0, indices.long() // top_k)


def scatter(x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    """Sum each token's ``top_k`` expert outputs, weighted: ``(N * top_k, d)`` back to ``(N, d)``."""
    if x.is_cuda:
        return _cuda_scatter(x, indices, bin_ids, weights, bins, top_k)
    by_token = x.index_select(0, indices.long().argsort())
    if weights is not None:
        by_token = by_token * weights[:, None].to(by_token.dtype)
    return by_token.view(-1, top_k, x.shape[-1]).sum(1)
