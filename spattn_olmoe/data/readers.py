"""Files to chunks: JSON lines, text and Parquet, plain, gzip or zstd.

Where a chunk ends depends on the bytes after its start alone, never on how they happened to arrive, so a reader that
starts again from any chunk's end yields the same chunks.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from .chunks import CHUNK_BYTES, CHUNK_DOCUMENTS, BrokenFileError, Chunk, Position, Reject

READ_BYTES = 2**18
_COMPRESSIONS = (".gz", ".zst", ".zstd")
_KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".txt": "text", ".parquet": "parquet"}

EXPANSION = 500
"""How many times its size an archive may grow: text compressed by gzip or zstd stays far below, and a bomb far above."""
_ALWAYS_ALLOWED = 2**24
"""Bytes that any archive may grow to: as many empty lines, which are the slowest to read, take seconds."""
_ZSTD_STEP = 2**10
"""Compressed bytes at a time: as a block of 4 may stand for 2 ** 17, this bounds what is decompressed at once to 2 ** 25."""
_BATCH_BYTES = 2**28
_BATCH_ROWS = 256


Pieces = Callable[[int], Iterator[tuple[bytes, float]]]
"""A file's decompressed bytes from an offset on, piece by piece, each with the share of the file read so far."""


def file_kind(path: Path) -> str | None:
    """``jsonl``, ``text`` or ``parquet`` by the file's ending; None for any other."""
    suffixes = path.suffixes
    compressed = bool(suffixes) and suffixes[-1] in _COMPRESSIONS
    kind = _KINDS.get("".join(suffixes[-2:-1] if compressed else suffixes[-1:]))
    return None if compressed and kind == "parquet" else kind


def read_file(
    path: Path, name: str, start: Position, *, field: str, separator: str | None, max_document_bytes: int
) -> Iterator[Chunk]:
    """The chunks of a local file from ``start`` on.

    :param name: what to call the file in chunks and rejects.
    :param separator: between the documents of a text file; None takes it as one.
    :raises OSError: the file cannot be opened or read.
    """
    kind = file_kind(path)
    if kind == "parquet":
        return group_rows(parquet_cells(path, field, start.offset), name, start)
    assert kind is not None
    pieces = partial(byte_chunks, path)
    return read_pieces(pieces, kind, name, start, separator=separator, max_document_bytes=max_document_bytes)


def read_pieces(
    pieces: Pieces, kind: str, name: str, start: Position, *, separator: str | None, max_document_bytes: int
) -> Iterator[Chunk]:
    """The chunks of a file of JSON lines or of text, wherever it lies, from ``start`` on; see :func:`read_file`."""
    if kind == "text" and separator is None:
        return _whole(pieces, name, start, max_document_bytes)
    delimiter = Delimiter(separator if kind == "text" and separator else "\n")
    # JSON escapes and the keys beside the text take room of their own; the text itself is measured once decoded
    return _delimited(pieces, name, kind, delimiter, start, 4 * max_document_bytes)


class Delimiter:
    """What stands between documents. A line break in it is one of Unix or of Windows."""

    def __init__(self, text: str):
        breaks = text.replace("\r\n", "\n").split("\n")
        self._find = re.compile(rb"\r?\n".join(re.escape(part.encode()) for part in breaks))
        self.longest = len("\r\n".join(breaks).encode())
        """Bytes of the longest form."""

    def end(self, data: bytes | bytearray, start: int, stop: int) -> int | None:
        """Where the first one between ``start`` and ``stop`` ends."""
        found = self._find.search(data, start, stop)
        return None if found is None else found.end()

    def last_end(self, data: bytes | bytearray, stop: int | None = None) -> int:
        """Where the last one before ``stop`` ends; 0 without any."""
        return max(
            (found.end() for found in self._find.finditer(data, 0, len(data) if stop is None else stop)), default=0
        )

    def count(self, data: bytes) -> int:
        """Documents that end within these bytes."""
        return sum(1 for _ in self._find.finditer(data))

    def split(self, data: bytes) -> list[bytes]:
        """What stands before, between and after them."""
        return self._find.split(data)


def _delimited(
    pieces: Pieces, name: str, kind: str, delimiter: Delimiter, start: Position, longest: int
) -> Iterator[Chunk]:
    buffer, position, share = bytearray(), start, 0.0
    source, broken = pieces(start.offset), None
    ended = False
    while not ended:
        try:
            data, share = next(source)
            buffer += data
        except StopIteration:
            ended = True
        except BrokenFileError as error:
            broken, ended = str(error), True
        while (end := _chunk_end(buffer, delimiter, longest)) is not None:
            payload = bytes(buffer[:end])
            del buffer[:end]
            first, position = position.number + 1, _after(position, payload, delimiter)
            yield Chunk(kind, payload, name, first, position, share=share)
        if len(buffer) >= CHUNK_BYTES + longest + delimiter.longest:
            # no document ends in the chunk's window: what precedes the last delimiter is sound, what follows too long
            begin = delimiter.last_end(buffer, CHUNK_BYTES)
            payload = bytes(buffer[:begin])
            first, position = position.number + 1, _after(position, payload, delimiter)
            skipped, broken = _skip_document(buffer[begin:], source, buffer, delimiter)
            ended = broken is not None
            reject = Reject(name, position.number + 1, f"longer than {longest} bytes")
            position = Position(position.offset + skipped, position.number + 1)
            yield Chunk(kind, payload, name, first, position, rejects=(reject,), share=share)
    yield from _rest(buffer, broken, kind, name, position, delimiter)


def _skip_document(
    seen: bytearray, source: Iterator[tuple[bytes, float]], buffer: bytearray, delimiter: Delimiter
) -> tuple[int, str | None]:
    """Read past the end of an overlong document without keeping it; leave what follows in ``buffer``.

    :returns: the document's bytes, delimiter included, and why the file cannot be read to its end, where that is so.
    """
    tail, skipped = bytes(seen), 0
    while (end := delimiter.end(tail, 0, len(tail))) is None:
        kept = tail[max(0, len(tail) - delimiter.longest + 1) :]
        skipped += len(tail) - len(kept)
        try:
            data, _share = next(source)
        except (StopIteration, BrokenFileError) as error:
            buffer.clear()
            return skipped + len(kept), str(error) if isinstance(error, BrokenFileError) else None
        tail = kept + data
    buffer[:] = tail[end:]
    return skipped + end, None


def _chunk_end(buffer: bytearray, delimiter: Delimiter, longest: int) -> int | None:
    """Where the chunk at the buffer's start ends: after the first delimiter that makes it large enough."""
    return delimiter.end(buffer, max(0, CHUNK_BYTES - delimiter.longest), CHUNK_BYTES + longest + delimiter.longest)


def _after(position: Position, payload: bytes, delimiter: Delimiter) -> Position:
    return Position(position.offset + len(payload), position.number + delimiter.count(payload))


def _rest(
    buffer: bytearray, broken: str | None, kind: str, name: str, position: Position, delimiter: Delimiter
) -> Iterator[Chunk]:
    """The last documents of a file; of a broken one, only those that are whole."""
    payload = bytes(buffer)
    if broken is not None:
        payload = payload[: delimiter.last_end(payload)]
    if not payload.strip():
        payload = b""
    first, end = position.number + 1, _after(position, payload, delimiter)
    rejects = () if broken is None else (Reject(name, end.number + 1, broken),)
    if payload or rejects:
        yield Chunk(kind, payload, name, first, end, rejects=rejects, share=1.0, broken=broken is not None)


def _whole(pieces: Pieces, name: str, start: Position, max_document_bytes: int) -> Iterator[Chunk]:
    """A text file that is one document."""
    if start.number:
        return
    parts: list[bytes] = []
    size, reason, broken = 0, None, False
    try:
        for data, _share in pieces(0):
            parts.append(data)
            size += len(data)
            if size > max_document_bytes:
                reason = f"longer than {max_document_bytes} bytes; is a separator: wanted?"
                break
    except BrokenFileError as error:
        reason, broken = str(error), True
    end = Position(max(1, size), 1)
    if reason is not None:
        yield Chunk("rows", [], name, 1, end, rejects=(Reject(name, 1, reason),), share=1.0, broken=broken)
    else:
        yield Chunk("rows", [b"".join(parts)], name, 1, end, share=1.0)


def byte_chunks(path: Path, start: int) -> Iterator[tuple[bytes, float]]:
    """The :data:`Pieces` of a local file.

    :raises BrokenFileError: see :func:`unpack`.
    """
    size = max(1, path.stat().st_size)
    with open(path, "rb") as file:
        if path.suffix not in _COMPRESSIONS:
            file.seek(start)
            start = 0
        for data in unpack(file, path.suffix, start):
            yield data, file.tell() / size


def unpack(file: BinaryIO, suffix: str, start: int = 0) -> Iterator[bytes]:
    """An open file's bytes, decompressed as its ending asks for, without the first ``start``.

    :raises BrokenFileError: truncated, corrupt or empty compression, after everything before it was yielded.
    """
    total = 0
    for data in {".gz": _gunzip, ".zst": _unzstd, ".zstd": _unzstd}.get(suffix, _plain)(file):
        total += len(data)
        if total > max(_ALWAYS_ALLOWED, EXPANSION * file.tell()):
            raise BrokenFileError(f"decompresses to more than {EXPANSION} times its size: no text does")
        if total > start:
            yield data[max(0, start - total + len(data)) :]
    if suffix in _COMPRESSIONS and not file.tell():
        raise BrokenFileError("empty file where an archive should be")


def whole_lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file without their line breaks; of one that breaks, those that are whole."""
    rest = bytearray()
    for data in pieces:
        first, *more = data.split(b"\n")
        rest += first
        for following in more:
            yield bytes(rest).removesuffix(b"\r")
            rest = bytearray(following)
    if rest:
        yield bytes(rest)


def _plain(file: BinaryIO) -> Iterator[bytes]:
    while data := file.read(READ_BYTES):
        yield data


def _gunzip(file: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as unzipped:
        try:
            while data := unzipped.read1(READ_BYTES):
                yield data
        except EOFError as error:
            raise BrokenFileError("truncated gzip archive") from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise BrokenFileError(f"corrupt gzip archive: {error}") from error


def _unzstd(file: BinaryIO) -> Iterator[bytes]:
    """Frame by frame, because ``zstandard``'s stream reader ends a truncated archive without a word."""
    context = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame, begun = context.decompressobj(), False
    try:
        while block := file.read(READ_BYTES // 4):
            for begin in range(0, len(block), _ZSTD_STEP):
                data = block[begin : begin + _ZSTD_STEP]
                while data:
                    begun = True
                    if decompressed := frame.decompress(data):
                        yield decompressed
                    if not frame.eof:
                        break
                    data = frame.unused_data
                    frame, begun = context.decompressobj(), False
    except zstandard.ZstdError as error:
        raise BrokenFileError(f"corrupt zstd archive: {error}") from error
    if begun:
        raise BrokenFileError("truncated zstd archive")


def parquet_cells(path: Path, field: str, start: int) -> Iterator[tuple[bytes | None, float]]:
    """A text column's cells from row ``start`` on, each with the share of the file read so far.

    :raises BrokenFileError: no Parquet, no such column, or a column of no text.
    """
    try:
        with pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True) as file:
            total = max(1, file.metadata.num_rows)
            row = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if row + rows <= start:
                    row += rows
                    continue
                if field not in file.schema_arrow.names:
                    raise BrokenFileError(f"no column {field!r} (has {_some(file.schema_arrow.names)})")
                batch_size = _rows_at_once(file.metadata.row_group(group), field)
                for batch in file.iter_batches(batch_size, row_groups=[group], columns=[field], use_threads=False):
                    for cell in cells(batch.column(0), field):
                        row += 1
                        if row > start:
                            yield cell, row / total
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault; pyarrow's own complaints about a file carry no errno
        raise BrokenFileError(f"no readable Parquet file: {' '.join(str(error).split())}") from error


def _rows_at_once(group: pq.RowGroupMetaData, field: str) -> int:
    """So few rows of a column that they fit in memory even if each is the longest entry of a dictionary."""
    columns = (group.column(i) for i in range(group.num_columns))
    stored = max((c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == field), default=1)
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, stored)))


def _some(names: list[str]) -> str:
    """The first few names of a list."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(name[:50] for name in names[:10]) + more


def cells(column: pa.Array | pa.ChunkedArray, field: str) -> list[bytes | None]:
    """A text column as bytes: whether they are UTF-8 is looked at document by document.

    :raises BrokenFileError: a column of no text.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (text or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_null(kind)):
        raise BrokenFileError(f"column {field!r} is {kind}, no text")
    if pa.types.is_null(kind):
        return [None] * len(column)
    return column.cast(pa.large_binary()).to_pylist()


def group_rows(
    rows: Iterable[tuple[bytes | None, float]], name: str, start: Position, kind: str = "rows"
) -> Iterator[Chunk]:
    """Cells of a table, gathered to chunks; a table that breaks is a reject after what could be read of it."""
    gathered: list[bytes | None] = []
    size, position, share = 0, start, 0.0
    source, broken = iter(rows), None
    while True:
        try:
            cell, share = next(source)
        except StopIteration:
            break
        except BrokenFileError as error:
            broken = str(error)
            break
        gathered.append(cell)
        size += len(cell or b"")
        if size >= CHUNK_BYTES or len(gathered) >= CHUNK_DOCUMENTS:
            first, position = position.number + 1, _rows_after(position, len(gathered))
            yield Chunk(kind, gathered, name, first, position, share=share)
            gathered, size = [], 0
    first, position = position.number + 1, _rows_after(position, len(gathered))
    rejects = () if broken is None else (Reject(name, position.number + 1, broken),)
    if gathered or rejects:
        yield Chunk(kind, gathered, name, first, position, rejects=rejects, share=1.0, broken=broken is not None)


def _rows_after(position: Position, rows: int) -> Position:
    return Position(position.offset + rows, position.number + rows)
