"""Real text for the data benchmark, from unpacked Debian documentation packages.

    for p in debian-handbook linux-doc-6.1 python3.11-doc ...; do apt-get download $p; dpkg -x ${p}_*.deb raw/$p; done
    python benchmarks/debian_corpus.py raw corpus --megabytes 560

HTML pages lose their markup, plain text and reStructuredText stay as they are; equal pages are kept once. Half of the
documents go to ``.jsonl.zst`` files, half to Parquet files, dealt by a hash so that each file is a sample of the whole.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html.parser
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

_TEXT = {".txt", ".rst", ".md", ".texi", ".info"}
_HTML = {".html", ".htm", ".xhtml"}
_FILES = 8
_SHORTEST = 300
"""Characters; shorter pages are frames and redirects."""


class _Stripper(html.parser.HTMLParser):
    """Keeps what a reader would see."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def page_text(path: Path) -> str | None:
    """A page as text, None for what is no documentation or no UTF-8."""
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    if plain.suffix not in _TEXT | _HTML:
        return None
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if plain.suffix in _HTML:
        stripper = _Stripper()
        stripper.feed(text)
        text = re.sub(r"[ \t]+", " ", re.sub(r"\s*\n\s*\n\s*", "\n\n", "".join(stripper.parts)))
    text = text.strip()
    return text if len(text) >= _SHORTEST else None


def documents(folder: Path) -> Iterator[tuple[str, str]]:
    """Every page once, in an order that mixes the packages."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    random.Random(0).shuffle(paths)
    seen: set[bytes] = set()
    for path in paths:
        text = page_text(path)
        digest = hashlib.sha256(text.encode()).digest() if text else b""
        if text and digest not in seen:
            seen.add(digest)
            yield path.relative_to(folder).as_posix(), text


def write(folder: Path, target: Path, n_bytes: int) -> None:
    """Write ``n_bytes`` of text, half of it as JSON lines, half as Parquet."""
    (target / "jsonl").mkdir(parents=True, exist_ok=True)
    (target / "parquet").mkdir(parents=True, exist_ok=True)
    lines = [zstandard.open(target / f"jsonl/{i:02d}.jsonl.zst", "wb") for i in range(_FILES)]
    schema = pa.schema([("id", pa.string()), ("text", pa.string())])
    tables = [pq.ParquetWriter(target / f"parquet/{i:02d}.parquet", schema, compression="zstd") for i in range(_FILES)]
    rows: list[list[dict[str, str]]] = [[] for _ in range(_FILES)]
    written = 0
    for name, text in documents(folder):
        place = hashlib.sha256(name.encode()).digest()[0] % (2 * _FILES)
        record = {"id": name, "text": text, "source": name.split("/")[0]}
        if place < _FILES:
            lines[place].write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        else:
            rows[place - _FILES].append({"id": name, "text": text})
            if len(rows[place - _FILES]) == 1000:
                tables[place - _FILES].write_table(pa.Table.from_pylist(rows[place - _FILES], schema=schema))
                rows[place - _FILES] = []
        written += len(text.encode())
        if written >= n_bytes:
            break
    for left, table in zip(rows, tables, strict=True):
        table.write_table(pa.Table.from_pylist(left, schema=schema))
        table.close()
    for line in lines:
        line.close()
    print(f"{written:,} bytes of text in {target}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="unpacked packages, a folder each")
    parser.add_argument("target", type=Path)
    parser.add_argument("--megabytes", type=int, default=560)
    args = parser.parse_args()
    write(args.folder, args.target, args.megabytes * 10**6)
    return 0


if __name__ == "__main__":
    sys.exit(main())
