"""The work of the worker processes: a chunk in, token ids out."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from dataclasses import dataclass, field
from multiprocessing import parent_process

import numpy as np
from tokenizers import Tokenizer

from .chunks import Chunk, Reject
from .documents import texts
from .tokenizer import parse_tokenizer

SPLITS = ("train", "validation")
Tokens = np.ndarray  # of uint16 or uint32, one dimension


@dataclass(frozen=True)
class Settings:
    """What every worker needs to know. Small, and picklable."""

    tokenizer: bytes
    eos_token_id: int
    dtype: str
    validation_share: float
    max_document_bytes: int
    fields: tuple[str, ...]
    """Per source."""
    separators: tuple[str | None, ...]


@dataclass
class Encoded:
    """A chunk's documents, split by split: ids laid end to end, an EOS after each document."""

    tokens: dict[str, Tokens]
    lengths: dict[str, np.ndarray]
    """Tokens of each document, EOS included."""
    text_bytes: dict[str, np.ndarray]
    """UTF-8 bytes of each document's text."""
    rejects: list[Reject] = field(default_factory=list)


class Encoder:
    """Tokenises chunks with one tokenizer, on one core."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.tokenizer: Tokenizer = parse_tokenizer(settings.tokenizer, "of this corpus")
        self._eos = np.array([settings.eos_token_id], dtype=settings.dtype)

    def __call__(self, source: int, chunk: Chunk) -> Encoded:
        s = self.settings
        pieces: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
        text_bytes: dict[str, list[int]] = {split: [] for split in SPLITS}
        result = Encoded({}, {}, {})
        for item in texts(
            chunk, field=s.fields[source], separator=s.separators[source], max_document_bytes=s.max_document_bytes
        ):
            if isinstance(item, Reject):
                result.rejects.append(item)
                continue
            ids = self._ids(item.text)
            if (ids == self._eos).any():  # one that no check of the tokenizer foresaw
                result.rejects.append(
                    Reject(chunk.file, item.number, f"its text becomes the id {s.eos_token_id} of an EOS")
                )
                continue
            split = SPLITS[is_validation(item.utf8, s.validation_share)]
            pieces[split] += [ids, self._eos]
            lengths[split].append(len(ids) + 1)
            text_bytes[split].append(len(item.utf8))
        result.rejects += chunk.rejects
        empty = np.array([], dtype=s.dtype)
        result.tokens = {split: np.concatenate([empty, *pieces[split]]) for split in SPLITS}
        result.lengths = {split: np.array(lengths[split], dtype=np.int64) for split in SPLITS}
        result.text_bytes = {split: np.array(text_bytes[split], dtype=np.int64) for split in SPLITS}
        return result

    def _ids(self, text: str) -> np.ndarray:
        # one at a time, because an encoding takes a hundred times its text's memory: a batch saves nothing on one thread
        (encoding,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, dtype=self.settings.dtype)


def is_validation(text: bytes, share: float) -> bool:
    """Whether a document is held out: a matter of its text and the share alone. A larger share holds out a superset."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") < share * 2**64


_encoder: Encoder | None = None


def start_worker(settings: Settings) -> None:
    """What a worker process does first: one tokenizer thread; exit when the parent dies."""
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _encoder = Encoder(settings)


def work(source: int, chunk: Chunk) -> Encoded:
    """A chunk, encoded by this process's encoder: what a pool runs."""
    assert _encoder is not None
    return _encoder(source, chunk)


def _die_with_parent() -> None:
    # a killed parent closes no queue: without this its workers would wait for ever
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
