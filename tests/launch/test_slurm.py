"""The Slurm script on a real Slurm: what happens to jobs of two machines, which train a tiny model."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from benchmarks.slurm_cluster import SlurmCluster, missing
from benchmarks.tiny import write_data
from benchmarks.tiny_run import ROOT
from spattn_olmoe.cluster import slurm
from spattn_olmoe.cluster.launch import plan_run
from spattn_olmoe.cluster.profile import Profile
from spattn_olmoe.metrics import curve
from tests.faults.injected import inject
from tests.faults.processes import Run, command

pytestmark = [pytest.mark.skipif(missing() is not None, reason=str(missing())), pytest.mark.timeout(3600)]
SCRIPT = ROOT / "scripts/launch/slurm.sbatch"


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with SlurmCluster(nodes=3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def submit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user has: a checkout with its environment. And the data."""
    folder = tmp_path_factory.mktemp("checkout")
    activate = folder / ".venv/bin/activate"
    activate.parent.mkdir(parents=True)
    (folder / "bin").mkdir()
    away = folder / "bin/scontrol"
    away.write_text(
        f'#!/bin/bash\nrm {folder}/controller-is-away 2>/dev/null && exit 1\nexec {shutil.which("scontrol")} "$@"\n'
    )
    away.chmod(0o755)
    activate.write_text(
        f'export PATH="{away.parent}:{Path(sys.executable).parent}:$PATH" PYTHONPATH="{ROOT}"\n'
        "export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=\n"
        f"while [ -e {folder}/set-up-is-slow ]; do touch {folder}/set-up-waits; sleep 0.1; done\n"
    )
    (folder / "scripts").symlink_to(ROOT / "scripts")
    (folder / "pauses").mkdir()
    write_data(folder / "data")
    return folder


@pytest.fixture(autouse=True)
def no_job_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "cluster" in request.fixturenames:
        cluster = request.getfixturevalue("cluster")
        cluster.run("scancel", "--user=root", "--signal=KILL", "--full", check=False)
        cluster.run("scancel", "--user=root", check=False)
        cluster.wait(lambda: cluster.run("squeue", "--noheader") == "", "an empty queue")


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
            over = self.state in ("FAILED", "COMPLETED", "CANCELLED", "TIMEOUT")
            if not true() and over:
                time.sleep(2)  # the last lines of its log are on their way
                assert true(), "the job is over"
            return true()

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


def launch(
    cluster: SlurmCluster, folder: Path, run: Path, *overrides: str, check: bool = True, **profile: object
) -> str:
    """What the launcher prints on the login machine."""
    site = {"kind": "slurm", "nodes": 2, "gpus_per_node": 1, "cores_per_node": 2, "check": False, **profile}
    (folder / "cluster.yaml").write_text(yaml.safe_dump(site))
    _, *arguments = command(run, folder / "data", *overrides)
    launcher = [
        "env",
        f"PYTHONPATH={ROOT}",
        sys.executable,
        "scripts/launch.py",
        "--cluster",
        "cluster.yaml",
        *arguments,
    ]
    return cluster.run(*launcher, cwd=folder, check=check, timeout=900)


def pause(folder: Path, *steps: int) -> str:
    return inject("Pause", steps=list(steps), folder=folder / "pauses")


def preempt(cluster: SlurmCluster, job: Job) -> str:
    """Submit a job that takes all machines, and wait until Slurm has told the one that must give way."""
    options = ["--parsable", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true"]
    high = cluster.run("sbatch", *options).strip()
    job.until(lambda: cluster.job(job.id).get("PreemptTime", "None") != "None", "preemption")
    return high


def test_a_run_that_everything_happens_to_ends_with_the_losses_of_one_that_nothing_happens_to(
    cluster: SlurmCluster, submit_folder: Path
):
    saves = ("trainer.max_duration.value=12", "trainer.callbacks.checkpointer.save_interval=4")
    job = Job.launched(cluster, submit_folder, "disturbed", *saves, pause(submit_folder, 3, 5, 7, 10))
    assert (job.run / "launch/job.sbatch").is_file() and (job.run / "launch/commit").is_file()

    job.until_paused(3)
    # it has all memory of the machines, the cores of the profile, and its GPU, though each machine has two
    assert "mem=4000M" in cluster.job(job.id)["TRES"]
    assert "CPUs=4 " in cluster.run("scontrol", "show", "step", f"{job.id}.0")
    assert [len(cluster.ranks(node)) for node in job_nodes(cluster, job.id)] == [1, 1]
    # the notice before the time limit
    cluster.run("scancel", "--signal=USR1", "--batch", job.id)
    job.until_log("notice from Slurm")
    job.resume(3)
    job.until_log("notified: back into the queue")
    assert job.steps() == [3]
    job.requeued(1)

    job.until_paused(5)  # preemption without a user signal
    high = preempt(cluster, job)
    job.resume(5)
    job.until_log("preempted: back into the queue")
    assert job.steps()[-1] == 5
    cluster.wait(lambda: cluster.job(high)["JobState"] == "COMPLETED", "the job that preempted", 60)
    job.requeued(2)

    job.until_paused(7)  # a lost machine, which is not the one with the script
    lost = job_nodes(cluster, job.id)[1]
    cluster.lose(lost)
    job.resume(7)
    job.requeued(3)
    assert "not tried again" not in job.log

    job.until_paused(10)  # a rank killed, with a newer checkpoint
    assert lost not in job_nodes(cluster, job.id)
    assert job.steps()[-1] == 8
    (rank,) = [pid for node in job_nodes(cluster, job.id)[1:] for pid in cluster.ranks(node)]
    os.kill(rank, signal.SIGKILL)
    job.resume(10)
    job.until_log("it crashed after a newer checkpoint: back into the queue")
    assert "training ended with exit code 1; newest checkpoint: step 8, step 5 at the start" in job.log
    job.requeued(4)

    job.until_state("COMPLETED")
    cluster.switch_on(lost)  # only now: what Slurm still has to tell the machine would end a new start of the job there
    assert [int(step) for step in re.findall(r"resuming from \S*/step(\d+)", job.log)] == [3, 5, 5, 8]
    undisturbed = Run(submit_folder / "runs/undisturbed", submit_folder / "data", saves)
    assert undisturbed(ranks=2) == 0, undisturbed.log
    assert curve(job.run) == undisturbed.curve
    assert list(curve(job.run)) == list(range(1, 13))


def test_stopping_saves_and_ends_it_and_meanwhile_a_second_submission_is_refused(
    cluster: SlurmCluster, submit_folder: Path
):
    """And submitted again, it resumes, without a machine that fails its check; a plain scancel ends it for good."""
    arguments = ["trainer.max_duration.value=50", pause(submit_folder, 22, 24)]
    job = Job(cluster, submit_folder, "stopped", *arguments, options=("--nodes=1",))
    job.until_paused(22)
    second = Job(cluster, submit_folder, "stopped", *arguments, options=("--nodes=1",))
    second.until_state("FAILED")
    assert cluster.job(second.id)["ExitCode"] == "2:0"
    assert f"error: {job.run} is in use: job {job.id}, process " in second.log
    assert (job.run / "heartbeat").exists()  # without it the first would be taken for one that hangs

    cluster.run("scancel", "--signal=TERM", job.id)
    job.resume(22)
    job.until_state("FAILED")
    assert (cluster.job(job.id)["ExitCode"], cluster.job(job.id)["Restarts"]) == ("143:0", "0")
    assert job.steps()[-1] == 22

    cluster.on("node1", "head -c 64000000 /dev/zero > /dev/shm/left_behind || true")
    checked = (f"--export=ALL,SPATTN_SAVE_FOLDER={job.run}",)
    again = Job(cluster, submit_folder, "stopped", *arguments, options=checked)
    again.until_log("excluded from this job: node1: back into the queue")
    again.until(lambda: cluster.job(again.id)["ExcNodeList"] == "node1", "the exclusion")
    assert "in /dev/shm" in again.log and "resuming from" not in again.log
    again.requeued(1)
    again.until_paused(24)
    assert job_nodes(cluster, again.id) == ["node2", "node3"]
    assert re.search(r"resuming from \S*/step22\b", again.log)

    cluster.run("scancel", again.id)
    again.until_log("SIGTERM")
    again.resume(24)
    again.until_state("CANCELLED")
    again.until_log("training ended with exit code 143")
    assert again.steps()[-1] == 24
    assert cluster.run("squeue", "--noheader") == ""
    assert cluster.job(again.id)["Restarts"] == "1"


def test_the_launcher_hands_on_what_slurm_refuses(
    cluster: SlurmCluster, submit_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(submit_folder)
    monkeypatch.setenv("PATH", f"{cluster.commands('sbatch')}:{os.environ['PATH']}")
    config, _, *overrides = command(submit_folder / "runs/refused", submit_folder / "data")[1:]
    site = Profile(kind="slurm", nodes=1, gpus_per_node=1, cores_per_node=2, time="1:00:00")
    run = plan_run(site, config.removeprefix("--config="), overrides)

    def check(**changes: object) -> None:
        profile = replace(site, **changes)
        slurm.check_job(run.write(profile, slurm.FILE, slurm.job_script(profile, run)))

    check()
    for changes, words in (
        ({"partition": "gpus"}, "Invalid partition name specified"),
        ({"gpus_per_node": 3}, "Requested node configuration is not available"),
        ({"nodes": 9}, "Requested node configuration is not available"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            check(**changes)
        assert "\n" not in str(error.value)
    assert cluster.run("squeue", "--noheader") == ""


def test_a_wrong_config_is_not_tried_again_and_its_exit_code_is_kept(cluster: SlurmCluster, submit_folder: Path):
    job = Job(cluster, submit_folder, "wrong", "model.n_layer=2", options=("--nodes=1", "--export=ALL"))
    job.until_state("FAILED")
    record = cluster.job(job.id)
    assert (record["ExitCode"], record["Restarts"]) == ("2:0", "0")
    assert "model.n_layer is not a key" in job.log and "Traceback" not in job.log


def test_whatever_comes_before_training_it_goes_back_into_the_queue(cluster: SlurmCluster, submit_folder: Path):
    """A notice while the script sets itself up, and a preemption while it checks the nodes and Slurm does not answer."""
    slow, away = submit_folder / "set-up-is-slow", submit_folder / "controller-is-away"
    slow.touch()
    job = Job(cluster, submit_folder, "early", options=("--nodes=1", "--export=ALL,SPATTN_SAVE_FOLDER=early"))
    job.until((submit_folder / "set-up-waits").exists, "its set-up")
    cluster.run("scancel", "--signal=USR1", "--batch", job.id)
    job.until_log("notice from Slurm")
    slow.unlink()
    job.until_log("notified: back into the queue")
    job.requeued(1)

    job.until(lambda: f"{job.id}.0" in cluster.run("squeue", "--steps", "--noheader", "--format=%i"), "its check")
    away.touch()
    preempt(cluster, job)
    job.until_log("preempted: back into the queue")
    assert not away.exists()
    job.until(lambda: cluster.job(job.id)["Restarts"] == "2", "the queue")


def test_a_rank_that_hangs_is_noticed_its_stacks_are_written_and_the_job_ends_as_after_a_crash(
    cluster: SlurmCluster, submit_folder: Path
):
    overrides = ["trainer.max_duration.value=5000", "trainer.callbacks.checkpointer.save_interval=3"]
    run = submit_folder / "runs/hung"
    exports = f"--export=ALL,SPATTN_SAVE_FOLDER={run},SPATTN_CHECK=no,SPATTN_HANG_SECONDS=15,SPATTN_RETRIES=0"
    job = Job(
        cluster, submit_folder, "hung", *overrides, "trainer.callbacks.heartbeat.stacks_after=4", options=(exports,)
    )
    job.until(lambda: bool(job.steps()), "a checkpoint")
    (rank,) = cluster.ranks(job_nodes(cluster, job.id)[1])
    os.kill(rank, signal.SIGSTOP)
    job.until_log("no step for 15 seconds: the ranks are killed")
    job.until_log("it has crashed 1 times: not tried again")
    job.until_state("FAILED")
    stacks = (run / "stacks/rank0.txt").read_text()
    assert " in fit\n" in stacks and "/torch/distributed/" in stacks  # it waits for the other, in a step or in a save


def job_nodes(cluster: SlurmCluster, job: str) -> list[str]:
    return cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_signal_meets_bash_while_it_reads_a_command_inside_a_word():
    """A trap that runs while bash 5.2 expands ``"$(...)"``, ``$(($(...)))`` or ``<(...)`` is a syntax error."""
    commands = [line for line in SCRIPT.read_text().splitlines() if not line.lstrip().startswith("#")]
    with_commands = [line.strip() for line in commands if re.search(r"[$<>]\((?!\()|`", line)]
    assert len(with_commands) > 10
    assert [line for line in with_commands if not re.match(r"\w+=\$\([^()]*\)( #.*)?$", line)] == []


def test_the_ranks_may_take_as_long_to_save_as_slurm_gives_notice():
    lines = SCRIPT.read_text().splitlines()
    (notice,) = [int(m[1]) for line in lines if (m := re.match(r"#SBATCH --signal=B:USR1@(\d+)$", line))]
    (timeout,) = [int(m[1]) for line in lines if (m := re.search(r"--shutdown-timeout=(\d+)", line))]
    assert timeout < notice  # else Slurm kills before torchrun has waited
