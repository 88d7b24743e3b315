"""What a run writes of itself: progress, metrics, Weights & Biases."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from olmo_core.train.callbacks import CheckpointerCallback

from spattn_olmoe.model import apply_remedies
from spattn_olmoe.model.fingerprint import FILE_NAME, Fingerprint
from spattn_olmoe.train.faults import SafeCheckpointer
from spattn_olmoe.train.progress import (
    METRICS_FILE,
    MFU_IF_DENSE,
    CheckpointFiles,
    MetricsFile,
    Progress,
    Throughput,
    WandB,
    keep_steps,
    peak_flops,
    progress_line,
    read_metrics,
)
from spattn_olmoe.train.run import build_trainer
from tests.model.tiny import BASE, TINY, run_overrides, run_python, tiny, write_data

LOSS = "train/CE loss"


def experiment(folder: Path, *overrides: str):
    """The tiny experiment in this process: one rank, no process group."""
    return tiny(*arguments(folder, *overrides))


def arguments(folder: Path, *overrides: str) -> list[str]:
    data = folder / "data"
    if not data.exists():
        write_data(data)
    return [*run_overrides(folder / "run", data), "train_module.dp_config=null", *overrides]


@pytest.fixture(autouse=True)
def cpu_moe():
    apply_remedies()


# ---- the metrics file ------------------------------------------------------------------------------------------------


def lines(*steps):
    return "".join(json.dumps({"step": step, "time": 0.0, "a": float(step)}) + "\n" for step in steps)


def test_metrics_of_a_step_are_put_together_in_order(tmp_path):
    parts = [{"step": 2, "a": 1.0}, {"step": 1, "a": 0.5}, {"step": 2, "b": 3.0}, {"step": 2, "a": 2.0}]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(part) + "\n" for part in parts))
    metrics = read_metrics(tmp_path)
    assert metrics == {1: {"a": 0.5}, 2: {"a": 2.0, "b": 3.0}}
    assert list(metrics) == [1, 2]


@pytest.mark.parametrize("broken", ['{"step": 3, "a"', "\n", "[]\n", '{"a": 1}\n', "3\n", '{"step": null}\n'])
def test_a_line_that_was_cut_off_is_passed_over(tmp_path, broken):
    (tmp_path / METRICS_FILE).write_text(lines(1, 2) + broken)
    assert list(read_metrics(tmp_path)) == [1, 2]
    keep_steps(tmp_path / METRICS_FILE, up_to=5)
    assert (tmp_path / METRICS_FILE).read_text() == lines(1, 2)


def test_lines_of_steps_that_come_again_are_dropped(tmp_path):
    file = tmp_path / METRICS_FILE
    file.write_text(lines(1, 2, 3, 2, 4))
    keep_steps(file, up_to=2)
    assert file.read_text() == lines(1, 2, 2)
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_without_a_file_there_is_nothing_to_keep(tmp_path):
    keep_steps(tmp_path / METRICS_FILE, up_to=2)
    assert list(tmp_path.iterdir()) == []


# ---- progress --------------------------------------------------------------------------------------------------------


def test_a_step_is_one_line():
    metrics = {LOSS: 4.56789, "optim/LR (group 0)": 4e-4, "optim/total grad norm": 1.2345, MFU_IF_DENSE: 31.26}
    line = progress_line(7, 300, metrics, tps=12345.6, mfu=28.04, eta="0:01:02")
    assert line == (
        "step 7/300 | loss 4.5679 | lr 4.00e-04 | grad norm 1.234 | 12,346 tokens/s per device | "
        "MFU 28.0 % (as if dense 31.3 %) | ETA 0:01:02"
    )


def test_what_is_not_known_is_not_guessed():
    line = progress_line(7, None, {LOSS: 1.0}, tps=None, mfu=None, eta="-")
    assert line == (
        "step 7/? | loss 1.0000 | lr n/a | grad norm n/a | n/a tokens/s per device | "
        "MFU n/a % (as if dense n/a %) | ETA -"
    )


DEVICES = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A10": None,
    "NVIDIA GB10": None,
    "NVIDIA GeForce RTX 4090": None,
}


@pytest.mark.parametrize(("name", "peak"), DEVICES.items(), ids=DEVICES.keys())
def test_peaks_are_known_by_the_devices_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_a_cpu_has_no_peak():
    assert peak_flops(torch.device("cpu")) is None


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three steps."""
    apply_remedies()
    folder = tmp_path_factory.mktemp("whole")
    config = experiment(folder, "attention.type=spattention", "trainer.callbacks.checkpointer.save_interval=2")
    trainer = build_trainer(config)
    trainer.fit()
    return config, trainer, folder / "run"


def test_a_run_gets_our_callbacks(run):
    _, trainer, _ = run
    kinds = [type(callback) for callback in trainer.callbacks.values()]
    for kind in (Progress, Throughput, MetricsFile, CheckpointFiles, SafeCheckpointer):
        assert kinds.count(kind) == 1
    assert sum(issubclass(kind, CheckpointerCallback) for kind in kinds) == 1


def test_a_run_writes_every_step(run):
    _, _, folder = run
    metrics = read_metrics(folder)
    trained = {step: values for step, values in metrics.items() if LOSS in values}
    assert list(trained) == [1, 2, 3]
    for values in trained.values():
        assert 3 < values[LOSS] < 6
        assert values["optim/total grad norm"] > 0
        assert MFU_IF_DENSE not in values  # a CPU has no MFU


def test_every_checkpoint_and_the_run_carry_attention_and_tokenizer(run):
    config, _, folder = run
    expected = Fingerprint.of(config.model_with_attention())
    for place in (folder, folder / "step2", folder / "step3"):
        assert json.loads((place / FILE_NAME).read_text()) == json.loads(expected.to_json())
        assert (place / "tokenizer.json").read_bytes() == (folder.parent / "data" / "tokenizer.json").read_bytes()
    saved = json.loads((folder / "step3" / "config.json").read_text())
    assert saved["model"]["block"]["sequence_mixer"]["pattern"] == "spattention"


def test_mfu_as_if_dense_takes_the_dense_models_flops(run):
    _, trainer, _ = run
    speed = next(c for c in trainer.callbacks.values() if isinstance(c, Throughput))
    assert speed._ratio() > 1
    assert speed.device_peak_flops_per_second is None


def test_a_resumed_run_is_an_uninterrupted_one(run, tmp_path):
    _, _, whole = run
    options = ["attention.type=spattention", "trainer.callbacks.checkpointer.save_interval=2"]
    for stop in ("trainer.hard_stop={value: 2, unit: steps}", "trainer.hard_stop=null"):
        build_trainer(experiment(tmp_path, *options, stop)).fit()
        if "2" in stop:
            with (tmp_path / "run" / METRICS_FILE).open("a") as file:
                file.write(lines(3) + '{"step": 3, "tr')  # written after the checkpoint, and cut off
    ours, theirs = read_metrics(tmp_path / "run"), read_metrics(whole)
    for key in (LOSS, "optim/total grad norm"):
        assert {s: v[key] for s, v in ours.items() if key in v} == {s: v[key] for s, v in theirs.items() if key in v}
    assert "a" not in ours[3]
    written = [json.loads(line) for line in (tmp_path / "run" / METRICS_FILE).read_text().splitlines()]
    assert [line["step"] for line in written if LOSS in line] == [1, 2, 3]


def test_progress_is_logged_once_a_step(caplog, tmp_path):
    with caplog.at_level(logging.INFO):
        build_trainer(experiment(tmp_path, "trainer.no_checkpoints=true")).fit()
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("step ")]
    assert [line.split(" |")[0] for line in said] == ["step 1/3", "step 2/3", "step 3/3"]
    assert all("MFU n/a % (as if dense n/a %)" in line for line in said)


# ---- Weights & Biases ------------------------------------------------------------------------------------------------

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
    """Train in a Python of its own; returns steps, whether wandb is still on, whether it was imported, and the log."""
    changes = ["trainer.callbacks.wandb.enabled=true", "trainer.no_checkpoints=true", *overrides]
    done = run_python(
        TRAIN.format(before=before),
        str(BASE),
        *TINY,
        *arguments(folder, *changes),
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
