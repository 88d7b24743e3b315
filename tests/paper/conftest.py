"""``scripts/reproduce.py`` in this process."""

from __future__ import annotations

import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.tiny_run import ROOT


@pytest.fixture
def reproduce(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """``reproduce(*words)`` in ``tmp_path``: exit code, output and errors."""

    def command(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *words])
        monkeypatch.chdir(tmp_path)
        handler = signal.getsignal(signal.SIGTERM)
        capfd.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / "scripts/reproduce.py"), run_name="__main__")
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        finally:
            signal.signal(signal.SIGTERM, handler)
        return code, *capfd.readouterr()

    return command
