"""Jobs on a real Slurm, as users submit them."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from benchmarks.slurm_cluster import SlurmCluster, missing
from spattn_olmoe.commands import ROOT
from tests.faults.injected import inject
from tests.faults.processes import command

MARKS = [pytest.mark.skipif(missing() is not None, reason=str(missing())), pytest.mark.timeout(3600)]
SCRIPT = ROOT / "scripts/launch/slurm.sbatch"


class Job:
    """A job of two machines, submitted as a user does: the script by itself, or by the launcher."""

    def __init__(
        self, cluster: SlurmCluster, folder: Path, run: str, *overrides: str, options: tuple[str, ...] = ()
    ) -> None:
        self.cluster, self.folder, self.run = cluster, folder, folder / "runs" / run
        exports = f"ALL,SPATTN_SAVE_FOLDER={self.run},SPATTN_CHECK=no"
        sbatch = ["sbatch", "--parsable", "--nodes=2", "--gpus-per-node=1", "--cpus-per-task=2", f"--export={exports}"]
        _, *arguments = command(self.run, folder / "data", *overrides)
        self.id = cluster.run(*sbatch, *options, str(SCRIPT), *arguments, cwd=folder).strip()
        self._log = folder / f"slurm-{self.id}.log"

    @classmethod
    def launched(cls, cluster: SlurmCluster, folder: Path, run: str, *overrides: str) -> Job:
        job = cls.__new__(cls)
        job.cluster, job.folder, job.run = cluster, folder, folder / "runs" / run
        out = launch(cluster, folder, job.run, *overrides)
        found = re.search(rf"^{run}: job (\d+)$", out, flags=re.MULTILINE)
        assert found, out
        job.id = found[1]
        job._log = job.run / f"logs/{run}-{job.id}.log"
        assert f"tail -F {job._log}" in out
        return job

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    @property
    def state(self) -> str:
        return self.cluster.job(self.id)["JobState"]

    def steps(self) -> list[int]:
        return sorted(int(p.parent.name.removeprefix("step")) for p in self.run.glob("step*/.metadata.json"))

    def until(self, true: Callable[[], bool], what: str, seconds: float = 300) -> None:
        """Wait for something that the job does, as long as it can still do it."""

        def true_or_over() -> bool:
            if true():
                return True
            if self.state in ("FAILED", "COMPLETED", "CANCELLED", "TIMEOUT"):
                time.sleep(2)  # the last lines of its log are on their way
                assert true(), "the job is over"
                return True
            return False

        try:
            self.cluster.wait(true_or_over, what, seconds)
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}\n{self.cluster.job(self.id)}\n{self.log[-4000:]}") from None

    def until_state(self, state: str) -> None:
        self.until(lambda: self.state == state, f"job {self.id} {state}")

    def until_log(self, words: str, times: int = 1) -> None:
        self.until(lambda: self.log.count(words) >= times, words)

    def until_paused(self, step: int) -> None:
        self.until((self.folder / "pauses" / f"at-{step}").exists, f"step {step}")

    def resume(self, step: int) -> None:
        (self.folder / "pauses" / str(step)).touch()

    def requeued(self, restarts: int) -> None:
        """Wait for the queue, and do not wait in it."""
        self.until(lambda: self.cluster.job(self.id)["Restarts"] == str(restarts), f"restart {restarts}")
        self.until_state("PENDING")
        self.cluster.start_now(self.id)


def launch(cluster: SlurmCluster, folder: Path, run: Path, *overrides: str) -> str:
    """What the launcher prints on the login machine."""
    site = {"kind": "slurm", "nodes": 2, "gpus_per_node": 1, "cores_per_node": 2, "check": False}
    (folder / "cluster.yaml").write_text(yaml.safe_dump(site))
    _, *arguments = command(run, folder / "data", *overrides)
    python = ["env", f"PYTHONPATH={ROOT}", sys.executable]
    return cluster.run(*python, "scripts/launch.py", "--cluster", "cluster.yaml", *arguments, cwd=folder, timeout=900)


def pause(folder: Path, *steps: int) -> str:
    return inject("Pause", steps=list(steps), folder=folder / "pauses")


def preempt(cluster: SlurmCluster, job: Job) -> str:
    """Submit a job that takes all machines, and wait until Slurm has told the one that must give way."""
    options = ["--parsable", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true"]
    high = cluster.run("sbatch", *options).strip()
    job.until(lambda: cluster.job(job.id).get("PreemptTime", "None") != "None", "preemption")
    return high


def job_nodes(cluster: SlurmCluster, job: str) -> list[str]:
    return cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()
