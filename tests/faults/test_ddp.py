"""Runs in OLMo-core's new stack: they train, resume under other layouts, skip bad steps, and refuse what cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from spattn_olmoe.metrics import read_metrics
from spattn_olmoe.model.checkpoint import Checkpoint
from spattn_olmoe.model.convert import convert, verify
from spattn_olmoe.model.stack import Stack
from tests.faults.injected import inject
from tests.faults.processes import Run

BFLOAT16 = 2e-3
"""How far rounding to bfloat16 may take a loss; another batch's is 1e-2 away."""

DDP = (
    "stack=ddp",
    "train_module.dp_config.name=ddp",
    "train_module.dp_config.param_dtype=bfloat16",
    "attention.head_order=natural",
)
SHORT = ("trainer.max_duration.value=6", "trainer.callbacks.checkpointer.save_interval=2")
FOUR_LAYERS = "model.n_layers=4"
EP = "train_module.ep_config.degree=2"
ULYSSES = ("train_module.cp_config.degree=2", "train_module.cp_config.uly={}")
PIPELINE = ("train_module.pp_config.degree=2", "train_module.pp_config.schedule=Custom1F1BV")


def until(step: int) -> str:
    return f"trainer.hard_stop={{value: {step}, unit: steps}}"


def losses(run: Run) -> dict[int, float]:
    return {step: loss for step, (loss, _) in run.curve.items()}


@pytest.fixture(scope="module")
def unbroken_ddp(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("ddp") / "run", data, (*DDP, *SHORT, FOUR_LAYERS))
    assert run() == 0, run.log
    assert list(run.curve) == list(range(1, 7))
    return run


@pytest.fixture
def from_step2(unbroken_ddp: Run, data: Path, tmp_path: Path) -> Run:
    """A run of which nothing but its first checkpoint is left."""
    run = Run(tmp_path / "run", data, unbroken_ddp.overrides)
    shutil.copytree(unbroken_ddp.folder / "step2", run.folder / "step2")
    return run


def test_a_run_resumes_bit_for_bit(unbroken_ddp, from_step2):
    assert from_step2() == 0, from_step2.log
    assert from_step2.curve == {step: unbroken_ddp.curve[step] for step in range(3, 7)}
    assert json.loads((from_step2.folder / "step4/config.json").read_text())["stack"] == "ddp"


def test_a_run_resumes_under_other_layouts(unbroken_ddp, from_step2):
    """From one rank to a pipeline, to experts folded with Ulysses, and back to one."""
    for layout, stop, ranks in ((PIPELINE, 4, 2), ((EP, *ULYSSES), 5, 2), ((), 6, 1)):
        assert from_step2(*layout, until(stop), ranks=ranks) == 0, from_step2.log
    metrics = read_metrics(from_step2.folder)
    balancing = {step: metrics[step]["train/load balancing loss"] for step in (3, 4)}
    assert min(balancing.values()) > 0, balancing  # in the step of a pipeline's save too
    found, wanted = losses(from_step2), losses(unbroken_ddp)
    assert list(found) == [3, 4, 5, 6]
    assert found[3] == wanted[3]  # a pipeline computes what one rank does, in the same order
    assert all(abs(found[step] - wanted[step]) < BFLOAT16 * wanted[step] for step in found)


def test_a_step_without_a_finite_gradient_leaves_weights_and_moments_alone(data, tmp_path):
    run, by_hand = (Run(tmp_path / name, data, (*DDP, until(4))) for name in ("run", "by_hand"))
    assert run(inject("NaN", at=3)) == 0, run.log
    assert "step 3 skipped: the gradient's norm is nan (1 in a row)" in run.log
    assert list(run.curve) == [1, 2, 4]
    assert by_hand("trainer.steps_to_skip=[{start: 3, stop: 4}]") == 0, by_hand.log
    assert run.curve == by_hand.curve


# ---- the other stack -------------------------------------------------------------------------------------------------


def test_a_run_of_v1_continues_in_the_new_stack_and_back(unbroken, data, tmp_path):
    """Weights, moments, step and data order go along; the way back is exact."""
    source = Checkpoint.open(unbroken.folder / "step4")
    there, back = Run(tmp_path / "there", data, DDP), Run(tmp_path / "back", data)
    assert convert(source, there.folder / "step4", Stack.ddp)["moments"] > 0
    assert verify(source, there.folder / "step4") > 100
    convert(Checkpoint.open(there.folder / "step4"), back.folder / "step4", Stack.v1)
    assert back(until(6)) == 0, back.log
    assert back.curve == {step: unbroken.curve[step] for step in (5, 6)}
    assert there(until(6)) == 0, there.log
    wanted, found = losses(unbroken), losses(there)
    assert list(found) == [5, 6]
    assert all(abs(found[step] - wanted[step]) < BFLOAT16 * wanted[step] for step in found)


def test_weights_of_the_other_stack_are_refused(unbroken, data, tmp_path):
    run = Run(tmp_path / "run", data, DDP)
    assert run(f"trainer.load_path={unbroken.folder}") == 2
    errors = [line for line in run.log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in run.log
    assert "holds weights of stack=v1 but this config has stack=ddp" in errors[0]
    assert "scripts/convert_stack.py --checkpoint" in errors[0]
