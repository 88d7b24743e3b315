"""Exports of tiny checkpoints."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tiny_checkpoint import write_checkpoint
from benchmarks.tiny_run import ROOT
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


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``refusal(script, *words)``: the one line with which a script of this process ends with exit code 2."""

    def run(script: str, *words: object) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [script, *map(str, words)])
            patch.setattr("spattn_olmoe.errors.quiet", lambda: None)
            capsys.readouterr()
            with pytest.raises(SystemExit) as end:
                runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return run
