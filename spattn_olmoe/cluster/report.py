"""Plans and memory estimates as tables."""

from __future__ import annotations

import shlex

from rich.console import Console
from rich.table import Table

from ..commands import HEAD, train_command
from ..machine import ASSUMED_MFU, gpu_time
from ..train.config import ExperimentConfig
from ..train.dry_run import short
from ..train.layout import Layout, nodes_of
from .memory import Memory, memory
from .search import Plan


def memory_table(config: ExperimentConfig, ranks: int) -> Table:
    """Memory of one GPU under a config's own layout, by part, or why it is not estimated."""
    try:
        layout = Layout.of(config, ranks)
        needed = memory(config, layout)
    except ValueError as error:
        table = Table("memory of a GPU", "GB", min_width=100)
        table.add_row("not estimated", str(error))
        return table
    return _parts(needed, f"{ranks} ranks, {layout}. An estimate: docs/cluster.md tells how good.")


def _parts(needed: Memory, caption: str) -> Table:
    table = Table(f"memory of a GPU at {needed.moment}, its fullest", "GB", min_width=100, caption=caption)
    for name, size in needed.parts.items():
        table.add_row(name, f"{size / 1e9:,.2f}")
    table.add_row("in all", f"{needed.peak / 1e9:,.2f}")
    return table


def print_plan(plan: Plan, config_path: str, overrides: list[str], console: Console) -> None:
    """Print what a run needs, why the layout was chosen and the command that starts it."""

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False, highlight=False)

    console.print(_run_table(plan))
    console.print(_parts(plan.best.memory, f"{plan.room / 1e9:,.1f} GB of {plan.gpu.name} are for tensors."))
    for line in reasons(plan):
        say(line)
    nodes = nodes_of(plan.ranks)
    command = train_command(config_path, [*overrides, *plan.overrides], plan.ranks // nodes, nodes)
    # $HEAD_NODE is the shell's to expand
    say(f"\nStart it with\n{' '.join(w if w.endswith(HEAD) else shlex.quote(w) for w in command)}")
    assert plan.best.layout == Layout.of(plan.config, plan.ranks)


def reasons(plan: Plan) -> list[str]:
    """Why the best layout is the best, and what became of the others."""
    best = plan.best.layout
    return [
        f"Chosen: {best}, {best.microbatch:,} tokens a microbatch: of the {len(plan.fitting):,} layouts that train and fit, the "
        "one with the fewest kinds of parallelism, the smallest degrees and then the longest microbatch.",
        *(f"Refused: {count:,} x {reason}." for reason, count in plan.refused.most_common()),
    ]


def _run_table(plan: Plan) -> Table:
    shape, config, best = plan.shape, plan.config, plan.best
    model = config.model_with_attention()
    table = Table("", "", title=f"{config.name} on {plan.ranks:,} x {plan.gpu.name}", show_header=False, min_width=100)
    parameters = shape.count("")
    table.add_row(
        "parameters",
        f"{parameters:,} ({short(parameters)}), active {model.num_active_params:,} ({short(model.num_active_params)}), "
        f"embedding {shape.count('embeddings.'):,}",
    )
    table.add_row("FLOPs per token", f"{plan.flops.total:,}, exact for the mask (as if dense: {plan.flops.dense:,})")
    table.add_row("checkpoint", f"{plan.checkpoint / 1e9:,.1f} GB: weights and two moments of Adam")
    table.add_row("layout", f"{best.layout}; {best.layout.microbatch:,} tokens a microbatch")
    table.add_row("memory of a GPU", f"{best.memory.peak / 1e9:,.1f} GB of {plan.room / 1e9:,.1f} GB")
    if plan.tokens is None or plan.gpu_hours is None:
        table.add_row("time", "not known: trainer.max_duration is in epochs")
    else:
        days = plan.gpu_hours / plan.ranks / 24
        table.add_row("time", f"{gpu_time(plan.gpu_hours)}, {days:,.2f} days, for {short(plan.tokens)} tokens")
    table.caption = (
        f"Time is FLOPs over {ASSUMED_MFU:.0%} of the bfloat16 peak, whatever the layout: "
        "an assumption; nothing was timed."
    )
    return table
