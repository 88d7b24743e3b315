"""SPAttention and its rivals as attention types for OLMo-core's OLMoE models (arXiv 2511.09596)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .kernels import attention
    from .patterns import available_patterns, build_pattern

__version__ = "0.1.0"

__all__ = ["attention", "available_patterns", "build_pattern"]


def __getattr__(name: str) -> Any:
    # on first use, so that tokenising processes and --help do not pay for torch
    if name == "attention":
        from .kernels import attention

        return attention
    if name in ("available_patterns", "build_pattern"):
        from . import patterns

        return getattr(patterns, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
