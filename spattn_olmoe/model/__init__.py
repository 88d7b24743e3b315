"""The plugin: attention patterns in OLMo-core's models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

_MODULES = {"apply_remedies": "remedies", "attach": "section", "with_attention": "section"}


def __getattr__(name: str) -> Any:
    # on first use: whoever only reads what a checkpoint states does not wait for OLMo-core
    if name in __all__:
        return getattr(import_module(f".{_MODULES.get(name, 'mixer')}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
