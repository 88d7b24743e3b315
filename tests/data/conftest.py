"""A small tokenizer, documents out of the standard library's sources, and a config to prepare them with."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from spattn_olmoe.data import DataConfig, SourceConfig, TokenizerSection, train_tokenizer

EOS = 0


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
