"""From a config and a cluster's profile to a job: checked before it queues, written down, submitted."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from olmo_core.io import is_url

from ..lock import Lock
from ..machine import GPUS, commit
from ..train.config import ExperimentConfig, load_experiment
from ..train.layout import Layout
from ..train.run import check, check_layout
from ..train.shards import check_data
from .memory import USABLE, memory
from .profile import Profile

TYPE = "attention.type"

LONGEST_LABEL = 40
"""Characters of a JobSet's name: Kubernetes allows 63 to its pods, which JobSet calls ``NAME-train-0-15-abcde``."""


@dataclass(frozen=True)
class Run:
    """One run to submit: a config with its overrides, checked.

    :param name: of its job: the last part of its folder, as the scheduler allows it.
    """

    name: str
    folder: Path
    arguments: list[str]
    config: ExperimentConfig

    def write(self, profile: Profile, file: str, contents: str) -> Path:
        """Put the job and where it comes from into the run's folder.

        :returns: the job's file, ``launch/<file>``.
        """
        folder = self.folder / "launch"
        folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "logs").mkdir(exist_ok=True)  # Slurm does not make it, and fails the job
        (folder / "commit").write_text(f"{commit() or 'unknown'}\n")
        (folder / "cluster.json").write_text(json.dumps(asdict(profile), indent=1) + "\n")
        (folder / file).write_text(contents)
        return folder / file


def plan_runs(
    profile: Profile, config: str, overrides: list[str], types: list[str], *, trusted: Sequence[str] = ()
) -> list[Run]:
    """The runs of a command: one for each attention type, or the config's own.

    :param trusted: what the jobs are told with ``--trust``.

    :raises ValueError: what cannot work on this cluster, in one line.
    """
    if types and (given := [item for item in overrides if item.startswith(f"{TYPE}=")]):
        raise ValueError(
            f"--types {','.join(types)} and {given[0]} both name the attention type: leave one of them out"
        )
    variants = [[*overrides, f"{TYPE}={name}"] for name in types] or [overrides]
    runs = [plan_run(profile, config, variant, trusted) for variant in variants]
    folders = [run.folder for run in runs]
    if doubled := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise ValueError(f"trainer.save_folder={doubled} would be that of several runs: put ${{{TYPE}}} into it")
    names = [run.name for run in runs]
    if twin := next((run for run in runs if names.count(run.name) > 1), None):
        raise ValueError(
            f"trainer.save_folder={twin.folder}: several runs would be jobs of the name {twin.name}, which comes from "
            "the last part of the folder: let it differ in letters or digits"
        )
    return runs


def plan_run(profile: Profile, config: str, overrides: list[str], trusted: Sequence[str] = ()) -> Run:
    """One run, checked as far as the login node can: config, layout, data, memory of a GPU, save folder."""
    experiment = load_experiment(config, overrides)
    check(experiment)
    check_layout(experiment, profile.ranks, profile.nodes)
    if profile.kind == "slurm":  # pods have their own data
        check_data(experiment)
    check_memory(profile, experiment)
    folder = experiment.trainer.save_folder
    if is_url(folder):
        raise ValueError(f"trainer.save_folder={folder} is a URL: the launcher needs a folder that all nodes see")
    if Path(folder).exists() and profile.kind == "slurm":
        Lock(folder, patience=0).release()  # refuses what a running job writes
    arguments = ["--config", os.path.relpath(config), *(f"--trust={name}" for name in trusted), *overrides]
    name = Path(folder).name
    return Run(dns_label(name) if profile.kind == "kubernetes" else name, Path(folder), arguments, experiment)


def dns_label(name: str) -> str:
    """A name as Kubernetes allows it to a service (RFC 1035): a letter, then letters, digits and hyphens."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not label[:1].isalpha():
        label = f"r-{label}".strip("-")
    if len(label) > LONGEST_LABEL:  # what tells runs apart is often the end
        tail = hashlib.sha256(name.encode()).hexdigest()[:6]
        label = f"{label[: LONGEST_LABEL - len(tail) - 1].strip('-')}-{tail}"
    return label


def check_memory(profile: Profile, config: ExperimentConfig) -> None:
    """Raise where by the estimate the run does not fit a GPU of the cluster."""
    if profile.gpu is None:
        return
    gpu = GPUS[profile.gpu]
    try:
        needed = memory(config, Layout.of(config, profile.ranks, profile.nodes))
    except ValueError:  # the model has a part that is not modelled
        return  # check_env and the first step will tell
    if needed.peak > gpu.memory * USABLE:
        raise ValueError(
            f"the run needs an estimated {needed.peak / 2**30:.0f} GiB of memory on each of {profile.ranks} GPUs, and a "
            f"{gpu.name} has {gpu.memory / 2**30:.0f}: python scripts/plan.py --gpus {profile.ranks} --gpu {profile.gpu} "
            "proposes a layout"
        )


def bash_array(name: str, items: list[str]) -> str:
    """A bash assignment of an array."""
    return f"{name}=({' '.join(shlex.quote(item) for item in items)})"
