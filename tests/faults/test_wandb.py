"""Weights & Biases that cannot be reached: the run does not notice."""

from __future__ import annotations

import pytest

KEY = {
    "WANDB_API_KEY": "0" * 40,
    "WANDB_BASE_URL": "http://127.0.0.1:9",
    "WANDB_INIT_TIMEOUT": "2",
    "WANDB_SILENT": "true",
}


def test_an_unreachable_server_does_not_stop_a_run(unbroken, new_run):
    pytest.importorskip("wandb")
    run = new_run("trainer.callbacks.wandb.enabled=true")
    assert run(env=KEY) == 0, run.log
    assert run.log.count("wandb is off for the rest of this run") == 1
    assert run.curve == unbroken.curve


def test_looking_for_cancel_tags_without_a_network_does_not_stop_a_run(unbroken, new_run):
    pytest.importorskip("wandb")
    run = new_run("trainer.callbacks.wandb.enabled=true", "trainer.callbacks.wandb.mode=offline")
    assert run(env=KEY) == 0, run.log
    assert run.curve == unbroken.curve
    assert list(run.folder.rglob("run-*.wandb"))
