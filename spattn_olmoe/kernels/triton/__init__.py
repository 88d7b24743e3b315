"""Fused Triton kernels for patterns that are distance intervals: forward, backward and decoding.

Nothing of this package is imported before it is needed, so the rest works where Triton is not installed.
"""

from __future__ import annotations

from torch import Tensor

from ...patterns import Pattern
from ..call import Call
from ..documents import document_bounds
from .ops import banded_decode, banded_forward, is_interpreted

__all__ = ["decode", "is_interpreted", "run"]


def run(call: Call) -> Tensor:
    """Attention and gradients that visit only tiles in which the pattern has a pair. Memory O(T).

    float32 is multiplied exactly unless ``torch.set_float32_matmul_precision`` allows TF32.
    """
    B, T, H, _ = call.q_BTHD.shape
    bounds = (None, None) if call.cu_doc_lens is None else document_bounds(call.cu_doc_lens, B, T)
    heads = local_intervals(call.pattern, call.head_offset, H)
    return banded_forward(*call[:3], heads, call.scale, *bounds)[0]


def decode(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    pattern: Pattern,
    *,
    start: Tensor,
    leftpad: Tensor | None,
    scale: float,
    head_offset: int,
) -> Tensor:
    """Attention of a few queries to a KV cache, without gradients; see :func:`..cached.cached_attention`."""
    heads = local_intervals(pattern, head_offset, q_BTHD.shape[2])
    return banded_decode(q_BTHD, k_BSGD, v_BSGD, start, leftpad, heads, scale)


def local_intervals(pattern: Pattern, head_offset: int, H: int) -> list[int]:
    """``lo, hi, lo, hi`` of ``H`` heads from ``head_offset`` on, flat."""
    table = pattern.table
    assert table is not None, "dispatch sends only patterns that are intervals"
    return [bound for head in table[head_offset : head_offset + H] for pair in head for bound in pair]
