"""Submit a run with scripts/launch.py to a real Slurm, let everything happen to it, and compare it with one left alone.

    python scripts/benchmark.py cluster FOLDER        # root, Debian's slurm-wlm, munge and iproute2; half an hour

The cluster has three machines on this one (``benchmarks/slurm_cluster.py``). The run takes two of them. Its real time limit
stops it twice, a job of a higher partition preempts it, with and without the user signal, a machine is lost, a rank is killed;
meanwhile it is submitted a second time. Loss and gradient norm of every step must be equal, bit for bit, to those of the same run
left alone. A third run is cancelled, a fourth crashes more often than its profile allows. The two minutes that Slurm holds a
requeued job back are skipped (``scontrol update StartTime=now+3``).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from benchmarks.slurm_cluster import SlurmCluster, missing
from benchmarks.tiny import BASE, ROOT, TINY, run_overrides, write_data
from spattn_olmoe import machine
from spattn_olmoe.metrics import curve, last_step

STEPS = 800
"""Two time limits pass before all else happens: a quick machine has trained for 360 by then."""
PATIENCE = 900.0
"""Seconds to wait for anything."""
PROFILE = {
    "kind": "slurm",
    "nodes": 2,
    "gpus_per_node": 1,
    "cores_per_node": 2,
    "retries": 1,
    "time": "00:05:00",
    "options": ["--signal=B:USR1@60"],
    "env": {"OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": ""},
    "setup": [f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={ROOT}"],
}


class Job:
    """A run, submitted by the launcher."""

    def __init__(self, cluster: SlurmCluster, folder: Path, name: str) -> None:
        self.cluster, self.run, self.brake = cluster, folder / name, folder / f"{name}.brake"
        self.events: list[dict[str, Any]] = []
        self._begun = time.monotonic()
        profile = folder / "cluster.yaml"
        profile.write_text(yaml.safe_dump(PROFILE))
        brake = f"{{_CLASS_: benchmarks.brake.Brake, file: {self.brake}}}"
        self.command = [
            *(
                "env",
                f"PYTHONPATH={ROOT}",
                sys.executable,
                "scripts/launch.py",
                f"--cluster={profile}",
                f"--config={BASE}",
            ),
            *("--trust=benchmarks.brake", *TINY, *run_overrides(self.run, folder / "data")),
            *("attention.type=spattention", f"trainer.max_duration.value={STEPS}"),
            *("trainer.callbacks.checkpointer.save_interval=20", f"trainer.callbacks.brake={brake}"),
        ]

    def submit(self) -> None:
        out = self.cluster.run(*self.command, cwd=ROOT, timeout=PATIENCE)
        self.id = re.findall(r": job (\d+)$", out, flags=re.MULTILINE)[0]

    @property
    def log(self) -> str:
        path = self.run / f"logs/{self.run.name}-{self.id}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def record(self) -> dict[str, str]:
        return self.cluster.job(self.id)

    @property
    def step(self) -> int:
        """The last one in the metrics."""
        return last_step(self.run)

    @property
    def saved(self) -> int:
        """The step of the newest finished checkpoint."""
        return max((int(p.parent.name[4:]) for p in self.run.glob("step*/.metadata.json")), default=0)

    def wait(self, true: Callable[[], bool], what: str) -> None:
        try:
            self.cluster.wait(true, what, PATIENCE)
        except AssertionError as error:
            raise ValueError(f"{error}, see {self.run}/logs; Slurm's record is {self.record}") from None

    def advance(self, steps: int = 5) -> None:
        """Let it train from where it is now."""
        target = self.step + steps
        if target > STEPS:
            raise ValueError(
                f"the run is at step {self.step} of {STEPS}: this machine is too quick for STEPS in {__file__}"
            )
        self.wait(lambda: self.step >= target, f"step {target}")

    def note(self, event: str, words: str = "") -> None:
        """Keep what has happened, once the job's log has it."""
        self.wait(lambda: words in self.log, words)
        line = next((line for line in reversed(self.log.splitlines()) if words in line), "")
        self.events.append(
            {
                "event": event,
                "seconds": round(time.monotonic() - self._begun),
                "step": self.step,
                "newest_checkpoint": self.saved,
                "restarts": int(self.record["Restarts"]),
                "state": self.record["JobState"],
                **({"log": line} if words else {}),
            }
        )
        print(self.events[-1], flush=True)

    def back(self, restarts: int, event: str, words: str = "") -> None:
        """Wait until Slurm has put it back into the queue, and start it."""
        self.wait(lambda: self.record["Restarts"] == str(restarts), f"restart {restarts}")
        self.wait(lambda: self.record["JobState"] == "PENDING", "the queue")
        self.note(event, words)
        self.cluster.start_now(self.id)

    def nodes(self) -> list[str]:
        return self.cluster.run("scontrol", "show", "hostnames", self.record["NodeList"]).split()

    def lift_time_limit(self) -> None:
        """No more notices: on a busy machine they would come between the other events."""
        self.cluster.run("scontrol", "update", f"JobId={self.id}", "TimeLimit=120")

    def kill_a_rank(self, saved: bool = True) -> None:
        """SIGKILL to the rank of the second machine, by default when there is a newer checkpoint than now."""
        before = self.saved
        self.wait(lambda: self.saved > before or not saved, "a newer checkpoint")
        os.kill(self.cluster.ranks(self.nodes()[1])[0], signal.SIGKILL)

    def finish(self) -> None:
        self.brake.unlink(missing_ok=True)
        self.wait(lambda: self.record["JobState"] == "COMPLETED", "the end of training")
        self.note("completed", "training ended with exit code 0")

    def curve(self) -> dict[int, tuple[float, float]]:
        """Loss and norm of the gradient by step."""
        return curve(self.run)


def disturb(job: Job) -> None:
    """All that happens to one run."""
    cluster = job.cluster
    for restarts in (1, 2):
        job.advance()
        job.back(restarts, "time limit", "notified: back into the queue")
    job.lift_time_limit()

    job.advance()
    preempt(cluster)
    job.back(3, "preempted, without the user signal", "preempted: back into the queue")
    cluster.configure("SlurmctldParameters=preempt_send_user_signal")
    job.advance()
    preempt(cluster)
    job.back(4, "preempted, with the user signal", "notified: back into the queue")

    job.advance()
    refuse_a_second(job)  # while a machine is free for it

    lost = job.nodes()[1]
    cluster.lose(lost)
    job.back(5, f"{lost} lost")
    job.kill_a_rank()
    job.back(6, "a rank killed", "it crashed after a newer checkpoint: back into the queue")
    job.advance()
    job.finish()
    cluster.switch_on(lost)  # only now: what Slurm still has to tell the machine would end a new start of the job there


def preempt(cluster: SlurmCluster) -> None:
    """A job of the higher partition takes all machines, and gives them back."""
    high = cluster.run(
        "sbatch", "--parsable", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true"
    ).strip()
    cluster.wait(lambda: cluster.job(high)["JobState"] == "COMPLETED", "the job that preempts", PATIENCE)


def refuse_a_second(job: Job) -> None:
    """The same run, submitted again while it runs: by the launcher, and by hand."""
    refusal = job.cluster.run(*job.command, cwd=ROOT, check=False, timeout=PATIENCE).strip()
    if refusal.splitlines() != [refusal] or f"job {job.id}" not in refusal:
        raise ValueError(f"the launcher should have refused in one line: {refusal}")
    job.note(f"second submission: {refusal}")
    options = ["--parsable", "--nodes=1", f"--output={job.run}/logs/second.log"]
    second = job.cluster.run("sbatch", *options, str(job.run / "launch/job.sbatch"), cwd=ROOT).strip()
    job.wait(lambda: job.cluster.job(second)["JobState"] == "FAILED", "the second job's end")
    lines = (job.run / "logs/second.log").read_text().splitlines()
    refusal = next(line for line in lines if "is in use" in line)
    job.note(f"second job: exit code {job.cluster.job(second)['ExitCode']}, {refusal.strip()}")


def crash(job: Job) -> None:
    """One more crash than the profile allows; then, submitted again, one without a newer checkpoint."""
    job.kill_a_rank()
    job.back(1, "a rank killed", "it crashed after a newer checkpoint: back into the queue")
    job.kill_a_rank()
    job.wait(lambda: job.record["JobState"] == "FAILED", "the end")
    job.note("a rank killed again", "it has crashed 2 times: not tried again")
    submitted = time.time()
    job.submit()
    job.lift_time_limit()
    heartbeat = job.run / "heartbeat"
    job.wait(lambda: heartbeat.exists() and heartbeat.stat().st_mtime > submitted, "a step")
    job.kill_a_rank(saved=False)
    job.wait(lambda: job.record["JobState"] == "FAILED", "the end")
    job.note("a rank killed early", "it crashed without a newer checkpoint: not tried again")


def cancel(job: Job) -> None:
    """``scancel``: it saves, ends, and does not come back."""
    job.advance()
    job.cluster.run("scancel", job.id)
    job.wait(lambda: job.record["JobState"] == "CANCELLED", "the end")
    job.note("scancel", "training ended with exit code 143")
    time.sleep(10)
    left = job.cluster.run("squeue", "--noheader")
    if left or job.saved != job.step or job.record["Restarts"] != "0":
        raise ValueError(
            f"scancel: saved step {job.saved} of {job.step}, Restarts={job.record['Restarts']}, queue {left!r}"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="must not exist; all machines of a cluster would see it")
    parser.add_argument("--results", type=Path, default=machine.results_folder("cpu") / "cluster.json")


def run(args: argparse.Namespace) -> int:
    if reason := missing():
        raise ValueError(f"no Slurm cluster here: {reason}")
    folder = args.folder.resolve()
    folder.mkdir(parents=True)
    write_data(folder / "data")
    record = machine.describe("cpu")
    with SlurmCluster(nodes=3) as cluster:
        jobs = {name: Job(cluster, folder, name) for name in ("disturbed", "alone", "cancelled", "crashing")}
        for name, what in zip(jobs, (disturb, Job.finish, cancel, crash), strict=True):
            jobs[name].brake.touch()
            jobs[name].submit()
            if what is not disturb:
                jobs[name].lift_time_limit()
            what(jobs[name])
        record["result"] = result = {
            "slurm": cluster.run("sinfo", "--version").split()[1],
            "profile": PROFILE,
            "launcher": [word.replace(str(folder), "FOLDER") for word in jobs["disturbed"].command[2:]],
            **compare(jobs),
        }
    text = json.dumps(record).replace(str(folder), "FOLDER").replace(str(ROOT), ".").replace(sys.prefix, ".venv")
    machine.write_json(args.results, json.loads(text))
    if result["steps_that_differ"]:
        raise ValueError(f"these steps differ: {result['steps_that_differ']}")
    print(f"{len(result['resumed_from'])} restarts: all {STEPS} steps are identical")
    shutil.rmtree(folder)
    return 0


def compare(jobs: dict[str, Job]) -> dict[str, Any]:
    a, b = jobs["alone"].curve(), jobs["disturbed"].curve()
    resumed = re.findall(r"resuming from \S*/step(\d+)", jobs["disturbed"].log)
    return {
        "steps": STEPS,
        "events": {name: job.events for name, job in jobs.items()},
        "resumed_from": [int(step) for step in resumed],
        "last_loss": [a[STEPS][0], b[STEPS][0]],
        "steps_that_differ": [step for step in range(1, STEPS + 1) if a[step] != b[step]],
    }
