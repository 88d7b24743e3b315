"""Chunks to texts: what counts as a document, and why something does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import NamedTuple

from .chunks import Chunk, Reject
from .readers import Delimiter


class Document(NamedTuple):
    """One document.

    :param number: its line, row or place in the file, from 1.
    """

    number: int
    text: str
    utf8: bytes


def texts(chunk: Chunk, *, field: str, separator: str | None, max_document_bytes: int) -> Iterator[Document | Reject]:
    """Each document of a chunk, or the reason why it is none."""
    for number, raw in enumerate(_split(chunk, separator), start=chunk.first):
        if chunk.kind == "jsonl" and raw is not None and not raw.strip():
            continue  # a blank line is no document
        text = _json_text(raw, number, field) if chunk.kind == "jsonl" else _text(raw, number, field)
        encoded = _sound(text, max_document_bytes)
        if isinstance(encoded, _Bad):
            yield Reject(chunk.file, number, encoded.reason)
        else:
            assert isinstance(text, str)
            yield Document(number, text, encoded)


_DECODER = json.JSONDecoder(parse_int=lambda digits: 0)
"""Numbers are not read: Python refuses integers of thousands of digits, which JSON allows beside the text."""


class _Bad:
    def __init__(self, reason: str):
        self.reason = reason


def _split(chunk: Chunk, separator: str | None) -> list[bytes | None]:
    if isinstance(chunk.payload, list):
        return chunk.payload
    if not chunk.payload:
        return []
    delimiter = Delimiter(separator if chunk.kind == "text" and separator else "\n")
    pieces: list[bytes | None] = [*delimiter.split(chunk.payload)]
    last = pieces[-1]
    if last is not None and not last.strip():
        pieces.pop()  # what follows the last delimiter
    return [p and p.strip(b"\r\n") for p in pieces] if chunk.kind == "text" else pieces


def _decode(raw: bytes, number: int) -> str | _Bad:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        return _Bad(f"not UTF-8: {error.reason} at byte {error.start}")


def _text(raw: bytes | None, number: int, field: str) -> str | _Bad:
    return _Bad(f"{field!r} is null") if raw is None else _decode(raw, number)


def _json_text(raw: bytes | None, number: int, field: str) -> str | _Bad:
    assert raw is not None
    line = _decode(raw, number)
    if isinstance(line, _Bad):
        return line
    try:
        record = _DECODER.decode(line)
    except ValueError as error:
        return _Bad(f"malformed JSON: {error}")
    except RecursionError:
        return _Bad("malformed JSON: nested too deeply")
    if not isinstance(record, dict):
        return _Bad(f"no JSON object but {type(record).__name__}")
    if field not in record:
        return _Bad(f"no field {field!r} (has {', '.join(map(repr, record)) or 'none'})"[:200])
    text = record[field]
    return text if isinstance(text, str) else _Bad(f"field {field!r} is {type(text).__name__}, no text")


def _sound(text: str | _Bad, max_document_bytes: int) -> bytes | _Bad:
    if isinstance(text, _Bad):
        return text
    if not text or text.isspace():
        return _Bad("empty document")
    try:
        encoded = text.encode("utf-8")
    except UnicodeEncodeError as error:
        return _Bad(f"not Unicode: {error.reason} at character {error.start}")
    if len(encoded) > max_document_bytes:
        return _Bad(f"{len(encoded)} bytes of text, more than max_document_bytes={max_document_bytes}")
    return encoded
