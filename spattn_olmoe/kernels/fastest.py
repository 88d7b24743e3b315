"""Which implementation is the fastest on a GPU: what ``impl="auto"`` means on CUDA, by compute capability."""

from __future__ import annotations

import functools
import importlib.util

import torch

from ..patterns.base import Interval

HeadIntervals = tuple[tuple[Interval, Interval], ...]

BY_DEFAULT = {"dense": "sdpa", "intervals": "triton", "other": "flex"}
"""By kind of mask: dense causal without documents, at most two distance intervals a head, any other."""

MEASURED: dict[tuple[int, int], dict[str, str]] = {}
"""Where a benchmark shows something else: by compute capability, the kinds that differ from :data:`BY_DEFAULT`.

An entry stands on a file ``benchmarks/results/<gpu>/attention.json`` that is committed with it.
"""


def fastest(kind: str, capability: tuple[int, int] | None) -> str:
    """The implementation for a kind of mask; ``capability`` is None where there is no GPU to ask."""
    measured = MEASURED.get(capability, {}) if capability else {}
    return measured.get(kind, BY_DEFAULT[kind])


def triton_unsuitable(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the fused Triton kernels cannot serve tensors like these, as the end of a sentence; None where they can."""
    missing = _triton_missing(device_type)
    if missing:
        return missing
    if dtype not in TRITON_DTYPES:
        return f"computes in bfloat16, float16 or float32, not {dtype}"
    if device_type == "cpu" and dtype == torch.bfloat16:
        return "cannot multiply bfloat16 in Triton's interpreter: use float16 or float32 there"
    if head_dim > TRITON_MAX_HEAD_DIM:
        return f"serves head_dim up to {TRITON_MAX_HEAD_DIM}, not {head_dim}: use impl='flex'"
    return None


TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TRITON_MAX_HEAD_DIM = 256


@torch.compiler.assume_constant_result
def _triton_missing(device_type: str) -> str | None:
    """What a machine lacks to run the kernels on such a device."""
    return _missing(device_type)


@functools.cache
def _missing(device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs the package 'triton', which is not installed: pip install triton, or use impl='auto'"
    if device_type == "cuda":
        capability = cuda_capability()
        if capability is not None and capability < (8, 0):
            return (
                f"needs a GPU of compute capability 8.0 or later, not {capability[0]}.{capability[1]}: use impl='flex'"
            )
        return None
    from . import triton as banded  # imports Triton

    if device_type != "cpu" or not banded.is_interpreted():
        return f"needs a CUDA GPU, but q is on {device_type}: use impl='auto'"
    return None


@torch.compiler.assume_constant_result
def cuda_capability() -> tuple[int, int] | None:
    """Compute capability of the current GPU, None without one."""
    return _capability()


@functools.cache
def _capability() -> tuple[int, int] | None:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None
