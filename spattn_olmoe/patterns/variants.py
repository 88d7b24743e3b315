"""The named masks, each once: what a word stands for in benchmarks, reports, pictures and tests.

A named mask is an attention type with options. ``spattention`` is the type of two masks, so it names neither of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import nearest
from .base import Pattern
from .registry import available_patterns, build_pattern, pattern_class, pattern_options


class Variant(NamedTuple):
    """A named mask.

    :param name: what a table prints, and what command lines take.
    :param type: ``attention.type``.
    :param options: what the type has to be told for this mask.
    :param title: what stands above a picture of it.
    """

    name: str
    type: str
    options: Mapping[str, Any]
    title: str

    def build(self, n_heads: int, band_length: int, **options: Any) -> Pattern:
        """Its pattern; ``options`` are further ones, as :func:`.registry.build_pattern` takes them."""
        for key in options.keys() & self.options.keys():
            if options[key] != self.options[key]:
                raise ValueError(f"attention.{key}={options[key]!r} is not {self.name!r}: leave one of the two out")
        return build_pattern(self.type, n_heads, band_length, **{**self.options, **options})

    @property
    def section(self) -> dict[str, Any]:
        """Its ``attention:`` section of a config: the type and the options."""
        return {"type": self.type, **self.options}

    @property
    def overrides(self) -> tuple[str, ...]:
        """What a command line adds to a config: ``attention.type=...`` and the options."""
        words = {key: str(value).lower() if isinstance(value, bool) else value for key, value in self.section.items()}
        return tuple(f"attention.{key}={word}" for key, word in words.items())


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("dense", "standard", {}, "Dense causal attention"),
        Variant("exclusive", "spattention", {"local_sharing": False}, "SPAttention, exclusive bands"),
        Variant("sharing", "spattention", {"local_sharing": True}, "SPAttention, local sharing"),
        Variant("sliding_window", "sliding_window", {}, "Sliding window"),
        Variant("eball", "eball", {}, "EBALL"),
        Variant("gbhalf", "gbhalf", {}, "GBHALF"),
        Variant("equal_area", "equal_area", {"local_sharing": False}, "Bands of equal area"),
        Variant("equal_area_sharing", "equal_area", {"local_sharing": True}, "Bands of equal area, local sharing"),
        Variant(
            "exclusive_sinks", "spattention_sinks", {"local_sharing": False}, "SPAttention, exclusive bands, sinks"
        ),
        Variant("sharing_sinks", "spattention_sinks", {"local_sharing": True}, "SPAttention, local sharing, sinks"),
        Variant("longformer", "longformer", {}, "Longformer"),
        Variant("bigbird", "bigbird", {}, "BigBird, a stride for its links"),
        Variant("bigbird_seeded", "bigbird", {"random_links": "seeded"}, "BigBird, random links"),
        Variant("reformer", "reformer", {}, "Reformer, buckets of positions"),
        Variant("reformer_lsh", "reformer", {"buckets": "lsh"}, "Reformer, LSH"),
    )
}
"""The masks of this package, in the order of the documentation.

``exclusive`` is the paper's Eq. 4, ``sharing`` the mask of its released code and its tables. Bands of equal area and sinks
are not in the paper. ``bigbird`` and ``reformer``
are the released code's stand-ins, ``bigbird_seeded`` and ``reformer_lsh`` the methods themselves.
"""


def available_variants() -> tuple[str, ...]:
    """The names that :func:`find_variant` takes: the named masks, then every other registered type."""
    named = {variant.type for variant in VARIANTS.values()}
    return (*VARIANTS, *(name for name in available_patterns() if name not in named))


def find_variant(name: str) -> Variant:
    """The mask of a name: one of :data:`VARIANTS`, or a type that has one mask only, by its own name.

    :param name: may be ``module.name`` for a type that lives outside this package.
    :raises ValueError: no such mask; the message names the nearest one. Or a type of several masks.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    masks = [variant for variant in VARIANTS.values() if variant.type == name]
    if len(masks) > 1:
        raise ValueError(f"{name!r} is a type of several masks: name one of {', '.join(mask.name for mask in masks)}")
    if masks:
        return masks[0]
    if name not in available_patterns() and "." not in name:
        known = available_variants()
        hint = nearest(name, {*known, *available_patterns()})
        raise ValueError(f"{name!r} is not a mask{hint} (known: {', '.join(known)})")
    cls = pattern_class(name)
    return Variant(cls.name, cls.full_name(), {}, cls.name)


def build_mask(name: str, n_heads: int, band_length: int, **options: Any) -> Pattern:
    """The pattern of a named mask, or of a type with its options, whichever ``name`` is.

    :raises ValueError: neither; or options that are wrong or do not fit the name.
    """
    if name in available_patterns():
        return build_pattern(name, n_heads, band_length, **options)
    return find_variant(name).build(n_heads, band_length, **options)


def variant_of(type: str, options: Mapping[str, Any]) -> Variant:
    """The variant that a type with options is, or is nearest to: of its type, the one that most options agree with."""
    given = {**_defaults(type), **options}
    masks = [v for v in VARIANTS.values() if v.type == type and v.options.items() <= given.items()]
    name = type.rpartition(".")[2]
    return max(masks, key=lambda mask: len(mask.options), default=Variant(name, type, {}, name))


def mask_name(type: str, options: Mapping[str, Any]) -> str:
    """What a table prints for a type with options: its variant's name, and the options that are neither its nor default.

    >>> mask_name("spattention", {"local_sharing": True, "follows_input": True})
    'sharing follows_input=true'
    """
    variant = variant_of(type, options)
    stated = {**_defaults(type), **variant.options}
    extra = (f" {k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in options.items() if stated.get(k) != v)
    return variant.name + "".join(extra)


def attention_name(layers: Sequence[Mapping[str, Any]], follows_input: bool) -> str:
    """The attention of a model in a few words: its masks by name, and the options that are not a mask's own.

    :param layers: the config of every layer's pattern.
    """
    names = []
    for layer in layers:
        options = {k: v for k, v in layer.items() if k not in ("name", "n_heads", "band_length", "follows_input")}
        names.append(mask_name(layer["name"], options))
    kinds = list(dict.fromkeys(names))
    text = (
        kinds[0]
        if len(kinds) == 1
        else ", ".join(f"{n} layer{'s' * (n > 1)} {kind}" for kind in kinds if (n := names.count(kind)))
    )
    return f"{text}, follows_input=true" if follows_input else text


def _defaults(type: str) -> dict[str, Any]:
    """The options of a type with their defaults; of a type that is not imported, those that all types have."""
    name = type.rpartition(".")[2]
    if name in available_patterns():
        return pattern_options(name)
    return {
        field.name: field.default for field in dataclasses.fields(Pattern) if field.default is not dataclasses.MISSING
    }
