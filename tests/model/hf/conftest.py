"""Exports of tiny checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tiny_checkpoint import write_checkpoint
from spattn_olmoe.model.checkpoint import Checkpoint
from spattn_olmoe.model.hf.export import export


class Pair:
    """A checkpoint, its native model, and the folder of its export."""

    def __init__(self, folder: Path, section: dict[str, Any], n_kv_heads: int | None):
        self.native = write_checkpoint(folder / "step1", section, n_kv_heads)
        self.checkpoint = Checkpoint.open(folder / "step1")
        self.folder = folder / "exported"
        self.config = export(self.checkpoint, self.folder)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """``exported(section, n_kv_heads=None)``, made once."""
    made: dict[str, Pair] = {}

    def make(section: dict[str, Any], n_kv_heads: int | None = None) -> Pair:
        key = json.dumps([section, n_kv_heads])
        if key not in made:
            made[key] = Pair(tmp_path_factory.mktemp("exported"), section, n_kv_heads)
        return made[key]

    return make
