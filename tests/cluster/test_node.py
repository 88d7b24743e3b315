"""The checks of a machine on this machine, alone and as a job of two processes."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

import pytest
import torch

from benchmarks import forked
from benchmarks.tiny_run import ROOT
from spattn_olmoe.cluster import FAIL, OK, WARN, Row, check_node, merge
from spattn_olmoe.cluster.node import checkpoints_kept
from spattn_olmoe.cluster.nodes import own_gpu
from spattn_olmoe.train import load_experiment


def rows(config: Path, *overrides: str) -> dict[str, Row]:
    return {row.name: row for row in check_node(load_experiment(config, overrides), 1, 1)}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_sound_machine_passes_and_is_left_as_it_was(tiny_yaml: Path, here: Path):
    found = rows(tiny_yaml)
    assert not [row for row in found.values() if row.status == FAIL]
    assert found["OLMo-core"].status == found["data"].status == found["disk space"].status == OK
    assert "1 files" in found["data"].found
    assert not list(here.iterdir())


BAD = {
    "no data": (["dataset.paths=[nowhere/*.bin]"], "data", "nowhere"),
    "another vocabulary": (["dataset.tokenizer.vocab_size=500"], "data", "512"),
    "a disk too small": (
        ["model.block.feed_forward_moe.hidden_size=1000000", "model.block.feed_forward_moe.num_experts=1024"],
        "disk space",
        "checkpoints of",
    ),
    "a folder that cannot be": (["trainer.save_folder=/proc/runs"], "save folder", "/proc"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_would_end_a_run_fails_and_names_a_remedy(what: str, tiny_yaml: Path, here: Path):
    overrides, name, words = BAD[what]
    row = rows(tiny_yaml, *overrides)[name]
    assert row.status == FAIL and words in row.found and row.remedy


def test_wandb_never_fails(tiny_yaml: Path, here: Path, monkeypatch: pytest.MonkeyPatch):
    on = "trainer.callbacks.wandb.enabled=true"
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert "not set" in rows(tiny_yaml, on)["wandb"].found
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:9")  # the port that discards; nobody listens
    row = rows(tiny_yaml, on)["wandb"]
    assert row.status == WARN and "localhost cannot be reached" in row.found


def test_checkpoints_are_counted(tiny_yaml: Path):
    large = ROOT / "configs/1b7b_spattn.yaml"
    assert checkpoints_kept(load_experiment(large)) == 27  # every 1000 of 25,000 steps, the last, an ephemeral one
    assert checkpoints_kept(load_experiment(large, ["trainer.callbacks.checkpointer.max_checkpoints=3"])) == 4


def test_machines_that_differ_are_named():
    same, mine, other = Row("Python", OK, "3.11"), Row("GPU", OK, "8 x A"), Row("GPU", FAIL, "7 x A", "look")
    merged = merge([("one", [same, mine]), ("two", [same, mine]), ("three", [same, other])])
    assert merged == [same, Row("GPU", OK, "one, two: 8 x A"), Row("GPU", FAIL, "three: 7 x A", "look")]


def test_a_job_of_two_processes_prints_one_table_and_fails_as_one(tiny_yaml: Path, here: Path):
    script = str(ROOT / "scripts/check_env.py")
    done = forked.run(script, "--config", str(tiny_yaml), "dataset.paths=[nowhere]", cwd=here, ranks=2)
    assert done.returncode == 1
    assert done.stdout.count("┃ check") == 1
    assert re.search(r"all-reduce +│ warn +│ not tried", done.stdout) and re.search(r"clock skew +│ ok", done.stdout)
    assert re.search(r"data +│ fail", done.stdout) and re.search(r"layout +│ ok +│ fits 2 processes", done.stdout)


CHECK = f"""
import runpy, sys
from spattn_olmoe.cluster import node
node.PATIENCE = 1.0
sys.argv = [{str(ROOT / "scripts/check_env.py")!r}, *sys.argv[1:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
HEALTHY = 'case "$1" in *ecc*) echo "0x0000000000000000, 0, 1980, 1980" ;; esac'


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (HEALTHY, None),
        ("echo 'Unable to determine the device handle' >&2; exit 255", "nvidia-smi fails with status 255"),
        ("sleep 600", "nvidia-smi does not answer within 1 seconds"),
    ],
)
def test_a_node_with_a_broken_gpu_is_named_whatever_nvidia_smi_does(
    tiny_yaml: Path, here: Path, second: str, words: str | None
):
    """Two nodes of a process each, with an nvidia-smi each; the second's is that of a node whose driver lost a GPU."""
    processes = []
    for i, (rank, body) in enumerate(zip(forked.ranks_of(2), (HEALTHY, second), strict=True)):
        smi = here / f"bin{i}/nvidia-smi"
        smi.parent.mkdir()
        smi.write_text(f"#!/bin/sh\n{body}\n")
        smi.chmod(0o755)
        node = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "SLURMD_NODENAME": f"node{i}"}
        env = {**rank, **node, "PATH": f"{smi.parent}:{os.environ['PATH']}"}
        arguments = ["--config", str(tiny_yaml), "--failed-nodes", "failed"]
        processes.append(forked.start(["-c", CHECK, *arguments], here / "out", env=env))
    assert forked.wait(processes, 100) == (words is not None), (here / "out").read_text()
    table = (here / "out").read_text()
    if words is None:
        assert not (here / "failed").exists()
        assert re.search(r"all-reduce +│ ok +│ gloo over 2 processes", table)
    else:
        assert (here / "failed").read_text() == "node1\n"
        assert re.search(rf"GPU clocks, ECC +│ fail +│ node1: RuntimeError: {words}", table), table
        assert re.search(r"all-reduce +│ warn +│ not tried", table)


def test_a_gpu_that_cannot_be_used_is_a_row_and_no_crash(tiny_yaml: Path, here: Path, monkeypatch: pytest.MonkeyPatch):
    def lost(*_: object) -> None:
        raise RuntimeError("CUDA error: unknown error\nCUDA kernel errors might be reported later")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lost)
    monkeypatch.setattr(torch.cuda, "get_device_name", lost)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [(r.name, r.status, r.found) for r in own_gpu()] == [
        ("GPU 1", FAIL, "RuntimeError: CUDA error: unknown error")
    ]
    monkeypatch.setenv("LOCAL_RANK", "2")  # the machine's rows tell that there are too few
    assert own_gpu() == []
    found = rows(tiny_yaml)
    assert found["GPU"].status == FAIL and found["data"].status == OK


@pytest.mark.parametrize(("hard", "remedy"), [(1024, "a higher hard limit"), (4096, "ulimit -n 4096")])
def test_the_remedy_for_open_files_changes_something(
    tiny_yaml: Path, here: Path, monkeypatch: pytest.MonkeyPatch, hard: int, remedy: str
):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, hard))
    found = rows(tiny_yaml)["open files"]
    assert found.status == WARN and found.remedy.startswith(remedy)
