"""Where chunks come from: local files by glob, or a hub dataset streamed with ``datasets``."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import zstandard

from ..files import matching
from .chunks import BrokenFileError, Chunk, Position
from .config import SourceConfig
from .readers import cells, file_kind, group_rows, read_file, read_pieces, unpack, whole_lines
from .tokenizer import sha256

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    name: str
    """The same on every machine: relative to the folder that all of the source's local files share."""
    size: int | None
    """Bytes; None where the hub did not say."""


class Source(Protocol):
    """Files in a fixed order, read chunk by chunk."""

    files: list[SourceFile]
    origin: dict[str, Any]
    """Where the files are from, for the manifest."""

    def read(self, index: int, start: Position) -> Iterator[Chunk]:
        """The chunks of one file from ``start`` on.

        :raises ValueError: the file is gone, or the network is.
        """
        ...


def open_source(config: SourceConfig, index: int, *, max_document_bytes: int) -> Source:
    """:raises ValueError: nothing to read, or no permission to."""
    if config.hub:
        return HubSource(config, index, max_document_bytes=max_document_bytes)
    return LocalSource(config, index, max_document_bytes=max_document_bytes)


def listing(files: list[SourceFile]) -> str:
    """A hash of the names and sizes of all of a source's files: what parts prepared apart must have found alike."""
    return sha256(json.dumps([[file.name, file.size] for file in files]).encode())


def reading_order(files: list[SourceFile], seed: int | None, part: int, n_parts: int) -> list[int]:
    """The indices of this part's files, in the order to read them.

    :param seed: orders the files by a hash of it and their names; None keeps their own order.
    """
    order = list(range(len(files)))
    by_hash = sorted(order, key=lambda i: hashlib.sha256(f"{seed or 0}\0{files[i].name}".encode()).digest())
    mine = set(by_hash[part::n_parts])
    return [i for i in (order if seed is None else by_hash) if i in mine]


class LocalSource:
    """Local files by glob, sorted by path."""

    def __init__(self, config: SourceConfig, index: int, *, max_document_bytes: int):
        self._options = {
            "field": config.field,
            "separator": config.separator,
            "max_document_bytes": max_document_bytes,
        }
        self._paths = _expand(config.paths, f"sources[{index}].paths")
        shared = os.path.commonpath([path.parent for path in self._paths])
        self.files = [SourceFile(os.path.relpath(path, shared), path.stat().st_size) for path in self._paths]
        self.origin = {"paths": list(config.paths)}

    def read(self, index: int, start: Position) -> Iterator[Chunk]:
        """Chunks of a file from a position on."""
        path = self._paths[index]
        try:
            yield from read_file(path, self.files[index].name, start, **self._options)  # type: ignore[arg-type]
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}; correct it and run the same command again") from error


def _expand(patterns: list[str], key: str) -> list[Path]:
    found: set[Path] = set()
    for pattern in patterns:
        files = {path.absolute() for path in matching(os.path.expanduser(pattern)) if not path.is_dir()}
        if not files:
            raise ValueError(f"{key}: no file matches {pattern!r}")
        found |= files
    for path in sorted(found):
        if file_kind(path) is None:
            raise ValueError(
                f"{key}: {path}: unknown kind; known are .jsonl, .json (lines as well), .txt, each also with .gz or .zst, "
                "and .parquet"
            )
        if not path.is_file():
            raise ValueError(
                f"{key}: {path}: is a pipe or a device; only files can be read again from where a run stopped"
            )
        if not os.access(path, os.R_OK):
            raise ValueError(f"{key}: {path}: no permission to read it")
    return sorted(found)


class HubSource:
    """A hub dataset, streamed.

    ``datasets`` finds and opens its files. JSON lines and text are then decompressed and parsed like those of local
    files: its JSON builder gives up on the rest of a file at the first malformed line, and where two lines' other keys
    differ in type; its text builder makes a document of every line; and both take a truncated zstd archive for a whole
    one. Other kinds go through the builder that the dataset asks for, each file one shard of its iterable dataset; there
    a file that breaks is one entry of the rejects.
    """

    def __init__(self, config: SourceConfig, index: int, *, max_document_bytes: int):
        import datasets
        from datasets.packaged_modules.text.text import Text

        self._field, self._separator, self._max_document_bytes = config.field, config.separator, max_document_bytes
        self._what = f"sources[{index}].hub={config.hub!r}"
        try:
            builder = datasets.load_dataset_builder(
                config.hub, config.name, data_files=config.data_files or None, revision=config.revision
            )
        except Exception as error:  # datasets, huggingface_hub and their HTTP clients each raise kinds of their own
            raise self._unreachable(error) from error
        names = (builder.config.data_files or {}).get(config.split)
        if names is None:
            known = ", ".join(map(str, builder.config.data_files or {}))
            raise ValueError(f"sources[{index}].split={config.split!r}: {config.hub} has {known}")
        self._names = [str(name) for name in names]
        if all(map(_is_jsonl, self._names)):
            self._kind = "jsonl"
        elif isinstance(builder, Text):
            self._kind = "text"
            if other := next((name for name in self._names if file_kind(_path(name)) != "text"), None):
                raise ValueError(
                    f"sources[{index}].data_files: {other} is no .txt, as other files are; choose those of one kind"
                )
        else:
            self._kind = "rows"
            self._stream = self._streamed(builder, config.split)
        local = Path(str(config.hub)).is_dir()
        shared = os.path.commonpath([os.path.dirname(name) for name in self._names]) if local else ""
        self.files = [
            SourceFile(os.path.relpath(name, shared) if local else name, os.path.getsize(name) if local else None)
            for name in self._names
        ]
        self.origin = {
            "hub": config.hub,
            "name": config.name,
            "split": config.split,
            "data_files": list(config.data_files),
            "revision": None if local else _revision(self._names, config.revision),
        }
        if self._kind == "text":  # earlier versions made a document of every line: their work cannot be continued
            self.origin["kind"] = "text"

    def read(self, index: int, start: Position) -> Iterator[Chunk]:
        """Chunks of a file from a position on."""
        name, pieces = self.files[index].name, partial(self._pieces, index)
        if self._kind == "text":
            return read_pieces(
                pieces, "text", name, start, separator=self._separator, max_document_bytes=self._max_document_bytes
            )
        if self._kind == "rows":
            return group_rows(self._rows(index, start.offset), name, start)
        lines = whole_lines(data for data, _share in pieces(0))
        return group_rows(((line, 0.0) for line in itertools.islice(lines, start.offset, None)), name, start, "jsonl")

    def _streamed(self, builder: datasets.DatasetBuilder, split: str) -> datasets.IterableDataset:
        try:
            stream = builder.as_streaming_dataset(split=split)
        except Exception as error:
            raise self._unreachable(error) from error
        if stream.num_shards != len(self._names):
            raise ValueError(
                f"{self._what}: {len(self._names)} files but {stream.num_shards} shards: cannot resume in it"
            )
        return stream

    def _pieces(self, index: int, start: int) -> Iterator[tuple[bytes, float]]:
        """The bytes of a file; how much of it they are is not known."""
        from datasets.utils.file_utils import xopen

        name = self._names[index]
        try:
            with xopen(name, "rb") as file:
                yield from ((data, 0.0) for data in unpack(file, _path(name).suffix, start))
        except BrokenFileError:
            raise
        except Exception as error:
            raise self._sorted_out(error) from error

    def _rows(self, index: int, start: int) -> Iterator[tuple[bytes | None, float]]:
        one_file = self._stream.shard(num_shards=len(self.files), index=index)
        row = 0
        batches = one_file.with_format("arrow").iter(batch_size=256)
        while True:
            try:
                table = next(batches)
            except StopIteration:
                break
            except Exception as error:
                raise self._sorted_out(error) from error
            for cell in self._cells(table):
                row += 1
                if row > start:
                    yield cell, 0.0
        if _path(self._names[index]).suffix in (".zst", ".zstd"):  # datasets takes a truncated one for whole
            deque(self._pieces(index, 0), maxlen=0)

    def _cells(self, table: pa.Table) -> list[bytes | None]:
        if self._field not in table.column_names:
            raise BrokenFileError(f"no column {self._field!r} (has {', '.join(table.column_names)})")
        return cells(table.column(self._field), self._field)

    def _sorted_out(self, error: Exception) -> Exception:
        """A file that will never read any better is a reject; anything else (the network above all) stops the run."""
        for cause in _causes(error):
            if isinstance(cause, (pa.ArrowException, UnicodeDecodeError, EOFError, zlib.error, zstandard.ZstdError)):
                return BrokenFileError(f"unreadable: {' '.join(str(cause).split())}")
            if isinstance(cause, gzip.BadGzipFile):
                return BrokenFileError(f"corrupt gzip archive: {cause}")
        return self._unreachable(error)

    def _unreachable(self, error: Exception) -> ValueError:
        reason = next(itertools.islice(str(error).splitlines(), 1), "")
        return ValueError(
            f"{self._what}: {type(error).__name__}: {reason}; check the name, the revision and the network, "
            "then run the same command again"
        )


def _is_jsonl(name: str) -> bool:
    """Whether a hub dataset's file is JSON lines by its name; ``.json`` there may be one array, which its builder knows."""
    path = _path(name)
    return file_kind(path) == "jsonl" and ".json" not in path.suffixes[-2:]


def _path(name: str) -> Path:
    """What a hub dataset's file is called, for its ending."""
    return Path(name.split("?")[0])


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _revision(names: list[str], asked: str | None) -> str | None:
    """The commit in ``hf://datasets/owner/name@commit/file``."""
    found = {name.split("@", 1)[1].split("/", 1)[0] for name in names if "@" in name}
    return found.pop() if len(found) == 1 else asked
