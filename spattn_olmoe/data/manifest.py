"""``manifest.json``: what a folder of shards holds, and whether that is what a run expects."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..files import hash_file, inside, replace_file
from ..json_files import check_shape, read_json
from .tokenizer import same_ids
from .writer import Shard

log = logging.getLogger(__name__)

NAME = "manifest.json"
FORMAT = "spattn_olmoe shards 1"
_SAMPLE = 4096
_PREPARE = "prepare the corpus with scripts/prepare_data.py"
_SHAPE = {
    "tokenizer": {
        "identifier": str,
        "origin": str,
        "path": str,
        "sha256": str,
        "vocab_size": int,
        "eos_token_id": int,
        "pad_token_id": int,
    },
    "dtype": str,
    "shards": [{"path": str, "split": str, "tokens": int, "documents": int, "sha256": str}],
}
_SUMMARY_SHAPE = {
    "sources": [{"weight": float, "tokens": int, "documents": int, "broken_files": int}],
    "options": {"sequence_length": int, "max_tokens": (int, None)},
    "statistics": {
        "documents": int,
        "tokens": int,
        "text_bytes": int,
        "rejects": int,
        "longer_than_sequence_length": int,
        "lengths": [int],
    },
    "versions": {str: str},
}


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that made the ids."""

    identifier: str
    origin: str
    """``file``, ``wheel``, ``hub`` or ``trained``."""
    path: str
    """Its ``tokenizer.json``, relative to the manifest."""
    sha256: str
    vocab_size: int
    eos_token_id: int
    pad_token_id: int


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``. Paths in it are relative to ``directory``."""

    directory: Path
    tokenizer: TokenizerRecord
    dtype: str
    shards: list[Shard]
    sources: list[dict[str, Any]] = field(default_factory=list)
    """Per source: where from, revision, options, every file with its size, and the documents, tokens and rejects."""
    options: dict[str, Any] = field(default_factory=dict)
    """What the shards' bytes depend on."""
    statistics: dict[str, Any] = field(default_factory=dict)
    """Document lengths and rejects."""
    part: str = "0/1"
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def train_paths(self) -> list[str]:
        """The training shards, in order, as ``NumpyFSLDatasetConfig(paths=...)`` takes them."""
        return self._paths("train")

    @property
    def validation_paths(self) -> list[str]:
        """The held-out shards."""
        return self._paths("validation")

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's file."""
        return self.directory / self.tokenizer.path

    @property
    def train_tokens(self) -> int:
        """Tokens of the training shards."""
        return self.count("train").tokens

    @property
    def validation_tokens(self) -> int:
        """Tokens of the held-out shards."""
        return self.count("validation").tokens

    def count(self, split: str) -> Shard:
        """Tokens and documents of a split, as one shard."""
        shards = [shard for shard in self.shards if shard.split == split]
        return Shard("", split, sum(s.tokens for s in shards), sum(s.documents for s in shards), "")

    def save(self) -> None:
        """Write ``manifest.json``, atomically. Equal corpora have equal manifests: there is no date in it."""
        content = {"format": FORMAT, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}}
        del content["directory"]
        content["tokenizer"] = asdict(self.tokenizer)
        content["shards"] = [asdict(shard) for shard in self.shards]
        replace_file(self.directory / NAME, (json.dumps(content, indent=1) + "\n").encode())

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Manifest:
        """Read ``manifest.json`` without looking at the shards.

        :raises ValueError: it is missing, or not written by this package.
        """
        folder = Path(directory)
        path = folder / NAME
        try:
            content = read_json(path)
        except FileNotFoundError as error:
            unfinished = " (its preparation has not finished)" if (folder / "progress.json").exists() else ""
            raise ValueError(
                f"{folder}: expected {NAME} beside the shards, found none{unfinished}; {_PREPARE}"
            ) from error
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{error}; {_PREPARE} again") from None
        found = content.pop("format", None) if isinstance(content, dict) else None
        if found != FORMAT:
            raise ValueError(f"{path}: expected format {FORMAT!r}, found {found!r}; {_PREPARE} again")
        try:
            check_shape(content, _SHAPE, str(path))
        except ValueError as error:
            raise ValueError(f"{error}; {_PREPARE} again") from None
        if content["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"{path}: dtype {content['dtype']!r} is neither uint16 nor uint32; {_PREPARE} again")
        for name in (content["tokenizer"]["path"], *(shard["path"] for shard in content["shards"])):
            inside(folder, name)
        try:
            content["tokenizer"] = TokenizerRecord(**content["tokenizer"])
            content["shards"] = [Shard(**shard) for shard in content["shards"]]
            return cls(directory=folder, **content)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: a key is missing or unknown ({error}); {_PREPARE} again") from error

    def _paths(self, split: str) -> list[str]:
        return [str(self.directory / shard.path) for shard in self.shards if shard.split == split]


def verify(
    directory: str | os.PathLike[str],
    *,
    vocab_size: int | None = None,
    eos_token_id: int | None = None,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    sequence_length: int | None = None,
    hashes: bool = False,
) -> Manifest:
    """Read the manifest and refuse shards that do not match it, or that do not match what a run expects.

    :param vocab_size: the tokenizer's number of ids (``dataset.tokenizer.vocab_size``, not the model's padded one).
    :param eos_token_id: the id after each document.
    :param dtype: ``uint16`` or ``uint32``.
    :param tokenizer: the ``tokenizer.json`` of a model or of other shards: the ids must stand for the same tokens, which
        their number does not tell.
    :param sequence_length: the run's; the training split must hold at least one sequence in one shard.
    :param hashes: read every byte: compare each shard's SHA-256 and look at every id. Without it sizes are compared
        and the first and last ids of each shard looked at.
    :raises ValueError: the first thing that does not match: what, expected, found and remedy in one line.
    """
    manifest = Manifest.load(directory)
    expectations = [
        ("tokenizer.vocab_size", vocab_size, manifest.tokenizer.vocab_size),
        ("tokenizer.eos_token_id", eos_token_id, manifest.tokenizer.eos_token_id),
        ("dtype", dtype, manifest.dtype),
    ]
    for key, expected, found in expectations:
        if expected is not None and expected != found:
            raise ValueError(
                f"{manifest.directory}: {key}: the run expects {expected}, the shards were made with {found}; "
                "change the run's config or prepare the corpus with that tokenizer"
            )
    if not manifest.train_paths:
        raise ValueError(f"{manifest.directory}: expected training shards, found none in {NAME}; {_PREPARE} again")
    _check_tokenizer(manifest)
    if tokenizer is not None and not same_ids(manifest.tokenizer_path, tokenizer):
        raise ValueError(
            f"{manifest.directory}: its shards were made with another tokenizer than that of {tokenizer.parent}; "
            f"prepare the corpus with tokenizer.identifier={tokenizer}"
        )
    for shard in manifest.shards:
        _check_shard(manifest, shard, hashes)
    if sequence_length is not None:
        _check_length(manifest, sequence_length)
    return manifest


def check_summary(manifest: Manifest) -> None:
    """Raise unless a manifest holds the counts that a summary of the corpus shows, as every finished preparation's does."""
    content = {key: getattr(manifest, key) for key in _SUMMARY_SHAPE}
    check_shape(content, _SUMMARY_SHAPE, str(manifest.directory / NAME))


def verify_shard(manifest: Manifest, shard: Shard) -> None:
    """Read every byte of one shard: its SHA-256, and that every id is in the vocabulary.

    :raises ValueError: it is not what the manifest states.
    """
    _check_shard(manifest, shard, hashes=True)


def _check_tokenizer(manifest: Manifest) -> None:
    path = manifest.tokenizer_path
    if not path.is_file():
        raise ValueError(f"{path}: expected the corpus's tokenizer, found no such file; {_PREPARE} again")
    if (found := hash_file(path).hexdigest()) != manifest.tokenizer.sha256:
        raise ValueError(f"{path}: expected SHA-256 {manifest.tokenizer.sha256}, found {found}; {_PREPARE} again")


def _check_shard(manifest: Manifest, shard: Shard, hashes: bool) -> None:
    path = manifest.directory / shard.path
    again = f"copy it again or {_PREPARE} again"
    expected = shard.tokens * np.dtype(manifest.dtype).itemsize
    try:
        found = path.stat().st_size
        with open(path, "rb") as file:
            magic = file.read(6)
    except OSError as error:
        raise ValueError(f"{path}: expected a shard of {expected} bytes, found: {error.strerror}; {again}") from error
    if magic == b"\x93NUMPY":
        raise ValueError(f"{path}: expected headerless {manifest.dtype} ids, found an np.save file; {_PREPARE} instead")
    if found != expected or found == 0:
        raise ValueError(
            f"{path}: expected {expected} bytes ({shard.tokens} {manifest.dtype} tokens), found {found}; {again}"
        )
    ids = np.memmap(path, dtype=manifest.dtype, mode="r")
    limit = manifest.tokenizer.vocab_size
    parts = np.array_split(ids, -(-len(ids) // (1 << 24))) if hashes else [ids[:_SAMPLE], ids[-_SAMPLE:]]
    largest = max(int(part.max()) for part in parts)
    if largest >= limit:
        raise ValueError(f"{path}: expected ids below vocab_size={limit}, found {largest}; {_PREPARE} again")
    if hashes and (digest := hash_file(path).hexdigest()) != shard.sha256:
        raise ValueError(f"{path}: expected SHA-256 {shard.sha256}, found {digest}; {again}")


def _check_length(manifest: Manifest, sequence_length: int) -> None:
    longest = {
        split: max((s.tokens for s in manifest.shards if s.split == split), default=None)
        for split in ("train", "validation")
    }
    if (longest["train"] or 0) < sequence_length:
        raise ValueError(
            f"{manifest.directory}: sequence_length={sequence_length} is more than the {longest['train']} tokens of "
            "the largest training shard, so there is nothing to train on; shorten it or prepare more text"
        )
    if longest["validation"] is not None and longest["validation"] < sequence_length:
        log.warning(
            "%s: the validation split holds no whole sequence of %d tokens: evaluation will see nothing",
            manifest.directory,
            sequence_length,
        )
