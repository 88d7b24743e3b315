"""A look into a folder of shards: its documents as text, and how long they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from rich.table import Table

from .manifest import Manifest
from .tokenizer import parse_tokenizer

_WINDOW = 1 << 22


def document(manifest: Manifest, split: str, number: int) -> np.ndarray:
    """The ids of one document, without the EOS after it.

    :param number: counted from 0 over the split's shards, in order.
    :raises ValueError: the split has no such document.
    """
    if number < 0:
        raise ValueError(f"document {number}: documents are counted from 0")
    begin = 0
    pieces: list[np.ndarray] = []
    for shard in manifest.shards:
        if shard.split != split:
            continue
        if number < begin + shard.documents or pieces:
            ids = np.memmap(manifest.directory / shard.path, dtype=manifest.dtype, mode="r")
            start, end = _bounds(ids, manifest.tokenizer.eos_token_id, 0 if pieces else number - begin)
            pieces.append(np.array(ids[start:end]))
            if end < len(ids):
                return np.concatenate(pieces)
        elif number == begin + shard.documents and _is_cut(manifest, shard.path):
            # a document longer than a shard: it begins here and ends in a later one
            ids = np.memmap(manifest.directory / shard.path, dtype=manifest.dtype, mode="r")
            pieces.append(np.array(ids[_bounds(ids, manifest.tokenizer.eos_token_id, number - begin)[0] :]))
        begin += shard.documents
    raise ValueError(f"{manifest.directory}: expected document {number} in {split!r}, which has {begin} (from 0)")


def decode(manifest: Manifest, ids: np.ndarray) -> str:
    """A document's text, as far as the tokenizer keeps it (its normaliser may have changed some characters)."""
    tokenizer = parse_tokenizer(manifest.tokenizer_path.read_bytes(), str(manifest.tokenizer_path))
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def histogram(lengths: Sequence[int]) -> Table:
    """Documents by length in powers of two, as bars.

    :param lengths: ``manifest.statistics["lengths"]``.
    """
    table = Table(title="document lengths, tokens", show_header=False)
    used = [power for power, count in enumerate(lengths) if count]
    if not used:
        return table
    largest = max(lengths)
    for power in range(used[0], used[-1] + 1):
        bar = "█" * round(40 * lengths[power] / largest) or ("▏" if lengths[power] else "")
        table.add_row(f"{2**power:,} to {2 ** (power + 1) - 1:,}", f"{lengths[power]:,}", bar)
    return table


def _is_cut(manifest: Manifest, path: str) -> bool:
    ids = np.memmap(manifest.directory / path, dtype=manifest.dtype, mode="r")
    return int(ids[-1]) != manifest.tokenizer.eos_token_id


def _bounds(ids: np.ndarray, eos: int, number: int) -> tuple[int, int]:
    """Where the ``number``-th document of a shard begins, and where its EOS is (the shard's end if it has none)."""
    start = 0
    for i, end in enumerate(_eos_places(ids, eos)):
        if i == number:
            return start, end
        start = end + 1
    return start, len(ids)


def _eos_places(ids: np.ndarray, eos: int) -> Iterator[int]:
    for begin in range(0, len(ids), _WINDOW):
        yield from (begin + int(i) for i in np.flatnonzero(ids[begin : begin + _WINDOW] == eos))
