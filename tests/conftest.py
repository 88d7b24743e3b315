"""What several test folders share: tiny prepared data, a tiny experiment, and a checkpoint of it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from benchmarks.tiny_run import prepare_tiny_data, run_training, write_tiny_yaml
from spattn_olmoe.collector import keep_everything


def pytest_collection_finish() -> None:
    keep_everything()  # all modules of tests, and what they import


@pytest.fixture(autouse=True)
def errors_of_threads_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a command that has failed in this process: the end of one silences its threads."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real token shards with a manifest: 512 ids, from the pages of Python's own manual."""
    return prepare_tiny_data(tmp_path_factory.mktemp("tiny_data"))


@pytest.fixture(scope="session")
def tiny_yaml(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's config, smaller: a step takes a tenth of a second."""
    return write_tiny_yaml(tmp_path_factory.mktemp("tiny_config") / "tiny.yaml", tiny_data)


@pytest.fixture(scope="session")
def trained(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after 12 steps: 4 heads, band length 32, 512 ids."""
    folder = tmp_path_factory.mktemp("trained")
    done = run_training(tiny_yaml, f"trainer.save_folder={folder}/run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run" / "step12"
