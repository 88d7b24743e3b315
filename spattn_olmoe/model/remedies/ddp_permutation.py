"""Tokens sorted by expert without TransformerEngine, in the stack ``ddp``.

OLMo-core takes both permutations from TransformerEngine, which no extra of it installs, and has nothing in its place: without
the package a step fails, on a GPU too (``'NoneType' object is not callable``). Here tensors on a CPU, and all tensors where
the package is missing, are permuted by PyTorch; with the package, CUDA tensors go to it as before.
"""

from __future__ import annotations

from typing import Any

import torch
from olmo_core.nn.moe import utils
from torch import Tensor

from .release import require_tested_release

_stock_permute, _stock_unpermute = utils.moe_permute, utils.moe_unpermute


def apply() -> None:
    """Make ``moe_permute`` and ``moe_unpermute`` of ``olmo_core.nn.moe.utils`` work everywhere."""
    require_tested_release(__name__)
    utils.moe_permute, utils.moe_unpermute = moe_permute, moe_unpermute


def moe_permute(inp: Tensor, routing_map: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Copy each row to its ``top_k`` places, grouped by expert: ``(N, d)`` to ``(N * top_k, d)``.

    :param routing_map: the experts of each row, ``(N, top_k)``.
    :returns: the rows, and which assignment ``row * top_k + choice`` stands at each place.
    """
    if inp.is_cuda and _stock_permute is not None:
        return _stock_permute(inp=inp, routing_map=routing_map, **kwargs)
    order = routing_map.flatten().argsort(stable=True)
    return inp.index_select(0, order // routing_map.shape[1]), order


def moe_unpermute(
    inp: Tensor,
    row_id_map: Tensor,
    merging_probs: Tensor | None = None,
    restore_shape: torch.Size | None = None,
    **kwargs: Any,
) -> Tensor:
    """Bring rows back to where :func:`moe_permute` took them from, the ``top_k`` of each weighted and summed in float32.

    :param merging_probs: weights ``(N, top_k)``; None where ``top_k`` is 1.
    """
    if inp.is_cuda and _stock_unpermute is not None:
        return _stock_unpermute(
            inp=inp, row_id_map=row_id_map, merging_probs=merging_probs, restore_shape=restore_shape, **kwargs
        )
    rows = inp.index_select(0, row_id_map.argsort())
    if merging_probs is None:
        return rows
    weighted = rows.view(*merging_probs.shape, -1) * merging_probs[..., None].float()
    return weighted.sum(1).to(inp.dtype)
