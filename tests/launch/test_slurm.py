"""The Slurm script itself, run by bash. Where Slurm's own commands would be, functions that do the same on this machine: two
"nodes" of one process each, so that the rendezvous, torchrun and the signals are real."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, training_environment

SCRIPT = ROOT / "scripts/launch/slurm.sbatch"

SLURM = r"""
srun() {  # one task a node; what srun is sent, its tasks are sent
  local tasks=() status=0 node task
  shift  # --kill-on-bad-exit
  for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" & tasks+=($!); done
  trap 'kill -TERM "${tasks[@]}"' TERM
  for task in "${tasks[@]}"; do
    wait "$task" || status=$?
    while kill -0 "$task" 2>/dev/null; do status=0; wait "$task" || status=$?; done
  done
  return "$status"
}
scontrol() {
  case $1 in
    show) for ((node = 0; node < SLURM_NNODES; node++)); do echo localhost; done ;;
    requeue) echo "$2" >requeued ;;
  esac
}
export -f srun scontrol
exec bash "$@"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A submit folder with the environment that the script's one line to adapt names."""
    activate = tmp_path / ".venv/bin/activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\n')
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    return tmp_path


def submit(folder: Path, *arguments: str, nodes: int = 2) -> subprocess.Popen[str]:
    """Start the script as Slurm would, its output in a file."""
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NNODES": str(nodes),
        "SLURM_JOB_NODELIST": ",".join(["localhost"] * nodes),
        "SLURM_GPUS_ON_NODE": "1",
    }
    with (folder / "job.log").open("w") as log:
        return subprocess.Popen(
            ["bash", "-c", SLURM, "slurm", str(SCRIPT), *arguments],
            cwd=folder,
            env={**training_environment(), **slurm},
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )


def complete_steps(run: Path) -> list[int]:
    return sorted(int(p.parent.name.removeprefix("step")) for p in run.glob("step*/.metadata.json"))


def test_a_job_trains_stops_with_a_checkpoint_goes_back_into_the_queue_and_goes_on(tiny_yaml: Path, folder: Path):
    run = folder / "runs/tiny-spattention"
    arguments = ["--config", str(tiny_yaml), "attention.type=spattention", "trainer.max_duration.value=5000"]
    arguments += ["trainer.callbacks.checkpointer.save_interval=5000"]
    arguments += ["trainer.callbacks.checkpointer.ephemeral_save_interval=null", "trainer.metrics_collect_interval=1"]
    job = submit(folder, *arguments)
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size):
        assert job.poll() is None and time.monotonic() < deadline, (folder / "job.log").read_text()[-3000:]
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    log = folder / "job.log"
    assert job.wait(timeout=120) == 0, log.read_text()[-3000:]
    (step,) = complete_steps(run)
    assert 0 < step < 5000
    assert (folder / "requeued").read_text().strip() == str(os.getpid())

    (folder / "requeued").unlink()
    again = submit(folder, *arguments, f"trainer.hard_stop={{value: {step + 2}, unit: steps}}", nodes=1)
    assert again.wait(timeout=120) == 0, log.read_text()[-3000:]
    assert max(complete_steps(run)) == step + 2
    assert not (folder / "requeued").exists()
    said = log.read_text()
    assert re.search(rf"resuming from .*step{step}\b", said)
    assert "training ended with exit code 0" in said


def test_a_job_that_fails_says_so_and_is_not_tried_again(tiny_yaml: Path, folder: Path):
    job = submit(folder, "--config", str(tiny_yaml), "model.n_layer=2", nodes=1)
    assert job.wait(timeout=120) != 0
    assert not (folder / "requeued").exists()
    assert "model.n_layer is not a key" in (folder / "job.log").read_text()


def test_there_is_one_line_to_adapt():
    lines = SCRIPT.read_text().splitlines()
    assert sum("# ADAPT" in line for line in lines) == 1
    (notice,) = [int(m[1]) for line in lines if (m := re.match(r"#SBATCH --signal=B:TERM@(\d+)$", line))]
    (timeout,) = [int(m[1]) for line in lines if (m := re.search(r"--shutdown-timeout=(\d+)", line))]
    assert timeout < notice  # else Slurm kills before torchrun has waited
