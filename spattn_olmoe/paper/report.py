"""A table's report: Markdown, the figures in it as CSV, and plots. Made from results and from nothing else."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..evaluation import statistics
from ..evaluation.compare import NO_DIFFERENCE, columns_of, compare, mean_metrics, together
from ..evaluation.report import context_read
from ..evaluation.results import read
from ..evaluation.statistics import Crossed
from ..evaluation.suites import SUITES, implied_stderr
from ..machine import made_on
from ..patterns import build_pattern
from ..tables import context_label, interval, p_value, plus_minus, table
from .comparison import Comparison, Result
from .runs import TABLES, Run, Scale
from .same_start import PARTS
from .train_and_evaluate import suite_file

_SMOOTH = 25
"""Steps of the running mean in plots of training loss."""


def write(name: str, runs: Sequence[Run], results: Sequence[Result], scale: Scale, out: Path) -> list[Path]:
    """``NAME.md``, ``NAME.csv``, and two plots for each model.

    :param name: the table's.
    """
    out.mkdir(parents=True, exist_ok=True)
    comparisons = Comparison.of(results)
    paths = [out / f"{name}.md", out / f"{name}.csv"]
    paths[0].write_text(markdown(name, comparisons, scale.scope, read_scores(name, runs, scale)))
    with open(paths[1], "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows(comparisons))
    for c in comparisons:
        for kind, draw in (("loss", plot_training), ("context", plot_context)):
            paths.append(out / f"{name}-{c.model}-{kind}.png")
            draw(c).savefig(paths[-1], dpi=110)
    return paths


def read_scores(name: str, runs: Sequence[Run], scale: Scale) -> dict[str, dict[str, Any]]:
    """The lm-eval results of runs, by name; empty at a scale without."""
    found = {run.name: file for run in runs if (file := suite_file(run, scale, name))}
    return {run: read(file) for run, file in found.items()}


def markdown(name: str, comparisons: Sequence[Comparison], scope: str, scores: dict[str, dict[str, Any]]) -> str:
    """The report of a table.

    :param scope: what its scale can and cannot show.
    :param scores: lm-eval results by run; empty at a scale without.
    """
    lines = [f"# {name.replace('table', 'Table ')}", "", scope, ""]
    for c in comparisons:
        first = next(iter(c.results.values()))[0]
        lines += [
            f"## {c.model}: {first['parameters']:,} parameters, {first['tokens']:,} tokens, {_seeds(c)}",
            "",
            *_losses(name, c),
            "",
            f"![Training loss]({name}-{c.model}-loss.png)",
            "",
            *_order(name, c),
            *_context(name, c),
            *_twins(c),
            *_short_prompts(c),
            *_dead_rows(c),
        ]
    if scores:
        lines += _scores(name, comparisons, scores)
    lines += [*_paper(name), *_start(comparisons)]
    machines = [r["machine"] for c in comparisons for rs in c.results.values() for r in rs]
    return "\n".join([*lines, *made_on(machines)]) + "\n"


# ---- held-out loss ---------------------------------------------------------------------------------------------------


def _losses(name: str, c: Comparison) -> list[str]:
    differences = c.differences()
    averages = _printed(name)
    head = [
        "",
        "pairs of dense",
        "held-out loss",
        f"less {c.reference}'s",
        "95 % interval",
        "p (Holm)",
        "paper's average",
    ]
    body = []
    for variant in sorted(c.results, key=lambda v: c.losses(v).mean()):
        by_seed = c.losses(variant).mean(1)
        d, p = differences.get(variant, (None, 1.0))
        body.append(
            [
                variant,
                f"{100 * pairs_of_dense(c.results[variant][0]):.1f} %",
                plus_minus(by_seed.mean(), by_seed.std(ddof=1) if len(by_seed) > 1 else None),
                *(["", "", ""] if d is None else [f"{d.mean:+.4f}", interval(d.interval), p_value(p)]),
                ", ".join(f"{value:.4f}" for value in averages.get(variant, [])),
            ]
        )
    first = next(iter(c.results.values()))[0]["held_out"]
    sample = (
        f"that take both as samples, so that other seeds and other text are in them; {c.seeds} seeds make them wide."
        if c.seeds > 1
        else "that take these as a sample. There is one seed: what another would give is not in them."
    )
    return [
        table(head, body),
        "",
        f"Cross-entropy in nats a token on {first['sequences']} held-out sequences of {first['length']} tokens, lower is better; "
        "+- is the standard deviation over seeds. Differences are paired over "
        f"{'seeds and sequences' if c.seeds > 1 else 'sequences'}; intervals are Student's, {sample} p allows for the "
        "number of rows.",
    ]


def _seeds(c: Comparison) -> str:
    return f"{c.seeds} seed{'s' if c.seeds > 1 else ''}"


def pairs_of_dense(result: Result) -> float:
    """The share of dense causal attention's (query, key) pairs that a run's model attends."""
    T = result["held_out"]["length"]
    patterns = [build_pattern(**layer) for layer in result["attention"]]
    dense = build_pattern("standard", patterns[0].n_heads, T).attended_pairs(T)
    return sum(p.attended_pairs(T) for p in patterns) / (len(patterns) * dense)


def verdict(d: Crossed, p: float) -> str:
    """Whether losses of two variants, the second less the first's, stand in the order that puts the first before."""
    if p >= statistics.LEVEL:
        return "cannot be told"
    return "as in the paper" if d.mean > 0 else "the other way round"


def paper_order(name: str) -> list[str]:
    """The variants of a table by their printed average, best first; those with several rows by the mean of them."""
    averages = _printed(name)
    return sorted(averages, key=lambda variant: -float(np.mean(averages[variant])))


def _printed(name: str) -> dict[str, list[float]]:
    printed = {method: average for method, _, average in SUITES[name].paper}
    found: dict[str, list[float]] = {}
    for variant, method in TABLES[name].rows:
        found.setdefault(variant, []).append(printed[method])
    return found


def _order(name: str, c: Comparison) -> list[str]:
    order = [variant for variant in paper_order(name) if variant in c.results]
    if len(order) < 2:
        return []
    body = [
        [f"{a} before {b}", f"{d.mean:+.4f}", interval(d.interval), p_value(p), verdict(d, p)]
        for a, b, d, p in c.order(order)
    ]
    return [
        f"By its printed averages the paper's order is {', '.join(order)}. Held-out loss of neighbours, the second's less the "
        "first's (positive: as in the paper):",
        "",
        table(["", "difference", "95 % interval", "p (Holm)", ""], body),
        "",
    ]


def _context(name: str, c: Comparison) -> list[str]:
    head = ["tokens of context", *c.results]
    body = [
        [context_label(context), *(f"{c.losses(variant, i).mean():.4f}" for variant in c.results)]
        for i, context in enumerate(c.contexts)
    ]
    return [
        "Held-out loss by the number of tokens before a token:",
        "",
        table(head, body),
        "",
        f"![Difference by context]({name}-{c.model}-context.png)",
        "",
    ]


def _twins(c: Comparison) -> list[str]:
    found = c.twins()
    lines = [
        f"- {a} and {b} have the same masks: "
        + (
            "every loss of theirs is the same to the last digit."
            if not off
            else f"their losses differ by at most {off:.2g}."
        )
        for a, b, off in found
    ]
    return [*lines, ""] if lines else []


def _short_prompts(c: Comparison) -> list[str]:
    body = []
    for variant in c.results:
        for length, train, follows, d in c.short_prompts(variant):
            body.append(
                [f"{variant}, {length}", f"{train:.4f}", f"{follows:.4f}", f"{d.mean:+.4f}", interval(d.interval)]
            )
    if not body:
        return []
    head = ["variant, tokens", "follows_input=false", "follows_input=true", "difference", "95 % interval"]
    return [
        "Held-out loss of inputs shorter than in training (the beginnings of the same sequences), with bands as in training and "
        "with bands that follow the input's length, as the paper's released code evaluates:",
        "",
        table(head, body),
        "",
    ]


def _dead_rows(c: Comparison) -> list[str]:
    body = [
        [variant, *(f"{100 * results[0]['dead_rows'][key]:.1f} %" for key in ("sequences", "documents"))]
        for variant, results in c.results.items()
    ]
    return [
        "Share of (head, query) rows without any key in the held-out sequences, whole and with their documents masked from one "
        "another:",
        "",
        table(["", "whole sequences", "documents masked"], body),
        "",
    ]


# ---- lm-eval scores, the paper, where it was made --------------------------------------------------------------------


def _scores(name: str, comparisons: Sequence[Comparison], scores: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["## Scores", ""]
    for c in comparisons:
        found = {v: [scores[r["run"]] for r in rs] for v, rs in c.results.items()}
        head, body = [c.model], []
        for variant, results in found.items():
            cells = _score_cells(results)
            head = [c.model, *cells]
            body.append([variant, *cells.values()])
        lines += [table(head, body), "", *_score_differences(c.reference, found), ""]
    limit = next(iter(scores.values()))["limit"]
    kind = "the standard error over questions" if comparisons[0].seeds == 1 else "the standard deviation over seeds"
    first = "" if limit is None else f" Only the first {limit} questions of each task are asked."
    told = f"one is named where p, adjusted (Holm) for all types, seeds and columns of the table, is below {statistics.LEVEL}"
    return [
        *lines,
        *_lost_context(scores),
        f"Means over seeds; +- is {kind}. Differences are paired over questions, seed by seed; {told}.{first}",
        "",
    ]


def _lost_context(scores: dict[str, dict[str, Any]]) -> list[str]:
    """How much of their prompts runs read, where any lost some."""
    if not any(results["truncated_requests"] for results in scores.values()):
        return []
    runs: dict[str, list[str]] = {}
    for run, results in scores.items():
        runs.setdefault(context_read(results), []).append(run)
    return [*(f"- {', '.join(names)}: {read}" for read, names in runs.items()), ""]


def _score_cells(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """One cell a column and metric: the mean over seeds."""
    cells = {}
    for column in columns_of(results[0]):
        for metric in mean_metrics(results[0]["measurements"][column.key], column):
            found = [r["measurements"][column.key]["metrics"][metric] for r in results]
            values = [one["value"] for one in found]
            spread = found[0]["stderr"] if len(found) == 1 else float(np.std(values, ddof=1))
            label = column.label if column.metric else f"{column.label} {metric}"
            cells[label] = plus_minus(float(np.mean(values)), spread)
    return cells


def _score_differences(reference: str, scores: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A line for each variant and seed, with what can be told apart in all of them together."""
    pairs = {
        f"{variant} less {reference}, seed {seed}": (a, b)
        for variant, results in scores.items()
        if variant != reference
        for seed, (a, b) in enumerate(zip(scores[reference], results, strict=True))
    }
    lines = []
    for name, differences in zip(pairs, together([compare(a, b) for a, b in pairs.values()]), strict=True):
        seen = [d for d in differences if d.verdict != NO_DIFFERENCE]
        words = "; ".join(f"{d.label} {d.metric} {d.difference:+.4f} ({interval(d.interval)})" for d in seen)
        lines.append(f"- {name}: {words or NO_DIFFERENCE}")
    return lines


def _paper(name: str) -> list[str]:
    suite = SUITES[name]
    body, spreads = [], []
    for method, values, average in suite.paper:
        errors = [implied_stderr(v, c) for v, c in zip(values, suite.columns, strict=True)]
        spreads.append(math.hypot(*errors) / len(errors))
        cells = [plus_minus(v, e) for v, e in zip(values, errors, strict=True)]
        body.append([method, *cells, plus_minus(average, spreads[-1])])
    words = []
    size = len(suite.paper) // len(TABLES[name].models)  # rows of one model
    for start in range(0, len(suite.paper), size):
        rows = [(average, spreads[i], method) for i, (method, _, average) in enumerate(suite.paper)][
            start : start + size
        ]
        (high, error_high, best), (low, error_low, worst) = max(rows), min(rows)
        error = math.hypot(error_high, error_low)
        words.append(
            f"{best} less {worst}: {high - low:.4f} +- {error:.4f}, {(high - low) / error:.1f} standard errors."
        )
    return [
        "## The paper's table",
        "",
        table(["", *(column.label for column in suite.columns), "Average"], body),
        "",
        "One run each. The paper prints no errors: those beside its numbers are the binomial ones of its tasks' full sizes, "
        f"columns and methods taken as independent. Highest average less lowest, at that: {' '.join(words)}",
        "",
    ]


def _start(comparisons: Sequence[Comparison]) -> list[str]:
    lines = [
        "## Same start",
        "",
        "All variants of a seed started from the same weights, data and order of data (SHA-256):",
        "",
    ]
    body = []
    for c in comparisons:
        for result in next(iter(c.results.values())):
            body.append([f"{c.model}, seed {result['seed']}", *(f"`{result['start'][part][:12]}`" for part in PARTS)])
    return [*lines, table(["", *PARTS], body), ""]


def rows(comparisons: Sequence[Comparison]) -> list[list[Any]]:
    """The held-out losses as rows of a CSV file."""
    found: list[list[Any]] = [["model", "variant", "seed", "context_from", "context_to", "loss", "stderr"]]
    for c in comparisons:
        for variant, results in c.results.items():
            for r in results:
                for row in r["held_out"]["rows"]:
                    lo, hi = row["context"]
                    found.append(
                        [c.model, variant, r["seed"], lo, hi - 1, f"{row['loss']:.6f}", f"{row['stderr']:.6f}"]
                    )
    return found


# ---- plots -----------------------------------------------------------------------------------------------------------


def plot_training(c: Comparison) -> Figure:
    """Training loss, and its difference from the reference's: mean over seeds, in a band from the lowest to the highest."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    reference = _curves(c, c.reference)
    for variant in c.results:
        curves = _curves(c, variant)
        steps = np.arange(1, curves.shape[1] + 1) + (_window(c) - 1)
        for axes, values in ((left, curves), (right, curves - reference)):
            axes.plot(steps, values.mean(0), label=variant, linewidth=1.1, color=_colour(c, variant))
            axes.fill_between(steps, values.min(0), values.max(0), color=_colour(c, variant), alpha=0.15, linewidth=0)
    left.set(xlabel="step", ylabel="training loss (nats per token)")
    right.set(xlabel="step", ylabel=f"difference from {c.reference}")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.suptitle(f"{c.model}: running mean of {_window(c)} steps, bands over {_seeds(c)}", fontsize=10)
    return figure


def _colour(c: Comparison, variant: str) -> str:
    return f"C{list(c.results).index(variant)}"


def _window(c: Comparison) -> int:
    return min(_SMOOTH, next(iter(c.results.values()))[0]["steps"])


def _curves(c: Comparison, variant: str) -> np.ndarray:
    """Smoothed training losses, ``(seeds, steps)``."""
    kernel = np.ones(_window(c)) / _window(c)
    return np.array([np.convolve(r["training_loss"], kernel, mode="valid") for r in c.results[variant]])


def plot_context(c: Comparison) -> Figure:
    """Held-out loss by length of context, less the reference's, with 95 % intervals."""
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    axes = figure.subplots()
    others = [variant for variant in c.results if variant != c.reference]
    labels = [context_label(context) for context in c.contexts]
    for n, variant in enumerate(others):
        found = [c.difference(variant, context=i) for i in range(len(labels))]
        place = np.arange(len(labels)) + (n - (len(others) - 1) / 2) * 0.8 / max(len(others), 1)
        reach = [d.interval[1] - d.mean for d in found]
        axes.errorbar(
            place,
            [d.mean for d in found],
            reach,
            fmt="o",
            markersize=4,
            capsize=2,
            linewidth=1,
            color=_colour(c, variant),
            label=variant,
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(labels)), labels)
    axes.set(xlabel="tokens of context", ylabel=f"held-out loss less {c.reference}'s (nats)")
    axes.grid(alpha=0.3, axis="y")
    figure.legend(fontsize=8, loc="outside right upper")
    return figure
