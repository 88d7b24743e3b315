"""What ``scripts/reproduce.py`` does."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..machine import ASSUMED_MFU, GPUS, default_device, describe, gpu_time
from ..metrics import METRICS_FILE
from ..patterns import find_variant
from . import appendix, conversion, loss_by_tokens, masks, page, report
from .recall import command as recall
from .recall.study import STUDIES
from .runs import CONFIGS, SCALES, TABLES, Run, Scale, Table, cost, runs_of
from .train_and_evaluate import check_device, prepare_data, run_all, run_command, suite_command


def main(args: argparse.Namespace) -> None:
    """Do one target.

    :raises ValueError: arguments that do not fit together, or cannot be honoured.
    """
    out = args.out or Path("runs") / "reproduce" / args.scale
    args.jobs = _jobs(args.jobs, SCALES[args.scale])
    if args.target in TABLES:
        _table(args, out)
    elif args.target in STUDIES:
        recall.main(args, out, _say)
    elif args.target == "appendix_a":
        _appendix_a(args, out)
    elif args.target == "conversion":
        _conversion(args, out)
    elif args.target == "loss_by_tokens":
        _loss_by_tokens(args, out)
    else:
        figure = masks.figure_1() if args.target == "figure1" else masks.figure_2()
        _say(str(masks.save(figure, out / f"{args.target}.png")))


def _table(args: argparse.Namespace, out: Path) -> None:
    scale = SCALES[args.scale]
    runs = _runs(args, scale, TABLES[args.target], out, _variants(args.variants))
    if args.dry_run:
        _print_dry_run(runs, scale, args.target)
        return
    results = _finish(args, scale, runs, args.target, out)
    for path in report.write(args.target, runs, results, scale, out):
        _say(str(path))
    there = [run.folder for run in runs if (run.folder / METRICS_FILE).is_file()]  # results may have come without them
    if there:
        recall_file = out / "recall.json"
        _say(str(page.write(there, out / f"{args.target}.html", recall=recall_file if recall_file.is_file() else None)))


def _appendix_a(args: argparse.Namespace, out: Path) -> None:
    scale = SCALES[args.scale]
    if scale.name != "cpu":
        raise ValueError(
            f"appendix_a --scale {scale.name}: the paper's experiment has 4 layers and 8 heads, which is --scale cpu; "
            "scripts/analyze_heads.py measures the heads of any checkpoint"
        )
    if args.variants:
        raise ValueError(f"--variants {args.variants}: appendix_a has its own ({', '.join(appendix.NAMES)})")
    runs = _runs(args, scale, TABLES["table3"], out, appendix.NAMES)
    if args.dry_run:
        _print_dry_run(runs, scale, args.target)
        return
    _finish(args, scale, runs, "table3", out)
    for path in appendix.write(appendix.measure(runs, describe(default_device())), out):
        _say(str(path))


def _conversion(args: argparse.Namespace, out: Path) -> None:
    scale = SCALES[args.scale]
    config = _small_config(args, scale)
    if args.variants:
        raise ValueError(f"--variants {args.variants}: conversion has its own ({', '.join(conversion.MASKS)})")
    stages = conversion.plan(config, seeds=_seeds(args, scale), out=out / "conversion", overrides=args.overrides)
    if args.dry_run:
        _print_dry_run([run for runs in stages.values() for run in runs], scale, args.target)
        return
    for runs in stages.values():
        _finish(args, scale, runs, args.target, out / "conversion")
    for path in conversion.write(conversion.measure(stages), out):
        _say(str(path))


def _loss_by_tokens(args: argparse.Namespace, out: Path) -> None:
    scale = SCALES[args.scale]
    if args.scale == "cpu":
        scale = replace(scale, config=loss_by_tokens.CONFIG, data=loss_by_tokens.DATA, scope=loss_by_tokens.SCOPE)
    config = _small_config(args, scale)
    chosen = _variants(args.variants) or loss_by_tokens.MASKS
    runs = loss_by_tokens.plan(config, chosen, seeds=_seeds(args, scale), out=out, overrides=args.overrides)
    if args.dry_run:
        _print_dry_run(runs, scale, args.target)
        return
    _finish(args, scale, runs, args.target, out)
    for path in loss_by_tokens.write(loss_by_tokens.measure(runs), out):
        _say(str(path))


def _small_config(args: argparse.Namespace, scale: Scale) -> Path:
    """The config of a study that the paper does not have, and so none of its models."""
    config = args.config or scale.config
    if config is None:
        raise ValueError(
            f"{args.target} --scale {scale.name}: the paper has no such experiment; use --scale cpu or gpu"
        )
    return config


def _seeds(args: argparse.Namespace, scale: Scale) -> int:
    return scale.seeds if args.seeds is None else args.seeds


def _runs(args: argparse.Namespace, scale: Scale, table: Table, out: Path, variants: Sequence[str] | None) -> list[Run]:
    return runs_of(
        table,
        scale,
        seeds=_seeds(args, scale),
        out=out,
        config=args.config,
        overrides=args.overrides,
        variants=variants,
    )


def _finish(args: argparse.Namespace, scale: Scale, runs: list[Run], table: str, out: Path) -> list[dict[str, Any]]:
    """Bring runs to their end; their results."""
    check_device(scale)
    if args.config is None and scale.config is not None:
        prepare_data(scale, _say)
    return run_all(runs, scale, table, out=out, jobs=args.jobs, say=_say)


def _say(line: str) -> None:
    print(line, flush=True)


def _variants(text: str | None) -> list[str] | None:
    if text is None:
        return None
    try:
        return [find_variant(name.strip()).name for name in text.split(",") if name.strip()]
    except ValueError as error:
        raise ValueError(f"--variants {text}: {error}") from error


def _jobs(asked: int | None, scale: Scale) -> int:
    if asked is None:
        return 1 if scale.needs_gpu else len(os.sched_getaffinity(0))
    if asked < 1:
        raise ValueError(f"--jobs {asked}: must be at least 1")
    return asked


def _print_dry_run(runs: list[Run], scale: Scale, table: str) -> None:
    """What would be launched, and what it would cost."""
    costs = {run.name: cost(run) for run in runs}
    print(f"# {table} --scale {scale.name}: {len(runs)} runs. {scale.scope}\n")
    data = scale.data.relative_to(CONFIGS.parent)
    longest = max(c.tokens for c in costs.values())
    whole = "" if scale.config is not None else f" max_tokens={longest} # one pass of the longest run"
    print(f"python scripts/prepare_data.py --config {data}{whole}")
    for run in runs:
        own = costs[run.name]
        time = f", {gpu_time(own.gpu_hours)}" if scale.needs_gpu else ""
        print(f"\n# {run.name}: {own.tokens:,} tokens, {own.flops:.3g} FLOPs{time}")
        print(shlex.join(run_command(run, scale)))
        scores = suite_command(run, scale, table)
        if scores:
            print(shlex.join(scores))
    tokens, flops = sum(c.tokens for c in costs.values()), sum(c.flops for c in costs.values())
    print(f"\n# in all: {tokens:,} tokens, {flops:.3g} FLOPs", end="")
    if scale.needs_gpu:
        total = sum(c.gpu_hours for c in costs.values())
        print(
            f"; {gpu_time(total)} at {ASSUMED_MFU:.0%} (assumed, not measured) of an H200's "
            f"{GPUS['h200'].flops / 1e12:.0f} dense bfloat16 TFLOP/s",
            end="",
        )
    print(". Held-out losses are computed in between; evaluation is not in the figures.")
