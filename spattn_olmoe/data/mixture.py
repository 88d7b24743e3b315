"""Which source the next chunk comes from, so that the sources' tokens keep to their weights."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

LAG = 256
"""A choice sees the token counts of chunks at least this far back, never of later ones: so it does not depend on which
of the chunks under way happened to finish first, and any number of workers draws the same mixture."""


class Mixture:
    """Always the source that is furthest behind its share, by tokens counted where known and expected elsewhere."""

    def __init__(self, weights: Sequence[float], state: dict[str, Any] | None = None):
        self.weights = list(weights)
        state = state or {"tokens": [0] * len(weights), "chunks": [0] * len(weights), "recent": []}
        self._tokens: list[int] = list(state["tokens"])
        self._chunks: list[int] = list(state["chunks"])
        self._recent: deque[tuple[int, int | None]] = deque((s, n) for s, n in state["recent"])
        """Chunks too young to be seen: their source, and their tokens once :meth:`counted`."""
        self._uncounted = 0

    def choose(self, sources: Sequence[int]) -> int:
        """The source of the next chunk, among those that are not exhausted."""
        while len(self._recent) >= LAG:
            source, tokens = self._recent.popleft()
            assert tokens is not None, "more chunks under way than the mixture's lag"
            self._tokens[source] += tokens
            self._chunks[source] += 1
        expected = [float(tokens) for tokens in self._tokens]
        typical = sum(self._tokens) / max(1, sum(self._chunks)) or 1.0
        for source, _tokens in self._recent:
            seen = self._chunks[source]
            expected[source] += self._tokens[source] / seen if seen else typical
        return min(sources, key=lambda s: (expected[s] / self.weights[s], s))

    def drawn(self, source: int) -> None:
        """A chunk of this source is under way."""
        self._recent.append((source, None))
        self._uncounted += 1

    def counted(self, source: int, tokens: int) -> None:
        """The oldest chunk under way turned out to have so many tokens."""
        place = len(self._recent) - self._uncounted
        assert self._recent[place][0] == source
        self._recent[place] = (source, tokens)
        self._uncounted -= 1

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to draw the same mixture: the chunks under way are drawn again."""
        counted = list(self._recent)[: len(self._recent) - self._uncounted]
        return {"tokens": self._tokens, "chunks": self._chunks, "recent": counted}
