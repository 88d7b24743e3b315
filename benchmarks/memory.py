"""The planner's memory model against real allocations: processes train a small OLMoE, layout by layout, on this machine.

python scripts/benchmark.py memory [--only NAME ...] [--out FILE]

Measured is the most resident memory of rank 0 during the second step, less what it had before the model was built. On a CPU
that is what was allocated, since the C library is told to give every large block back to the system at once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.forked import environment
from spattn_olmoe import machine
from spattn_olmoe.commands import ROOT

WORKER = ROOT / "benchmarks/memory_worker.py"
MIB = 2**20

MODEL = [
    "name=memory",
    "attention.type=standard",
    "attention.impl=sdpa",  # it keeps for the backward pass what the fused kernels keep
    "model.d_model=512",
    "model.n_layers=2",
    "model.vocab_size=8192",
    "model.block.sequence_mixer.n_heads=8",
    "model.block.feed_forward_moe.num_experts=16",
    "model.block.feed_forward_moe.hidden_size=512",
    "model.block.feed_forward_moe.router.top_k=4",
    "dataset.sequence_length=512",
    "dataset.instance_filter_config=null",
    "data_loader.global_batch_size=2048",
    "data_loader.num_workers=0",
    "train_module.rank_microbatch_size=1024",
    "train_module.dp_config.param_dtype=null",  # float32: CPUs compute bfloat16 through copies of their own
    "train_module.optim.foreach=true",  # what PyTorch does by default on a GPU
    "trainer.max_duration.value=2",
    "trainer.max_duration.unit=steps",
    "trainer.no_checkpoints=true",
    "trainer.callbacks.wandb.enabled=false",
]
HSDP = ["train_module.dp_config.name=hsdp", "train_module.dp_config.shard_degree=2"]
PARTS = "[blocks.*.attention_norm,blocks.*.attention,blocks.*.feed_forward_norm,blocks.*.feed_forward_moe.experts]"
RECOMPUTE = ["train_module.ac_config.mode=selected_modules", f"train_module.ac_config.modules={PARTS}"]
LONG = ["train_module.rank_microbatch_size=2048"]

CASES: dict[str, tuple[int, list[str]]] = {  # number of ranks, overrides
    "fsdp": (1, []),
    "fsdp, recompute": (1, RECOMPUTE),
    "fsdp, 2 ranks": (2, []),
    "ddp, 2 ranks": (2, ["train_module.dp_config.name=ddp"]),
    "fsdp + tp, 2 ranks": (2, ["train_module.tp_config.degree=2", *LONG]),
    "fsdp + ulysses, 2 ranks": (2, ["train_module.cp_config.degree=2", "train_module.cp_config.uly={}", *LONG]),
    "hsdp + ep, 2 ranks": (2, [*HSDP, "train_module.ep_config.degree=2"]),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=CASES, help="these layouts only")
    parser.add_argument("--out", type=Path, help="where the result goes (default: benchmarks/results/cpu/memory.json)")


def run(args: argparse.Namespace) -> int:
    rows = []
    out = args.out or machine.results_folder("cpu") / "memory.json"
    with tempfile.TemporaryDirectory() as folder:
        data = _data(Path(folder))
        for name in args.only or CASES:
            rows.append(measure(name, Path(folder), data))
            print(line(rows[-1]), flush=True)
            machine.write_json(out, {"machine": machine.describe("cpu"), "rows": rows})
    print(f"wrote {out}")
    return 0


def measure(name: str, folder: Path, data: list[str]) -> dict:
    """One layout: bytes predicted and bytes measured, by half of a step."""
    from spattn_olmoe.cluster import Layout, memory
    from spattn_olmoe.train import load_experiment

    ranks, overrides = CASES[name]
    overrides = [*MODEL, *data, f"trainer.save_folder={folder}/run", *overrides]
    base, out = ROOT / "configs/base/olmoe.yaml", folder / "peaks.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(WORKER)]
    env = environment(
        {
            # Blocks of 64 KiB and more are mapped and unmapped one by one, so that resident memory is what is allocated.
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
            "MALLOC_ARENA_MAX": "1",
            # oneDNN would keep the scratch of every shape it has met, and experts' shapes are never the same.
            "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
        }
    )
    done = subprocess.run(
        [*command, str(base), json.dumps(overrides), str(out)], env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"{name}: training failed: {done.stderr[-2000:]}")
    measured = json.loads(out.read_text())[-1]
    config = load_experiment(base, overrides)
    predicted = memory(config, Layout.of(config, ranks))
    moments = {moment: sum(parts.values()) for moment, parts in predicted.moments.items()}
    step = moments.pop("the optimiser's step")
    return {
        "layout": name,
        "predicted": {"forward and backward": max(moments.values()), "optimiser": step},
        "measured": measured,
        "parts": {moment: dict(parts) for moment, parts in predicted.moments.items()},
    }


def line(row: dict) -> str:
    """A result in words."""
    halves = [
        f"{half} {row['predicted'][half] / MIB:6.0f} predicted, {row['measured'][half] / MIB:6.0f} measured "
        f"({row['predicted'][half] / row['measured'][half] - 1:+.0%})"
        for half in row["measured"]
    ]
    return f"{row['layout']:26} MiB: " + "; ".join(halves)


def _data(folder: Path) -> list[str]:
    """Token shards of the pages of Python's own manual, as overrides."""
    from pydoc_data.topics import topics

    from spattn_olmoe.data import DataConfig, SourceConfig, TokenizerSection, prepare

    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in topics.values()))
    shards = folder / "shards"
    tokenizer = TokenizerSection(train_vocab_size=512)
    prepare(
        DataConfig(
            output=str(shards), sources=[SourceConfig(paths=[str(corpus)])], tokenizer=tokenizer, sequence_length=512
        )
    )
    return [
        f"dataset.paths=[{shards}/train-*.bin]",
        f"dataset.tokenizer.identifier={shards}/tokenizer.json",
        "dataset.tokenizer.vocab_size=512",
        "dataset.tokenizer.eos_token_id=0",
        "dataset.tokenizer.pad_token_id=1",
    ]
