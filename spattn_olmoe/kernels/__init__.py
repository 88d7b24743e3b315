"""How attention is computed: one function, several implementations that agree. No OLMo-core."""

from .cached import cached_attention
from .call import Facts
from .dispatch import IMPLEMENTATIONS, attention, choose

__all__ = ["IMPLEMENTATIONS", "Facts", "attention", "cached_attention", "choose"]
