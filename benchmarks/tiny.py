"""A tiny OLMoE with everything that the real one has, its data, and runs of it on several ranks.

Benchmarks and tests share it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks import forked
from spattn_olmoe.commands import ROOT
from spattn_olmoe.data.manifest import Manifest, TokenizerRecord
from spattn_olmoe.data.writer import Shard
from spattn_olmoe.files import hash_file
from spattn_olmoe.train import ExperimentConfig, load_experiment

BASE = ROOT / "configs" / "base" / "olmoe.yaml"

T, VOCAB, LAYERS, HEADS = 32, 64, 2, 4
EOS, PAD = 0, 1

TINY = (
    "name=tiny",
    "model.d_model=32",
    f"model.n_layers={LAYERS}",
    f"model.vocab_size={VOCAB}",
    f"model.block.sequence_mixer.n_heads={HEADS}",
    "model.block.feed_forward_moe.num_experts=4",
    "model.block.feed_forward_moe.hidden_size=32",
    "model.block.feed_forward_moe.router.top_k=2",
    f"dataset.sequence_length={T}",
    f"dataset.tokenizer.vocab_size={VOCAB}",
    f"dataset.tokenizer.eos_token_id={EOS}",
    "dataset.dtype=uint16",  # OLMo-core takes so few ids for bytes
    "dataset.instance_filter_config=null",
    f"data_loader.global_batch_size={4 * T}",
    "data_loader.num_workers=0",
    f"train_module.rank_microbatch_size={T}",
    "train_module.optim.lr=1.0e-2",
    "train_module.scheduler.warmup=2",
    "train_module.dp_config.param_dtype=null",
    "trainer.max_duration.value=3",
    "trainer.max_duration.unit=steps",
    "trainer.metrics_collect_interval=1",
    "trainer.callbacks.checkpointer.save_interval=1000",
    "trainer.callbacks.checkpointer.ephemeral_save_interval=null",
    "trainer.callbacks.wandb.enabled=false",
)


def tiny(*overrides: str) -> ExperimentConfig:
    """The tiny experiment. It has no data unless ``overrides`` name some."""
    return load_experiment(BASE, [*TINY, *overrides])


def run_overrides(folder: Path, data: Path) -> list[str]:
    """What a run needs beside :data:`TINY`: where it writes and reads."""
    return [
        f"trainer.save_folder={folder}",
        f"dataset.paths=[{data}/train-*.bin]",
        f"dataset.tokenizer.identifier={data}/tokenizer.json",
    ]


def write_data(folder: Path, n_tokens: int = 4096, seed: int = 0) -> Path:
    """A folder of shards as ``scripts/prepare_data.py`` leaves it: random ids, in documents of 50 tokens or so."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = np.random.default_rng(seed).integers(2, VOCAB, n_tokens).astype(np.uint16)
    ids[49::50] = EOS
    ids[-1] = EOS
    shard, tokenizer = folder / "train-00000.bin", folder / "tokenizer.json"
    ids.tofile(shard)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tokenizer))
    record = TokenizerRecord(
        "tokenizer.json", "file", tokenizer.name, hash_file(tokenizer).hexdigest(), VOCAB, EOS, PAD
    )
    shards = [Shard(shard.name, "train", n_tokens, int((ids == EOS).sum()), hash_file(shard).hexdigest())]
    Manifest(folder, record, "uint16", shards).save()
    return folder


def on_ranks(n_ranks: int, script: Path, *args: str, timeout: float = 400) -> None:
    """Run a script on several ranks of this machine; its failure is the caller's."""
    done = forked.run(str(script), *args, cwd=ROOT, ranks=n_ranks, timeout=timeout)
    if done.returncode:
        raise AssertionError(f"{script.name} on {n_ranks} ranks:\n{done.stdout[-3000:]}\n{done.stderr[-8000:]}")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def one_rank_overrides(folder: Path, *overrides: str) -> list[str]:
    """Overrides of a run of one rank without a process group, its data written where there are none."""
    data = folder / "data"
    if not data.exists():
        write_data(data)
    return [*run_overrides(folder / "run", data), "train_module.dp_config=null", *overrides]
