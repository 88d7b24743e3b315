"""One run writes a save folder, and how it ended is kept for the launcher."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from tests.faults.injected import inject
from tests.faults.processes import Run

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_second_run_is_refused_on_every_rank_and_the_first_is_not_disturbed(unbroken, new_run: Callable[..., Run]):
    run = new_run()
    with run.started() as first:
        run.until(lambda: (run.folder / "lock").exists() and (run.folder / "lock").stat().st_size > 0, first[0])
        os.kill(first[0].pid, signal.SIGSTOP)  # so that it cannot end before the others have started
        second = Run(run.folder, run.data, run.overrides, suffix="second")
        assert second(ranks=2) == 2
        (line,) = [line for line in second.log.splitlines() if line.startswith("error: ")]
        assert f"{run.folder} is in use: process {first[0].pid} on " in line and "trainer.save_folder" in line
        os.kill(first[0].pid, signal.SIGCONT)
        assert run.wait(first) == 0
    assert run.curve == unbroken.curve


@pytest.mark.parametrize(
    ("overrides", "ranks", "status", "kept"),
    [
        (["trainer.max_duration.value=1"], 1, 0, "0"),
        (["model.n_layer=2"], 2, 2, "2"),
        ([inject("Error", at=2, rank=1)], 2, 1, "1"),
        ([inject("Signal", at=2)], 1, 143, "143"),
        ([inject("Signal", at=2, rank=1, number=9)], 2, 1, "1"),
    ],
)
def test_the_exit_code_is_kept(new_run: Callable[..., Run], tmp_path, overrides, ranks, status, kept):
    run = new_run(*overrides)
    kept_in = tmp_path / "code"
    with run.started(ranks=ranks, env={"SPATTN_EXIT_CODE": str(kept_in)}) as processes:
        run.wait(processes)
    assert processes[0].exitcode == status, run.log
    assert kept_in.read_text() == f"{kept}\n"


def test_a_run_whose_lock_was_taken_over_ends_with_one_line_and_saves_nothing(new_run: Callable[..., Run], tmp_path):
    run = new_run()
    kept_in = tmp_path / "code"
    with run.started(inject("LockTakenOver", at=6), env={"SPATTN_EXIT_CODE": str(kept_in)}) as processes:
        assert run.wait(processes) == 1
    (line,) = [line for line in run.log.splitlines() if line.startswith("error: ")]
    assert f"{run.folder} was taken over (see {run.folder}/lock): this process ends" in line
    assert "Traceback" not in run.log
    assert run.steps() == ["step4"]
    assert (run.folder / "lock").read_text() == '{"host": "another"}'
    assert kept_in.read_text() == "1\n"
