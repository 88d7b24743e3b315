"""Several ranks: they stop together, they fall back together, and one that dies takes the others with it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable

import pytest

from spattn_olmoe.model.checkpoint_files import find_damage
from tests.faults.injected import inject
from tests.faults.processes import Run
from tests.faults.test_checkpoints import WEIGHTS, flip

pytestmark = pytest.mark.filterwarnings("ignore")
MINUTE = 60.0


@pytest.fixture(scope="module")
def unbroken_2(data, tmp_path_factory) -> Run:
    """Two ranks to which nothing happens."""
    run = Run(tmp_path_factory.mktemp("unbroken_2") / "run", data)
    assert run(ranks=2) == 0, run.log
    return run


def test_all_ranks_stop_at_the_same_step(unbroken_2, new_run: Callable[..., Run]):
    run = new_run()
    assert run(inject("SlowToHear", at=6, rank=1), ranks=2) == 143, run.log
    assert sorted(re.findall(r"rank \d stops after step \d+", run.log)) == [
        "rank 0 stops after step 6",
        "rank 1 stops after step 6",
    ]
    assert run.steps() == ["step4", "step6"]
    assert sorted(path.name for path in (run.folder / "step6/checksums").iterdir()) == ["rank0.json", "rank1.json"]
    assert run(ranks=2) == 0, run.log
    assert run.curve == unbroken_2.curve


def test_without_the_remedy_they_do_not(new_run):
    run = new_run()
    with run.started(inject("SlowToHear", at=6, rank=1, stock="true"), ranks=2) as processes:
        run.until_said("rank 0 stops after step", processes[0])
        time.sleep(0.2)
    stops = int(re.findall(r"rank 0 stops after step (\d+)", run.log)[0])
    assert f"rank 1 begins step {stops + 1}" in run.log


def test_all_ranks_fall_back_to_the_same_checkpoint(unbroken_2, new_run):
    run = new_run()
    shutil.copytree(unbroken_2.folder, run.folder, ignore=shutil.ignore_patterns("step12"))
    flip(run.folder / "step8" / WEIGHTS.replace("__0", "__1"))
    assert run(ranks=2) == 0, run.log
    assert run.log.count(f"going back to {run.folder / 'step4'}") == 1
    assert run.curve == unbroken_2.curve


def test_all_ranks_skip_the_step_that_is_bad_on_one(unbroken_2, new_run):
    run = new_run()
    assert run(inject("NaN", at=3, rank=1), "trainer.hard_stop={value: 4, unit: steps}", ranks=2) == 0, run.log
    assert run.log.count("step 3 skipped: the gradient's norm is nan") == 1
    assert {step: unbroken_2.curve[step] for step in (1, 2)} == {step: run.curve[step] for step in (1, 2)}
    assert list(run.curve) == [1, 2, 4]
    assert find_damage(str(run.folder / "step4")) is None


def test_a_rank_that_fails_leaves_at_once_and_says_why(new_run, tmp_path):
    run, env = new_run(), {"TORCHELASTIC_ERROR_FILE": f"{tmp_path}/error{{RANK}}.json"}  # as the launcher sets it
    with run.started(inject("Error", at=6, rank=1), ranks=2, env=env) as processes:
        run.until_said("step 5/12", processes[0])
        for process in reversed(processes):
            process.join(MINUTE)
        assert processes[1].exitcode == 1
        assert processes[0].exitcode not in (0, None)
    first = json.loads((tmp_path / "error1.json").read_text())
    assert "ArithmeticError: rank lost its mind" in run.log
    assert "ArithmeticError: rank lost its mind" in first["message"]["message"]


def test_a_full_disk_on_one_rank_is_one_line(new_run):
    run = new_run()
    assert run(inject("FullDisk", at=4, rank=1, size=40_000), ranks=2) != 0
    lines = [line for line in run.log.splitlines() if line.startswith("error: rank ")]
    assert lines and all("step4 could not be saved" in line and "File too large" in line for line in lines), run.log
    assert "Traceback" not in run.log


def test_the_launcher_passes_sigterm_on_and_names_the_rank_that_died(unbroken_2, new_run):
    run = new_run()
    with run.launched(ranks=2) as launcher:
        run.until(lambda: (run.folder / "metrics.jsonl").exists() and 2 in run.curve, launcher)
        os.kill(launcher.pid, signal.SIGTERM)
        assert run.wait([launcher]) != 0
    stopped = max(int(name.removeprefix("step")) for name in run.steps())
    assert f"ended by SIGTERM at step {stopped}" in run.log, run.log[-3000:]
    with run.launched(inject("Signal", at=11, rank=1, number=int(signal.SIGKILL)), ranks=2) as launcher:
        run.until_said("step 10/12", launcher)
        launcher.join(MINUTE)
        assert launcher.exitcode not in (0, None)
    cause = run.log[run.log.index("Root Cause (first observed failure)") :]
    assert re.search(r"rank\s*: 1 .*exitcode\s*: -9", cause, re.DOTALL), cause
    assert run(ranks=2) == 0, run.log
    assert run.curve == unbroken_2.curve
