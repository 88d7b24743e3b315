"""A run that does not move shows where it stands, and a rank that is slow is named."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from spattn_olmoe.metrics import read_metrics
from spattn_olmoe.train.watch import BEHIND_METRIC, SLOWEST_METRIC, Heartbeat, Stragglers
from tests.faults.injected import inject
from tests.faults.processes import Run

pytestmark = pytest.mark.filterwarnings("ignore")


def test_stacks_of_all_ranks_where_one_hangs(new_run: Callable[..., Run], tmp_path):
    run = new_run(inject("Pause", steps=[3], folder=tmp_path), "trainer.callbacks.heartbeat.stacks_after=2")
    stacks = {run.folder / "stacks/rank0.txt": "injected.py", run.folder / "stacks/rank1.txt": "in train_batch"}
    (run.folder / "stacks").mkdir(parents=True)
    (run.folder / "stacks/rank0.txt").write_text("of an earlier start\n")
    with run.started(ranks=2) as processes:  # rank 0 hangs in the fault, and rank 1 waits for it
        run.until(lambda: all(p.exists() and words in p.read_text() for p, words in stacks.items()), processes[0])
        beaten = (run.folder / "heartbeat").stat().st_mtime
        assert beaten < min(path.stat().st_mtime for path in stacks)
    written = (run.folder / "stacks/rank0.txt").read_text()
    assert "in pre_step" in written and written.startswith("of an earlier start\n")


def test_a_slow_rank_is_named_with_its_host(new_run: Callable[..., Run]):
    run = new_run("trainer.callbacks.stragglers.interval=3")
    assert run(inject("Slow", rank=1, seconds=0.2), ranks=2) == 0, run.log
    metrics = {step: values for step, values in read_metrics(run.folder).items() if BEHIND_METRIC in values}
    assert list(metrics) == [3, 6, 9, 12]
    assert all(values[SLOWEST_METRIC] == 1 and values[BEHIND_METRIC] > 15 for values in metrics.values())
    assert f"step 12: rank 1 on {socket.gethostname()} is " in run.log


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match=r"heartbeat\.stacks_after=0 .*must be greater than 0"):
        Heartbeat(stacks_after=0)
    with pytest.raises(ValueError, match=r"stragglers\.interval=1 must be at least 2"):
        Stragglers(interval=1)
