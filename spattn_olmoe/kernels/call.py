"""One call of attention, as every implementation is given it, and the facts by which one is chosen."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..patterns import Pattern


class Call(NamedTuple):
    """The arguments of :func:`.dispatch.attention`, checked and complete.

    :param pattern: at the length of this input; never one of another length.
    :param scale: positive.
    """

    q_BTHD: Tensor
    k_BTGD: Tensor
    v_BTGD: Tensor
    pattern: Pattern
    cu_doc_lens: Tensor | None
    scale: float
    head_offset: int


class Facts(NamedTuple):
    """What the choice of an implementation depends on.

    :param device: its type, such as ``cuda``.
    :param T: length of the input; ``documents``: whether it has bounds of documents.
    """

    device: str
    pattern: Pattern
    T: int
    documents: bool = False
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128

    @property
    def dense(self) -> bool:
        """Whether every query attends every key before it."""
        table = self.pattern.table
        return table is not None and not self.documents and all(lo == 0 and hi >= self.T for (lo, hi), _ in table)
