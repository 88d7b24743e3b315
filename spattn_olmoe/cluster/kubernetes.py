"""Runs as JobSets of Kubernetes: ``scripts/launch/kubernetes/jobset.yaml`` with a cluster's values in it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import yaml

from .launch import Run
from .profile import Profile

MANIFEST = Path("scripts/launch/kubernetes/jobset.yaml")
FILE = "jobset.yaml"


def job_script(profile: Profile, run: Run) -> str:
    """The manifest of a run."""
    if not MANIFEST.is_file():
        raise ValueError(f"{MANIFEST} is not there: start the launcher in the folder of the repository")
    jobset = yaml.safe_load(MANIFEST.read_text())
    jobset["metadata"].update(name=run.name, namespace=profile.namespace)
    labels = jobset["metadata"].pop("labels")
    if profile.queue:
        jobset["metadata"]["labels"] = {**labels, "kueue.x-k8s.io/queue-name": profile.queue}
    jobset["spec"]["failurePolicy"]["maxRestarts"] = profile.retries
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    job.update(completions=profile.nodes, parallelism=profile.nodes)
    pod = job["template"]["spec"]
    job["template"]["metadata"]["labels"]["app"] = run.name
    (affinity,) = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    affinity["labelSelector"]["matchLabels"]["app"] = run.name
    (check,), (train,) = pod["initContainers"], pod["containers"]
    check.update(image=profile.image, args=[f"--gpus={profile.ranks}", *run.arguments])
    train.update(image=profile.image, args=run.arguments, command=_command(train["command"], profile))
    _fill(train, profile, run)
    return yaml.safe_dump(jobset, sort_keys=False)


def _command(command: list[str], profile: Profile) -> list[str]:
    values = {"--nnodes": profile.nodes, "--nproc_per_node": profile.gpus_per_node}
    return [f"{key}={values[key]}" if (key := item.split("=")[0]) in values else item for item in command]


def _fill(train: dict[str, Any], profile: Profile, run: Run) -> None:
    """The container's resources and environment."""
    limits = {"memory": profile.memory_per_node, "nvidia.com/gpu": profile.gpus_per_node}
    if profile.rdma:
        limits[profile.rdma] = profile.gpus_per_node
        train["securityContext"]["capabilities"]["add"] = ["IPC_LOCK"]  # registered memory is locked memory
    train["resources"] = {"requests": {"cpu": str(profile.cores_per_node), **limits}, "limits": limits}
    files = {"SPATTN_EXIT_CODE": run.folder / "exit_code", "TORCH_FR_DUMP_TEMP_FILE": run.folder / "flight/rank_"}
    env = {**files, **profile.env}
    kept = [item for item in train["env"] if item["name"] not in env]
    train["env"] = kept + [{"name": name, "value": str(value)} for name, value in env.items()]


def check_queue(run: Run) -> None:
    """Nothing: applying a JobSet of a name that exists is refused by the API server."""


def check_job(script: Path) -> None:
    """Raise with the API server's reason where it would not take a manifest."""
    _kubectl("create", "--dry-run=server", "-f", str(script))


def submit(script: Path) -> str:
    """Submit a manifest; returns the JobSet's name."""
    return _kubectl("create", "-o", "name", "-f", str(script)).strip().rpartition("/")[2]


def how_to(run: Run, job: str) -> str:
    """What the owner of a JobSet does next."""
    rank_0 = f"jobset.sigs.k8s.io/jobset-name={job},batch.kubernetes.io/job-completion-index=0"
    return "\n".join(
        [
            f"{run.name}: JobSet {job}",
            f"  watch    kubectl logs -f -l {rank_0}",
            f"  stop     kubectl delete jobset {job}",
            f"  resume   kubectl create -f {run.folder}/launch/{FILE}",
        ]
    )


def _kubectl(*command: str) -> str:
    try:
        done = subprocess.run(["kubectl", *command], capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError("kubectl is not installed: --print shows the manifest") from None
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[0] if done.stderr.strip() else "no reason given"
        raise ValueError(f"Kubernetes refuses the run (kubectl {command[0]}): {reason}")
    return done.stdout
