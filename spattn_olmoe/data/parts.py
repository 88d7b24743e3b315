"""One manifest over parts that were prepared apart, on as many machines."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..files import replace_file
from .config import parse_part
from .manifest import Manifest, verify
from .progress import same_options


def merge(output: str | os.PathLike[str], *, hashes: bool = False) -> Manifest:
    """Write ``manifest.json`` over the folders ``part-*`` in ``output``. The shards stay where they are.

    :param hashes: read every shard and compare its SHA-256 first.
    :raises ValueError: a part is missing, unfinished, damaged, or was made with other options or from other files.
    """
    folder = Path(output)
    found = sorted(folder.glob("part-*-of-*"))
    if not found:
        raise ValueError(f"{folder}: expected folders part-*-of-*, found none; prepare each with --part i/n")
    parts = [_part(path, hashes) for path in found]
    n = parse_part(parts[0].part)[1]
    here = {parse_part(part.part) for part in parts}
    missing = [f"{i}/{n}" for i in range(n) if (i, n) not in here]
    if missing or len(parts) != n:
        raise ValueError(f"{folder}: expected {n} parts, found {len(parts)}; missing: {', '.join(missing) or 'none'}")
    first = parts[0]
    _same_listings(parts)
    for part in parts[1:]:
        same_options(part.directory, _shared(part), _shared(first))
    _disjoint(parts)
    replace_file(folder / first.tokenizer.path, first.tokenizer_path.read_bytes())
    merged = replace(
        first,
        directory=folder,
        shards=[replace(s, path=f"{p.directory.name}/{s.path}") for p in parts for s in p.shards],
        sources=[_added([p.sources[i] for p in parts]) for i in range(len(first.sources))],
        options={**_shared(first), "parts": [p.options["sources"] for p in parts]},
        statistics=_added([p.statistics for p in parts]),
        part="0/1",
    )
    merged.save()
    return merged


def _part(folder: Path, hashes: bool) -> Manifest:
    return verify(folder, hashes=hashes)


_AGAIN = "make the files the same on every machine, delete the parts that were made from others and prepare them again"


def _same_listings(parts: list[Manifest]) -> None:
    """Raise where parts found different files: each takes its share of what it found, so text would be lost or doubled."""
    first = parts[0]
    for part in parts[1:]:
        for i, (a, b) in enumerate(zip(first.options["sources"], part.options["sources"], strict=False)):
            found = [source.get("files_of_all_parts") for source in (a, b)]
            if None not in found and found[0] != found[1]:  # None: an earlier version did not write it down
                raise ValueError(
                    f"{part.directory}: sources[{i}]: there were other files, or files of other sizes, than for "
                    f"{first.directory}; {_AGAIN}"
                )


def _disjoint(parts: list[Manifest]) -> None:
    """Raise where two parts read one file: what is left to see of parts whose listings are unknown."""
    readers: dict[tuple[int, str], Path] = {}
    for part in parts:
        for i, source in enumerate(part.options["sources"]):
            for name, _size in source["files"]:
                other = readers.setdefault((i, name), part.directory)
                if other != part.directory:
                    raise ValueError(f"{part.directory}: sources[{i}]: {name} was read for {other} as well; {_AGAIN}")


def _shared(part: Manifest) -> dict[str, Any]:
    """The options that all parts must agree on: all but which files each has read."""
    sources = [{k: v for k, v in source.items() if k != "files"} for source in part.options["sources"]]
    return {**part.options, "part": parse_part(part.options["part"])[1], "sources": sources}


_COUNTS = ("documents", "tokens", "text_bytes", "rejects", "broken_files", "longer_than_sequence_length")


def _added(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts added up; everything else, equal in all parts, from the first."""
    total = {k: v for k, v in records[0].items() if k != "end"}
    for key in _COUNTS:
        if key in total:
            total[key] = sum(record[key] for record in records)
    if "lengths" in total:
        total["lengths"] = [sum(counts) for counts in zip(*(r["lengths"] for r in records), strict=True)]
    return total
