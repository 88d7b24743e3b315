"""The corpus that every CPython has on board."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.forked import environment
from benchmarks.tiny_run import ROOT


def write_stdlib_corpus(folder: Path, *options: str) -> list[Path]:
    command = [sys.executable, str(ROOT / "scripts/quickstart_corpus.py"), str(folder), *options]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=True)
    files = [Path(line.split()[0]) for line in done.stdout.splitlines()]
    assert files == sorted(folder.glob("*.jsonl"), key=files.index) and files
    return files


def test_the_stdlib_corpus_is_large_unique_and_the_same_every_time(tmp_path: Path) -> None:
    files = write_stdlib_corpus(tmp_path / "a")
    again = write_stdlib_corpus(tmp_path / "b")
    assert [p.read_bytes() for p in files] == [p.read_bytes() for p in again]
    texts = [json.loads(line)["text"] for path in files for line in path.read_text().splitlines()]
    assert len(texts) == len(set(texts)) > 2000 and sum(map(len, texts)) > 1_500_000
    assert any("with_statement" in text or 'The "with" statement' in text for text in texts)


def test_sources_are_the_library_itself(tmp_path: Path) -> None:
    reference, sources = write_stdlib_corpus(tmp_path, "--sources")
    texts = {(record := json.loads(line))["id"]: record["text"] for line in sources.read_text().splitlines()}
    assert reference.name == "reference.jsonl" and sum(map(len, texts.values())) > 8_000_000
    assert not any("test" in name.split(":")[0].split(".") for name in texts)
    module = Path(argparse.__file__).read_text()
    parts = [text for name, text in texts.items() if name.startswith("argparse:")]
    assert len(parts) > 20 and "".join(parts) in module  # in its order, without a gap
