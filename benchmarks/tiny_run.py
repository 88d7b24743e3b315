"""The quickstart in small, as its user runs it: a prepared corpus, a config, and the training command.

Benchmarks and tests share it. Heavy libraries are imported where they are used: most tests need none of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def prepare_tiny_data(folder: Path) -> Path:
    """Real token shards with a manifest, 512 ids, from the pages of Python's own manual; returns their folder."""
    from pydoc_data.topics import topics

    from spattn_olmoe.data import DataConfig, SourceConfig, TokenizerSection, prepare

    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in topics.values()))
    prepare(
        DataConfig(
            output=str(folder / "shards"),
            sources=[SourceConfig(paths=[str(corpus)])],
            tokenizer=TokenizerSection(train_vocab_size=512),
            sequence_length=32,
        )
    )
    return folder / "shards"


def write_tiny_yaml(path: Path, tiny_data: Path) -> Path:
    """Write the quickstart's config, smaller: a step takes a tenth of a second."""
    path.write_text(f"""
extends: {ROOT}/configs/quickstart.yaml
name: tiny
model:
  d_model: 32
  n_layers: 2
  vocab_size: 512
  block:
    sequence_mixer: {{n_heads: 4}}
    feed_forward_moe: {{num_experts: 4, hidden_size: 16}}
dataset:
  paths: ["{tiny_data}/train-*.bin"]
  sequence_length: 32
  tokenizer: {{identifier: "{tiny_data}/tokenizer.json", vocab_size: 512}}
data_loader: {{global_batch_size: 128}}
train_module: {{rank_microbatch_size: 64, optim: {{lr: 1.0e-2}}, scheduler: {{warmup: 2}}}}
trainer:
  metrics_collect_interval: 3
  max_duration: {{value: 12, unit: steps}}
  callbacks:
    checkpointer: {{save_interval: 8, ephemeral_save_interval: 4}}
    lm_evaluator: {{enabled: false}}
""")
    return path


def training_command(config: Path, *arguments: str) -> list[str]:
    """The command line of one training process."""
    return [sys.executable, str(ROOT / "scripts/train.py"), "--config", str(config), *arguments]


def training_environment() -> dict[str, str]:
    """The environment of a training process: one thread, for bits that do not depend on the machine's cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run_training(config: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the training command to its end."""
    return subprocess.run(
        training_command(config, *arguments),
        cwd=cwd,
        env=training_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
