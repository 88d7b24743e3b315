"""Local files to chunks: JSON lines, text and Parquet, plain, gzip or zstd.

Where a chunk ends depends on the bytes after its start alone, never on how they happened to arrive, so a reader that
starts again from any chunk's end yields the same chunks.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from .chunks import CHUNK_BYTES, CHUNK_DOCUMENTS, BrokenFileError, Chunk, Position, Reject

READ_BYTES = 2**18
_COMPRESSIONS = (".gz", ".zst", ".zstd")
_KINDS = {".jsonl": "jsonl", ".txt": "text", ".parquet": "parquet"}


def file_kind(path: Path) -> str | None:
    """``jsonl``, ``text`` or ``parquet`` by the file's ending; None for any other."""
    suffixes = path.suffixes
    compressed = bool(suffixes) and suffixes[-1] in _COMPRESSIONS
    kind = _KINDS.get("".join(suffixes[-2:-1] if compressed else suffixes[-1:]))
    return None if compressed and kind == "parquet" else kind


def read_file(
    path: Path, name: str, start: Position, *, field: str, separator: str | None, max_document_bytes: int
) -> Iterator[Chunk]:
    """The chunks of a file from ``start`` on.

    :param name: what to call the file in chunks and rejects.
    :param separator: between the documents of a text file; None takes it as one.
    :raises OSError: the file cannot be opened or read.
    """
    kind = file_kind(path)
    if kind == "parquet":
        yield from group_rows(parquet_cells(path, field, start.offset), name, start)
    elif kind == "text" and separator is None:
        yield from _whole(path, name, start, max_document_bytes)
    else:
        assert kind is not None
        delimiter = b"\n" if kind == "jsonl" else (separator or "").encode()
        # JSON escapes and the keys beside the text take room of their own; the text itself is measured once decoded
        yield from _delimited(path, name, kind, delimiter, start, 4 * max_document_bytes)


def _delimited(path: Path, name: str, kind: str, delimiter: bytes, start: Position, longest: int) -> Iterator[Chunk]:
    buffer, position, share = bytearray(), start, 0.0
    source, broken = byte_chunks(path, start.offset), None
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
        if len(buffer) >= CHUNK_BYTES + longest + len(delimiter):
            # no document ends in the chunk's window: what precedes the last delimiter is sound, what follows too long
            last = buffer.rfind(delimiter, 0, CHUNK_BYTES)
            begin = last + len(delimiter) if last >= 0 else 0
            payload = bytes(buffer[:begin])
            first, position = position.number + 1, _after(position, payload, delimiter)
            skipped = _skip_document(buffer[begin:], source, buffer, delimiter)
            reject = Reject(name, position.number + 1, f"longer than {longest} bytes")
            position = Position(position.offset + skipped, position.number + 1)
            yield Chunk(kind, payload, name, first, position, rejects=(reject,), share=share)
    yield from _rest(buffer, broken, kind, name, position, delimiter)


def _skip_document(seen: bytearray, source: Iterator[tuple[bytes, float]], buffer: bytearray, delimiter: bytes) -> int:
    """Read past the end of an overlong document without keeping it; leave what follows in ``buffer``.

    :returns: the document's bytes, delimiter included.
    """
    tail, skipped = seen, 0
    while (end := tail.find(delimiter)) < 0:
        keep = len(delimiter) - 1
        skipped += len(tail) - min(keep, len(tail))
        tail = tail[len(tail) - min(keep, len(tail)) :]
        try:
            data, _share = next(source)
        except (StopIteration, BrokenFileError):
            buffer.clear()
            return skipped + len(tail)
        tail = tail + data
    buffer[:] = tail[end + len(delimiter) :]
    return skipped + end + len(delimiter)


def _chunk_end(buffer: bytearray, delimiter: bytes, longest: int) -> int | None:
    """Where the chunk at the buffer's start ends: behind the first delimiter that makes it large enough."""
    found = buffer.find(delimiter, max(0, CHUNK_BYTES - len(delimiter)), CHUNK_BYTES + longest + len(delimiter))
    return None if found < 0 else found + len(delimiter)


def _after(position: Position, payload: bytes, delimiter: bytes) -> Position:
    return Position(position.offset + len(payload), position.number + payload.count(delimiter))


def _rest(
    buffer: bytearray, broken: str | None, kind: str, name: str, position: Position, delimiter: bytes
) -> Iterator[Chunk]:
    """The last documents of a file; of a broken one, only those that are whole."""
    payload = bytes(buffer)
    if broken is not None:
        payload = payload[: payload.rfind(delimiter) + len(delimiter)] if delimiter in payload else b""
    if not payload.strip():
        payload = b""
    first, end = position.number + 1, _after(position, payload, delimiter)
    rejects = () if broken is None else (Reject(name, end.number + 1, broken),)
    if payload or rejects:
        yield Chunk(kind, payload, name, first, end, rejects=rejects, share=1.0)


def _whole(path: Path, name: str, start: Position, max_document_bytes: int) -> Iterator[Chunk]:
    """A text file that is one document."""
    if start.number:
        return
    parts: list[bytes] = []
    size, reason = 0, None
    try:
        for data, _share in byte_chunks(path, 0):
            parts.append(data)
            size += len(data)
            if size > max_document_bytes:
                reason = f"longer than {max_document_bytes} bytes; is a separator: wanted?"
                break
    except BrokenFileError as error:
        reason = str(error)
    end = Position(max(1, size), 1)
    if reason is not None:
        yield Chunk("rows", [], name, 1, end, rejects=(Reject(name, 1, reason),), share=1.0)
    else:
        yield Chunk("rows", [b"".join(parts)], name, 1, end, share=1.0)


def byte_chunks(path: Path, start: int) -> Iterator[tuple[bytes, float]]:
    """A file's decompressed bytes from ``start`` on, each with the share of the file read so far.

    :raises BrokenFileError: truncated or corrupt compression, after everything in front of it was yielded.
    """
    size = max(1, path.stat().st_size)
    with open(path, "rb") as file:
        if path.suffix not in _COMPRESSIONS:
            file.seek(start)
        pieces = {".gz": _gunzip, ".zst": _unzstd, ".zstd": _unzstd}.get(path.suffix, _plain)(file)
        skip = 0 if path.suffix not in _COMPRESSIONS else start
        for data in pieces:
            if skip >= len(data):
                skip -= len(data)
                continue
            yield data[skip:] if skip else data, file.tell() / size
            skip = 0


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
        while data := file.read(READ_BYTES // 4):
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
                    raise BrokenFileError(f"no column {field!r} (has {', '.join(file.schema_arrow.names)})")
                for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=[field], use_threads=False):
                    for cell in cells(batch.column(0), field):
                        row += 1
                        if row > start:
                            yield cell, row / total
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault; pyarrow's own complaints about a file carry no errno
        raise BrokenFileError(f"no readable Parquet file: {' '.join(str(error).split())}") from error


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
    """Cells of a table, gathered to chunks; a table that breaks is a reject behind what could be read of it."""
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
        yield Chunk(kind, gathered, name, first, position, rejects=rejects, share=1.0)


def _rows_after(position: Position, rows: int) -> Position:
    return Position(position.offset + rows, position.number + rows)
