"""What has been done so far: counters that survive a crash."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..files import replace_file
from ..json_files import read_json
from .chunks import Position

NAME = "progress.json"
_SINCE = frozenset({"files_of_all_parts", "train_bytes"})
"""Options that earlier versions did not write down: where one is missing it is unknown, and agrees with any."""


@dataclass
class SourceProgress:
    """One source's place and counts."""

    file: int = 0
    """Index into this part's reading order."""
    offset: int = 0
    number: int = 0
    share: float = 0.0
    """How much of that file is read."""
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    rejects: int = 0
    broken_files: int = 0
    """Files of which an unknown rest could not be read."""

    @property
    def position(self) -> Position:
        """Where in its file the next chunk begins."""
        return Position(self.offset, self.number)


@dataclass
class Progress:
    """Everything a later run needs to resume, and what the summary shows."""

    sources: list[SourceProgress]
    mixture: dict[str, Any] | None = None
    writers: dict[str, dict[str, Any]] = field(default_factory=dict)
    reject_bytes: int = 0
    """Length of ``rejects.jsonl``."""
    lengths: list[int] = field(default_factory=lambda: [0] * 40)
    """Documents by length: entry ``i`` counts those of ``2**i`` to ``2**(i + 1) - 1`` tokens, EOS included."""
    longer: int = 0
    """Documents longer than the config's sequence length."""

    @property
    def documents(self) -> int:
        """Documents of all sources."""
        return sum(s.documents for s in self.sources)

    @property
    def tokens(self) -> int:
        """Tokens of all sources."""
        return sum(s.tokens for s in self.sources)

    @property
    def text_bytes(self) -> int:
        """Bytes of text of all sources."""
        return sum(s.text_bytes for s in self.sources)

    @property
    def rejects(self) -> int:
        """Documents of all sources that were left out."""
        return sum(s.rejects for s in self.sources)

    @property
    def reject_share(self) -> float:
        """Their share of everything that was read."""
        return self.rejects / max(1, self.documents + self.rejects)

    def count_lengths(self, lengths: np.ndarray, sequence_length: int) -> None:
        """:param lengths: tokens of each document, EOS included."""
        powers = np.bincount(np.frexp(lengths.astype(np.float64))[1] - 1, minlength=len(self.lengths))
        self.lengths = [old + int(new) for old, new in zip(self.lengths, powers, strict=True)]
        self.longer += int((lengths > sequence_length).sum())

    def save(self, folder: Path, options: dict[str, Any]) -> None:
        """Write the state, with the options that a later run must share."""
        replace_file(folder / NAME, json.dumps({"options": options, "progress": asdict(self)}).encode())

    @classmethod
    def load(cls, folder: Path, options: dict[str, Any], n_sources: int) -> Progress:
        """An earlier run's progress in this folder, or none yet.

        :raises ValueError: the earlier run had other options.
        """
        path = folder / NAME
        if not path.exists():
            return cls([SourceProgress() for _ in range(n_sources)])
        try:
            saved = read_json(path, {"options": dict, "progress": {"sources": [dict]}})
            earlier, content = saved["options"], saved["progress"]
            sources = [SourceProgress(**source) for source in content.pop("sources")]
            progress = cls(sources=sources, **content)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: was written by another version; choose another output or delete {folder}"
            ) from error
        same_options(folder, earlier, options)
        return progress


def same_options(folder: Path, found: Any, asked: Any, key: str = "") -> None:
    """:raises ValueError: the first option in which an existing output and this run differ."""
    if isinstance(found, dict) and isinstance(asked, dict):
        for name in dict.fromkeys([*asked, *found]):
            if name not in _SINCE or (name in asked and name in found):
                same_options(folder, found.get(name), asked.get(name), f"{key}.{name}" if key else name)
    elif isinstance(found, list) and isinstance(asked, list) and len(found) == len(asked):
        for i, (old, new) in enumerate(zip(found, asked, strict=True)):
            same_options(folder, old, new, f"{key}[{i}]")
    elif json.loads(json.dumps(asked)) != found:
        raise ValueError(
            f"{folder}: holds work with other options: {key}: expected {_short(asked)}, found {_short(found)}; "
            "ask for the same options, choose another output, or delete the folder"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    if isinstance(value, list) and len(text) > 80:
        return f"a list of {len(value)}"
    return text if len(text) <= 80 else text[:77] + "..."
