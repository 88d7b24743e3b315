"""Weights & Biases in a run."""

from __future__ import annotations

import json

import pytest

from benchmarks import forked
from benchmarks.tiny import BASE, TINY, one_rank_overrides
from spattn_olmoe.metrics import read_metrics
from spattn_olmoe.train.wandb import WandB

LOSS = "train/CE loss"

TRAIN = """
import json, logging, sys
logging.basicConfig(level=logging.INFO)
{before}
from spattn_olmoe.model import apply_remedies
from spattn_olmoe.train import load_experiment
from spattn_olmoe.train.run import build_trainer
apply_remedies()
trainer = build_trainer(load_experiment(sys.argv[1], sys.argv[2:]))
trainer.fit()
wandb = next(c for n, c in trainer.callbacks.items() if n == "wandb")
print("RESULT", json.dumps([trainer.global_step, wandb.enabled, "wandb" in sys.modules]))
"""


def wandb_run(folder, *overrides, before="", env=None):
    """Train in a process of its own; returns steps, whether wandb is still on, whether it was imported, and the log."""
    changes = ["trainer.callbacks.wandb.enabled=true", "trainer.no_checkpoints=true", *overrides]
    done = forked.run(
        *("-c", TRAIN.format(before=before), str(BASE), *TINY, *one_rank_overrides(folder, *changes)),
        cwd=folder,
        env={"WANDB_API_KEY": "", "WANDB_SILENT": "true", **(env or {})},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return *json.loads(result.removeprefix("RESULT ")), done.stderr


ABSENT = "sys.modules.pop('wandb', None)\nimport importlib.util as u\nfind = u.find_spec\n"
ABSENT += "u.find_spec = lambda name, *a: None if name == 'wandb' else find(name, *a)\nsys.modules['wandb'] = None"


def test_without_the_package_a_run_goes_on(tmp_path):
    steps, enabled, _, log = wandb_run(tmp_path, before=ABSENT)
    assert (steps, enabled) == (3, False)
    assert log.count("the wandb package is not installed (pip install wandb)") == 1
    assert LOSS in read_metrics(tmp_path / "run")[3]


def test_disabled_means_that_it_is_not_even_imported(tmp_path):
    steps, _, imported, _ = wandb_run(tmp_path, "trainer.callbacks.wandb.mode=disabled")
    assert (steps, imported) == (3, False)


def test_a_failing_start_does_not_stop_the_run(tmp_path):
    pytest.importorskip("wandb")
    broken = "import wandb\ndef fail(**kwargs): raise wandb.errors.CommError('no network')\nwandb.init = fail"
    steps, enabled, _, log = wandb_run(tmp_path, before=broken)
    assert (steps, enabled) == (3, False)
    assert log.count("wandb is off for the rest of this run: it failed to start: CommError: no network") == 1


def test_failing_in_the_middle_does_not_stop_the_run(tmp_path):
    pytest.importorskip("wandb")
    broken = "from wandb.sdk.wandb_run import Run\ndef fail(*a, **k): raise OSError('disk full')\nRun.log = fail"
    steps, enabled, _, log = wandb_run(tmp_path, "trainer.callbacks.wandb.mode=offline", before=broken)
    assert (steps, enabled) == (3, False)
    assert log.count("it failed to log: OSError: disk full") == 1


def test_offline_writes_a_run_and_resuming_goes_on_with_it(tmp_path):
    pytest.importorskip("wandb")
    resume = "trainer.no_checkpoints=false"
    first = wandb_run(tmp_path, resume, "trainer.hard_stop={value: 2, unit: steps}")
    assert first[:2] == (2, True)
    assert "wandb logs offline: WANDB_API_KEY is not set" in first[3]
    ids = list((tmp_path / "run").rglob("run_id"))
    assert len(ids) == 1
    run_id = ids[0].read_text()
    second = wandb_run(tmp_path, resume)
    assert second[:2] == (3, True)
    assert ids[0].read_text() == run_id
    files = list((tmp_path / "run").rglob(f"run-{run_id}.wandb"))
    assert len(files) == 2
    assert all(file.stat().st_size > 0 for file in files)


@pytest.mark.parametrize("mode", ["", "on", "Offline", "dryrun"])
def test_an_unknown_mode_is_refused(mode):
    with pytest.raises(
        ValueError, match=r"trainer\.callbacks\.wandb\.mode=.*must be auto, online, offline or disabled"
    ):
        WandB(mode=mode)
