"""All experts in one grouped matrix product on a GPU.

Without the unmaintained ``grouped_gemm`` package OLMo-core multiplies expert by expert in a Python loop and waits for the
device to learn each expert's share. PyTorch's own ``grouped_mm`` does it in one launch. It serves bfloat16 on CUDA; any
other call keeps a loop, in full precision: :mod:`.expert_loop`.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from olmo_core.nn.moe.mlp import DroplessMoEMLP
from torch import Tensor

from . import expert_loop
from .release import require_tested_release


def apply() -> None:
    """Give :class:`DroplessMoEMLP` the grouped product."""
    require_tested_release(__name__)
    DroplessMoEMLP.gmm = gmm  # type: ignore[method-assign]
    warnings.filterwarnings("ignore", message="Grouped GEMM not available")  # it asks for the package done without here


@torch._dynamo.disable()
def gmm(self: DroplessMoEMLP, x: Tensor, w: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """Multiply consecutive groups of rows of ``x`` with one matrix each.

    :param x: ``(rows, in)``, rows sorted by expert.
    :param w: ``(experts, in, out)``, or ``(experts, out, in)`` with ``trans_b``.
    :param batch_sizes: rows per expert, ``(experts,)``.
    """
    # An installed grouped_gemm would round to bfloat16 whatever the dtype; the loop and grouped_mm do not.
    if x.is_cuda and x.dtype == w.dtype == torch.bfloat16:
        return grouped_product(x, w, batch_sizes, trans_b)
    return expert_loop.gmm(self, x, w, batch_sizes, trans_b)


def grouped_product(x: Tensor, w: Tensor, batch_sizes: Tensor, trans_b: bool) -> Tensor:
    """:func:`gmm` by ``torch.nn.functional.grouped_mm``, without waiting for the device."""
    ends = batch_sizes.to(device=x.device, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return F.grouped_mm(x, w.transpose(-2, -1) if trans_b else w, offs=ends)
