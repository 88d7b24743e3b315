"""How attention is computed: one door, several implementations that agree. No OLMo-core."""

from .attention import IMPLEMENTATIONS, attention, choose
from .cached import cached_attention

__all__ = ["IMPLEMENTATIONS", "attention", "cached_attention", "choose"]
