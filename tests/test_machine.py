"""Facts of GPUs, and the one number of GPU-hours of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

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
