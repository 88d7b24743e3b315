"""SPAttention and its rivals as attention types for OLMo-core's OLMoE models (arXiv 2511.09596)."""

from .kernels import attention
from .patterns import available_patterns, build_pattern

__version__ = "0.1.0"

__all__ = ["attention", "available_patterns", "build_pattern"]
