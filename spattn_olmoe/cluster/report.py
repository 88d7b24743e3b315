"""Plans and memory estimates as tables."""

from __future__ import annotations

import shlex

from rich.console import Console
from rich.table import Table

from ..machine import ASSUMED_MFU, gpu_hours
from ..train.config import ExperimentConfig
from ..train.dry_run import short
from ..train.layout import Layout
from .machines import ASSUMPTIONS, GPUS_PER_NODE, assumed
from .memory import memory
from .search import Plan

GIB = 2**30


def memory_table(config: ExperimentConfig, ranks: int) -> Table:
    """Memory of one GPU under a config's own layout, by part, or why it is not estimated."""
    table = Table("memory of a GPU", "GiB", min_width=100)
    try:
        layout = Layout.of(config, ranks)
        needed = memory(config, layout)
    except ValueError as error:
        table.add_row("not estimated", str(error))
        return table
    for name, size in needed.parts.items():
        table.add_row(name, f"{size / GIB:,.2f}")
    table.add_row("in all", f"{needed.peak / GIB:,.2f}")
    table.caption = f"{ranks} ranks, {layout}, fullest at {needed.moment}. An estimate: docs/planning.md says how good."
    return table


def print_plan(plan: Plan, config_path: str, overrides: list[str], console: Console) -> None:
    """Print what a run needs, the layouts that fit and the command that starts the best one."""
    best = plan.best
    console.print(_run_table(plan))
    console.print(_memory_parts(plan))
    console.print(_time_parts(plan))
    console.print(_layouts(plan))
    console.print(_assumptions())
    for line in reasons(plan):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    per_node = next(n for n in range(GPUS_PER_NODE, 0, -1) if plan.ranks % n == 0)
    nodes = plan.ranks // per_node
    command = f"torchrun --nnodes={nodes} --nproc_per_node={per_node}"
    command += " --rdzv_backend=c10d --rdzv_endpoint=$HEAD_NODE:29500" if nodes > 1 else ""
    arguments = " ".join(shlex.quote(item) for item in [*overrides, *plan.overrides])
    console.print("\nStart it with", highlight=False)
    console.print(
        f"{command} scripts/train.py --config {shlex.quote(config_path)} {arguments}",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
    assert best.layout == Layout.of(plan.config, plan.ranks)


def reasons(plan: Plan) -> list[str]:
    """Why the best layout is the best, and what became of the others."""
    best = plan.best
    fastest = max(plan.fitting, key=lambda c: c.speed.tokens_per_second)
    lines = [f"Chosen: {best.layout}, {best.layout.microbatch:,} tokens a microbatch."]
    if fastest.layout == best.layout:
        lines += [f"It is the fastest by the estimate of {len(plan.fitting):,} that fit."]
    else:
        slower = 1 - best.speed.tokens_per_second / fastest.speed.tokens_per_second
        lines += [
            f"It is {slower:.1%} slower by the estimate than the fastest ({fastest.layout}, {fastest.layout.microbatch:,} "
            "tokens), and simpler or the same: the estimate is not more exact than that."
        ]
    lines += [f"Refused: {count:,} x {reason}." for reason, count in plan.refused.most_common()]
    return lines


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
    table.add_row(
        "memory of a GPU",
        f"{best.memory.peak / 1e9:,.1f} GB of {plan.gpu.memory * assumed('memory') / 1e9:,.1f} GB that tensors may take",
    )
    rate = best.speed.tokens_per_second
    table.add_row(
        "expected speed", f"{rate:,.0f} tokens/s, {rate / plan.ranks:,.0f} a GPU, MFU {best.speed.mfu:.1%}, "
        f"{best.speed.seconds:.2f} s a step"
    )  # fmt: skip
    if plan.tokens is None:
        table.add_row("expected time", "not known: trainer.max_duration is in epochs")
    else:
        hours = gpu_hours(float(plan.tokens) * plan.flops.total, plan.gpu.name.lower())
        table.add_row(
            "expected time",
            f"{hours:,.0f} GPU-hours for {short(plan.tokens)} tokens at an assumed MFU of {ASSUMED_MFU:.0%}: "
            f"{hours / plan.ranks / 24:,.2f} days",
        )
    table.caption = "Speed, by which layouts are compared, and time are arithmetic on assumptions; nothing was timed."
    return table


def _memory_parts(plan: Plan) -> Table:
    needed = plan.best.memory
    table = Table(f"memory of a GPU at {needed.moment}", "GB", min_width=100)
    for name, size in needed.parts.items():
        table.add_row(name, f"{size / 1e9:,.2f}")
    table.add_row("in all", f"{needed.peak / 1e9:,.2f}")
    return table


def _time_parts(plan: Plan) -> Table:
    step = plan.best.speed
    table = Table("time of a step", "s", "share", min_width=100)
    for name, seconds in step.parts.items():
        table.add_row(name, f"{seconds:.3f}", f"{seconds / step.seconds:.0%}")
    return table


def _layouts(plan: Plan, rows: int = 8) -> Table:
    table = Table("layouts that fit", "tokens a microbatch", "GB a GPU", "tokens/s", "MFU", min_width=100)
    for candidate in plan.fitting[:rows]:
        table.add_row(
            str(candidate.layout),
            f"{candidate.layout.microbatch:,}",
            f"{candidate.memory.peak / 1e9:.1f}",
            f"{candidate.speed.tokens_per_second:,.0f}",
            f"{candidate.speed.mfu:.1%}",
        )
    if len(plan.fitting) > rows:
        table.caption = f"and {len(plan.fitting) - rows:,} more"
    return table


def _assumptions() -> Table:
    table = Table("assumption", "value", "means", "from", min_width=100)
    for name, assumption in ASSUMPTIONS.items():
        table.add_row(name, f"{assumption.value:g}", assumption.means, assumption.source)
    return table
