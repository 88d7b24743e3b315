"""Sources to shards: one process reads and writes, in order; the others tokenise.

Reading order, and with it every byte written, depends on the options alone: not on the number of workers, on timing, or
on how often the run was killed. Progress is written down every few seconds, after the bytes it speaks of are on the
disk; a run that starts again cuts the shards back to that point and resumes.
"""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .. import __version__
from ..files import sync_folder
from ..json_files import parse_json
from ..lock import flock
from . import manifest as manifest_module
from . import progress as progress_module
from .chunks import Chunk, Position
from .config import DataConfig, check
from .encode import SPLITS, Encoded, start_worker, work
from .manifest import Manifest, verify
from .mixture import LAG, Mixture
from .progress import Progress, same_options
from .resolve import Plan, make_plan, place_tokenizer
from .writer import ShardWriter

log = logging.getLogger(__name__)

REJECTS = "rejects.jsonl"
_ENOUGH_TO_JUDGE = 1000
"""Documents after which the share of rejects means something; at the end it is looked at in any case."""

_CHUNKS_UNDER_WAY = 16
"""Per worker. They are written in order: enough of them, and one slow worker or a slow disk holds up none of the others."""

Report = Callable[[Progress, float | None], None]
"""Called after every chunk with the progress and the share of the work done (None where it cannot be known)."""


def prepare(config: DataConfig, report: Report | None = None) -> Manifest:
    """Write a corpus's shards and manifest, continuing where an earlier run stopped.

    :param report: called after every chunk, for a progress bar.
    :returns: the manifest; at once where the corpus is complete already.
    :raises ValueError: whatever the user can correct, in one line. What was finished stays valid.
    """
    check(config)
    try:
        return _prepare(config, report or (lambda _progress, _share: None))
    except OSError as error:
        remedy = "; free some space and run the same command again" if error.errno == errno.ENOSPC else ""
        raise ValueError(f"{error.filename or config.output}: {error.strerror or error}{remedy}") from error
    except BrokenProcessPool as error:
        raise ValueError(
            "workers: a tokenising process was killed, as happens when memory runs out; run the same command again "
            "with fewer workers or a smaller max_document_bytes"
        ) from error


def _prepare(config: DataConfig, report: Report) -> Manifest:
    plan = make_plan(config)
    with _locked(plan.folder):
        if (plan.folder / manifest_module.NAME).exists():
            same_options(plan.folder, Manifest.load(plan.folder).options, plan.options)
            (plan.folder / progress_module.NAME).unlink(missing_ok=True)
            place_tokenizer(plan)
            log.info("%s: complete already", plan.folder)
            return verify(plan.folder)
        progress = Progress.load(plan.folder, plan.options, len(plan.sources))
        if not (plan.folder / progress_module.NAME).exists():
            _refuse_foreign_shards(plan.folder)
        place_tokenizer(plan)
        return _Run(plan, progress, report).finish()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes out; the lock goes with the process, however it ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        granted = flock(handle)
        if granted is False:
            raise ValueError(f"{folder}: another process is preparing it; wait for it or choose another output")
        if granted is None:
            log.warning(
                "%s: its file system has no locks: nothing keeps a second process from preparing it too", folder
            )
        yield
    finally:
        os.close(handle)


def _refuse_foreign_shards(folder: Path) -> None:
    for split in SPLITS:
        for path in folder.glob(f"{split}-*.bin*"):
            raise ValueError(
                f"{path}: is there without {progress_module.NAME}; choose another output or delete the folder"
            )


class _Run:
    """One uninterrupted stretch of work on one folder."""

    def __init__(self, plan: Plan, progress: Progress, report: Report):
        self.plan, self.progress, self.report = plan, progress, report
        self.mixture = Mixture([s.weight for s in plan.config.sources], progress.mixture)
        self.writers = {
            split: ShardWriter(
                plan.folder, split, plan.settings.dtype, plan.config.shard_bytes, progress.writers.get(split)
            )
            for split in SPLITS
        }
        self.rejects = _open_rejects(plan.folder / REJECTS, progress.reject_bytes)
        self.full = self._tokens_left() == 0
        self._between_chunks = True

    def finish(self) -> Manifest:
        """Work until the sources are exhausted or the tokens suffice, and write the manifest."""
        try:
            self._checkpoint()
            if not self.full:
                self._work()
            self._judge_rejects(at_end=True)
            return self._conclude()
        finally:
            for writer in self.writers.values():
                writer.abandon()
            try:
                self.rejects.close()
            except OSError:
                log.debug("rejects.jsonl: what was not written comes after the checkpoint")

    def _work(self) -> None:
        n_workers = self.plan.config.workers or len(os.sched_getaffinity(0))
        window = min(LAG - 1, _CHUNKS_UNDER_WAY * n_workers)
        due = time.monotonic() + self.plan.config.checkpoint_seconds
        under_way: deque[tuple[int, Chunk, Future[Encoded]]] = deque()
        chunks = self._chunks()
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(n_workers, context, start_worker, (self.plan.settings,))
        try:
            while not self.full:
                while len(under_way) < window and (drawn := next(chunks, None)):
                    under_way.append((*drawn, pool.submit(work, *drawn)))
                if not under_way:
                    break
                source, chunk, future = under_way.popleft()
                self._commit(source, chunk, future.result())
                if time.monotonic() >= due:
                    self._checkpoint()
                    due = time.monotonic() + self.plan.config.checkpoint_seconds
        except BaseException:
            self._checkpoint_if_possible()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _chunks(self) -> Iterator[tuple[int, Chunk]]:
        streams = {i: self._stream(i) for i in range(len(self.plan.sources))}
        while streams:
            source = self.mixture.choose(list(streams))
            chunk = next(streams[source], None)
            if chunk is not None:
                self.mixture.drawn(source)
                yield source, chunk
            elif self.plan.config.when_exhausted == "stop":
                return
            else:
                del streams[source]

    def _stream(self, source: int) -> Iterator[Chunk]:
        begin = self.progress.sources[source]
        order, first, position = self.plan.orders[source], begin.file, begin.position
        for index in order[first:]:
            yield from self.plan.sources[source].read(index, position)
            position = Position()

    def _commit(self, source: int, chunk: Chunk, encoded: Encoded) -> None:
        self._between_chunks = False
        lengths, tokens = self._cut_to_limit(encoded)
        for split in SPLITS:
            self.writers[split].append(tokens[split], lengths[split])
            self.progress.count_lengths(lengths[split], self.plan.config.sequence_length)
        for reject in encoded.rejects:
            self.rejects.write(json.dumps({"source": source, **asdict(reject)}).encode() + b"\n")
        counts, total = self.progress.sources[source], sum(map(len, tokens.values()))
        self.mixture.counted(source, total)
        counts.tokens += total
        counts.documents += sum(map(len, lengths.values()))
        # the first documents of a split: those that were not cut off
        counts.text_bytes += sum(int(encoded.text_bytes[split][: len(lengths[split])].sum()) for split in SPLITS)
        counts.rejects += sum(reject.documents for reject in encoded.rejects)
        counts.broken_files += chunk.broken
        self._move_on(source, chunk)
        self._between_chunks = True
        self.full = self._tokens_left() == 0
        self.report(self.progress, self._share_done())
        self._judge_rejects()

    def _cut_to_limit(self, encoded: Encoded) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Drop training documents after the one that reaches ``max_tokens``."""
        lengths, tokens, left = dict(encoded.lengths), dict(encoded.tokens), self._tokens_left()
        if left is not None and left < len(tokens["train"]):
            documents = int(np.searchsorted(np.cumsum(lengths["train"]), left)) + 1
            lengths["train"] = lengths["train"][:documents]
            tokens["train"] = tokens["train"][: int(lengths["train"].sum())]
        return lengths, tokens

    def _tokens_left(self) -> int | None:
        limit = self.plan.max_tokens
        return None if limit is None else max(0, limit - self.writers["train"].tokens)

    def _move_on(self, source: int, chunk: Chunk) -> None:
        place, names = self.progress.sources[source], self.plan.sources[source].files
        order = self.plan.orders[source]
        while names[order[place.file]].name != chunk.file:
            place.file += 1
        place.offset, place.number, place.share = chunk.end.offset, chunk.end.number, chunk.share

    def _judge_rejects(self, at_end: bool = False) -> None:
        limit, p = self.plan.config.max_reject_share, self.progress
        if p.reject_share <= limit or not (at_end or p.documents + p.rejects >= _ENOUGH_TO_JUDGE):
            return
        self._checkpoint()
        lines = (self.plan.folder / REJECTS).read_bytes().splitlines()
        last = parse_json(lines[-1], REJECTS, {"file": str, "number": int, "reason": str})
        raise ValueError(
            f"max_reject_share={limit}: {p.rejects} of {p.documents + p.rejects} documents were rejected "
            f"({p.reject_share:.1%}), the last in {last['file']}:{last['number']} ({last['reason']}); look at "
            f"{self.plan.folder / REJECTS}, correct the sources or raise max_reject_share"
        )

    def _share_done(self) -> float | None:
        """By the bytes of the files, or by ``max_tokens`` where that is nearer its end."""
        done = total = 0.0
        for source, order, place in zip(self.plan.sources, self.plan.orders, self.progress.sources, strict=True):
            sizes = [source.files[i].size for i in order]
            known = [float(size or 1) for size in sizes]
            total += sum(known)
            done += sum(known[: place.file]) + (known[place.file] * place.share)
        limit = self.plan.max_tokens
        return max(done / max(1.0, total), 0.0 if limit is None else min(1.0, self.writers["train"].tokens / limit))

    def _checkpoint(self) -> None:
        self.rejects.flush()
        os.fsync(self.rejects.fileno())
        self.progress.reject_bytes = self.rejects.tell()
        self.progress.writers = {split: writer.checkpoint() for split, writer in self.writers.items()}
        self.progress.mixture = self.mixture.state()
        self.progress.save(self.plan.folder, self.plan.options)

    def _checkpoint_if_possible(self) -> None:
        """Keep what was done when something goes wrong; the earlier checkpoint stands if even that fails."""
        if not self._between_chunks:
            return  # a chunk is half written: the counters do not tell where it ends
        try:
            self._checkpoint()
        except OSError as error:
            log.warning("the last seconds of work could not be kept: %s", error)

    def _conclude(self) -> Manifest:
        self._checkpoint()
        if not self.progress.documents:
            raise ValueError(f"sources: hold no documents ({self.progress.rejects} rejected, see {REJECTS})")
        shards = [shard for split in SPLITS for shard in self.writers[split].close()]
        manifest = Manifest(
            directory=self.plan.folder,
            tokenizer=self.plan.tokenizer,
            dtype=self.plan.settings.dtype,
            shards=shards,
            sources=[self._source_record(i) for i in range(len(self.plan.sources))],
            options=self.plan.options,
            statistics={
                "documents": self.progress.documents,
                "tokens": self.progress.tokens,
                "text_bytes": self.progress.text_bytes,
                "rejects": self.progress.rejects,
                "longer_than_sequence_length": self.progress.longer,
                "lengths": self.progress.lengths,
            },
            part=self.plan.config.part,
            versions={"spattn_olmoe": __version__, **self.plan.options["versions"]},
        )
        manifest.save()
        (self.plan.folder / progress_module.NAME).unlink()
        sync_folder(self.plan.folder)
        return manifest

    def _source_record(self, index: int) -> dict[str, Any]:
        counts = asdict(self.progress.sources[index])
        end = {key: counts.pop(key) for key in ("file", "offset", "number")}
        del counts["share"]
        return {
            **self.plan.sources[index].origin,
            "weight": self.plan.config.sources[index].weight,
            "end": end,
            **counts,
        }


def _open_rejects(path: Path, n_bytes: int) -> BinaryIO:
    """``rejects.jsonl``, cut back to the checkpoint."""
    file = open(path, "ab")  # noqa: SIM115  # the run closes it
    file.truncate(n_bytes)
    file.seek(0, os.SEEK_END)
    return file
