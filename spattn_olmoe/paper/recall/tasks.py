"""The tasks: sequences made on the fly whose answers lie at known distances.

Every task states, for each token that is scored, the distance to the token that holds the answer. Sequences depend on
``(seed, index of the batch)`` alone, so a run that was interrupted sees the same ones again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from ...errors import nearest

IGNORED = -100
"""The label of a token that is not scored, as in torch's cross-entropy."""

_TRIES = 200  # places are drawn again where they collide; far more than any setting that is not refused needs


class Batch(NamedTuple):
    """Sequences of a task, each array int64 ``(B, T)``.

    :param ids: the input.
    :param labels: what to predict at a position, or :data:`IGNORED`.
    :param distances: where there is a label, how far back the token lies that tells it; 0 elsewhere.
    """

    ids: np.ndarray
    labels: np.ndarray
    distances: np.ndarray


@dataclass(frozen=True)
class Task(ABC):
    """What is to be learnt.

    :param length: tokens of a sequence, ``T``.
    """

    length: int = 256

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= 2**20:
                raise ValueError(f"{field.name}={value!r}: must be a whole number of at least 1")

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Tokens of the vocabulary."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """Accuracy of a model that knows which kind of token is wanted, and nothing about the sequence."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, n: int) -> Batch:
        """``n`` sequences."""

    def batch(self, seed: int, index: int, n: int) -> Batch:
        """Batch ``index`` of ``n`` sequences: the same whenever it is asked for."""
        return self.draw(np.random.default_rng([seed, index]), n)

    def _empty(self, n: int) -> Batch:
        shape = (n, self.length)
        return Batch(np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64), np.zeros(shape, np.int64))


@dataclass(frozen=True)
class OneHop(Task):
    """One-hop recall: a *pair token* states a key and its value at once; the key's query token, later, asks for the pair.

    One look back answers it, by any head that attends that distance, in any layer. Distances are uniform over 1 to
    ``T - 1``, so that no band is practised more often than another.

    :param pairs: pairs in a sequence, each asked for once; their keys differ.
    :param keys: number of keys; ``values``: of values a key can have; ``fillers``: tokens that mean nothing.
    """

    pairs: int = 8
    keys: int = 16
    values: int = 16
    fillers: int = 48

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs > self.keys:
            raise ValueError(f"pairs={self.pairs}: more than keys={self.keys}, and the keys of a sequence differ")
        if 4 * self.pairs > self.length:
            raise ValueError(f"pairs={self.pairs}: must be at most a quarter of length={self.length}")

    @property
    def vocab_size(self) -> int:
        return self.keys * self.values + self.keys + self.fillers

    @property
    def chance(self) -> float:
        return 1 / self.values

    def draw(self, rng: np.random.Generator, n: int) -> Batch:
        T, first_query = self.length, self.keys * self.values
        ids, labels, distances = self._empty(n)
        ids[:] = rng.integers(first_query + self.keys, self.vocab_size, (n, T))
        keys = rng.permuted(np.tile(np.arange(self.keys), (n, 1)), axis=1)[:, : self.pairs]
        tokens = keys * self.values + rng.integers(0, self.values, keys.shape)
        free = np.ones((n, T), bool)
        for pair in range(self.pairs):
            start, end = _two_places(rng, free)
            rows = np.arange(n)
            ids[rows, start], ids[rows, end] = tokens[:, pair], first_query + keys[:, pair]
            labels[rows, end], distances[rows, end] = tokens[:, pair], end - start
        return Batch(ids, labels, distances)


def _two_places(rng: np.random.Generator, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A place and a later one in every row, both free, their distance uniform; they are taken from ``free``."""
    n, T = free.shape
    start, end = np.zeros(n, np.int64), np.zeros(n, np.int64)
    open_ = np.arange(n)
    for _ in range(_TRIES):
        distance = rng.integers(1, T, len(open_))
        start[open_] = rng.integers(0, T - distance)
        end[open_] = start[open_] + distance
        open_ = open_[~(free[open_, start[open_]] & free[open_, end[open_]])]
        if not len(open_):
            break
    else:
        raise RuntimeError("no free places found")
    rows = np.arange(n)
    free[rows, start] = free[rows, end] = False
    return start, end


@dataclass(frozen=True)
class TwoHop(Task):
    """Multi-query associative recall (MQAR) as Zoology defines it (arXiv 2312.04927): key and value are neighbours.

    The sequence begins with ``pairs`` keys, each followed by its value. Each key comes back once, at an even place of the
    rest, and the value is to be predicted there. Two hops: a layer has to bring the key to its value's place before
    another can find the value by it.

    :param vocab: tokens; keys are from ``1 .. vocab / 2 - 1``, values from the upper half. 0 fills the rest.
    :param power: in hundredths, ``a`` of the places' distribution ``p(g) ~ a g^(a - 1)``: 100 is uniform, and the
        published setting, 1, puts most queries close after the pairs.
    """

    vocab: int = 8192
    pairs: int = 16
    power: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab < 4 or self.pairs > self.vocab // 2 - 1:
            raise ValueError(f"vocab={self.vocab}: too small for pairs={self.pairs}, at least {2 * self.pairs + 2}")
        if self._slots < self.pairs:
            raise ValueError(
                f"pairs={self.pairs}: more than the {max(self._slots, 0)} places that length={self.length} leaves"
            )

    @property
    def _slots(self) -> int:
        return (self.length - 2 * self.pairs) // 2

    @property
    def vocab_size(self) -> int:
        return self.vocab

    @property
    def chance(self) -> float:
        return 1 / self.pairs

    def draw(self, rng: np.random.Generator, n: int) -> Batch:
        half, P = self.vocab // 2, self.pairs
        ids, labels, distances = self._empty(n)
        keys = 1 + _distinct(rng, n, half - 1, P)
        values = half + _distinct(rng, n, self.vocab - half, P)
        ids[:, 0 : 2 * P : 2], ids[:, 1 : 2 * P : 2] = keys, values
        a = self.power / 100
        weight = a * np.arange(1, self._slots + 1) ** (a - 1)
        # Places without replacement, with these weights: the P smallest of exponential waiting times.
        waiting = rng.exponential(size=(n, self._slots)) / weight
        places = 2 * P + 2 * rng.permuted(np.argpartition(waiting, P - 1, axis=1)[:, :P], axis=1)
        rows = np.arange(n)[:, None]
        ids[rows, places], labels[rows, places] = keys, values
        distances[rows, places] = places - (2 * np.arange(P) + 1)
        return Batch(ids, labels, distances)


def _distinct(rng: np.random.Generator, n: int, below: int, count: int) -> np.ndarray:
    """``count`` different numbers from ``0 .. below - 1`` in each of ``n`` rows."""
    return rng.permuted(np.argpartition(rng.random((n, below)), count - 1, axis=1)[:, :count], axis=1)


@dataclass(frozen=True)
class Copying(Task):
    """A span of random tokens, and the same span again at a distance that is uniform over what the length allows.

    A marker precedes the second span, so that it is known where to begin; each of its tokens is to be predicted.

    :param span: tokens of the span; ``symbols``: different tokens it is made of.
    """

    span: int = 8
    symbols: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if 2 * self.span + 1 > self.length:
            raise ValueError(f"span={self.span}: two spans and a marker do not fit length={self.length}")

    @property
    def vocab_size(self) -> int:
        return self.symbols + 2

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    def draw(self, rng: np.random.Generator, n: int) -> Batch:
        T, S, marker, blank = self.length, self.span, self.symbols, self.symbols + 1
        ids, labels, distances = self._empty(n)
        ids[:] = blank
        shift = rng.integers(S + 1, T - S + 1, n)  # from the first span to the second
        start = rng.integers(0, T - S - shift + 1)
        rows = np.arange(n)[:, None]
        span = rng.integers(0, self.symbols, (n, S))
        here = start[:, None] + np.arange(S)
        there = here + shift[:, None]
        ids[rows, here], ids[rows, there] = span, span
        ids[rows, there[:, :1] - 1] = marker
        labels[rows, there - 1] = span  # a token is predicted one place before it stands
        distances[rows, there - 1] = shift[:, None] - 1
        return Batch(ids, labels, distances)


@dataclass(frozen=True)
class SelectiveCopying(Task):
    """Selective copying with the settings of MAD (arXiv 2403.17844): tokens among blanks, to be repeated in order.

    :param tokens: how many there are to copy; ``symbols``: different ones.
    """

    tokens: int = 16
    symbols: int = 14

    def __post_init__(self) -> None:
        super().__post_init__()
        if 2 * self.tokens + 1 > self.length:
            raise ValueError(f"tokens={self.tokens}: they do not fit twice into length={self.length}")

    @property
    def vocab_size(self) -> int:
        return self.symbols + 2  # a blank and a marker

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    def draw(self, rng: np.random.Generator, n: int) -> Batch:
        T, S, marker, blank = self.length, self.tokens, self.symbols, self.symbols + 1
        ids, labels, distances = self._empty(n)
        ids[:] = blank
        rows, answers = np.arange(n)[:, None], np.arange(T - S, T)
        tokens = rng.integers(0, self.symbols, (n, S))
        places = np.sort(_distinct(rng, n, T - S - 1, S), axis=1)
        ids[rows, places] = tokens
        ids[:, T - S - 1] = marker
        labels[:, answers] = tokens
        distances[:, answers] = answers - places
        return Batch(ids, labels, distances)


TASKS: Mapping[str, type[Task]] = {
    "one_hop": OneHop,
    "two_hop": TwoHop,
    "copying": Copying,
    "selective_copying": SelectiveCopying,
}
"""The tasks by name."""


def build_task(name: str, **options: Any) -> Task:
    """A task by name.

    :raises ValueError: there is no such task or option, or a value that the task cannot be made with.
    """
    if name not in TASKS:
        raise ValueError(f"task={name!r}: no such task{nearest(name, TASKS)} (known: {', '.join(TASKS)})")
    known = [field.name for field in fields(TASKS[name])]
    for key in options:
        if key not in known:
            raise ValueError(f"{key}: {name} has no such option{nearest(key, known)} (known: {', '.join(known)})")
    return TASKS[name](**options)
