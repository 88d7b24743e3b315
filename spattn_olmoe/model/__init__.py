"""The plugin: attention patterns in OLMo-core's models."""

from .mixer import PatternAttention, PatternAttentionConfig, PatternBackend
from .remedies import apply_remedies
from .section import AttentionPlan, attach, plan_attention, with_attention

__all__ = [
    "AttentionPlan",
    "PatternAttention",
    "PatternAttentionConfig",
    "PatternBackend",
    "apply_remedies",
    "attach",
    "plan_attention",
    "with_attention",
]
