"""The corpus that every CPython has on board."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

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


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, of a library of two documents."""
    spec = importlib.util.spec_from_file_location("quickstart_corpus", ROOT / "scripts/quickstart_corpus.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "_reference", lambda _: [("a", "a" * 100)])
    monkeypatch.setattr(module, "_docstrings", lambda _: [("b", "b" * 100)])
    return module


@pytest.mark.parametrize("made", [False, True])
def test_what_is_interrupted_leaves_no_part_of_a_corpus(script, monkeypatch, tmp_path: Path, made: bool) -> None:
    folder, write = tmp_path / "corpus", script.replace_file
    if made:
        folder.mkdir()

    def interrupted(path: Path, data: bytes) -> None:
        if path.name == "docstrings.jsonl":
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(script, "replace_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.write_stdlib_corpus(folder)
    assert not list(tmp_path.rglob("*.jsonl"))
    monkeypatch.setattr(script, "replace_file", write)
    files = script.write_stdlib_corpus(folder)
    assert files == [folder / "reference.jsonl", folder / "docstrings.jsonl"] and all(map(Path.is_file, files))
    assert list(tmp_path.iterdir()) == [folder]


def test_an_existing_folder_keeps_what_else_it_holds(script, tmp_path: Path) -> None:
    (tmp_path / "reference.jsonl").write_text("a part")
    (tmp_path / "notes.txt").write_text("mine")
    script.write_stdlib_corpus(tmp_path)
    assert json.loads((tmp_path / "reference.jsonl").read_text())["text"] == "a" * 100
    assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / "docstrings.jsonl").is_file()
