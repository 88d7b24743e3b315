"""Scoring answers: our model class under lm-eval against lm-eval's own ``hf`` model, on the same dense weights.

    python scripts/benchmark.py evaluation --checkpoint runs/quickstart-standard

The checkpoint's weights go into transformers' OlmoeForCausalLM. Both models score the same questions with the same batch
size, in turns; a round times each once, tokenising included, loading not. That their log-likelihoods agree is checked first.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

from benchmarks.timing import take_turns
from spattn_olmoe import machine

TOLERANCE = 1e-3
"""Of a log-likelihood in nats: float32, and other kernels."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="of attention.type=standard: transformers has no bands")
    parser.add_argument("--tasks", default="copa,arc_easy,hellaswag", help="tasks with data offline")
    parser.add_argument("--limit", type=int, default=50, help="questions of each task")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60, help="about how long to measure")


def run(args: argparse.Namespace) -> int:
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    from spattn_olmoe.evaluation.model import SPAttnLM

    ours = SPAttnLM(args.checkpoint, batch_size=args.batch_size, device="cpu")
    if {layer["name"] for layer in ours.checkpoint.layers} != {"standard"}:
        raise ValueError(f"--checkpoint {args.checkpoint}: must be of attention.type=standard, as transformers' is")
    theirs = transformers_lm(ours, args.batch_size)
    requests = questions(args.tasks.split(","), args.limit)
    calls = {
        "ours": lambda: ours.loglikelihood(requests, disable_tqdm=True),
        "hf": lambda: theirs.loglikelihood(requests, disable_tqdm=True),
    }
    a, b = (call() for call in calls.values())
    apart = max(abs(x[0] - y[0]) for x, y in zip(a, b, strict=True))
    if apart > TOLERANCE:
        raise ValueError(f"the models disagree by up to {apart:.2g} nats: there is nothing to compare")
    before = os.getloadavg()
    found = take_turns(calls, "cpu", args.seconds)
    results: dict[str, Any] = {
        "machine": machine.describe("cpu"),
        "load_average_before": [round(load, 2) for load in before],
        "tasks": args.tasks,
        "requests": len(requests),
        "batch_size": args.batch_size,
        "largest_difference_nats": apart,
        "implementations": {name: timing._asdict() for name, timing in found.items()},
        "requests_per_second": {name: len(requests) / timing.ms * 1e3 for name, timing in found.items()},
        "hf_time_over_ours": found["hf"].ms / found["ours"].ms,
    }
    path = machine.results_folder("cpu") / "evaluation.json"
    machine.write_json(path, results)
    for name, rate in results["requests_per_second"].items():
        print(f"{name:5} {rate:8.1f} requests/s, median of {found[name].rounds} rounds")
    print(f"ours at {results['hf_time_over_ours']:.2f} times the speed of hf\n{path}")
    return 0


def questions(tasks: list[str], limit: int) -> list[Any]:
    """The requests of the first ``limit`` questions of each task."""
    from spattn_olmoe.evaluation import scores as evaluation
    from spattn_olmoe.evaluation.suites import suite_of_tasks

    requests = []
    with evaluation.task_manager(suite_of_tasks(tasks, 0), from_wheel=True) as manager:
        for task in manager.load(tasks)["tasks"].values():
            task.build_all_requests(limit=limit, rank=0, world_size=1)
            requests += task.instances
    return requests


def transformers_lm(ours: Any, batch_size: int) -> Any:
    """lm-eval's own model around transformers' OLMoE with our weights and our tokenizer."""
    from lm_eval.models.huggingface import HFLM

    from spattn_olmoe.model.hf.export import export

    with tempfile.TemporaryDirectory() as folder:
        export(ours.checkpoint, f"{folder}/exported")
        return HFLM(
            pretrained=f"{folder}/exported",
            trust_remote_code=True,
            max_length=ours.max_length,
            batch_size=batch_size,
            device="cpu",
        )
