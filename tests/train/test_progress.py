"""What a run prints and writes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from olmo_core.train.callbacks import CheckpointerCallback
from olmo_core.train.common import TrainingProgress

from benchmarks.tiny import one_rank_overrides, tiny
from spattn_olmoe.machine import peak_flops
from spattn_olmoe.metrics import METRICS_FILE, read_metrics
from spattn_olmoe.model import apply_remedies
from spattn_olmoe.model.fingerprint import FILE_NAME, Fingerprint
from spattn_olmoe.train.checkpoints import CheckpointFiles, SafeCheckpointer
from spattn_olmoe.train.metrics import MetricsFile
from spattn_olmoe.train.progress import (
    MFU_IF_DENSE,
    Progress,
    Throughput,
    duration,
    progress_line,
    summary_of_losses,
)
from spattn_olmoe.train.run import build_trainer
from tests.test_metrics import lines

LOSS = "train/CE loss"


def experiment(folder: Path, *overrides: str):
    """The tiny experiment in this process: one rank, no process group."""
    return tiny(*one_rank_overrides(folder, *overrides))


@pytest.fixture(autouse=True)
def cpu_moe():
    apply_remedies()


# ---- progress --------------------------------------------------------------------------------------------------------


def now(step: int, of: int | None, **speed: float) -> TrainingProgress:
    return TrainingProgress(current_step=step, current_tokens=0, total_steps=of, time_remaining=None, **speed)


def test_a_step_is_one_line():
    metrics = {LOSS: 4.56789, "optim/LR (group 0)": 4e-4, "optim/total grad norm": 1.2345, MFU_IF_DENSE: 31.26}
    metrics["eval/lm/validation/CE loss"] = 4.7
    assert progress_line(7, metrics, now(7, 300, tps=12345.6, bps=2.0, mfu=28.04)) == (
        "step 7/300 | loss 4.5679 | held-out 4.7000 | lr 4.00e-04 | grad norm 1.234 | MFU 28.0 % | "
        "MFU as if dense 31.3 % | 12,346 tokens/s | 2 min left"
    )


def test_what_is_not_known_is_left_out():
    assert progress_line(7, {LOSS: 1.0}, now(7, None)) == "step 7/? | loss 1.0000"
    assert progress_line(7, {LOSS: 1.0}, now(7, 7, tps=10.0, bps=1.0)) == "step 7/7 | loss 1.0000 | 10 tokens/s"


def test_several_held_out_losses_have_their_labels():
    metrics = {LOSS: 1.0, "eval/lm/books/CE loss": 2.0, "eval/lm/code/CE loss": 3.0, "eval/lm/code/PPL": 20.1}
    assert (
        progress_line(3, metrics, now(3, 9)) == "step 3/9 | loss 1.0000 | held-out books 2.0000 | held-out code 3.0000"
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (99.4, "99 s"), (100, "2 min"), (5940, "99 min"), (6000, "1.7 h"), (3.6e6, "1,000.0 h")],
)
def test_a_time_has_the_unit_that_suits_it(seconds, words):
    assert duration(seconds) == words


def test_the_summary_spans_a_run_that_was_resumed():
    metrics = {1: {LOSS: 7.64}, 10: {LOSS: 6.5, "eval/lm/validation/CE loss": 6.6}, 20: {LOSS: 5.4}, 21: {"a": 1.0}}
    assert summary_of_losses(metrics, 2048) == [
        "  loss         7.640 at step 1 (a uniform guess has ln 2048 = 7.625), 5.400 at step 20",
        "  held-out     6.600 at step 10 (validation)",
    ]
    assert summary_of_losses({}, 2048) == []


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
    assert saved["model"]["block"]["sequence_mixer"]["pattern"]["name"] == "spattention"


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
    with caplog.at_level(logging.INFO), caplog.at_level(logging.INFO, "spattn_olmoe"):  # which other tests quieten
        build_trainer(experiment(tmp_path, "trainer.no_checkpoints=true")).fit()
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("step ")]
    assert [line.split(" |")[0] for line in said] == ["step 1/3", "step 2/3", "step 3/3"]
    assert not any("n/a" in line or "MFU" in line for line in said)
