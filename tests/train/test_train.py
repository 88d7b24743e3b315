"""Training as its user runs it: real processes, real checkpoints, real kills."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import forked
from benchmarks.forked import environment
from benchmarks.tiny_run import ROOT, run_training
from spattn_olmoe.commands import train_command

LOSS = "train/CE loss"


def losses(run: Path) -> dict[int, float]:
    from spattn_olmoe.metrics import read_metrics

    return {step: metrics[LOSS] for step, metrics in read_metrics(run).items() if LOSS in metrics}


@pytest.fixture(scope="module")
def unbroken(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("unbroken")
    done = run_training(tiny_yaml, "attention.type=spattention", cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs/tiny-spattention"


def test_a_run_logs_learns_and_checkpoints(unbroken: Path):
    curve = losses(unbroken)
    assert list(curve) == list(range(1, 13))
    assert curve[12] < curve[1]
    assert {"step8", "step12"} <= {p.name for p in unbroken.glob("step*")}
    for name in ("config.json", "attention.json", "tokenizer.json", ".metadata.json"):
        assert (unbroken / "step12" / name).is_file(), name
    mixer = json.loads((unbroken / "step12/config.json").read_text())["model"]["block"]["sequence_mixer"]
    assert (mixer["pattern"]["name"], mixer["pattern"]["band_length"]) == ("spattention", 32)
    assert mixer["pattern"]["local_sharing"] is True


def train_until(reached: Callable[[], object], config: Path, *overrides: str, cwd: Path, number: int) -> int | None:
    """Start a run, send it a signal as soon as something is so, and return its exit status."""
    process = forked.start(
        train_command(config, ["attention.type=spattention", *overrides], to_run=True)[1:], cwd / "log", cwd=cwd
    )
    deadline = time.monotonic() + 240
    while not reached():
        assert process.is_alive() and time.monotonic() < deadline, "it ended before it could be stopped"
        time.sleep(0.01)
    os.kill(process.pid or 0, number)
    process.join(120)
    return process.exitcode


@pytest.mark.parametrize("after_step", [5, 9])
def test_killed_and_started_again_it_is_the_same_run(tiny_yaml: Path, unbroken: Path, tmp_path: Path, after_step: int):
    run = tmp_path / "runs/tiny-spattention"
    # The step's checkpoint or a later one is complete once its last file is there.
    files = [run / f"step{step}/.metadata.json" for step in range(after_step - after_step % 4, 13, 4)]
    status = train_until(lambda: any(file.exists() for file in files), tiny_yaml, cwd=tmp_path, number=signal.SIGKILL)
    assert status == -signal.SIGKILL
    again = run_training(tiny_yaml, "attention.type=spattention", cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resuming from" in again.stdout
    assert losses(run) == losses(unbroken)


def test_sigterm_saves_and_the_next_start_goes_on(tiny_yaml: Path, unbroken: Path, tmp_path: Path):
    run = tmp_path / "runs/tiny-spattention"
    status = train_until(
        lambda: (run / "metrics.jsonl").exists() and losses(run),
        tiny_yaml,
        "trainer.callbacks.checkpointer.ephemeral_save_interval=null",
        cwd=tmp_path,
        number=signal.SIGTERM,
    )
    assert status == 128 + signal.SIGTERM
    again = run_training(tiny_yaml, "attention.type=spattention", cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert losses(run) == losses(unbroken)


def test_another_attention_type_is_refused_on_resume_and_allowed_when_asked(
    tiny_yaml: Path, unbroken: Path, tmp_path: Path
):
    other = (f"trainer.save_folder={unbroken}", "attention.type=eball", "trainer.max_duration.value=13")
    refused = run_training(tiny_yaml, *other, cwd=tmp_path)
    assert refused.returncode == 2
    message = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert len(message) == 1 and "allow_attention_change=true" in message[0] and "Traceback" not in refused.stderr
    allowed = run_training(
        tiny_yaml,
        "attention.type=eball",
        f"trainer.load_path={unbroken}/step12",
        "allow_attention_change=true",
        "trainer.max_duration.value=13",
        cwd=tmp_path,
    )
    assert allowed.returncode == 0, allowed.stderr[-3000:]
    assert list(losses(tmp_path / "runs/tiny-eball")) == [13]


def test_a_run_is_continued_at_a_longer_length_with_wider_bands(tiny_yaml: Path, unbroken: Path, tmp_path: Path):
    """What configs/1b7b_spattn_16k.yaml does with a run at 4096 tokens."""
    done = run_training(
        tiny_yaml,
        "name=longer",
        "attention.type=spattention",
        "allow_attention_change=true",
        "dataset.sequence_length=128",
        "train_module.rank_microbatch_size=128",
        "model.block.sequence_mixer.rope.theta=100000",
        f"trainer.load_path={unbroken}",
        "trainer.load_trainer_state=false",
        "trainer.load_optim_state=false",
        "trainer.max_duration.value=2",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "runs/longer-spattention"
    assert list(losses(run)) == [1, 2]  # a schedule of its own
    assert losses(run)[1] < losses(unbroken)[6] < losses(unbroken)[1]  # from trained weights
    mixer = json.loads((run / "step2/config.json").read_text())["model"]["block"]["sequence_mixer"]
    assert (mixer["pattern"]["band_length"], mixer["rope"]["theta"]) == (128, 100000)


BAD = {
    "unknown key": (["model.n_layer=2"], "n_layers"),
    "unknown option": (["attention.local_sharin=true"], "local_sharing"),
    "unknown attention type": (["attention.type=spatention"], "spattention"),
    "heads that do not divide d_model": (["model.block.sequence_mixer.n_heads=5"], "d_model"),
    "missing data": (["dataset.paths=[nowhere/train-*.bin]"], "nowhere"),
    "vocabulary beyond the model's": (["model.vocab_size=256"], "vocab_size"),
    "data of another tokenizer": (["dataset.tokenizer.vocab_size=500"], "512"),
    "sequence longer than the data": (
        [
            "dataset.sequence_length=1048576",
            "data_loader.global_batch_size=1048576",
            "train_module.rank_microbatch_size=1048576",
        ],
        "sequence_length",
    ),
    "a batch larger than the data": (
        ["data_loader.global_batch_size=67108864", "train_module.rank_microbatch_size=128"],
        "data_loader.global_batch_size",
    ),
    "a checkpoint that is not there": (["trainer.load_path=nowhere/step5"], "trainer.load_path=nowhere/step5"),
    "more experts a token than there are": (["model.block.feed_forward_moe.router.top_k=5"], "top_k=5"),
    "dropout": (["model.block.sequence_mixer.dropout=0.1"], "dropout"),
    "layout beyond the ranks": (["train_module.tp_config.degree=2"], "tp_config"),
    "a config that is not there": (None, "does not exist"),
    "not key=value": (["attention.type"], "key=value"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_gets_one_line_and_exit_code_2(
    what: str,
    tiny_yaml: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    overrides, needle = BAD[what]
    config = tiny_yaml if overrides is not None else tmp_path / "absent.yaml"
    command = train_command(config, overrides or [], to_run=True)
    monkeypatch.setattr(sys, "argv", command[1:])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(command[1], run_name="__main__")
    assert stopped.value.code == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1 and err.startswith("error: ") and needle in err
    assert not list(tmp_path.iterdir())


def test_bad_input_under_torchrun(tiny_yaml: Path, tmp_path: Path):
    command = train_command(tiny_yaml, ["train_module.dp_config=null"], ranks=2, to_run=True)
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "train_module.dp_config" in errors[0]


def asked(*arguments: str) -> list[str]:
    """The lines that a training command prints which starts nothing."""
    done = run_training(ROOT / "configs/quickstart.yaml", *arguments, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_dry_run_is_short_and_knows_a_gpus_memory_when_asked():
    plain, with_gpus = asked("--dry-run"), asked("--dry-run", "--gpus", "1")
    assert len(plain) < len(with_gpus) <= 80
    assert "memory of a GPU" in "\n".join(with_gpus)
    if not torch.cuda.is_available():
        assert "memory of a GPU" not in "\n".join(plain) and "--gpus N" in plain[-1]


def test_show_prints_one_value_or_all_of_them():
    assert asked("--show", "attention.type", "attention.type=eball") == ["eball"]
    assert "  type: eball" in asked("--show", "attention.type=eball")
