"""The one door to attention: it checks the call, chooses how to compute it, and says so once."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..patterns import Pattern
from . import cpu, flex, reference
from .documents import check_cu_doc_lens
from .fastest import cuda_capability, fastest, triton_unsuitable
from .scale import positive_scale

log = logging.getLogger(__name__)


def _sdpa(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    pattern: Pattern,
    *,
    cu_doc_lens: Tensor | None,
    scale: float,
    head_offset: int,
) -> Tensor:
    """PyTorch's dense causal attention, whichever kernel it picks: flash or cuDNN on a GPU."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTGD, v_BTGD))
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa).transpose(1, 2)


def _triton(*args, **kwargs) -> Tensor:
    """The fused kernels, which are imported when they are first needed."""
    from . import triton as banded

    return banded.run(*args, **kwargs)


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "reference": reference.run,
    "cpu": cpu.run,
    "flex": flex.run,
    "sdpa": _sdpa,
    "triton": _triton,
}
"""Ways to compute attention, by the name that ``attention.impl`` takes."""

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    impl: str = "auto",
    cu_doc_lens: Tensor | None = None,
    scale: float | None = None,
    head_offset: int = 0,
) -> Tensor:
    """Attention under a pattern, differentiable in q, k and v.

    :param q: queries ``(B, T, H, D)``; ``H`` may be a slice of the pattern's heads (see ``head_offset``).
    :param k: keys ``(B, T, G, D)`` with ``G`` dividing ``H``: query head ``h`` reads group ``h // (H / G)``.
    :param v: values ``(B, T, G, D)``.
    :param pattern: what each head attends, over global heads.
    :param impl: ``auto`` chooses by device and pattern and logs its choice once; ``reference``, ``cpu``, ``flex``,
        ``triton`` (distance intervals) or ``sdpa`` (dense only) is taken at its word and raises where it cannot serve
        the call.
    :param cu_doc_lens: cumulative document lengths over the rows laid end to end, int ``(documents + 1,)``, from 0 to
        ``B * T``: pairs in different documents do not attend each other.
    :param scale: factor on the scores, any finite number; ``D ** -0.5`` by default.
    :param head_offset: the global index of the first head of ``q`` (tensor parallelism, Ulysses).
    :returns: ``(B, T, H, D)`` in q's dtype. A query without any key gets exact zeros, and zero gradients.
    :raises ValueError: shapes, dtypes, devices or an implementation that do not fit.
    """
    B, T, _H, D = _check(q, k, v, pattern, head_offset)
    if cu_doc_lens is not None:
        check_cu_doc_lens(cu_doc_lens, B, T, q.device)
    if T == 0 or B == 0:
        return reference.nothing(q, k, v)
    pattern = pattern.at_length(T)
    call = q.device.type, pattern, T, cu_doc_lens is not None, q.dtype, D
    chosen = choose(*call) if impl == "auto" else impl
    if chosen not in IMPLEMENTATIONS:
        raise ValueError(f"attention.impl={impl!r} is unknown (known: auto, {', '.join(IMPLEMENTATIONS)})")
    reason = unsuitable(chosen, *call)
    if reason:
        raise ValueError(f"attention.impl={chosen!r} {reason}")
    q, scale = positive_scale(q, scale)
    return IMPLEMENTATIONS[chosen](q, k, v, pattern, cu_doc_lens=cu_doc_lens, scale=scale, head_offset=head_offset)


def choose(
    device_type: str,
    pattern: Pattern,
    T: int,
    documents: bool,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
) -> str:
    """The implementation that ``auto`` means for this device and pattern; logged the first time.

    On CUDA it is the fastest by :mod:`.fastest`, or FlexAttention where that one cannot serve the call.
    """
    if device_type == "cpu":
        impl = "cpu"
    else:
        impl = fastest(_kind(pattern, T, documents), cuda_capability())
        if unsuitable(impl, device_type, pattern, T, documents, dtype, head_dim):
            impl = "flex"
    _say(pattern.name, device_type, impl)
    return impl


def unsuitable(
    impl: str,
    device_type: str,
    pattern: Pattern,
    T: int,
    documents: bool,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
) -> str | None:
    """Why an implementation cannot serve a call, as the end of a sentence about it; None where it can."""
    if impl == "cpu" and device_type != "cpu":
        return f"computes on the CPU but q is on {device_type}: use impl='auto'"
    if impl == "sdpa" and (documents or not _is_dense(pattern, T)):
        return f"is dense causal attention without documents, not what {pattern.name!r} asks for here: use impl='auto'"
    if impl == "triton" and pattern.table is None:
        return f"computes distance intervals, which {pattern.name!r} is not made of: use impl='auto'"
    if impl == "triton":
        return triton_unsuitable(device_type, dtype, head_dim)
    return None


def _kind(pattern: Pattern, T: int, documents: bool) -> str:
    if pattern.table is None:
        return "other"
    return "dense" if _is_dense(pattern, T) and not documents else "intervals"


def _is_dense(pattern: Pattern, T: int) -> bool:
    table = pattern.table
    return table is not None and all(head[0][0] == 0 and head[0][1] >= T for head in table)


@torch.compiler.assume_constant_result  # said while a graph is traced, and no part of it
def _say(name: str, device_type: str, impl: str) -> None:
    _say_once(name, device_type, impl)


@functools.cache
def _say_once(name: str, device_type: str, impl: str) -> None:
    log.info("attention.impl=auto: %r is computed by %r on %s", name, impl, device_type)


def _check(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, head_offset: int) -> tuple[int, int, int, int]:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be (batch, length, heads, head_dim), not of shape {tuple(x.shape)}")
        if x.dtype not in _DTYPES:
            raise ValueError(f"{name} is {x.dtype}: attention computes in float64, float32, bfloat16 or float16")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}: they must agree")
    B, T, H, D = q.shape
    if k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != D:
        raise ValueError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} must be (batch, length, kv_heads, head_dim) "
            f"with q's {(B, T)} and head_dim {D}"
        )
    if k.shape[2] == 0 or H % k.shape[2]:
        raise ValueError(f"n_heads={H} must be a multiple of n_kv_heads={k.shape[2]}")
    if head_offset < 0 or head_offset + H > pattern.n_heads:
        raise ValueError(
            f"heads {head_offset} to {head_offset + H} are not among the {pattern.n_heads} of {pattern}: "
            "q's heads and the pattern's n_heads disagree"
        )
    return B, T, H, D
