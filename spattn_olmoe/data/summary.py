"""What the user sees: a progress bar while it runs, a table at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from ..text import inline
from .manifest import Manifest
from .progress import Progress

_STEPS = 10_000
_LINE_SECONDS = 30.0


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[Progress, float | None], None]]:
    """A bar with documents, tokens, tokens/s and time left; a line every half minute where there is no terminal."""
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>5.1f}%"),
        TextColumn("{task.fields[counts]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, refresh_per_second=4) as bar:
        task = bar.add_task("", total=_STEPS, counts="")
        rate = _Rate()

        def show(progress: Progress, share: float | None) -> None:
            bar.update(task, completed=int(_STEPS * (share or 0.0)), counts=_counts(progress, rate(progress)))

        yield show


def summary_table(manifest: Manifest) -> Table:
    """Tokens, documents, lengths and rejects of a finished corpus."""
    s = manifest.statistics
    table = Table(title=escape(inline(str(manifest.directory))), show_header=False)
    length = manifest.options["sequence_length"]
    rows: list[tuple[str, str]] = []
    for split in ("train", "validation"):
        count = manifest.count(split)
        n = sum(shard.split == split for shard in manifest.shards)
        shards = f"{n} {'shard' if n == 1 else 'shards'} of {manifest.dtype}"
        rows.append((split, f"{count.tokens:,} tokens, {count.documents:,} documents, {shards}"))
    rows += [
        ("text", f"{s['text_bytes']:,} bytes, {s['text_bytes'] / max(1, s['tokens']):.2f} a token"),
        ("mean length", f"{s['tokens'] / max(1, s['documents']):,.1f} tokens"),
        (
            f"longer than {length} tokens",
            f"{s['longer_than_sequence_length'] / max(1, s['documents']):.2%} of documents",
        ),
        ("rejects", f"{s['rejects']:,} ({s['rejects'] / max(1, s['rejects'] + s['documents']):.3%})"),
    ]
    for key, value in rows:
        table.add_row(key, value)
    for i, source in enumerate(manifest.sources):
        table.add_row(escape(f"sources[{i}]"), _source(manifest, source))
    return table


def warnings(manifest: Manifest) -> Iterator[str]:
    """What in a finished corpus differs from what was asked for."""
    weights = sum(source["weight"] for source in manifest.sources)
    tokens = max(1, manifest.statistics["tokens"])
    for i, source in enumerate(manifest.sources):
        asked, got = source["weight"] / weights, source["tokens"] / tokens
        if abs(asked - got) > 0.01:
            yield (
                f"sources[{i}]: weight asks for {asked:.1%} of the tokens, it has {got:.1%}: a source was exhausted; "
                "max_tokens or when_exhausted=stop keeps the shares"
            )
        if source["broken_files"]:
            yield f"sources[{i}]: {source['broken_files']} files could not be read to their end: see rejects.jsonl"
    limit, part = manifest.options["max_tokens"], int(manifest.part.split("/")[1])
    if limit is not None and manifest.train_tokens < limit // part:
        yield f"max_tokens={limit}: the sources hold only {manifest.train_tokens:,} training tokens"


def _source(manifest: Manifest, source: dict[str, Any]) -> str:
    where = source.get("hub") or ", ".join(source["paths"])
    share = source["tokens"] / max(1, manifest.statistics["tokens"])
    return f"{escape(inline(where))}: {source['documents']:,} documents, {share:.1%} of tokens"


def _counts(progress: Progress, rate: float) -> str:
    speed = f"  {rate:,.0f} tokens/s" if rate else ""  # not known at the first line
    return f"{progress.documents:,} documents  {progress.tokens:,} tokens{speed}"


class _Rate:
    """Tokens a second since this run began; what an earlier run did does not count."""

    def __init__(self) -> None:
        self.begun: tuple[float, int] | None = None

    def __call__(self, progress: Progress) -> float:
        now = time.monotonic()
        if self.begun is None:
            self.begun = (now, progress.tokens)
        since, tokens = self.begun
        return (progress.tokens - tokens) / max(1e-9, now - since) if now > since else 0.0


def _lines(console: Console) -> Callable[[Progress, float | None], None]:
    rate, begun = _Rate(), time.monotonic()
    due = begun + _LINE_SECONDS

    def show(progress: Progress, share: float | None) -> None:
        nonlocal due
        tokens_per_second = rate(progress)
        if time.monotonic() < due:
            return
        due = time.monotonic() + _LINE_SECONDS
        done = "" if share is None else f"{share:.1%}  "
        console.print(done + _counts(progress, tokens_per_second), highlight=False, soft_wrap=True)

    return show
