"""What is settled before the first document is read: files, tokenizer, dtype, and what the bytes depend on."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import replace_file
from . import manifest, progress
from .chunks import CHUNK_BYTES, CHUNK_DOCUMENTS, Position, Reject
from .config import DataConfig, parse_part
from .documents import texts
from .encode import Settings
from .manifest import FORMAT, TokenizerRecord
from .mixture import LAG
from .sources import Source, listing, open_source, reading_order
from .tokenizer import (
    EOS,
    PAD,
    check_unforgeable,
    file_bytes,
    find_tokenizer,
    parse_tokenizer,
    sha256,
    special_id,
    train_tokenizer,
    vocab_size,
)

TOKENIZER_FILE = "tokenizer.json"


@dataclass
class Plan:
    """A config, resolved."""

    config: DataConfig
    folder: Path
    """Where this part's shards go."""
    sources: list[Source]
    orders: list[list[int]]
    """Per source: the files of this part, in the order to read them."""
    tokenizer: TokenizerRecord
    settings: Settings
    max_tokens: int | None
    """This part's own."""

    @property
    def options(self) -> dict[str, Any]:
        """What the shards' bytes depend on. A run resumes an earlier one's work only where these agree."""
        c = self.config
        return {
            "tokenizer": {
                **{k: v for k, v in dataclasses.asdict(self.tokenizer).items() if k not in ("identifier", "origin")},
                **({} if c.tokenizer.train_vocab_size is None else {"train_bytes": c.tokenizer.train_bytes}),
            },
            "dtype": self.settings.dtype,
            "shard_bytes": c.shard_bytes,
            "validation_share": c.validation_share,
            "max_tokens": c.max_tokens,
            "max_document_bytes": c.max_document_bytes,
            "sequence_length": c.sequence_length,
            "when_exhausted": c.when_exhausted,
            "shuffle_files": c.shuffle_files,
            "seed": c.seed,
            "part": c.part,
            "chunk": [CHUNK_BYTES, CHUNK_DOCUMENTS, LAG],
            "versions": {"format": FORMAT, "tokenizers": importlib.metadata.version("tokenizers")},
            "sources": [
                {
                    "field": s.field,
                    "separator": s.separator,
                    "weight": s.weight,
                    **{k: v for k, v in source.origin.items() if k in ("hub", "name", "split", "revision", "kind")},
                    "files": [[source.files[i].name, source.files[i].size] for i in order],
                    # after the part's own, which say what has changed
                    "files_of_all_parts": listing(source.files),
                }
                for s, source, order in zip(c.sources, self.sources, self.orders, strict=True)
            ],
        }


def part_folder(output: str, part: str) -> Path:
    """The folder of one part: ``output`` itself where there is only one."""
    i, n = parse_part(part)
    return Path(output) if n == 1 else Path(output) / f"part-{i:04d}-of-{n:04d}"


def make_plan(config: DataConfig) -> Plan:
    """Find the files and the tokenizer (train it where that is asked for), and choose the dtype.

    :raises ValueError: a source, a tokenizer or an output folder that cannot be had.
    """
    part, n_parts = parse_part(config.part)
    folder = part_folder(config.output, config.part)
    sources = [open_source(s, i, max_document_bytes=config.max_document_bytes) for i, s in enumerate(config.sources)]
    orders = []
    for i, source in enumerate(sources):
        if len(source.files) < n_parts:
            raise ValueError(
                f"part={config.part}: sources[{i}] has {len(source.files)} files, too few for {n_parts} parts"
            )
        orders.append(reading_order(source.files, config.seed if config.shuffle_files else None, part, n_parts))
    make_folder(folder)
    data, origin = _tokenizer_bytes(config, folder, sources)
    record, dtype = _describe_tokenizer(config, data, origin)
    settings = Settings(
        tokenizer=data,
        eos_token_id=record.eos_token_id,
        dtype=dtype,
        validation_share=config.validation_share,
        max_document_bytes=config.max_document_bytes,
        fields=tuple(s.field for s in config.sources),
        separators=tuple(s.separator for s in config.sources),
    )
    share = None if config.max_tokens is None else (config.max_tokens + n_parts - 1 - part) // n_parts
    return Plan(config, folder, sources, orders, record, settings, share)


def place_tokenizer(plan: Plan) -> None:
    """Put the tokenizer beside the shards.

    :raises ValueError: another one is there: the shards would be decoded with it.
    """
    path, data = plan.folder / TOKENIZER_FILE, plan.settings.tokenizer
    if not path.exists():
        replace_file(path, data)
    elif path.read_bytes() != data:
        raise ValueError(
            f"{path}: is another tokenizer than this run's ({plan.tokenizer.identifier}); delete it or choose another output"
        )


def make_folder(folder: Path) -> None:
    """:raises ValueError: it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output: {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"output: {folder}: no permission to write in it")


def _tokenizer_bytes(config: DataConfig, folder: Path, sources: list[Source]) -> tuple[bytes, str]:
    if config.tokenizer.train_vocab_size is None:
        return find_tokenizer(config.tokenizer)
    if parse_part(config.part)[1] > 1:
        raise ValueError(
            "tokenizer.train_vocab_size: cannot be used with parts, each machine would train on its own; train "
            "one first on a small corpus and give its tokenizer.json as tokenizer.identifier"
        )
    path = folder / TOKENIZER_FILE
    # only beside work whose options say what it was trained on; one by itself may be of other sources
    if path.is_file() and any((folder / name).exists() for name in (manifest.NAME, progress.NAME)):
        return path.read_bytes(), "trained"
    return file_bytes(train_tokenizer(_training_texts(config, sources), config.tokenizer.train_vocab_size)), "trained"


def _training_texts(config: DataConfig, sources: list[Source]) -> Iterator[str]:
    """The first ``tokenizer.train_bytes`` of text, shared between the sources by their weights."""
    total = sum(s.weight for s in config.sources)
    for s, source in zip(config.sources, sources, strict=True):
        left = config.tokenizer.train_bytes * s.weight / total
        order = reading_order(source.files, config.seed if config.shuffle_files else None, 0, 1)
        chunks = (chunk for i in order for chunk in source.read(i, Position()))
        for chunk in chunks:
            for item in texts(
                chunk, field=s.field, separator=s.separator, max_document_bytes=config.max_document_bytes
            ):
                if not isinstance(item, Reject):
                    yield item.text
                    left -= len(item.utf8)
            if left <= 0:
                break


def _describe_tokenizer(config: DataConfig, data: bytes, origin: str) -> tuple[TokenizerRecord, str]:
    section = config.tokenizer
    name = section.identifier or f"byte-level BPE of {section.train_vocab_size} ids"
    tokenizer = parse_tokenizer(data, name)
    size = vocab_size(tokenizer)
    if section.train_vocab_size not in (None, size):
        raise ValueError(
            f"tokenizer.train_vocab_size: expected {section.train_vocab_size}, found {size} ids in the "
            f"{TOKENIZER_FILE} of an earlier run in {config.output}; choose another output"
        )
    smallest = "uint16" if size <= np.iinfo(np.uint16).max + 1 else "uint32"
    if config.dtype == "uint16" and smallest != "uint16":
        raise ValueError(f"dtype=uint16: holds ids below 65536, the tokenizer has {size}; use uint32 or auto")
    record = TokenizerRecord(
        identifier=name,
        origin=origin,
        path=TOKENIZER_FILE,
        sha256=sha256(data),
        vocab_size=size,
        eos_token_id=special_id(tokenizer, "eos_token_id", section.eos_token_id, EOS),
        pad_token_id=special_id(tokenizer, "pad_token_id", section.pad_token_id, PAD),
    )
    check_unforgeable(tokenizer, record.eos_token_id)
    return record, smallest if config.dtype == "auto" else config.dtype
