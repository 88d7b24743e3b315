"""SPAttention and its rivals as attention types for OLMo-core's OLMoE models (arXiv 2511.09596)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import on_first_use

if TYPE_CHECKING:
    from .kernels import attention
    from .patterns import available_patterns, build_pattern

__version__ = "0.1.0"

__all__ = ["attention", "available_patterns", "build_pattern"]

# tokenising processes and --help do not pay for torch
__getattr__ = on_first_use(
    __name__, {"attention": "kernels", "available_patterns": "patterns", "build_pattern": "patterns"}
)
