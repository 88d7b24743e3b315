"""The Slurm script on a real Slurm: how jobs end, and what is refused before they start."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.slurm_cluster import SlurmCluster
from spattn_olmoe.cluster import slurm
from spattn_olmoe.cluster.launch import plan_run
from spattn_olmoe.cluster.profile import Profile
from tests.faults.processes import command
from tests.launch.slurm_jobs import MARKS, SCRIPT, Job, job_nodes, pause, preempt

pytestmark = MARKS


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
    again.until(lambda: bool(re.search(r"resuming from \S*/step22\b", again.log)), "its log")

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
    exports = f"--export=ALL,SPATTN_SAVE_FOLDER={run},SPATTN_CHECK=no,SPATTN_HANG_SECONDS=10,SPATTN_RETRIES=0"
    job = Job(
        cluster, submit_folder, "hung", *overrides, "trainer.callbacks.heartbeat.stacks_after=4", options=(exports,)
    )
    unreadable = submit_folder / "find-fails"
    unreadable.touch()
    job.until(lambda: bool(job.steps()), "a checkpoint")
    (rank,) = cluster.ranks(job_nodes(cluster, job.id)[1])
    os.kill(rank, signal.SIGSTOP)
    job.until_log("no step for 10 seconds: the ranks are killed")
    job.until_log("it has crashed 1 times: not tried again")
    job.until_state("FAILED")
    unreadable.unlink()
    assert re.search(r"newest checkpoint: step [1-9]\d*, step 0 at the start$", job.log, re.MULTILINE), job.log
    stacks = (run / "stacks/rank0.txt").read_text()
    assert " in fit\n" in stacks and "/torch/distributed/" in stacks  # it waits for the other, in a step or in a save


def test_ranks_without_a_heartbeat_whose_checkpoints_are_at_a_url_are_left_alone_until_they_crash(
    cluster: SlurmCluster, submit_folder: Path
):
    """The script sees nothing of them: neither three attempts at one step nor hours without a sign of life are an end."""
    exports = "--export=ALL,SPATTN_SAVE_FOLDER=s3://bucket/run,SPATTN_CHECK=no"
    arguments = ["trainer.callbacks.heartbeat.enabled=false", pause(submit_folder, 2)]
    job = Job(cluster, submit_folder, "elsewhere", *arguments, options=("--nodes=1", "--hold", exports))
    folder = submit_folder / f"runs/slurm-{job.id}"
    folder.mkdir(parents=True)
    (folder / "attempts.txt").write_text(f"job {job.id} starts at step 0\n" * 3)
    fast = submit_folder / "clock-is-fast"
    fast.touch()
    cluster.run("scontrol", "release", job.id)
    job.until_paused(2)
    time.sleep(3)  # eight hours of that clock
    (rank,) = cluster.ranks(*job_nodes(cluster, job.id))
    os.kill(rank, signal.SIGKILL)
    job.resume(2)
    job.until_log("it crashed, and its checkpoints are not seen: not tried again")
    job.until_state("FAILED")
    fast.unlink()
    assert "checkpoints go to s3://bucket/run, where this script sees none" in job.log and "no step for" not in job.log


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    scripts = sorted(SCRIPT.parent.glob("*.s*"))
    assert SCRIPT in scripts and len(scripts) >= 3
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
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
