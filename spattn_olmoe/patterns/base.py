"""What every attention pattern is: a small frozen value that says which keys a query may attend.

Vocabulary, used throughout the project: ``T`` length of an input, ``H`` query heads, ``i`` query position,
``j`` key position, ``d = i - j`` their distance, ``N`` the *band length* (``band_length``) that bands partition.
Every pattern is causal: ``d >= 0``.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .head_order import NATURAL, checked_order

UNBOUNDED = 2**30
"""Upper end of an interval without one. Far above any length, and safe to add to a position in int32."""

MAX_INTERVALS = 2
"""Intervals a head may have in :attr:`Pattern.intervals`; what the kernels are written for."""

_MASK_CELLS = 2**24  # cells of a dense mask looked at together when a pattern has no closed form

Interval = tuple[int, int]

IntervalTable = tuple[tuple[Interval, Interval], ...]
"""Two intervals for each head."""

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class BoundMask(NamedTuple):
    """A pattern's mask for one call of attention, see :meth:`Pattern.bind`.

    :param mask_mod: ``mask_mod(b, h, q_idx, kv_idx)`` as FlexAttention takes it; ``h`` counts the heads of the call.
    :param blocks: the square blocks of a given side that may hold a pair, bool ``(B, H, rows, columns)``: never too
        few. None where ``mask_mod`` alone can tell.
    """

    mask_mod: MaskMod
    blocks: Callable[[int], Tensor] | None = None


@dataclass(frozen=True)
class Pattern(ABC):
    """One attention type at one number of heads and one band length.

    Hashable, picklable, printable; rebuilt with ``build_pattern(**pattern.to_config())``. A subclass states
    :meth:`allows`. One whose heads attend at most two intervals of distance derives from
    :class:`.intervals.IntervalPattern` instead and states those, which is what makes it fast.

    :param n_heads: query heads ``H`` of the whole model, not of one rank.
    :param band_length: band length ``N``: the length that bands partition and that window sizes derive from.
    :param follows_input: False: ``N`` stays what it was in training, whatever the input's length.
        True: ``N`` is the input's length, as the paper's released code does it in evaluation.
    :param head_order: a permutation: head ``h`` attends what head ``head_order[h]`` attends in the ``"natural"`` order.
        :func:`build_pattern` also takes ``"balanced"``, and makes a permutation of it.
    """

    n_heads: int
    band_length: int
    follows_input: bool = False
    head_order: str | tuple[int, ...] = NATURAL

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self.check_whole("n_heads", "band_length", at_least=1)
        self.check_flag("follows_input")
        if self.head_order != NATURAL:
            order = checked_order(self.head_order, self.n_heads)
            in_order = order == tuple(range(self.n_heads))  # equal patterns compare equal
            object.__setattr__(self, "head_order", NATURAL if in_order else order)

    def check_whole(self, *options: str, at_least: int, at_most: int = 2**31 - 1) -> None:
        """Raise a ValueError unless these options are whole numbers in a range."""
        for key in options:
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value <= at_most:
                most = f" and at most {at_most}" if isinstance(value, int) and value > at_most else ""
                raise ValueError(f"attention.{key}={value!r}: must be a whole number of at least {at_least}{most}")

    def check_flag(self, option: str) -> None:
        """Raise a ValueError unless an option is true or false."""
        value = getattr(self, option)
        if not isinstance(value, bool):
            raise ValueError(f"attention.{option}={value!r}: must be true or false")

    def check_read(self, option: str, wanted: str, others: tuple[str, ...]) -> None:
        """Raise a ValueError where one of ``others`` is set and not read, because ``option`` is not ``wanted``."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in others and value != field.default and getattr(self, option) != wanted:
                raise ValueError(
                    f"attention.{field.name}={value!r} is read only with attention.{option}={wanted}: "
                    "set that, or leave it out"
                )

    # ---- what a subclass states ------------------------------------------------------------------------------

    @abstractmethod
    def allows(self, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """Whether query ``q_idx`` may attend key ``kv_idx`` in head ``h``, causality and order aside (they are added).

        Integer tensors that broadcast, in; a bool tensor out. Must be traceable: no branches on tensor values.
        """

    def head_intervals(self, h: int) -> list[Interval] | None:
        """The distances that head ``h`` attends, see :class:`.intervals.IntervalPattern`; None for any other pattern.

        In the natural order, as :meth:`allows`.
        """
        return None

    @property
    def follows_content(self) -> bool:
        """Whether the mask depends on queries and keys as well: then only :meth:`bind` tells it, anew for every call."""
        return False

    def bind(
        self,
        q_BTHD: Tensor,
        k_BSGD: Tensor,
        *,
        head_offset: int = 0,
        q_start: Tensor | int = 0,
        k_start: Tensor | int = 0,
        first: Tensor | int = 0,
    ) -> BoundMask:
        """The mask of one call of attention. Every implementation gets its mask here.

        :param q_BTHD: the queries; ``k_BSGD``: the keys. Read by patterns that follow the content, and by no other.
        :param head_offset: the global index of the first of the ``H`` heads.
        :param q_start: position of the first query, an int or ``(B,)``; ``k_start``: of the first key. Positions are
            what ``mask_mod`` is asked about.
        :param first: the lowest position that a query may attend, where documents say so: an int or ``(B, T)``. The
            caller applies it; a pattern reads it that has to know whether a query has another key.
        """

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return self.mask_mod(b, h + head_offset, q_idx, kv_idx)

        return BoundMask(mask_mod)

    # ---- what follows from it --------------------------------------------------------------------------------

    @property
    def options(self) -> dict[str, Any]:
        """The options of this type, by name, without heads and length."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("n_heads", "band_length")}

    @classmethod
    def full_name(cls) -> str:
        """The name by which a new process finds the type: ``module.name`` where it lives outside this package."""
        return cls.name if cls.__module__.startswith(f"{__package__}.") else f"{cls.__module__}.{cls.name}"

    def to_config(self) -> dict[str, Any]:
        """Keyword arguments with which ``build_pattern`` makes an equal pattern, in a new process as well."""
        config = {"name": self.full_name(), "n_heads": self.n_heads, "band_length": self.band_length, **self.options}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}

    def at_length(self, T: int) -> Pattern:
        """The pattern that applies to ``T`` tokens: itself, or rebuilt for ``T`` with ``follows_input=True``."""
        if not self.follows_input or T == self.band_length:
            return self
        return replace(self, band_length=T)

    @property
    def mask_mod(self) -> MaskMod:
        """``mask_mod(b, h, q_idx, kv_idx)`` in FlexAttention's convention; ``h`` is the global query head.

        A function and no method: FlexAttention counts arguments to tell masks from scores, ``self`` included.

        :raises ValueError: the pattern follows the content: there is no mask without queries and keys.
        """
        if self.follows_content:
            raise ValueError(f"{self}: what is attended depends on queries and keys, use bind(q, k)")

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return (q_idx >= kv_idx) & self.allows(self._in_natural_order(h), q_idx, kv_idx)

        return mask_mod

    def _in_natural_order(self, h: Tensor) -> Tensor:
        """``head_order[h]`` for a tensor of heads; comparisons only, which FlexAttention traces on any device."""
        out = h
        for head, natural in enumerate(self._order):
            if head != natural:
                out = torch.where(h == head, natural, out)
        return out

    @property
    def _order(self) -> tuple[int, ...]:
        return self.head_order if isinstance(self.head_order, tuple) else tuple(range(self.n_heads))

    def dense_mask(self, T: int | None = None, device: torch.device | str = "cpu") -> Tensor:
        """The whole mask, bool ``(H, T, T)``: ``[h, i, j]`` is True where query ``i`` attends key ``j``."""
        T = self.band_length if T is None else T
        return self.mask_rows(0, T, T, device=device)

    def mask_rows(self, start: int, stop: int, T: int, device: torch.device | str = "cpu") -> Tensor:
        """Rows ``start..stop`` of :meth:`dense_mask` at length ``T``, bool ``(H, stop - start, T)``."""
        h = torch.arange(self.n_heads, device=device)[:, None, None]
        i = torch.arange(start, stop, device=device)[None, :, None]
        j = torch.arange(T, device=device)[None, None, :]
        mask = self.at_length(T).mask_mod(torch.zeros_like(h), h, i, j)
        return mask.expand(self.n_heads, stop - start, T)

    @property
    def table(self) -> IntervalTable | None:
        """Two distance intervals a head, in head order: half-open, disjoint, ascending, empty as ``(0, 0)``.

        None where the mask is not at most two intervals of distance per head. Python ints, made once, and constants
        under torch.compile. :attr:`intervals` is the same as a tensor.
        """
        natural = self.natural_table
        return None if natural is None else tuple(natural[h] for h in self._order)

    @property
    def natural_table(self) -> IntervalTable | None:
        """:attr:`table` in the natural order of heads."""
        # A compiled graph is reused for another pattern of the class unless it read what tells them apart. What a
        # constant function reads does not count, but the hash reads every field, and is traced.
        return self._constant_table(hash(self))

    @torch.compiler.assume_constant_result  # of a method: PyTorch 2.11 cannot hand a pattern to such a function
    def _constant_table(self, _fields: int) -> IntervalTable | None:
        return _natural_table(self)

    @property
    def intervals(self) -> Tensor | None:
        """:attr:`table` as a tensor, int32 ``(H, 2, 2)``; None where there is none."""
        table = self.table
        return None if table is None else torch.tensor(table, dtype=torch.int32)

    def attended_pairs(self, T: int | None = None) -> int:
        """Exact number of (query, key) pairs over all heads for an input of ``T`` tokens (default ``N``).

        O(H) for interval patterns. FLOPs and sparsity are computed from it. Where the pattern follows the content it
        is an expected number, rounded; the pattern states what it expects of the content.
        """
        return sum(self.attended_pairs_per_head(T))

    def attended_pairs_per_head(self, T: int | None = None) -> tuple[int, ...]:
        """:meth:`attended_pairs` of each head, in head order: the load that ranks share under tensor parallelism."""
        T = self.band_length if T is None else T
        pairs = _natural_pairs_per_head(replace(self.at_length(T), head_order=NATURAL), T)
        return tuple(pairs[h] for h in self._order)

    def dead_rows(self, T: int | None = None) -> int:
        """Number of (head, query) rows that have no key at all, of ``H * T``. Their output is zero."""
        T = self.band_length if T is None else T
        pattern = self.at_length(T)
        table = pattern.table
        if table is None:
            h, i = torch.arange(self.n_heads)[:, None], torch.arange(T)[None, :]
            if pattern.mask_mod(torch.zeros_like(h), h, i, i).all():  # every query attends itself
                return 0
            return sum(int((~rows.any(-1)).sum()) for rows in pattern._chunks_of_rows(T))
        nearest = (min((lo for lo, hi in head if hi > lo), default=T) for head in table)
        return sum(min(lo, T) for lo in nearest)

    def _count_pairs_per_head(self, T: int) -> tuple[int, ...]:
        """Pairs of each head where there are no intervals: counted row by row unless a subclass has a formula."""
        counts = [rows.sum((1, 2)).tolist() for rows in self._chunks_of_rows(T)]
        return tuple(sum(heads) for heads in zip(*counts, strict=True))

    def _chunks_of_rows(self, T: int) -> Iterator[Tensor]:
        """The dense mask a few rows at a time, so that counting needs little memory at any length."""
        step = max(1, _MASK_CELLS // (self.n_heads * max(T, 1)))
        for start in range(0, T, step):
            yield self.mask_rows(start, min(start + step, T), T)


@functools.lru_cache(maxsize=512)  # asked for at every layer of every step, to count FLOPs
def _natural_pairs_per_head(pattern: Pattern, T: int) -> tuple[int, ...]:
    table = pattern.table
    if table is None:
        return pattern._count_pairs_per_head(T)
    return tuple(sum(_pairs_in(lo, hi, T) for lo, hi in head) for head in table)


def causal_pairs(T: int) -> int:
    """(query, key) pairs of one dense causal head: ``T (T + 1) / 2``."""
    return T * (T + 1) // 2


def _pairs_in(lo: int, hi: int, T: int) -> int:
    """Pairs of one head whose distance lies in ``[lo, hi)``: a distance ``d`` occurs ``T - d`` times."""
    lo, hi = min(lo, T), min(hi, T)
    return causal_pairs(T - lo) - causal_pairs(T - hi)


@functools.lru_cache(maxsize=512)
def _natural_table(pattern: Pattern) -> IntervalTable | None:
    rows = []
    for h in range(pattern.n_heads):
        intervals = pattern.head_intervals(h)
        if intervals is None:
            return None
        merged = merge_intervals(intervals)
        if len(merged) > MAX_INTERVALS:
            raise ValueError(
                f"{pattern.name}: head {h} has {len(merged)} distance intervals, more than {MAX_INTERVALS}: "
                "state such a mask with allows in place of head_intervals"
            )
        padded = (merged + [(0, 0)] * MAX_INTERVALS)[:MAX_INTERVALS]
        rows.append((padded[0], padded[1]))
    return tuple(rows)


def merge_intervals(intervals: list[Interval]) -> list[Interval]:
    """The same distances as disjoint, non-adjacent, ascending, non-empty intervals."""
    merged: list[Interval] = []
    for lo, hi in sorted((max(lo, 0), hi) for lo, hi in intervals):
        if hi <= lo:
            continue
        if merged and lo <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(hi, merged[-1][1]))
        else:
            merged.append((lo, hi))
    return merged
