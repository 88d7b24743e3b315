"""What goes wrong with data, as one line for the user."""

from __future__ import annotations


class DataError(ValueError):
    """Something that the user can mend: one line that says what was expected, what was found and what to do."""
