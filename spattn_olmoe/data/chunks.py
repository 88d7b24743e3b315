"""What is read from a file, piece by piece: a chunk holds whole documents and knows where the next one begins."""

from __future__ import annotations

from dataclasses import dataclass

CHUNK_BYTES = 2**20
"""A chunk is the fewest documents that reach this size. Mixtures depend on it: changing it changes their shards."""
CHUNK_DOCUMENTS = 4096
"""... or this number, where documents are tiny."""


@dataclass(frozen=True)
class Position:
    """A place between two documents of a file."""

    offset: int = 0
    """Bytes (after decompression) or, in tables, rows before it."""
    number: int = 0
    """Lines, rows or documents before it."""


@dataclass(frozen=True)
class Reject:
    """Something that could not be used."""

    file: str
    number: int | None
    """Line, row or document from 1; None for a whole file."""
    reason: str
    documents: int = 1
    """How many documents were lost with it, as far as is known."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents of one file, not yet decoded: that is left to the worker processes."""

    kind: str
    """What a document is made from: a line of JSON (``jsonl``), text as it stands (``text``, ``rows``)."""
    payload: bytes | list[bytes | None]
    """The documents apart, or with the file's own delimiter between them."""
    file: str
    first: int
    """Number of the first document, from 1."""
    end: Position
    rejects: tuple[Reject, ...] = ()
    """What the reader itself found wrong before ``end``."""
    share: float = 0.0
    """How much of the file is read, from 0 to 1."""
    broken: bool = False
    """Whether what follows ``end`` in the file, nobody knows how much, cannot be read."""


class BrokenFileError(Exception):
    """From here on the file cannot be read, and trying again will not help: truncated, corrupt or of another kind."""
