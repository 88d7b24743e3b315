"""Data and the curve of a run that nothing happens to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.tiny import write_data
from tests.faults.processes import Run


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("faults") / "data")


@pytest.fixture(scope="session")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("unbroken") / "run", data)
    assert run() == 0, run.log
    assert list(run.curve) == list(range(1, 13))
    return run


@pytest.fixture
def new_run(data: Path, tmp_path: Path) -> Callable[..., Run]:
    return lambda *overrides: Run(tmp_path / "run", data, overrides)
