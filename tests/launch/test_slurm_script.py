"""The Slurm script where a real Slurm would take hours, or an object store: its commands are stubs here."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch.slurm_jobs import SCRIPT

JOB = "7"
STUBS = {
    "scontrol": 'echo "scontrol $*" >>calls; case $2 in job) echo JobState=RUNNING ;; hostnames) echo here ;; esac',
    "squeue": f"echo {JOB}.0",
    "scancel": 'echo "scancel $*" >>calls',
    "srun": "sleep ${SRUN_SECONDS:-0}; exit ${SRUN_STATUS:-0}",
}


def stub(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    for name, body in STUBS.items():
        stub(tmp_path / "bin", name, body)
    activate = tmp_path / ".venv/bin/activate"
    activate.parent.mkdir(parents=True)
    activate.touch()
    return tmp_path


def attempt(here: Path, save_folder: str, **env: str) -> tuple[str, str]:
    """What one attempt of a job says, and which of Slurm's commands change something."""
    variables = {
        "PATH": f"{here}/bin:{os.environ['PATH']}",
        "SLURM_JOB_ID": JOB,
        "SLURM_NNODES": "1",
        "SLURM_GPUS_PER_NODE": "1",
        "SLURM_JOB_NODELIST": "here",
        "SPATTN_CHECK": "no",
        "SPATTN_SAVE_FOLDER": save_folder,
        **env,
    }
    done = subprocess.run(
        ["bash", str(SCRIPT), "--config", "x.yaml"], cwd=here, env=variables, capture_output=True, text=True, timeout=60
    )
    assert "line " not in done.stderr, done.stderr  # bash names the line of its own errors
    calls = (here / "calls").read_text().splitlines()
    return done.stdout, "\n".join(call for call in calls if not call.startswith("scontrol show"))


def test_at_a_url_no_number_of_time_limits_ends_a_run_and_no_crash_is_tried_again(here: Path):
    folder = here / f"runs/slurm-{JOB}"
    folder.mkdir(parents=True)
    (folder / "attempts.txt").write_text(f"job {JOB} starts at step 0\n" * 3)
    said, _ = attempt(here, "s3://bucket/run")
    assert "checkpoints go to s3://bucket/run, where this script sees none" in said
    assert "training ended with exit code 0\n" in said and "not tried again" not in said
    said, calls = attempt(here, "s3://bucket/run", SRUN_STATUS="1")
    assert "it crashed, and its checkpoints are not seen: not tried again" in said and "requeue" not in calls


def test_the_same_attempts_in_a_folder_end_it(here: Path):
    (here / "run").mkdir()
    (here / "run/attempts.txt").write_text(f"job {JOB} starts at step 0\n" * 3)
    said, _ = attempt(here, "run")
    assert "3 attempts have started at step 0 and saved nothing newer" in said


@pytest.mark.parametrize("earlier", [True, False])
def test_ranks_without_a_heartbeat_are_left_alone(here: Path, earlier: bool):
    """It is switched off, or they have not begun to train; a file there may be that of an earlier attempt."""
    (here / "run").mkdir()
    if earlier:
        (here / "run/heartbeat").touch()
    stub(here / "bin", "date", "echo $(($(/bin/date +%s) * 10000))")  # of a clock that runs so much faster
    said, calls = attempt(here, "run", SRUN_SECONDS="3", SPATTN_HANG_SECONDS="1800")
    assert "training ended with exit code 0" in said and "no step for" not in said and "scancel" not in calls


def test_a_folder_that_cannot_be_read_hides_no_checkpoint(here: Path):
    for step in ("step100", "step250", "step300-tmp"):
        (here / "run" / step).mkdir(parents=True)
        (here / "run" / step / ".metadata.json").touch()
    stub(here / "bin", "find", f'{shutil.which("find")} "$@"; echo "find: lost+found: Permission denied" >&2; exit 1')
    said, _ = attempt(here, "run")
    assert "newest checkpoint: step 250, step 250 at the start" in said
    shutil.rmtree(here / "run")
    said, _ = attempt(here, "run")
    assert "newest checkpoint: step 0, step 0 at the start" in said
