"""What ``scripts/reproduce.py recall`` and its sisters do."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from ... import settings
from ...errors import nearest
from . import report
from .study import SCALES, STUDIES, VARIANTS, Job, plan_jobs, run_jobs
from .tasks import TASKS
from .training import Setting


def main(args: argparse.Namespace, out: Path, say: Callable[[str], None]) -> None:
    """Train a study's models, or what is missing of them, and write its report.

    :raises ValueError: arguments that cannot be honoured.
    """
    if args.config is not None:
        raise ValueError(f"--config {args.config}: {args.target} makes its data and its model itself; use key=value")
    seeds = 3 if args.seeds is None else args.seeds
    if seeds < 1:
        raise ValueError(f"--seeds {seeds}: must be at least 1")
    names = VARIANTS if args.variants is None else [name.strip() for name in args.variants.split(",") if name.strip()]
    setting, options = _settings(args.target, args.scale, args.overrides)
    jobs = plan_jobs(args.target, names, seeds, setting, options)
    if args.dry_run:
        _plan(jobs, say)
        return
    device = "cpu" if args.scale == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--scale {args.scale}: needs a CUDA GPU, and there is none; --dry-run prints what it would train"
        )
    results = run_jobs(jobs, out, workers=args.jobs, device=device, say=say)
    for path in report.write(args.target, report.summarise(results), out):
        say(str(path))


def _settings(study: str, scale: str, words: list[str]) -> tuple[Setting, dict[str, Any]]:
    """The setting and the task's options of a scale, changed by ``key=value`` words."""
    base, options = SCALES[scale]
    task, _ = STUDIES[study]
    of_setting, of_task = ({field.name for field in fields(kind)} for kind in (Setting, TASKS[task]))
    changes = {}
    options = {key: value for key, value in options.items() if key in of_task}
    for key, value in settings.parse(words).items():
        if key in of_setting:
            changes[key] = value
        elif key in of_task:
            options[key] = value
        else:
            known = sorted(of_setting | of_task)
            raise ValueError(f"{key}: no setting of {study}{nearest(key, known)} (known: {', '.join(known)})")
    return Setting(**{**asdict(base), **changes}), options


def _plan(jobs: list[Job], say: Callable[[str], None]) -> None:
    setting, task = jobs[0].setting, jobs[0].task
    say(
        f"# {len({(job.key, job.seed) for job in jobs})} models, {setting.steps * setting.batch * task.length:,} tokens each"
    )
    say(f"# task {jobs[0].task_name}: {asdict(task)}")
    say(f"# {setting}")
    for job in jobs:
        say(f"{job.name}, seed {job.seed}: {job.attention}")
