"""A training step on a CPU: every named mask and transformers' OLMoE, in one process, in turns.

    python scripts/benchmark.py step                                            # the quickstart's step, against transformers
    python scripts/benchmark.py step --experts 64 --top-k 8                     # OLMoE's routing
    python scripts/benchmark.py step --lengths 256 1024 4096 8192 16384 --tokens 16384 --no-transformers

Ours is the step of ``scripts/train.py`` (see benchmarks/training_step.py). transformers' is a plain loop around
OlmoeForCausalLM of the same size under ``sdpa``, with the fastest of its ways to compute experts, PyTorch's fused AdamW, and
without the auxiliary losses that ours has. Least times of all rounds; every contender runs once a round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import arguments, report
from benchmarks.attention import Store
from benchmarks.training_step import build_step, one_rank
from spattn_olmoe import machine
from spattn_olmoe.commands import ROOT
from spattn_olmoe.errors import quiet, whole
from spattn_olmoe.patterns import find_variant

if TYPE_CHECKING:
    from spattn_olmoe.train import ExperimentConfig

MASKS = ("dense", "sharing", "exclusive", "sliding_window")
EXPERTS_PATHS = ("eager", "batched_mm", "grouped_mm")
"""How transformers computes experts, by the names that it takes."""

MOST_BYTES = 2**31

Step = Callable[[], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", nargs="+", type=whole(16, 2**20), metavar="N", default=[256, 1024])
    parser.add_argument("--tokens", type=whole(16, 2**24), default=4096, help="of a step; one sequence at least")
    parser.add_argument("--experts", type=whole(1, 1024), default=8)
    parser.add_argument("--top-k", type=whole(1, 1024), default=2)
    parser.add_argument("--rounds", type=whole(1, 1000), default=5)
    parser.add_argument("--no-transformers", action="store_true", help="our masks alone")
    parser.add_argument("--report", action="store_true", help="measure nothing: make table and plot of what is stored")
    arguments.add_patterns(parser, MASKS)
    parser.add_argument("--results", type=Path, default=machine.results_folder("cpu") / "step.json")


def run(args: argparse.Namespace) -> int:
    if not args.report:
        if args.top_k > args.experts:
            raise ValueError(f"--top-k {args.top_k}: must be at most --experts {args.experts}")
        store = Store(args.results, machine.describe("cpu"))
        quiet()
        with one_rank(seed=0, device="cpu"):
            for N in args.lengths:
                rows = measure(args, N)
                store.add(rows[0]["setting"], rows)
                report.print_setting(rows[0]["setting"], report.step_lines(rows))
    for file in report.write(args.results, report.step_markdown, report.step_plot):
        print(f"wrote {file}")
    return 0


def measure(args: argparse.Namespace, N: int) -> list[dict[str, Any]]:
    """Rows of one length: every contender's least seconds of a step."""
    tokens = max(N, args.tokens // N * N)
    setting = {
        "setting": f"N{N} tokens{tokens} experts{args.experts}/{args.top_k} threads{torch.get_num_threads()}",
        "N": N,
        "tokens": tokens,
        "experts": args.experts,
        "top_k": args.top_k,
        "threads": torch.get_num_threads(),
    }
    flops, steps = {}, {}
    for mask in args.patterns:
        steps[mask], flops[mask] = _ours(mask, setting)
    if not args.no_transformers:
        name, step = _fastest_of_transformers(setting)
        steps[name] = step
    least = dict.fromkeys(steps, float("inf"))
    for step in steps.values():
        step()
    for _ in range(args.rounds):
        for name, step in steps.items():
            least[name] = min(least[name], _seconds(step))
    return [
        {
            **setting,
            "contender": name,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "flops_per_token": flops.get(name),
        }
        for name, seconds in least.items()
    ]


def _ours(mask: str, setting: dict[str, Any]) -> tuple[Step, int]:
    """A step under a mask, and the operations of a token by its pairs."""
    from olmo_core.distributed import parallel

    from spattn_olmoe.model.flops import flops_per_token

    config = _experiment(setting, *find_variant(mask).overrides)
    model = config.model_with_attention()
    parallel._WORLD_MESH = None  # OLMo-core builds one model a process
    return build_step(config, model, _ids(setting)[None]), flops_per_token(
        model.build(init_device="meta"), setting["N"]
    ).total


def _experiment(setting: dict[str, Any], *words: str) -> ExperimentConfig:
    """The quickstart's, in a setting."""
    from spattn_olmoe.train import load_experiment

    shape = (
        f"dataset.sequence_length={setting['N']}",
        f"model.block.feed_forward_moe.num_experts={setting['experts']}",
        f"model.block.feed_forward_moe.router.top_k={setting['top_k']}",
        f"train_module.rank_microbatch_size={setting['tokens']}",
        f"data_loader.global_batch_size={setting['tokens']}",
    )
    return load_experiment(ROOT / "configs/quickstart.yaml", [*words, *shape])


def _ids(setting: dict[str, Any]) -> torch.Tensor:
    shape = setting["tokens"] // setting["N"], setting["N"]
    return torch.randint(2, 2048, shape, generator=torch.Generator().manual_seed(0))


def _fastest_of_transformers(setting: dict[str, Any]) -> tuple[str, Step]:
    found = {}
    model = _experiment(setting).model
    block: Any = model.block
    weights = 3 * model.d_model * block.feed_forward_moe.hidden_size  # of one expert
    for path in EXPERTS_PATHS:
        # batched_mm copies an expert's weights for every token that it is chosen for, forward and backward.
        if path == "batched_mm" and (need := 4 * weights * setting["tokens"] * setting["top_k"]) > MOST_BYTES:
            print(f"transformers {path}: left out, copies of weights would take {need / 2**30:.0f} GiB")
            continue
        try:
            step = _transformers(setting, path)
            step()
            found[min(_seconds(step) for _ in range(2))] = f"transformers {path}", step
        except (RuntimeError, ValueError) as error:
            print(f"transformers {path}: does not run here ({str(error).splitlines()[0][:100]})")
    return found[min(found)]


def _transformers(setting: dict[str, Any], experts: str) -> Step:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    from spattn_olmoe.model.hf.config import hf_config

    model_config = _experiment(setting, "attention.type=standard").model_with_attention()
    keys = hf_config(model_config, max_length=setting["N"], eos_token_id=0, pad_token_id=1, dtype="float32")
    model = OlmoeForCausalLM._from_config(
        OlmoeConfig(**keys), attn_implementation="sdpa", experts_implementation=experts
    )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids = _ids(setting)

    def step() -> float:
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def _seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
