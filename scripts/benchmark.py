"""Measure speed on this machine: python scripts/benchmark.py attention [--quick]

Each subcommand is a module of ``benchmarks/`` with ``add_arguments(parser)`` and ``run(args) -> exit status``.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from spattn_olmoe.errors import Parser, user_errors

SUBCOMMANDS = {
    "attention": "ours against other kernels, under every distance mask",
    "soak": "a training run, disturbed at random moments: is the loss curve the same",
    "loading": "a checkpoint opened safely against OLMo-core's own loading",
    "exporting": "memory and time of export_hf.py and import_hf.py by depth: of one layer or of all",
    "cluster": "a job of a real Slurm that everything happens to: is the loss curve the same",
    "memory": "the planner's memory model against real allocations of training, layout by layout",
    "gpu": "everything that takes a GPU, one part after another, resumable",
    "training": "training steps: dense attention against exclusive bands and local sharing",
    "step": "a training step on a CPU: every mask and transformers' OLMoE, in turns",
    "decoding": "generation on a CPU through the KV cache, by the length of the context",
    "evaluation": "scoring under lm-eval, ours against lm-eval's own model of transformers' OLMoE",
    "parallel": "every parallel layout against one rank: are losses and gradients the same",
    "compile_kernels": "the fused kernels compiled for GPUs that are not here: registers, spills, shared memory",
    "tune": "tile configurations of the fused kernels on this GPU",
}


def main() -> None:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    chosen = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    for name, summary in SUBCOMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if name == chosen:  # only what this one needs has to be installed: for attention PyTorch and Triton
            module = importlib.import_module(f"benchmarks.{name}")
            command.description = module.__doc__
            module.add_arguments(command)
    args = parser.parse_args()
    with user_errors():
        sys.exit(module.run(args))


if __name__ == "__main__":
    main()
