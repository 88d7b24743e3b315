"""The launcher without a cluster: what it would submit, and what it refuses before that."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from benchmarks.tiny import write_data
from benchmarks.tiny_run import ROOT
from spattn_olmoe.cluster import kubernetes, slurm
from spattn_olmoe.cluster.launch import Run, dns_label, plan_run, plan_runs
from spattn_olmoe.cluster.profile import Profile, load_profile
from spattn_olmoe.lock import Lock
from spattn_olmoe.train import load_experiment
from tests.faults.processes import command

EXAMPLES = ROOT / "configs/cluster"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("launch") / "data")


@pytest.fixture
def arguments(data: Path, tmp_path: Path) -> list[str]:
    """``--config`` and overrides of a tiny run."""
    words = command(tmp_path / "runs/tiny-spattention", data)[1:]
    return [word for word in words if not word.startswith("--trust")]


def profile(**changes: object) -> Profile:
    return replace(load_profile(EXAMPLES / "example_slurm.yaml"), **{"nodes": 1, "gpus_per_node": 2, **changes})


def run(arguments: list[str], **changes: object) -> Run:
    config, *overrides = arguments
    return plan_run(profile(**changes), config.removeprefix("--config="), overrides)


def test_the_job_of_slurm_holds_the_profile_and_the_run(arguments: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    cluster = profile(
        partition="gpu", options=["--qos=long"], env={"NCCL_IB_HCA": "mlx5 0"}, srun_options=["--container-image=a b"]
    )
    script = slurm.job_script(cluster, run(arguments))
    for line in (
        "#SBATCH --partition=gpu",
        "#SBATCH --qos=long",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --job-name=tiny-spattention",
        "#SBATCH --signal=B:USR1@600",
        "#SBATCH --mem=0",
        "export NCCL_IB_HCA='mlx5 0'",
        "srun_options=('--container-image=a b')",
        "source .venv/bin/activate",
    ):
        assert script.splitlines().count(line) == 1, line
    assert "ADAPT" not in script and "--account" not in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_the_manifest_of_kubernetes_holds_the_profile_and_the_run(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
):
    validate = pytest.importorskip("kubernetes_validate")
    monkeypatch.chdir(ROOT)
    cluster = replace(
        load_profile(EXAMPLES / "example_kubernetes.yaml"),
        nodes=1,
        gpus_per_node=2,
        rdma="rdma/hca",
        queue="training",
        env={"NCCL_IB_HCA": "mlx5"},
    )
    jobset = yaml.safe_load(kubernetes.job_script(cluster, run(arguments)))
    assert jobset["metadata"]["name"] == "tiny-spattention"
    assert jobset["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "training"}
    job = jobset["spec"]["replicatedJobs"][0]["template"]
    validate.validate({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job}, "1.29", strict=True)
    (train,) = job["spec"]["template"]["spec"]["containers"]
    assert train["resources"]["limits"] == {"memory": "512Gi", "nvidia.com/gpu": 2, "rdma/hca": 2}
    assert "--nproc_per_node=2" in train["command"] and "--nnodes=1" in train["command"]
    assert {"name": "NCCL_IB_HCA", "value": "mlx5"} in train["env"]
    files = {item["name"]: item["value"] for item in train["env"] if "value" in item}
    assert files["SPATTN_EXIT_CODE"].endswith("runs/tiny-spattention/exit_code")
    assert files["TORCH_FR_DUMP_TEMP_FILE"].endswith("runs/tiny-spattention/flight/rank_")
    assert train["args"][0] == "--config" and train["args"][1].endswith(".yaml")


def test_one_run_a_type(arguments: list[str]):
    config, *overrides = [item for item in arguments if not item.startswith(("attention.type", "trainer.save_folder"))]
    folder = "trainer.save_folder=runs/${name}-${attention.type}"
    runs = plan_runs(profile(), config.removeprefix("--config="), [*overrides, folder], ["standard", "eball"])
    assert [r.name for r in runs] == ["tiny-standard", "tiny-eball"]
    with pytest.raises(ValueError, match="several runs"):
        plan_runs(
            profile(), config.removeprefix("--config="), [*overrides, "trainer.save_folder=x"], ["standard", "eball"]
        )


LONG = "olmoe-1b7b-dclm-sequence4096-seed12536"


@pytest.mark.parametrize(
    "name",
    ["1b7b-spattention", "0p25b1p75b-standard", "Tiny_run.2", "7", "---", f"{LONG}-spattention", f"{LONG}-eball"],
)
def test_a_jobset_and_all_that_is_named_after_it_have_names_that_kubernetes_allows(name: str):
    label = dns_label(name)
    for derived in (
        label,
        f"{label}-train-0",
        f"{label}-train-0-0",
        f"{label}-train-0-99999-abcde",
    ):  # service, job, pods
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", derived) and len(derived) <= 63  # RFC 1035


def test_names_stay_apart_and_as_they_are_where_they_can():
    assert dns_label("tiny-spattention") == "tiny-spattention"
    assert dns_label(f"{LONG}-spattention") != dns_label(f"{LONG}-standard")
    shipped = [load_experiment(path) for path in sorted((ROOT / "configs").glob("*b_*.yaml"))]
    names = {Path(config.trainer.save_folder).name for config in shipped}
    assert len(names) > 4 and len({dns_label(name) for name in names}) == len(names)


def test_runs_that_kubernetes_could_not_tell_apart_are_refused(arguments: list[str]):
    config, *overrides = [item for item in arguments if not item.startswith(("attention.type", "trainer.save_folder"))]
    cluster = replace(load_profile(EXAMPLES / "example_kubernetes.yaml"), nodes=1, gpus_per_node=2)
    folder = "trainer.save_folder=runs/${attention.type}/seed"
    with pytest.raises(ValueError, match=r"jobs of the name seed, .* let it differ in letters or digits$"):
        plan_runs(cluster, config.removeprefix("--config="), [*overrides, folder], ["standard", "eball"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda text: text.replace("partition:", "partitoin:"),
            "partitoin is not a key of Profile; did you mean 'partition'?",
        ),
        (
            lambda text: text.replace("kind: slurm", "kind: slrum"),
            "kind='slrum' must be one of slurm, kubernetes; did you mean 'slurm'?",
        ),
        (lambda text: text.replace("nodes: 2", "nodes: 0", 1), "nodes=0 must lie between 1 and"),
        (lambda text: text.replace("retries: 10", "retries: -1"), "retries=-1 must lie between 0 and"),
        (
            lambda text: text.replace("min_bandwidth: 0", "min_bandwidth: -250"),
            "min_bandwidth=-250.0 must lie between 0",
        ),
        (lambda text: text.replace("min_bandwidth: 0", "min_bandwidth: .nan"), "min_bandwidth=nan must lie between 0"),
        (lambda text: text.replace('"24:00:00"', "24:00:00"), 'time=86400 must be a time in quotes, as "24:00:00"'),
        (lambda text: text.replace('"24:00:00"', "90"), "time=90 must be a time in quotes"),
        (lambda text: text.replace('"24:00:00"', "1-"), "time=1- must be a time in quotes"),
        (lambda text: f"{text}memory_per_node: -1Gi", "memory_per_node=-1Gi must be a number with a unit"),
        (lambda text: text.replace("nodes: 2", "nodes: two", 1), "nodes: Value 'two'"),
        (lambda text: text.replace("gpu: h100", "gpu: h1000"), "gpu='h1000' must be one of"),
        (lambda text: text.replace("kind: slurm", ""), "missing mandatory value: kind"),
    ],
)
def test_a_wrong_profile_is_one_line(tmp_path: Path, change: Callable[[str], str], words: str):
    path = tmp_path / "cluster.yaml"
    path.write_text(change((EXAMPLES / "example_slurm.yaml").read_text()))
    with pytest.raises(ValueError) as error:
        load_profile(path)
    assert words in str(error.value)


@pytest.mark.parametrize("time", ["24:00:00", "1-12", "1-12:30", "1-12:30:00", "90:00"])
def test_slurm_s_ways_to_write_a_time(tmp_path: Path, time: str):
    path = tmp_path / "cluster.yaml"
    path.write_text((EXAMPLES / "example_slurm.yaml").read_text().replace("24:00:00", time))
    assert load_profile(path).time == time


def test_what_cannot_work_is_refused_before_it_queues(arguments: list[str], tmp_path: Path):
    with pytest.raises(ValueError, match="must be a multiple of 3 data-parallel ranks"):
        run(arguments, gpus_per_node=3)
    with pytest.raises(ValueError, match=r"needs an estimated .* GiB of memory on each of 2 GPUs, and a H100 has"):
        run([*arguments, "model.d_model=65536", "model.n_layers=64"])
    with pytest.raises(ValueError, match="is a URL"):
        run([*arguments, "trainer.save_folder=s3://bucket/run"])
    (tmp_path / "runs/tiny-spattention").mkdir(parents=True)
    held = Lock(tmp_path / "runs/tiny-spattention")
    with pytest.raises(ValueError, match="is in use: "):
        run(arguments)
    held.release()


def test_without_slurm_it_says_so_in_one_line(arguments: list[str], tmp_path: Path):
    path = tmp_path / "cluster.yaml"
    path.write_text(
        (EXAMPLES / "example_slurm.yaml")
        .read_text()
        .replace("nodes: 2", "nodes: 1", 1)
        .replace("gpus_per_node: 8", "gpus_per_node: 2")
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:/nowhere"}
    launcher = [sys.executable, "scripts/launch.py", "--cluster", str(path), *arguments]
    done = subprocess.run(launcher, capture_output=True, text=True, cwd=ROOT, env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == "error: squeue is not installed: start the launcher on a login node of the cluster"
