"""The Slurm script on a real Slurm: a run of two machines to which everything happens.

It takes as long as all others together, which are in a file of their own for a process of their own.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

from benchmarks.slurm_cluster import SlurmCluster
from spattn_olmoe.metrics import curve
from tests.faults.processes import Run
from tests.launch.slurm_jobs import MARKS, Job, job_nodes, pause, preempt

pytestmark = MARKS


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
    undisturbed = Run(submit_folder / "runs/undisturbed", submit_folder / "data", saves)
    assert undisturbed(ranks=2) == 0, undisturbed.log  # while Slurm waits for the machine
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
    assert curve(job.run) == undisturbed.curve
    assert list(curve(job.run)) == list(range(1, 13))
