"""A run that is stopped or killed, anywhere, goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal

import pytest

from tests.faults.injected import inject

FAULTS = {
    "SIGTERM mid-step": (inject("Signal", at=6), 143, ["step4", "step6"]),
    "SIGINT mid-step": (inject("Signal", at=6, number=int(signal.SIGINT)), 130, ["step4", "step6"]),
    "SIGHUP mid-step": (inject("Signal", at=6, number=int(signal.SIGHUP)), 129, ["step4", "step6"]),
    "SIGKILL mid-step": (inject("Signal", at=6, number=int(signal.SIGKILL)), -9, ["step4"]),
}


def evaluation(data) -> str:
    return (
        "trainer.callbacks.evaluation={_CLASS_: olmo_core.train.callbacks.LMEvaluatorCallbackConfig, eval_interval: 6, "
        "eval_duration: {value: 2, unit: steps}, eval_dataset: {_CLASS_: olmo_core.data.NumpyPaddedFSLDatasetConfig, "
        f"paths: ['{data}/train-00000.bin'], sequence_length: 32, dtype: uint16, work_dir: '${{dataset.work_dir}}', "
        "metadata: [{label: train}], tokenizer: '${dataset.tokenizer}'}}"
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_stopped_mid_step(unbroken, new_run, fault):
    override, status, saved = FAULTS[fault]
    run = new_run()
    assert run(override) == status, run.log
    assert run.steps() == saved
    assert run() == 0, run.log
    assert run.curve == unbroken.curve


def test_sigterm_before_the_first_step_ends_at_once(unbroken, new_run):
    run = new_run()
    with run.started() as (process,):
        run.until((run.folder / "train.log").exists, process)  # nothing is built yet
        os.kill(process.pid, signal.SIGTERM)
        assert run.wait([process]) in (143, -signal.SIGTERM)
    assert run.steps() == [] or "step 1/" in run.log  # the signal may be late, and then find the run in its steps


def test_sigterm_in_the_dry_run_of_a_batch_ends_at_once(unbroken, new_run):
    run = new_run("data_loader.global_batch_size=4096")
    with run.started("--verbose") as (process,):
        run.until_said("Starting forward/backward dry-run batch", process)
        os.kill(process.pid, signal.SIGTERM)
        assert run.wait([process]) == 143
    assert run.steps() == [] and "Dry-run complete" not in run.log


def test_checkpoints_of_signals_do_not_pile_up(unbroken, new_run):
    run = new_run("trainer.callbacks.checkpointer.save_interval=100")
    for at in (2, 5, 7):
        assert run(inject("Signal", at=at)) == 143, run.log
        assert run.steps() == [f"step{at}"]
    assert run() == 0, run.log
    assert run.steps() == ["step12"]
    assert run.curve == unbroken.curve


def test_sigterm_while_a_resumed_run_starts_leaves_its_checkpoint_alone(unbroken, new_run):
    run = new_run()
    assert run("trainer.hard_stop.value=8", "trainer.hard_stop.unit=steps") == 0, run.log
    before = run.files("step8")
    assert run(inject("SignalAtStart", at=8)) == 143, run.log
    assert run.files("step8") == before
    assert run() == 0, run.log
    assert run.steps() == ["step12", "step4", "step8"]
    assert run.files("step8") == before
    assert run.curve == unbroken.curve


def test_a_checkpoint_of_a_signal_is_replaced_by_the_next_and_not_before(unbroken, new_run):
    run = new_run()
    assert run(inject("Signal", at=6)) == 143, run.log
    before = run.files("step6")
    assert run(inject("SignalAtStart", at=6)) == 143, run.log
    assert run.steps() == ["step4", "step6"] and run.files("step6") == before
    assert run() == 0, run.log
    assert run.steps() == ["step12", "step4", "step8"]
    assert run.curve == unbroken.curve


def test_the_checkpoint_of_the_last_step_is_permanent_though_a_signal_comes_in_it(new_run):
    run = new_run("trainer.callbacks.checkpointer.save_interval=100")
    assert run(inject("Signal", at=12)) == 143, run.log
    assert json.loads((run.folder / "step12/.metadata.json").read_text())["ephemeral"] is False


@pytest.mark.parametrize("how", ["synchronous", "asynchronous"])
def test_killed_while_saving_and_again_at_the_same_step(unbroken, new_run, how):
    run = new_run(f"trainer.callbacks.checkpointer.save_async={str(how == 'asynchronous').lower()}")
    for _ in range(2):
        assert run(inject("KillWhileSaving", at=8)) == -signal.SIGKILL, run.log
        assert list((run.folder / "step4/checksums").iterdir())
        assert not (run.folder / "step8/.metadata.json").exists()
    assert "step4" in run.log
    assert run() == 0, run.log
    assert run.curve == unbroken.curve
    assert not list(run.folder.glob("*-tmp"))


def test_sigterm_in_an_evaluation_lets_it_end_and_saves(unbroken, new_run, data):
    run = new_run(evaluation(data))
    assert run(inject("InEvaluation", at=6)) == 143, run.log
    assert "Finished lm evals" in run.messages()
    assert run.steps() == ["step4", "step6"]
    assert run() == 0, run.log
    assert run.curve == unbroken.curve


def test_an_evaluation_that_raises_does_not_end_the_run(unbroken, new_run, data):
    run = new_run(evaluation(data))
    assert run(inject("InEvaluation", at=6, error="true")) == 0, run.log
    assert run.log.count("evaluation failed; training continues") == 1
    assert "ConnectionError: the evaluation's data is gone" in run.log
    assert "Finished lm evals" in run.messages()  # the one at step 12
    assert run.curve == unbroken.curve


def test_sigterm_to_the_whole_process_group_leaves_the_data_workers_alive(unbroken, new_run):
    run = new_run("data_loader.num_workers=1")
    assert run(inject("Signal", at=6, group="true")) == 143, run.log
    assert run.steps() == ["step4", "step6"]
    assert run("data_loader.num_workers=0") == 0, run.log
    assert run.curve == unbroken.curve
