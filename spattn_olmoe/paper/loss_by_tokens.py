"""Do the losses of attention types cross with more training?

Types are trained on several million tokens, each seen once, at a constant learning rate: then any point of a curve is the end
of a shorter run, which it would not be under a schedule that decays. Their held-out losses are fitted by
L(D) = E + A * D ** -alpha in the tokens D, the form of arXiv 2203.15556 at one size of model, every seed by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import optimize

from ..evaluation.statistics import LEVEL, Crossed, crossed, holm
from ..machine import default_device, describe, made_on
from ..tables import interval, mean_of, table
from ..train.config import load_experiment
from . import held_out
from .figures import save_study
from .runs import CONFIGS, Run, make_run, steps_of

CONFIG = CONFIGS / "reproduce" / "cpu_long.yaml"
DATA = CONFIGS / "data" / "reproduce_cpu_long.yaml"

SCOPE = (
    "Can show: whether losses of types approach, cross or part in the first 3 M tokens of training a model of 2 M parameters on "
    "Python's standard library, each token seen once. Cannot show: what web text, larger models and longer training do."
)
MASKS = ("dense", "sharing", "exclusive")
"""What is compared unless asked otherwise; the first is what differences are taken from."""

FURTHER = 10
"""Fits are read at so many times the tokens of the runs."""

_EVALUATIONS = 15
_FIRST = 2  # evaluations that fits leave out: one before training, one of its first fifteenth
_M = 1e6


@dataclass(frozen=True)
class Fit:
    """L(D) = E + A * D ** -alpha, nats a token, with D in millions of tokens.

    :param rms: root mean square of what it leaves.
    """

    E: float
    A: float
    alpha: float
    rms: float

    def __call__(self, tokens: float | np.ndarray) -> Any:
        return _loss(np.asarray(tokens) / _M, self.E, self.A, self.alpha)


def _loss(millions: np.ndarray, E: float, A: float, alpha: float) -> np.ndarray:
    return E + A * millions**-alpha


def fit(curve: Mapping[int, float]) -> Fit:
    """The least squares fit of a held-out curve by tokens, its first points left out; E is not negative.

    :raises ValueError: too few points for three parameters.
    """
    points = list(curve.items())[_FIRST:]
    if len(points) < 4:
        raise ValueError(f"{len(points)} points after the first {_FIRST}: a fit needs 4: train for more steps")
    tokens, losses = np.array(points, dtype=float).T

    low, high = (0.0, 0.0, 0.01), (losses.min(), 100.0, 3.0)
    found, _ = optimize.curve_fit(
        _loss, tokens / _M, losses, p0=(losses.min() / 2, losses.min() / 2, 0.3), bounds=(low, high), max_nfev=100_000
    )
    rms = np.sqrt(np.mean((_loss(tokens / _M, *found) - losses) ** 2))
    E, A, alpha = map(float, found)
    return Fit(E, A, alpha, float(rms))


def plan(config: Path, masks: Sequence[str], *, seeds: int, out: Path, overrides: Sequence[str]) -> list[Run]:
    """The runs, seed by seed.

    :raises ValueError: too few steps, fewer than two masks, a learning rate that decays, or a key that is wrong.
    """
    experiment = load_experiment(config, overrides)
    steps = steps_of(experiment)
    if steps < _EVALUATIONS:
        raise ValueError(f"trainer.max_duration.value={steps}: loss_by_tokens needs {_EVALUATIONS} steps or more")
    if len(masks) < 2:
        raise ValueError(f"--variants {','.join(masks)}: name two or more, the first to compare the others with")
    schedule = experiment.train_module.scheduler
    if schedule and schedule.get_lr(1.0, steps, steps) < max(
        schedule.get_lr(1.0, step, steps) for step in range(steps)
    ):
        raise ValueError(
            "train_module.scheduler: its rate decays, so that a point of a curve would not be the end of a shorter run: add "
            "train_module.scheduler.alpha_f=1.0 for one that does not"
        )
    wanted = [*overrides, *held_out.in_loop(config, overrides, steps // _EVALUATIONS)]
    return [make_run(config.stem, mask, seed, config, wanted, out) for seed in range(seeds) for mask in masks]


def measure(runs: Sequence[Run]) -> dict[str, Any]:
    """The held-out curve of every run by tokens, seed by seed."""
    tokens = runs[0].experiment().data_loader.global_batch_size
    curves: dict[str, list[dict[int, float]]] = {}
    for run in runs:
        curves.setdefault(run.variant, []).append(
            {step * tokens: loss for step, loss in held_out.curve(run.folder).items()}
        )
    return {"machine": describe(default_device()), "curves": curves}


# ---- report ----------------------------------------------------------------------------------------------------------


def write(results: Mapping[str, Any], out: Path) -> list[Path]:
    """``loss_by_tokens.json``, ``loss_by_tokens.md`` and ``loss_by_tokens.png``."""
    return save_study("loss_by_tokens", results, markdown(results), picture(results), out)


def _by_tokens(results: Mapping[str, Any]) -> dict[str, list[dict[int, float]]]:
    """The curves, with the numbers that JSON made text of."""
    return {
        mask: [{int(tokens): loss for tokens, loss in curve.items()} for curve in curves]
        for mask, curves in results["curves"].items()
    }


def markdown(results: Mapping[str, Any]) -> str:
    """The report: losses by tokens, differences from the first mask, and what the fits expect of more training."""
    curves = _by_tokens(results)
    fits = {mask: [fit(curve) for curve in of_mask] for mask, of_mask in curves.items()}
    places = list(next(iter(curves.values()))[0])[_FIRST:]
    marks = sorted({places[round(n * (len(places) - 1) / 4)] for n in range(5)})
    first, seeds = next(iter(curves)), len(next(iter(curves.values())))

    losses = [[f"`{mask}`", *(mean_of([c[m] for c in of_mask]) for m in marks)] for mask, of_mask in curves.items()]
    apart: list[list[list[float]]] = []  # by mask, by column, by seed
    for mask in list(curves)[1:]:
        measured = [[one[m] - other[m] for one, other in zip(curves[mask], curves[first], strict=True)] for m in marks]
        further = [
            float(one(FURTHER * marks[-1]) - other(FURTHER * marks[-1]))
            for one, other in zip(fits[mask], fits[first], strict=True)
        ]
        apart.append([*measured, further])
    parameters = [
        [f"`{mask}`", *(mean_of([getattr(f, name) for f in of_mask]) for name in ("E", "A", "alpha", "rms"))]
        for mask, of_mask in fits.items()
    ]
    heads = [f"{m / _M:.2f} M" for m in marks]
    parts = [
        "# Held-out loss against tokens",
        "Nats a token on the held-out part of the same text; every token of training is seen once, at a constant learning rate "
        "after warm-up. "
        + (
            f"Mean and standard deviation over {seeds} seeds."
            if seeds > 1
            else "One seed: what another would give is not known."
        ),
        table(["attention", *heads], losses),
        f"## Less {first}'s",
        f"Paired by seed; several have Student's {1 - LEVEL:.0%} interval: of other seeds, not of other text. The last column is "
        f"the fits' at {FURTHER} times the tokens; it inherits what the form of the fit assumes."
        + (
            " An interval is of its cell alone; what cannot be told goes by p adjusted (Holm) for all cells, and an interval "
            "beside it may leave zero out."
            if seeds > 1
            else ""
        ),
        table(["attention", *heads, f"fit, {FURTHER * marks[-1] / _M:.1f} M"], _differences(list(curves)[1:], apart)),
        "## The fits",
        "L(D) = E + A * D^-alpha with D in millions of tokens, every seed by itself; rms is what the fit leaves.",
        table(["attention", "E", "A", "alpha", "rms"], parameters),
        "![Held-out loss against tokens](loss_by_tokens.png)",
        "\n".join(made_on([results["machine"]])),
    ]
    return "\n\n".join(parts) + "\n"


def _differences(masks: Sequence[str], apart: Sequence[Sequence[Sequence[float]]]) -> list[list[str]]:
    """A row for each mask: means and intervals over seeds, and what cannot be told in all cells together."""
    if len(apart[0][0]) < 2:
        return [[f"`{mask}`", *(f"{one:+.4f}" for (one,) in cells)] for mask, cells in zip(masks, apart, strict=True)]
    found = [[crossed(np.array(values)[:, None]) for values in cells] for cells in apart]
    adjusted = iter(holm([d.p for cells in found for d in cells]))

    def cell(d: Crossed, p: float) -> str:
        return f"{d.mean:+.4f} ({interval(d.interval)}){'' if p < LEVEL else ', cannot be told'}"

    return [[f"`{mask}`", *(cell(d, next(adjusted)) for d in cells)] for mask, cells in zip(masks, found, strict=True)]


def picture(results: Mapping[str, Any]) -> Figure:
    """Mean held-out loss against tokens, and dashed the means of the fits, further than the runs went."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for n, (mask, curves) in enumerate(_by_tokens(results).items()):
        places = list(curves[0])[_FIRST:]
        axes.plot(
            places,
            np.mean([[c[p] for p in places] for c in curves], axis=0),
            "o-",
            color=f"C{n}",
            markersize=3,
            label=mask,
        )
        further = np.geomspace(places[0], FURTHER * places[-1], 100)
        axes.plot(
            further, np.mean([fit(curve)(further) for curve in curves], axis=0), "--", color=f"C{n}", linewidth=0.8
        )
    axes.set(xscale="log", xlabel="tokens", ylabel="held-out loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(title="measured; dashed: fits")
    return figure
