"""Who is timed: ours, and everyone else who computes the same attention or dense causal attention instead of it.

A contender takes ``q, k, v (B, T, H, D)`` and returns ``(B, T, H, D)``, differentiable. Those that are not installed
are left out and named in the result.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from spattn_olmoe import attention
from spattn_olmoe.patterns import Pattern, find_variant

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense(device: str, T: int, H: int) -> tuple[dict[str, Attend], dict[str, str]]:
    """Dense causal attention by name, and why a name is missing."""
    if device == "cpu":
        return {"sdpa is_causal": _sdpa()}, {}
    causal = find_variant("dense").build(H, T)
    found: dict[str, Attend] = {
        "sdpa flash": _sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
        "flex dense": lambda q, k, v: attention(q, k, v, causal, impl="flex"),
        "ours dense": lambda q, k, v: attention(q, k, v, causal, impl="triton"),
    }
    missing = {}
    for name, module in (("FA3", "flash_attn_interface"), ("FA4", "flash_attn.cute")):
        try:
            found[name] = _flash(importlib.import_module(module).flash_attn_func)
        except (ImportError, AttributeError) as error:
            missing[name] = f"not installed ({error})"
    return found, missing


def banded(device: str, pattern: Pattern, T: int) -> tuple[dict[str, Attend], dict[str, str]]:
    """Attention under a pattern by name, ``ours`` among them, and why a name is missing."""
    if device == "cpu":
        return {
            "ours": lambda q, k, v: attention(q, k, v, pattern, impl="cpu"),
            "sdpa masked": _sdpa(mask=pattern.dense_mask(T)[None]),
        }, {}
    found: dict[str, Attend] = {
        "ours": lambda q, k, v: attention(q, k, v, pattern, impl="triton"),
        "flex": lambda q, k, v: attention(q, k, v, pattern, impl="flex"),
    }
    missing = {}
    try:
        found["flash-sparse-attn"] = _flash_sparse(importlib.import_module("flash_sparse_attn"), pattern, T)
    except (ImportError, AttributeError, ValueError) as error:
        missing["flash-sparse-attn"] = f"{type(error).__name__}: {error}"
    return found, missing


def _sdpa(backend: SDPBackend | None = None, mask: Tensor | None = None) -> Attend:
    """PyTorch's attention: causal, or under a dense mask; on a GPU by one of its kernels and no other."""

    def attend(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> Tensor:
        q, k, v = q_BTHD.transpose(1, 2), k_BTHD.transpose(1, 2), v_BTHD.transpose(1, 2)
        with nullcontext() if backend is None else sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return out.transpose(1, 2)

    return attend


def _flash(flash_attn_func: Callable) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return attend


def _flash_sparse(module, pattern: Pattern, T: int) -> Attend:
    """flash-sparse-attn's window per KV head: ``near`` keys, a gap (``right``), then a band (``left``)."""
    rows = []
    for (lo0, hi0), (lo1, hi1) in pattern.table or ():
        near, (lo, hi) = (min(hi0, T), (lo1, min(hi1, T))) if lo0 == 0 else (0, (lo0, min(hi0, T)))
        if lo0 > 0 and hi1 > lo1:
            raise ValueError(f"{pattern.name}: two intervals away from the diagonal")
        rows.append([0, max(hi - lo, 0), max(lo - near, 0), near])
    window = torch.tensor(rows, dtype=torch.int32, device="cuda")
    return lambda q, k, v: module.flash_dense_attn_func(q, k, v, is_causal=True, window_sizes=window, is_local=True)
