"""Data that change between two starts of a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.tiny import write_data
from tests.faults.processes import Run


@pytest.fixture
def stopped(unbroken: Run, tmp_path: Path) -> Run:
    """A run with checkpoints of steps 4 and 8 of 12, and data of its own."""
    data = Path(shutil.copytree(unbroken.data, tmp_path / "data"))
    shutil.copytree(unbroken.folder, tmp_path / "run", ignore=shutil.ignore_patterns("step12"))
    return Run(tmp_path / "run", data)


def one_error(run: Run, ranks: int = 1, arguments: tuple[str, ...] = ()) -> str:
    assert run(ranks=ranks, arguments=arguments) == 2, run.log
    errors = [line for line in run.log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in run.log
    return errors[0]


def replace_ids(shard: Path) -> None:
    """Other text, of the same size, in the place of the old: what no size can show."""
    ids = np.fromfile(shard, np.uint16)
    ids[1000:2000] = ids[1000:2000][::-1].copy()
    new = shard.with_suffix(".new")
    ids.tofile(new)
    new.replace(shard)


def test_a_truncated_shard_is_refused(stopped):
    shard = stopped.data / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    assert f"{shard}: expected 8192 bytes (4096 uint16 tokens), found 8190" in one_error(stopped)


def test_a_replaced_shard_is_refused_and_the_right_one_goes_on(unbroken, stopped):
    shard = stopped.data / "train-00000.bin"
    replace_ids(shard)
    assert f"{shard}: expected SHA-256" in one_error(stopped, ranks=2)
    shutil.copy(unbroken.data / shard.name, shard)
    assert stopped() == 0, stopped.log
    assert "Comparing 1 data shards with their SHA-256" in stopped.log
    assert stopped.curve == unbroken.curve


def test_data_that_were_prepared_anew_are_refused(stopped):
    write_data(stopped.data, seed=1)
    message = one_error(stopped)
    for words in (
        f"checkpoint {stopped.folder / 'step8'} was trained on train-00000.bin",
        "ignore_fingerprint_mismatch=true",
    ):
        assert words in message


def test_verify_data_reads_what_a_first_start_does_not(stopped):
    shutil.rmtree(stopped.folder)
    replace_ids(stopped.data / "train-00000.bin")
    assert "expected SHA-256" in one_error(stopped, ranks=2, arguments=("--verify-data",))
