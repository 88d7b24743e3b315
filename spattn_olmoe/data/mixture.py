"""Which source the next chunk comes from, so that the sources' tokens keep to their weights."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

LAG = 256
"""The choice of chunk ``i`` sees the token counts of chunks below ``i - LAG + 1`` and of no later ones: so it does not
depend on which of the chunks under way (always fewer than this) happened to finish first, or were lost in a crash."""


class Mixture:
    """Always the source that is furthest behind its share, by tokens counted where seen and expected elsewhere.

    :param state: what :meth:`state` returned; chunks that were under way then are drawn again.
    """

    def __init__(self, weights: Sequence[float], state: dict[str, Any] | None = None):
        self.weights = list(weights)
        state = state or {"tokens": [0] * len(weights), "chunks": [0] * len(weights), "recent": []}
        self._seen = _Totals(state["tokens"], state["chunks"])
        """All chunks below index ``_n_seen``: what a choice may look at."""
        self._n_seen = 0
        self._kept = _Totals(state["tokens"], state["chunks"])
        """All chunks before the log: those that no state can need any more."""
        self._log: deque[tuple[int, int | None]] = deque((source, tokens) for source, tokens in state["recent"])
        """Chunks from index ``_begin`` on: their source, and their tokens once :meth:`counted`."""
        self._begin = 0
        self._n_counted = len(self._log)
        self._n_drawn = [sum(source == s for source, _ in self._log) for s in range(len(weights))]
        """Chunks per source that are drawn and not seen."""

    def choose(self, sources: Sequence[int]) -> int:
        """The source of the next chunk, among those that are not exhausted."""
        self._see(self._begin + len(self._log) - (LAG - 1))
        typical = sum(self._seen.tokens) / max(1, sum(self._seen.chunks)) or 1.0

        def behind(source: int) -> tuple[float, int]:
            tokens, chunks = self._seen.tokens[source], self._seen.chunks[source]
            expected = tokens + self._n_drawn[source] * (tokens / chunks if chunks else typical)
            return expected / self.weights[source], source

        return min(sources, key=behind)

    def drawn(self, source: int) -> None:
        """A chunk of this source is under way."""
        self._log.append((source, None))
        self._n_drawn[source] += 1

    def counted(self, source: int, tokens: int) -> None:
        """The oldest chunk under way turned out to have so many tokens."""
        place = self._n_counted - self._begin
        assert self._log[place] == (source, None)
        self._log[place] = (source, tokens)
        self._n_counted += 1

    def state(self) -> dict[str, Any]:
        """What a later run needs to choose as this one would have after the last counted chunk."""
        recent = list(self._log)[: self._n_counted - self._begin]
        older = _Totals(self._kept.tokens, self._kept.chunks)
        while len(recent) > LAG - 1:
            older.add(*recent.pop(0))
        return {"tokens": older.tokens, "chunks": older.chunks, "recent": recent}

    def _see(self, end: int) -> None:
        while self._n_seen < end:
            source, tokens = self._log[self._n_seen - self._begin]
            self._seen.add(source, tokens)
            self._n_drawn[source] -= 1
            self._n_seen += 1
        # the oldest that a state may need is LAG - 1 before the last counted one
        while self._begin < self._n_counted - 2 * LAG:
            self._kept.add(*self._log.popleft())
            self._begin += 1


class _Totals:
    """Tokens and chunks per source."""

    def __init__(self, tokens: Sequence[int], chunks: Sequence[int]):
        self.tokens, self.chunks = list(tokens), list(chunks)

    def add(self, source: int, tokens: int | None) -> None:
        assert tokens is not None, "more chunks under way than the mixture's lag"
        self.tokens[source] += tokens
        self.chunks[source] += 1
