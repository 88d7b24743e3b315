"""How attention is computed: one door, several implementations that agree. No OLMo-core."""

from .cached import cached_attention
from .dispatch import IMPLEMENTATIONS, attention, choose

__all__ = ["IMPLEMENTATIONS", "attention", "cached_attention", "choose"]
