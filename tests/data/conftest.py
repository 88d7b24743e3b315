"""A small tokenizer, documents out of the standard library's sources, and a config to prepare them with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from spattn_olmoe.data import DataConfig, SourceConfig, TokenizerSection, train_tokenizer

ROOT = Path(__file__).parents[2]
EOS, PAD = 0, 1


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """240 distinct texts of 300 to 3,000 characters."""
    pieces: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8")
        pieces += [text[i : i + 300 + 37 * (i % 73)] for i in range(0, min(len(text), 12_000), 3000)]
    unique = list(dict.fromkeys(piece for piece in pieces if len(piece) >= 300 and piece.strip()))
    assert len(unique) >= 240
    return unique[:240]


@pytest.fixture(scope="session")
def tokenizer_file(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "small.json"
    train_tokenizer(documents, 600, path)
    return path


@pytest.fixture
def encode(tokenizer_file: Path) -> Callable[[Iterable[str]], list[int]]:
    """The ids that documents must become: each text's, then an EOS. By the plain ``encode``, one at a time."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.encode_special_tokens = True

    def run(texts: Iterable[str]) -> list[int]:
        return [i for text in texts for i in [*tokenizer.encode(text, add_special_tokens=False).ids, EOS]]

    return run


@pytest.fixture
def make_config(tmp_path: Path, tokenizer_file: Path) -> Callable[..., DataConfig]:
    """A config with one source of local files, one worker, and whatever else a test asks for."""

    def make(*paths: Path | str, output: str = "out", **options: Any) -> DataConfig:
        sources = options.pop("sources", None) or [SourceConfig(paths=[str(path) for path in paths])]
        options.setdefault("tokenizer", TokenizerSection(identifier=str(tokenizer_file)))
        options.setdefault("workers", 1)
        return DataConfig(output=str(tmp_path / output), sources=sources, **options)

    return make


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(texts)))
    return path


def read_ids(paths: Iterable[str], dtype: str = "uint16") -> list[int]:
    return [int(i) for path in paths for i in np.fromfile(path, dtype=dtype)]


def rejects(output: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(output) / "rejects.jsonl").read_text().splitlines()]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run_script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    """The one line that a failed command printed."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 1 and len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]
