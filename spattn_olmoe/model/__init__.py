"""The plugin: attention patterns in OLMo-core's models."""

from typing import TYPE_CHECKING

from ..lazy import on_first_use

if TYPE_CHECKING:
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

__getattr__ = on_first_use(
    __name__,
    {
        "PatternAttention": "mixer",
        "PatternAttentionConfig": "mixer",
        "PatternBackend": "mixer",
        "apply_remedies": "remedies",
        "attach": "section",
        "with_attention": "section",
    },
)
