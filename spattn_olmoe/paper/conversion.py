"""What does it cost to continue a dense model under bands?

A dense model is trained for half of the steps. From its weights four continuations take the other half, on the same data in
the same order, with a fresh optimiser and a schedule of their own: dense, bands with local sharing, exclusive bands, and bands
with sharing in all but a quarter of the layers. Beside them the same masks from scratch, for all of the steps. Held-out loss is
measured on the way.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..machine import default_device, describe, made_on
from ..settings import read
from ..tables import mean_of, table
from ..train.config import load_experiment
from . import held_out
from .figures import save_study
from .runs import Run, make_run, steps_of

MASKS = ("dense", "sharing", "exclusive", "sharing/dense_last")
"""Named masks; after a slash the ``attention.layers`` of a hybrid."""

BEFORE, AFTER, SCRATCH = "before", "after", "scratch"
"""Stages: before and after the switch, and from scratch."""

_EVALUATIONS = 8  # of the held-out loss in a whole run, and one before its first step
_OTHER_ORDER = 1000  # added to the seed of the data's order after the switch: not the batches of before once more


def plan(config: Path, *, seeds: int, out: Path, overrides: Sequence[str]) -> dict[str, list[Run]]:
    """The runs of every stage, in the order in which they need each other; a seed's runs of a stage start alike.

    :raises ValueError: too few steps, or a key that is wrong.
    """
    steps = steps_of(load_experiment(config, overrides))
    half = steps // 2
    if half < 1:
        raise ValueError(f"trainer.max_duration.value={steps}: conversion needs 2 steps or more, one before the switch")
    order = read(config, overrides)["data_loader"]["seed"]
    common = [*overrides, *held_out.in_loop(config, overrides, max(1, steps // _EVALUATIONS))]

    def stage(name: str, masks: Sequence[str], n_steps: int, own: Sequence[Sequence[str]]) -> list[Run]:
        wanted = [*common, f"trainer.max_duration.value={n_steps}"]
        return [_run(name, mask, n, config, [*wanted, *own[n]], out) for n in range(seeds) for mask in masks]

    nothing: list[list[str]] = [[]] * seeds
    before = stage(BEFORE, MASKS[:1], half, nothing)
    switch = [
        [
            f"trainer.load_path={run.folder.resolve()}",
            "allow_attention_change=true",
            *("trainer.load_trainer_state=false", "trainer.load_optim_state=false"),
            f"data_loader.seed={order + _OTHER_ORDER}",
        ]
        for run in before
    ]
    return {
        BEFORE: before,
        AFTER: stage(AFTER, MASKS, steps - half, switch),
        SCRATCH: stage(SCRATCH, MASKS, steps, nothing),
    }


def _run(stage: str, mask: str, seed: int, config: Path, overrides: Sequence[str], out: Path) -> Run:
    name, _, layers = mask.partition("/")
    hybrid = [f"attention.layers={layers}"] if layers else []
    run = make_run(stage, name, seed, config, [*overrides, *hybrid], out)
    return replace(run, variant=mask)


# ---- results ---------------------------------------------------------------------------------------------------------


def measure(stages: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """Every run's curve by tokens of its own stage, seed by seed, and how many tokens a stage's model had seen before."""
    before = stages[BEFORE][0].experiment()
    tokens = before.data_loader.global_batch_size
    curves: dict[str, dict[str, list[dict[int, float]]]] = {}
    for stage, runs in stages.items():
        for run in runs:
            by_tokens = {step * tokens: loss for step, loss in held_out.curve(run.folder).items()}
            curves.setdefault(stage, {}).setdefault(run.variant, []).append(by_tokens)
    switch = steps_of(before) * tokens
    return {"machine": describe(default_device()), "switch": switch, "curves": curves}


def write(results: Mapping[str, Any], out: Path) -> list[Path]:
    """``conversion.json``, ``conversion.md`` and ``conversion.png``."""
    return save_study("conversion", results, markdown(results), picture(results), out)


def markdown(results: Mapping[str, Any]) -> str:
    """The report: losses at the switch, half-way and at the end, and what a run from scratch has by then."""
    after, scratch = results["curves"][AFTER], results["curves"][SCRATCH]
    dense = [_end(curve) for curve in after["dense"]]
    body = []
    for mask, curves in after.items():
        losses = [list(curve.values()) for curve in curves]
        cells = [mean_of([run[place] for run in losses]) for place in (0, len(losses[0]) // 2, -1)]
        less = mean_of([run[-1] - other for run, other in zip(losses, dense, strict=True)])
        ends = mean_of([_end(curve) for curve in scratch[mask]])
        body.append([f"`{mask}`", *cells, "" if mask == "dense" else less, ends])
    head = ["continued as", "at the switch", "half-way", "at the end", "the end less dense's", "from scratch, the end"]
    parts = [
        "# What conversion costs",
        f"A dense model is trained on {results['switch']:,} tokens and continued on {int(list(after['dense'][0])[-1]):,} more "
        "with a fresh optimiser; from scratch the same mask is trained on all of them. Mean and standard deviation of the "
        f"held-out loss, in nats a token, over {len(dense)} seeds; differences are paired by seed. `dense_last` keeps the "
        "last quarter of the layers dense.",
        table(head, body, "lr"),
        "![Held-out loss against tokens](conversion.png)",
        "\n".join(made_on([results["machine"]])),
    ]
    return "\n\n".join(parts) + "\n"


def _end(curve: Mapping[int, float]) -> float:
    return list(curve.values())[-1]


def picture(results: Mapping[str, Any]) -> Figure:
    """Mean held-out loss against tokens: continuations solid, from scratch dashed, before the switch black."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for stage, masks in results["curves"].items():
        first = results["switch"] if stage == AFTER else 0
        for n, (mask, curves) in enumerate(masks.items()):
            losses = [statistics.fmean(values) for values in zip(*(curve.values() for curve in curves), strict=True)]
            color, style = "black" if stage == BEFORE else f"C{n}", "--" if stage == SCRATCH else "-"
            places = [first + int(tokens) for tokens in curves[0]]
            axes.plot(places, losses, style, color=color, label=f"{mask}, {stage}", linewidth=1.2)
    axes.set(xlabel="tokens", ylabel="held-out loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure
