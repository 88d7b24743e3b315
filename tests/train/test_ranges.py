"""Numbers that cannot be meant are refused by name before anything is built; the shipped configs are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.tiny_run import ROOT
from spattn_olmoe.train.config import load_experiment
from spattn_olmoe.train.run import check

CONFIGS = sorted(path for path in ROOT.glob("configs/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_in_range(path: Path) -> None:
    check(load_experiment(path))


NONSENSE = [
    "model.n_layers=1000000000000",
    "model.n_layers=0",
    "model.n_layers=-1",
    "model.d_model=0",
    "model.d_model=1000000000000",
    "model.block.sequence_mixer.n_heads=0",
    "model.block.sequence_mixer.n_kv_heads=0",
    "model.block.feed_forward_moe.num_experts=0",
    "model.block.feed_forward_moe.router.top_k=0",
    "model.block.feed_forward_moe.router.top_k=9",
    "train_module.max_grad_norm=.nan",
    "train_module.max_grad_norm=-1",
    "train_module.max_grad_norm=0",
    "train_module.max_grad_norm=.inf",
    "train_module.optim.lr=0",
    "train_module.optim.lr=.inf",
    "train_module.optim.lr=1e12",
    "train_module.optim.betas=[]",
    "train_module.optim.betas=[1.5,0.9]",
    "train_module.scheduler.warmup=-1",
    "train_module.scheduler.alpha_f=.nan",
    "train_module.rank_microbatch_size=0",
    "trainer.max_duration.value=-1",
    "trainer.max_duration.value=0",
    "trainer.metrics_collect_interval=0",
    "trainer.metrics_collect_interval=-1",
    "trainer.cancel_check_interval=0",
    "trainer.save_folder=''",
    "dataset.tokenizer.pad_token_id=-1",
    "dataset.tokenizer.pad_token_id=1000000",
    "dataset.tokenizer.eos_token_id=1000000",
    "data_loader.global_batch_size=0",
    "attention.impl=''",
    "attention.band_length=0",
    "init_seed=-1",
    "init_seed=99999999999999999999999",
]


@pytest.mark.parametrize("word", NONSENSE)
def test_nonsense_is_refused_by_its_key(word: str) -> None:
    with pytest.raises(ValueError) as refused:
        check(load_experiment(ROOT / "configs/quickstart.yaml", [word]))
    message = str(refused.value)
    assert word.partition("=")[0].rpartition(".")[2] in message and len(message.splitlines()) == 1
