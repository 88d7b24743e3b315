"""The quickstart in small, as its user runs it: a prepared corpus, a config, and the training command.

Benchmarks and tests share it. Heavy libraries are imported where they are used: most tests need none of them.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from benchmarks import forked
from spattn_olmoe.commands import ROOT, train_command


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


def run_training(config: Path, *arguments: str, cwd: Path, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run the training command to its end, in a forked process, or in one for each rank."""
    return forked.run(*train_command(config, arguments, to_run=True)[1:], cwd=cwd, ranks=ranks)
