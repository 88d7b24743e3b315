"""Attention types by name."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import nearest
from ..trust import check_import
from .base import Pattern
from .head_order import BALANCED, NATURAL, balanced_order

_REGISTRY: dict[str, type[Pattern]] = {}

P = TypeVar("P", bound=type[Pattern])


def register_pattern(name: str) -> Callable[[P], P]:
    """Class decorator: make a frozen dataclass derived from :class:`Pattern` known as ``attention.type: name``."""

    def register(cls: P) -> P:
        known = _REGISTRY.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"attention type {name!r} is already taken by {known.__module__}.{known.__qualname__}")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return register


def available_patterns() -> tuple[str, ...]:
    """The names that :func:`build_pattern` takes, sorted."""
    return tuple(sorted(_REGISTRY))


def pattern_class(name: str) -> type[Pattern]:
    """The class of an attention type.

    ``name`` is a registered name, or ``module.name`` for a type that lives outside this package: ``module`` is
    imported, which registers it, if it is trusted (:mod:`spattn_olmoe.trust`).

    :raises ValueError: no such type (the message names the nearest one), or a module that is not trusted.
    """
    key = name
    if name not in _REGISTRY and "." in name:
        module_name, _, key = name.rpartition(".")
        check_import(module_name, f"attention.type={name!r}")
        try:
            module = importlib.import_module(module_name)
        except (ImportError, TypeError, ValueError) as error:  # the last two: no module can have that name
            raise ValueError(f"attention.type={name!r}: cannot import {module_name!r} ({error})") from error
        found = _REGISTRY.get(key)
        if found is not None and found.__module__ != module_name and found not in vars(module).values():
            raise ValueError(f"attention.type={name!r}: {module_name!r} has no {key!r}, which is {found.__module__}'s")
    if key not in _REGISTRY:
        hint = nearest(key, _REGISTRY)
        raise ValueError(
            f"attention.type={name!r} is not an attention type{hint} (known: {', '.join(available_patterns())})"
        )
    return _REGISTRY[key]


def pattern_options(name: str) -> dict[str, Any]:
    """The options that a type reads, with their defaults (``n_heads`` and ``band_length`` aside)."""
    fields = dataclasses.fields(pattern_class(name))
    return {f.name: f.default for f in fields if f.name not in ("n_heads", "band_length")}


def build_pattern(name: str, n_heads: int, band_length: int, **options: Any) -> Pattern:
    """Build the pattern of an attention type.

    :param name: one of :func:`available_patterns`, or ``module.name`` (see :func:`pattern_class`).
    :param n_heads: query heads ``H`` of the model.
    :param band_length: band length ``N``, normally the sequence length of training.
    :param options: the type's own options, ``follows_input``, and ``head_order``: ``natural``, a permutation, or
        ``balanced``, which becomes the permutation of :func:`.head_order.balanced_order` for an input of ``N`` tokens.
    :raises ValueError: unknown name or option, or more heads than tokens.
    """
    cls = pattern_class(name)
    known = pattern_options(name)
    for key in options:
        if key not in known:
            raise ValueError(
                f"attention.{key} is not an option of type {name!r}{nearest(key, known)} (it reads: {', '.join(known)})"
            )
    balanced = options.get("head_order") == BALANCED
    if balanced:
        options["head_order"] = NATURAL
    pattern = cls(n_heads=n_heads, band_length=band_length, **options)
    if n_heads > band_length:
        raise ValueError(
            f"n_heads={n_heads} is more than the band length band_length={band_length}: "
            "some heads would have no distance to attend; use fewer heads or a longer sequence"
        )
    if balanced:
        return dataclasses.replace(pattern, head_order=balanced_order(pattern.attended_pairs_per_head()))
    return pattern
