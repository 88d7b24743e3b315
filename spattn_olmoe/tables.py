"""Tables in Markdown, for every report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_MARKS = {"l": "---", "r": "---:"}


def table(head: Sequence[str], body: Iterable[Sequence[str]], columns: str = "lr", *, tight: bool = False) -> str:
    """A table of as many lines as ``body`` has rows, and two.

    :param columns: ``l`` or ``r`` for each column, aligned to the left or right; the last letter holds for all that follow.
    :param tight: no spaces in the line between head and body.
    """
    pad = "" if tight else " "
    marks = (f"{pad}{_MARKS[side]}{pad}" for side in columns.ljust(len(head), columns[-1])[: len(head)])
    first, *lines = ("| " + " | ".join(cells) + " |" for cells in [head, *body])
    return "\n".join([first, f"|{'|'.join(marks)}|", *lines])
