"""Runs as jobs of Slurm: ``scripts/launch/slurm.sbatch`` with a cluster's values in it."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

from .launch import Run, bash_array
from .profile import Profile

SCRIPT = Path("scripts/launch/slurm.sbatch")
FILE = "job.sbatch"


def job_script(profile: Profile, run: Run) -> str:
    """The whole script of a run's job: submitted again, by hand or by the launcher, it resumes the run."""
    if not SCRIPT.is_file():
        raise ValueError(f"{SCRIPT} is not there: start the launcher in the folder of the repository")
    lines = SCRIPT.read_text().splitlines()
    header = {line.split("=")[0]: line for line in lines if line.startswith("#SBATCH ")}
    header.update({option.split("=")[0]: option for option in _options(profile, run)})
    body = lines[lines.index("set -euo pipefail") :]
    setup = [*profile.setup, bash_array("srun_options", profile.srun_options), *_exports(profile, run)]
    kept = [line for line in body if "# ADAPT" not in line]
    where = next(i for i, line in enumerate(body) if "# ADAPT" in line)
    kept[where:where] = [*setup, f"set -- {shlex.join(run.arguments)}"]
    head = ["#!/usr/bin/env bash", f"# Made by scripts/launch.py from {SCRIPT}, which explains it.", *header.values()]
    return "\n".join([*head, *kept]) + "\n"


def _options(profile: Profile, run: Run) -> list[str]:
    """The options of sbatch that a profile and a run decide."""
    options = {
        "job-name": run.name,
        "nodes": profile.nodes,
        "gpus-per-node": profile.gpus_per_node,
        "cpus-per-task": profile.cores_per_node,
        "time": profile.time,
        "output": f"{run.folder}/logs/%x-%j.log",
        "partition": profile.partition,
        "account": profile.account,
    }
    named = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    return named + [f"#SBATCH {option}" for option in profile.options]


def _exports(profile: Profile, run: Run) -> list[str]:
    variables = {
        **profile.env,
        "SPATTN_SAVE_FOLDER": run.folder,
        "SPATTN_CHECK": "yes" if profile.check else "no",
        "SPATTN_RETRIES": profile.retries,
        "SPATTN_HANG_SECONDS": profile.hang_seconds,
        "SPATTN_MIN_BANDWIDTH": profile.min_bandwidth,
    }
    return [f"export {name}={shlex.quote(str(value))}" for name, value in variables.items()]


def check_queue(run: Run) -> None:
    """Raise where a job of the same name, which would write the same folder, waits or runs already."""
    jobs = _slurm("squeue", "--noheader", "--me", f"--name={run.name}", "--format=%i %T").split("\n")[0]
    if jobs:
        job, state = jobs.split()
        raise ValueError(f"job {job} of the name {run.name} is {state} already: scancel {job} ends it")


def check_job(script: Path) -> None:
    """Raise with Slurm's own reason where it would not take a job."""
    _slurm("sbatch", "--test-only", str(script))


def submit(script: Path) -> str:
    """Submit a script; returns the job's number."""
    return _slurm("sbatch", "--parsable", str(script)).split(";")[0].strip()


def how_to(run: Run, job: str) -> str:
    """What the owner of a job does next."""
    return "\n".join(
        [
            f"{run.name}: job {job}",
            f"  watch    tail -F {run.folder}/logs/{run.name}-{job}.log; squeue --job {job}",
            f"  stop     scancel --signal=TERM {job}    saves; Slurm kills what has not saved in time after a plain scancel",
            f"  resume   sbatch {run.folder}/launch/{FILE}",
        ]
    )


def _slurm(*command: str) -> str:
    """The output of one of Slurm's commands.

    :raises ValueError: it is not installed, or what it complains about.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError(f"{command[0]} is not installed: start the launcher on a login node of the cluster") from None
    if done.returncode != 0:
        reason = re.sub(
            r"^\w+: (error|fatal): ", "", done.stderr.strip().splitlines()[-1] if done.stderr else "no reason given"
        )
        raise ValueError(f"Slurm refuses the job ({command[0]}): {reason}")
    return done.stdout
