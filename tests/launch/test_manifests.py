"""The Kubernetes manifest and the Dockerfile name only what is there, and agree with each other and with the scripts."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess

import pytest
import yaml

from benchmarks.tiny_run import ROOT
from spattn_olmoe import __version__, machine
from spattn_olmoe.train import load_experiment
from spattn_olmoe.train.layout import check_layout
from spattn_olmoe.train.run import check

LAUNCH = ROOT / "scripts/launch"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
JOBSET = yaml.safe_load((LAUNCH / "kubernetes/jobset.yaml").read_text())
(REPLICATED,) = JOBSET["spec"]["replicatedJobs"]
JOB = REPLICATED["template"]
POD = JOB["spec"]["template"]["spec"]
(TRAIN,) = POD["containers"]
(CHECK,) = POD["initContainers"]


def test_pods_find_each_other():
    nodes = JOB["spec"]["completions"]
    assert JOB["spec"]["completionMode"] == "Indexed" and JOB["spec"]["parallelism"] == nodes
    assert f"--nnodes={nodes}" in TRAIN["command"]
    assert JOBSET["spec"]["network"]["enableDNSHostnames"]
    name = "$(SPATTN_JOB)"  # pod 0 of job 0, as JobSet names it
    assert f"--master_addr={name}-{REPLICATED['name']}-0-0.{name}" in TRAIN["command"]
    (job,) = [item["valueFrom"] for item in TRAIN["env"] if item["name"] == "SPATTN_JOB"]
    assert job == {"fieldRef": {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/jobset-name']"}}
    (rank,) = [item["valueFrom"] for item in TRAIN["env"] if item["name"] == "NODE_RANK"]
    assert rank == {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    assert "--node_rank=$(NODE_RANK)" in TRAIN["command"]
    gpus = TRAIN["resources"]["limits"]["nvidia.com/gpu"]
    assert f"--nproc_per_node={gpus}" in TRAIN["command"]
    assert f"--gpus={nodes * gpus}" in CHECK["args"]


def test_its_config_and_layout_are_sound():
    arguments = TRAIN["args"]
    (config,) = [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
    overrides = [a for a in arguments if not a.startswith("--")]
    assert [a for a in CHECK["args"] if not a.startswith("--gpus=")] == arguments
    experiment = load_experiment(ROOT / config, overrides)
    check(experiment)
    check_layout(experiment, JOB["spec"]["completions"] * TRAIN["resources"]["limits"]["nvidia.com/gpu"])


def test_a_stopped_pod_has_time_to_save_and_a_wrong_config_is_not_tried_again():
    (timeout,) = [int(a.partition("=")[2]) for a in TRAIN["command"] if a.startswith("--shutdown-timeout=")]
    assert timeout < POD["terminationGracePeriodSeconds"]
    assert JOBSET["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert JOB["spec"]["backoffLimit"] == 0  # the gang starts again as one


CRASH, AGAIN, END = "counted restart", "RestartJobSetAndIgnoreMaxRestarts", "FailJobSet"


@pytest.mark.parametrize(
    ("container", "code", "disrupted", "action"),
    [
        ("check", 2, False, END),
        ("train", 2, False, END),
        ("train", 1, False, CRASH),
        ("train", 12, False, CRASH),
        ("train", 137, True, AGAIN),
        ("check", 143, True, AGAIN),
        ("train", 143, False, AGAIN),  # a pod whose ranks ended with those of a disrupted one
    ],
)
def test_what_becomes_of_a_jobset_when_a_pod_fails(container: str, code: int, disrupted: bool, action: str):
    """As the controllers of Jobs and of JobSets decide, in Kubernetes' words for what ended a Job."""
    message = None
    for rule in JOB["spec"]["podFailurePolicy"]["rules"]:
        assert rule["action"] == "FailJob"
        if (codes := rule.get("onExitCodes")) is not None:
            matches = code in codes["values"] and codes.get("containerName") in (None, container)
            said = f"Container {container} for pod default/x failed with exit code {code}"
        else:
            assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
            matches, said = disrupted, "Pod default/x has condition DisruptionTarget"
        if matches:
            message = f"{said} matching FailJob rule at index 0"
            break
    done = CRASH
    for rule in JOBSET["spec"]["failurePolicy"]["rules"]:
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])  # JobSet refuses others
        assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
        if message and any(re.search(pattern, message) for pattern in rule["onJobFailureMessagePatterns"]):
            done = rule["action"]
            break
    assert done == action


def test_what_is_mounted_is_declared_and_where_the_image_works():
    (workdir,) = re.findall(r"^WORKDIR (\S+)$", DOCKERFILE, flags=re.MULTILINE)
    mounts = {mount["name"]: mount["mountPath"] for mount in TRAIN["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in POD["volumes"]}
    assert mounts["runs"] == f"{workdir}/runs" and mounts["data"] == f"{workdir}/data" and mounts["shm"] == "/dev/shm"
    assert {CHECK["image"], TRAIN["image"]} == {f"registry.example.com/spattn_olmoe:{__version__}"}


def test_nobody_is_root():
    (user,) = re.findall(r"^USER (\d+):\d+$", DOCKERFILE, flags=re.MULTILINE)
    assert int(user) == POD["securityContext"]["runAsUser"] > 0 and POD["securityContext"]["runAsNonRoot"]
    for container in (TRAIN, CHECK):
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_the_image_copies_what_is_there_and_the_context_has_it():
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = re.findall(r"^COPY --chown=\S+ (.+) \S+$", DOCKERFILE, flags=re.MULTILINE)
    assert len(copied) == 5
    for name in " ".join(copied).split():
        assert (ROOT / name).exists()
        assert any(fnmatch.fnmatch(name, f"{pattern}*") for pattern in kept), name
    (image,) = re.findall(r"^ARG BASE=(\S+)$", DOCKERFILE, flags=re.MULTILINE)
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d\d\.04(@sha256:[0-9a-f]{64})?", image)


@pytest.mark.parametrize("version", ["1.29", "1.33", "1.37"])
def test_kubernetes_own_schema_finds_nothing(version: str):
    validate = pytest.importorskip("kubernetes_validate")
    validate.validate({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **JOB}, version, strict=True)
    wrong = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "x"},
        "spec": {**JOB["spec"], "completion": 2},
    }
    with pytest.raises(validate.ValidationError):
        validate.validate(wrong, version, strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_the_variant_for_infiniband_adds_its_devices():
    out = subprocess.run(
        ["kubectl", "kustomize", LAUNCH / "kubernetes_rdma"], capture_output=True, text=True, check=True
    ).stdout
    (container,) = yaml.safe_load(out)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert container["resources"]["limits"]["rdma/hca_shared_devices_a"] == gpus
    assert container["securityContext"]["capabilities"] == {"add": ["IPC_LOCK"], "drop": ["ALL"]}
    assert container["command"] == TRAIN["command"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_runs_side_by_side_share_neither_name_nor_folder():
    out = subprocess.run(
        ["kubectl", "kustomize", LAUNCH / "kubernetes_types"], capture_output=True, text=True, check=True
    ).stdout
    jobsets = list(yaml.safe_load_all(out))
    assert [j["metadata"]["name"] for j in jobsets] == ["spattn-spattention", "spattn-standard"]
    pods = [j["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"] for j in jobsets]
    folders = set()
    for pod in pods:
        (check,), (train,) = pod["initContainers"], pod["containers"]
        overrides = [item for item in train["args"] if not item.startswith("--")]
        assert check["args"][-len(train["args"]) :] == train["args"]
        folders.add(load_experiment(ROOT / "configs/1b7b_spattn.yaml", overrides).trainer.save_folder)
    assert folders == {"runs/1b7b-spattention", "runs/1b7b-standard"}


def test_the_first_process_passes_signals_on():
    assert re.search(r"apt-get install .*\btini\b", DOCKERFILE)
    assert re.search(r'^ENTRYPOINT \["tini", "--"\]$', DOCKERFILE, flags=re.MULTILINE)
    assert TRAIN["command"][:2] == ["tini", "--"]


def test_the_image_knows_its_commit():
    assert re.search(r"^ARG COMMIT=$", DOCKERFILE, flags=re.MULTILINE)
    assert re.search(r"^LABEL org\.opencontainers\.image\.revision=\$\{COMMIT\}", DOCKERFILE, flags=re.MULTILINE)
    assert re.search(rf"^ENV {machine.COMMIT}=\$\{{COMMIT\}}$", DOCKERFILE, flags=re.MULTILINE)


def test_a_wrong_config_would_be_refused():
    try:
        check_layout(load_experiment(ROOT / "configs/1b7b_spattn.yaml", ["train_module.dp_config=null"]), 16)
    except ValueError as error:
        assert "dp_config" in str(error)
    else:
        raise AssertionError("sixteen models of their own were let through")
