"""Tables in Markdown and the numbers in them, written alike in every report."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

_MARKS = {"l": "---", "r": "---:"}
FIRST_CONTEXT = 16
"""Where the first range of contexts ends by which losses are split."""


def table(head: Sequence[str], body: Iterable[Sequence[str]], columns: str = "lr") -> str:
    """A table of as many lines as ``body`` has rows, and two.

    :param columns: ``l`` or ``r`` for each column, aligned to the left or right; the last letter holds for all that follow.
    """
    marks = (_MARKS[side] for side in columns.ljust(len(head), columns[-1])[: len(head)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, list(marks), *body])


def plus_minus(value: float, error: float | None) -> str:
    """A value with its error, ``0.4956 +- 0.0140``; alone where the error is not known."""
    return f"{value:.4f}" if error is None else f"{value:.4f} +- {error:.4f}"


def mean_of(values: Sequence[float]) -> str:
    """The mean with the standard deviation; alone of one value."""
    return plus_minus(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def interval(bounds: Sequence[float]) -> str:
    """A confidence interval of a difference."""
    return f"{bounds[0]:+.4f} to {bounds[1]:+.4f}"


def p_value(p: float) -> str:
    """A p-value to four digits."""
    return f"{p:.4f}" if p >= 1e-4 else "< 0.0001"


def context_label(context: Sequence[int]) -> str:
    """A half-open range of context lengths; ``all`` for the one that holds every other."""
    lo, hi = context
    return "all" if lo == 1 and hi > FIRST_CONTEXT else f"{lo} to {hi - 1}"
