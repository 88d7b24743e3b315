"""What is attended: pure arithmetic on heads and distances. No kernels, no OLMo-core.

Every module of this package registers the types it defines, so a new attention type is one new file here.
"""

import importlib
import pkgutil

from .base import MAX_INTERVALS, UNBOUNDED, Pattern, causal_pairs
from .intervals import IntervalPattern
from .registry import available_patterns, build_pattern, pattern_class, pattern_options, register_pattern
from .variants import (
    VARIANTS,
    Variant,
    attention_name,
    available_variants,
    build_mask,
    find_variant,
    mask_name,
    variant_of,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "MAX_INTERVALS",
    "UNBOUNDED",
    "VARIANTS",
    "IntervalPattern",
    "Pattern",
    "Variant",
    "attention_name",
    "available_patterns",
    "available_variants",
    "build_mask",
    "build_pattern",
    "causal_pairs",
    "find_variant",
    "mask_name",
    "pattern_class",
    "pattern_options",
    "register_pattern",
    "variant_of",
]
