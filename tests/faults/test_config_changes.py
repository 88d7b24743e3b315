"""A run that is resumed with another config: what has changed is used, or the line that passes it over names it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from olmo_core.distributed.checkpoint import get_checkpoint_metadata, load_keys

from tests.faults.processes import Run

OPTIM = "train_module.optim"


@pytest.fixture
def stopped(unbroken: Run, new_run) -> Run:
    """A run with checkpoints of steps 4 and 8 of 12."""
    run = new_run()
    shutil.copytree(unbroken.folder, run.folder, ignore=shutil.ignore_patterns("step12"))
    return run


def config(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "config.json").read_text())


def options(checkpoint: Path, key: str) -> set[Any]:
    """What a checkpoint holds of an option of its optimiser, over all parameters."""
    folder = str(checkpoint / "model_and_optim")
    names = [name for name in get_checkpoint_metadata(folder).state_dict_metadata if name.endswith(f".{key}")]
    assert names
    return set(load_keys(folder, names))


def test_changed_options_of_the_optimiser_are_used_and_named(unbroken, stopped):
    assert options(stopped.folder / "step8", "weight_decay") == {0.1}
    assert stopped(f"{OPTIM}.weight_decay=0.5", f"{OPTIM}.betas=[0.5,0.6]", f"{OPTIM}.eps=1.0e-3") == 0, stopped.log
    (line,) = [line for line in stopped.log.splitlines() if "from here on" in line]
    for said in (
        "weight_decay was 0.1 and is 0.5",
        "betas was (0.9, 0.95) and is (0.5, 0.6)",
        "eps was 1e-08 and is 0.001",
    ):
        assert f"{OPTIM}.{said} from here on" in line
    assert stopped.curve[9] == unbroken.curve[9]  # of the weights that were loaded
    assert stopped.curve[10] != unbroken.curve[10]
    after = stopped.folder / "step12"
    assert (options(after, "weight_decay"), options(after, "betas"), options(after, "eps")) == (
        {0.5},
        {(0.5, 0.6)},
        {1e-3},
    )
    assert config(after)["train_module"]["optim"]["weight_decay"] == 0.5


def test_without_a_scheduler_a_changed_learning_rate_is_used(unbroken, new_run):
    run = new_run("train_module.scheduler=null")
    assert run("trainer.hard_stop={value: 4, unit: steps}") == 0, run.log
    assert run(f"{OPTIM}.lr=0.5e-2", "trainer.max_duration.value=5") == 0, run.log
    assert f"{OPTIM}.lr was 0.01 and is 0.005 from here on" in run.log
    assert options(run.folder / "step5", "lr") == {0.005}


def test_a_resume_without_changes_names_none(unbroken, stopped):
    assert stopped() == 0, stopped.log
    assert "from here on" not in stopped.log and "passed over" not in stopped.log
    assert stopped.curve == unbroken.curve


def test_changed_seeds_are_passed_over_and_not_saved(unbroken, stopped):
    assert stopped("data_loader.seed=1", "init_seed=2") == 0, stopped.log
    (line,) = [line for line in stopped.log.splitlines() if "passed over" in line]
    for said in ("data_loader.seed=1", "began with 34521", "init_seed=2", "began with 12536", "trainer.save_folder"):
        assert said in line
    assert stopped.curve == unbroken.curve
    before, after = (config(stopped.folder / step) for step in ("step8", "step12"))
    assert after["data_loader"]["seed"] == before["data_loader"]["seed"]
    assert (after["init_seed"], after["model"]) == (before["init_seed"], before["model"])


def test_another_runs_checkpoint_leaves_the_seeds_alone(unbroken, tmp_path):
    run = Run(tmp_path / "another", unbroken.data, (f"trainer.load_path={unbroken.folder}/step8",))
    fresh = ("trainer.load_trainer_state=false", "trainer.max_duration.value=1")
    assert run("data_loader.seed=1", "init_seed=2", *fresh) == 0, run.log
    assert "passed over" not in run.log
    after = config(run.folder / "step1")
    assert (after["data_loader"]["seed"], after["init_seed"]) == (1, 2)
