"""Text that came from a file, where it is shown: in Markdown and on a terminal, and in pictures."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

_MARKUP = re.compile(r"([\\`|<\[])")


def inline(text: str) -> str:
    """A text as it may stand in a line or a cell of Markdown, or on a terminal: it breaks no line and marks nothing up.

    Line breaks and control characters become spaces, those that turn the direction of text among them.
    """
    kept = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs") else c for c in text)
    return _MARKUP.sub(r"\\\1", kept)


def visible(text: str) -> str:
    """A text as it may be written to a terminal: its line breaks and tabs stay, other control characters are left out."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))


def inlined(value: Any) -> Any:
    """A JSON value with every text in it, keys too, as :func:`inline` has it."""
    if isinstance(value, str):
        return inline(value)
    if isinstance(value, dict):
        return {inlined(key): inlined(inner) for key, inner in value.items()}
    return [inlined(inner) for inner in value] if isinstance(value, list) else value


def figure_text(text: str) -> str:
    """A text as matplotlib shows it letter by letter, where dollars would begin a formula."""
    shown = inline(text).replace("\\", "").replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown  # which matplotlib would leave out of a legend
