"""What a study found: tables, a picture, and the summary they are made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ...model.section import layer_patterns, with_attention
from ...tables import table
from ..figures import save_study
from ..reachability import reach
from .study import section
from .tasks import TASKS
from .training import BANDS, PHASES, Setting, build_config

GOAL = 0.9
"""The accuracy whose first step is reported."""


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What reports are made from: every type's curves without the single answers, and what its masks can reach."""
    task, setting = results[0]["task"], results[0]["setting"]
    types: dict[str, Any] = {}
    for result in results:
        own = types.setdefault(result["name"], {"attention": result["attention"], "seeds": {}})
        own["seeds"][str(result["seed"])] = {"seconds": result["seconds"], "curve": result["curve"]}
    for name, own in types.items():
        own["reach"] = _reach(name, task, setting)
    return {"task": task, "setting": setting, "machine": results[0]["machine"], "types": types}


def _reach(name: str, task: dict[str, Any], setting: dict[str, Any]) -> list[dict[str, float]]:
    options = {key: value for key, value in task.items() if key not in ("name", "chance")}
    config = build_config(Setting(**setting), TASKS[task["name"]](**options))
    model = with_attention(config, band_length=task["length"], **section(name))
    return reach(list(layer_patterns(model)), task["length"]).bands(BANDS)


def write(study: str, summary: dict[str, Any], out: Path) -> list[Path]:
    """``STUDY.json``, ``STUDY.md`` and ``STUDY.png``."""
    return save_study(study, summary, markdown(study, summary), plot(summary), out)


# ---- tables ----------------------------------------------------------------------------------------------------------


def markdown(study: str, summary: dict[str, Any]) -> str:
    """The report as a page."""
    task, setting, types = summary["task"], summary["setting"], summary["types"]
    T = task["length"]
    width = T // BANDS
    bands = [f"{max(1, b * width)}-{(b + 1) * width - 1}" for b in range(BANDS)]
    seeds = len(next(iter(types.values()))["seeds"])
    machine = summary["machine"]
    parts = [
        f"# {study}: what is recalled, by distance",
        f"Task {task['name']}, {T} tokens, chance {task['chance']:.2f}. Model: {setting['n_layers']} layers, "
        f"{setting['n_heads']} heads, width {setting['d_model']}; {setting['steps']:,} steps of {setting['batch']} sequences; "
        f"{seeds} seeds. {machine['cpu']}, torch {machine['versions']['torch']}, commit {machine['commit']}, "
        f"`{machine['command']}`.",
        "## Accuracy at the end, by distance of the answer\n\nMean over seeds; beside the total the least and the most.\n\n"
        + table(["attention", "all", "least to most", *bands], _accuracies(types)),
        f"## Steps until {GOAL:.0%} are right\n\nThe median over seeds; a dash where a seed in two has not come so far.\n\n"
        + table(["attention", "all", *bands], _first_steps(types)),
        "## By phase inside the band\n\nNearest quarter of each band first.\n\n"
        + table(["attention", *(f"{p + 1} of {PHASES}" for p in range(PHASES))], _phases(types)),
        "## What the masks alone can reach in these layers\n\nFewest layers that connect every pair at the distance (a dash: "
        "not all pairs; then the share that is), and mean number of paths over heads and layers.\n\n"
        + table(["attention", *bands], _reached(types)),
    ]
    return "\n\n".join(parts) + "\n"


def _last(own: dict[str, Any]) -> list[dict[str, Any]]:
    return [seed["curve"][-1] for seed in own["seeds"].values()]


def _mean(values: Sequence[float | None]) -> str:
    there = [value for value in values if value is not None]
    return f"{fmean(there):.2f}" if there else "-"


def _accuracies(types: dict[str, Any]) -> Iterator[list[str]]:
    for name, own in types.items():
        ends = _last(own)
        every = [end["accuracy"] for end in ends]
        spread = f"{min(every):.2f} to {max(every):.2f}"
        yield [
            name,
            _mean(every),
            spread,
            *(_mean([end["bands"][b]["accuracy"] for end in ends]) for b in range(BANDS)),
        ]


def _first_steps(types: dict[str, Any]) -> Iterator[list[str]]:
    for name, own in types.items():
        curves = [seed["curve"] for seed in own["seeds"].values()]
        whole = [_first([(e["step"], e["accuracy"]) for e in curve]) for curve in curves]
        by_band = [
            [_first([(e["step"], e["bands"][b]["accuracy"]) for e in curve]) for curve in curves] for b in range(BANDS)
        ]
        yield [name, _median(whole), *map(_median, by_band)]


def _first(points: Sequence[tuple[int, float | None]]) -> float:
    """The first step from which on the goal is met to the end: to touch it once is luck."""
    first = np.inf
    for step, accuracy in points:
        first = np.inf if accuracy is None or accuracy < GOAL else min(first, step)
    return float(first)


def _median(steps: Sequence[float]) -> str:
    middle = sorted(steps)[len(steps) // 2]
    return "-" if np.isinf(middle) else f"{middle:,.0f}"


def _phases(types: dict[str, Any]) -> Iterator[list[str]]:
    for name, own in types.items():
        yield [name, *(_mean([end["phases"][p]["accuracy"] for end in _last(own)]) for p in range(PHASES))]


def _reached(types: dict[str, Any]) -> Iterator[list[str]]:
    for name, own in types.items():
        yield [name, *(_reach_cell(cell) for cell in own["reach"])]


def _reach_cell(cell: dict[str, float]) -> str:
    if not cell["share"]:
        return "-"
    return f"{cell['hops']}, {cell['paths']:.3g}" if cell["hops"] else f"- ({cell['share']:.0%}), {cell['paths']:.3g}"


# ---- picture ---------------------------------------------------------------------------------------------------------


def plot(summary: dict[str, Any]) -> Figure:
    """Accuracy over steps (range over seeds), accuracy by band at the end, and what the masks can reach."""
    types = summary["types"]
    figure = Figure(figsize=(15, 1.6 + 0.42 * max(len(types), 8)), layout="constrained")
    over_steps, by_band, reachable = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    for index, (name, own) in enumerate(types.items()):
        curves = np.array([[point["accuracy"] for point in seed["curve"]] for seed in own["seeds"].values()])
        steps = [point["step"] for point in next(iter(own["seeds"].values()))["curve"]]
        colour = f"C{index % 10}"
        over_steps.plot(steps, curves.mean(0), label=name, color=colour, marker="." if len(steps) == 1 else None)
        over_steps.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0)
    over_steps.axhline(summary["task"]["chance"], color="grey", linestyle=":", linewidth=1)
    over_steps.set(title="Accuracy", xlabel="step", ylim=(0, 1.02))
    over_steps.legend(fontsize=7)
    ends = [[[band["accuracy"] for band in end["bands"]] for end in _last(own)] for own in types.values()]
    accuracy = np.array(ends, float).mean(1)  # None, where nothing was asked, is NaN
    _heatmap(by_band, accuracy, list(types), "Accuracy at the end, by distance", "{:.2f}", (0, 1))
    paths = np.array([[cell["paths"] for cell in own["reach"]] for own in types.values()])
    with np.errstate(divide="ignore"):
        shade = np.log10(paths)
    _heatmap(reachable, shade, list(types), "Paths from the masks alone", "{:.2g}", (-2, 3), shown=paths)
    return figure


def _heatmap(
    axes: Any,
    values: np.ndarray,
    names: list[str],
    title: str,
    text: str,
    limits: tuple[float, float],
    shown: np.ndarray | None = None,
) -> None:
    axes.imshow(values, vmin=limits[0], vmax=limits[1], cmap="Blues", aspect="auto")
    for row, column in np.ndindex(*values.shape):
        value = (values if shown is None else shown)[row, column]
        dark = values[row, column] > (limits[0] + limits[1]) / 2
        axes.text(
            column, row, text.format(value), ha="center", va="center", fontsize=7, color="white" if dark else "black"
        )
    axes.set_xticks(range(values.shape[1]), range(values.shape[1]), fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(title=title, xlabel="eighth of the length (0: nearest)")
