"""The plugin: attention patterns in OLMo-core's models, experiments in YAML, and runs that resume."""

from .attach import AttentionPlan, attach, plan_attention, with_attention
from .config import ExperimentConfig, load_experiment
from .mixer import PatternAttention, PatternAttentionConfig, PatternBackend
from .remedies import apply_remedies

__all__ = [
    "AttentionPlan",
    "ExperimentConfig",
    "PatternAttention",
    "PatternAttentionConfig",
    "PatternBackend",
    "apply_remedies",
    "attach",
    "load_experiment",
    "plan_attention",
    "with_attention",
]
