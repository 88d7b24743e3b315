"""Attention: validates the call, picks an implementation, and logs the choice once."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..patterns import Pattern, mask_name
from . import cpu, flex, reference
from .call import Call, Facts
from .documents import check_cu_doc_lens
from .scale import positive_scale

log = logging.getLogger(__name__)

Result = TypeVar("Result")


def _constant(function: Callable[..., Result]) -> Callable[..., Result]:
    """Evaluate once for given arguments, when a graph is traced at the latest: it is no part of the graph."""
    kept = functools.cache(function)

    @functools.wraps(function)
    def look_up(*args: object) -> Result:  # the compiler looks through a cache, and would trace what it wraps
        return kept(*args)

    look_up.cache_clear = kept.cache_clear  # type: ignore[attr-defined]
    return torch.compiler.assume_constant_result(look_up)


def _sdpa(call: Call) -> Tensor:
    """PyTorch's dense causal attention, whichever kernel it picks: flash or cuDNN on a GPU."""
    return reference.sdpa(call, is_causal=True)


def _triton(call: Call) -> Tensor:
    """The fused kernels, which are imported when they are first needed."""
    from . import triton

    return triton.run(call)


IMPLEMENTATIONS: dict[str, Callable[[Call], Tensor]] = {
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
        ``triton`` (distance intervals) or ``sdpa`` (dense only) is used as given, and raises where it does not support
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
    facts = Facts(q.device.type, pattern, T, cu_doc_lens is not None, q.dtype, D)
    if impl == "auto":
        impl = choose(facts)
    else:
        _check_choice(impl, facts)
    q, scale = positive_scale(q, scale)
    return IMPLEMENTATIONS[impl](Call(q, k, v, pattern, cu_doc_lens, scale, head_offset))


def choose(facts: Facts) -> str:
    """The implementation that ``auto`` means, which supports the call; logged the first time.

    On CUDA it is ``sdpa`` for a dense mask, ``triton`` for other distance intervals, and ``flex`` for any other mask and
    where the fused kernels cannot run.
    """
    impl = "cpu" if facts.device == "cpu" else "sdpa" if facts.dense else "triton"
    if unsuitable(impl, facts):
        impl = "flex"
    _log_choice(facts.pattern.name, tuple(facts.pattern.options.items()), facts.device, impl)
    return impl


def _check_choice(impl: str, facts: Facts) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"attention.impl={impl!r} is unknown (known: auto, {', '.join(IMPLEMENTATIONS)})")
    reason = unsuitable(impl, facts)
    if reason:
        raise ValueError(f"attention.impl={impl!r} {reason}")


def unsuitable(impl: str, facts: Facts) -> str | None:
    """Why an implementation cannot serve a call, as the end of a sentence about it; None where it can."""
    name = facts.pattern.name
    if impl == "cpu" and facts.device != "cpu":
        return f"computes on the CPU but q is on {facts.device}: use impl='auto'"
    if impl == "sdpa" and not facts.dense:
        return f"is dense causal attention without documents, not what {name!r} asks for here: use impl='auto'"
    if impl == "triton" and facts.pattern.table is None:
        return f"computes distance intervals, which {name!r} is not made of: use impl='auto'"
    if impl == "triton":
        return triton_unsuitable(facts.device, facts.dtype, facts.head_dim)
    return None


TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRITON_MAX_HEAD_DIM = 256


def triton_unsuitable(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the fused Triton kernels cannot serve tensors like these, as the end of a sentence; None where they can."""
    missing = _triton_missing(device)
    if missing:
        return missing
    if dtype not in TRITON_DTYPES:
        return f"computes in bfloat16, float16 or float32, not {dtype}"
    if device == "cpu" and dtype == torch.bfloat16:
        return "cannot multiply bfloat16 in Triton's interpreter: use float16 or float32 there"
    if head_dim > TRITON_MAX_HEAD_DIM:
        return f"serves head_dim up to {TRITON_MAX_HEAD_DIM}, not {head_dim}: use impl='flex'"
    return None


@_constant
def _triton_missing(device: str) -> str | None:
    """What this machine lacks to run the fused kernels on a kind of device."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package 'triton', which is not installed: pip install triton, or use impl='auto'"
    if device == "cuda":
        major, minor = _cuda_capability()
        if (major, minor) < (8, 0):
            return f"needs a GPU of compute capability 8.0 or later, not {major}.{minor}: use impl='flex'"
        return None
    from . import triton  # imports the package of that name

    if device != "cpu" or not triton.is_interpreted():
        return f"needs a CUDA GPU, but q is on {device}: use impl='auto'"
    return None


def _cuda_capability() -> tuple[int, int]:
    """Of the current GPU. Where there is none to ask, as when a model is built for another machine, one that serves."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 0)


@_constant
def _log_choice(name: str, options: tuple[tuple[str, object], ...], device: str, impl: str) -> None:
    log.info("attention.impl=auto: the mask %r is computed by %r on %s", mask_name(name, dict(options)), impl, device)


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
