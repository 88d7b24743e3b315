"""Token shards: headerless arrays of at most a given size, appended to, and cut back to a checkpoint after a crash."""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..files import hash_file, sync_folder

UNFINISHED = ".partial"


@dataclass(frozen=True)
class Shard:
    """One finished shard."""

    path: str
    """Relative to the manifest."""
    split: str
    tokens: int
    documents: int
    """Documents that end in it."""
    sha256: str


class ShardWriter:
    """Writes one split. A shard carries the ending ``.partial`` until it is full.

    :param shard_bytes: the most bytes of a shard.
    :param state: what :meth:`checkpoint` returned; whatever was written after it is cut off.
    """

    def __init__(self, folder: Path, split: str, dtype: str, shard_bytes: int, state: dict[str, Any] | None = None):
        self.folder, self.split, self.dtype = folder, split, np.dtype(dtype)
        self.capacity = shard_bytes // self.dtype.itemsize
        state = state or {"finished": [], "tokens": 0, "documents": 0}
        self.finished = [Shard(**shard) for shard in state["finished"]]
        self._tokens: int = state["tokens"]
        self._documents: int = state["documents"]
        self._file: BinaryIO | None = None
        self._cut_back()

    @property
    def tokens(self) -> int:
        """Tokens of this split so far."""
        return self._tokens + sum(shard.tokens for shard in self.finished)

    def append(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Add documents laid end to end; one that does not fit any more opens the next shard.

        :param tokens: ids of all documents, of the shard's dtype.
        :param lengths: tokens of each document.
        """
        assert tokens.dtype == self.dtype and int(lengths.sum()) == len(tokens)
        ends = np.cumsum(lengths)
        written, document = 0, 0
        while document < len(lengths):
            fitting = int(np.searchsorted(ends, written + self.capacity - self._tokens, side="right"))
            if fitting > document:
                self._write(tokens[written : ends[fitting - 1]], fitting - document)
                written, document = int(ends[fitting - 1]), fitting
                continue
            if self._tokens:
                self._finish()
            if lengths[document] > self.capacity:
                self._write_overlong(tokens[written : ends[document]])
                written, document = int(ends[document]), document + 1

    def checkpoint(self) -> dict[str, Any]:
        """Make everything written durable.

        :returns: what a later writer needs to continue from here.
        """
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        finished = [asdict(shard) for shard in self.finished]
        return {"finished": finished, "tokens": self._tokens, "documents": self._documents}

    def close(self) -> list[Shard]:
        """Finish the last shard.

        :returns: all shards.
        """
        if self._tokens:
            self._finish()
        return self.finished

    def abandon(self) -> None:
        """Let go of the file without finishing it."""
        if self._file is not None:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):  # a full disk: what is lost comes after the checkpoint
                file.close()

    def _name(self, index: int) -> str:
        return f"{self.split}-{index:05d}.bin"

    def _partial(self) -> Path:
        return self.folder / (self._name(len(self.finished)) + UNFINISHED)

    def _cut_back(self) -> None:
        current = self.folder / self._name(len(self.finished))
        partial = self._partial()
        if current.exists():  # it was finished after the checkpoint
            os.replace(current, partial)
        known = {shard.path for shard in self.finished} | {partial.name}
        for path in self.folder.glob(f"{self.split}-*.bin*"):
            if path.name not in known:
                path.unlink()
        n_bytes = self._tokens * self.dtype.itemsize
        self._digest = hash_file(partial, n_bytes) if n_bytes else hashlib.sha256()
        if partial.exists():
            os.truncate(partial, n_bytes)

    def _write(self, tokens: np.ndarray, documents: int) -> None:
        if self._file is None:
            self._file = open(self._partial(), "ab")  # noqa: SIM115  # closed by _finish or abandon
        data = tokens.tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._tokens += len(tokens)
        self._documents += documents

    def _write_overlong(self, tokens: np.ndarray) -> None:
        for begin in range(0, len(tokens), self.capacity):
            piece = tokens[begin : begin + self.capacity]
            last = begin + len(piece) == len(tokens)
            self._write(piece, int(last))
            if not last:
                self._finish()

    def _finish(self) -> None:
        assert self._file is not None or self._partial().exists()
        self.checkpoint()
        self.abandon()
        name = self._name(len(self.finished))
        os.replace(self._partial(), self.folder / name)
        sync_folder(self.folder)
        self.finished.append(Shard(name, self.split, self._tokens, self._documents, self._digest.hexdigest()))
        self._tokens = self._documents = 0
        self._digest = hashlib.sha256()
