"""Facts of GPUs, and the one number of GPU-hours of a run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from spattn_olmoe import machine
from spattn_olmoe.cluster import plan
from spattn_olmoe.machine import ASSUMED_MFU, GPUS, gpu_hours
from spattn_olmoe.model.flops import flops_per_token
from spattn_olmoe.paper.runs import SCALES, TABLES, cost, runs_of
from spattn_olmoe.train import load_experiment

ROOT = Path(__file__).parents[1]


def test_hours_are_flops_over_the_assumed_share_of_the_peak():
    for name, gpu in GPUS.items():
        assert gpu_hours(gpu.flops * ASSUMED_MFU * 7200, name) == pytest.approx(2)


@pytest.mark.parametrize("name", ["1b7b_standard", "1b7b_spattn", "0p25b1p75b_spattn"])
def test_the_documentation_has_the_same_number(name):
    config = load_experiment(ROOT / "configs" / f"{name}.yaml")
    model = config.model_with_attention().build(init_device="meta")
    tokens = config.trainer.max_duration.value * config.data_loader.global_batch_size
    hours = gpu_hours(float(tokens) * flops_per_token(model, config.sequence_length).total)
    (row,) = [
        line for line in (ROOT / "docs/evaluation.md").read_text().splitlines() if f"`{name}`" in line and "|" in line
    ]
    assert int(row.split("|")[-2]) == round(hours)


def test_plans_and_reproductions_have_the_same_number(tmp_path):
    """What scripts/plan.py and scripts/reproduce.py --dry-run print for one run."""
    planned = plan(load_experiment(ROOT / "configs/1b7b_spattn.yaml"), 16, "h100").gpu_hours
    (run,) = runs_of(
        TABLES["table1"],
        SCALES["paper"],
        seeds=1,
        out=tmp_path,
        config=ROOT / "configs/1b7b_spattn.yaml",
        variants=["sharing"],
    )
    assert cost(run).gpu_hours == planned


def test_results_are_no_change_to_the_code(tmp_path, monkeypatch):
    """A result file that is committed and measured again would else make every later result one of changed code."""
    code, results = tmp_path / "spattn_olmoe/machine.py", tmp_path / machine.RESULTS / "gpu/attention.json"

    def git(*args):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *identity, *args], cwd=tmp_path, check=True, capture_output=True)

    for path in (code, results):
        path.parent.mkdir(parents=True)
        path.write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    monkeypatch.setattr(machine, "__file__", str(code))
    for path, changed in ((results, False), (code, True)):
        path.write_text("2")
        assert machine.describe("cpu")["changed"] is changed


def test_the_same_setup_is_the_same_device_and_a_commit_without_changes():
    here = {"commit": "a" * 40, "changed": False, "device": "GPU"}
    assert machine.same_setup(here, here) and machine.same_setup(here, here | {"changed": None})
    for other in ({"commit": None}, {"commit": "b" * 40}, {"changed": True}, {"device": "CPU"}):
        assert not machine.same_setup(here, here | other) and not machine.same_setup(here | other, here)
    assert not machine.same_setup(here | {"commit": None}, here | {"commit": None})


def test_results_that_cannot_be_written_leave_those_of_before(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    machine.write_json(path, {"a": 1})
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        machine.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
