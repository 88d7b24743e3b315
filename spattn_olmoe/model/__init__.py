"""The plugin: attention patterns in OLMo-core's models."""

from .mixer import PatternAttention, PatternAttentionConfig, PatternBackend
from .remedies import apply_remedies
from .section import attach, with_attention

__all__ = [
    "PatternAttention",
    "PatternAttentionConfig",
    "PatternBackend",
    "apply_remedies",
    "attach",
    "with_attention",
]
