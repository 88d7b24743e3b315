"""Results as tables: Markdown and CSV, in the paper's layout where the suite is one of its tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..machine import as_line
from ..patterns import attention_name
from ..tables import interval, plus_minus, table
from ..text import inline, inlined
from .compare import NO_DIFFERENCE, Difference, average, columns_of
from .suites import SUITES, implied_stderr


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each score of a table: label, task, shots, metric, value, stderr, n, chance."""
    found = []
    for column in columns_of(results):
        measurement = results["measurements"][column.key]
        for metric in [column.metric] if column.metric else measurement["metrics"]:
            score = measurement["metrics"][metric]
            found.append(
                {
                    "label": column.label,
                    "task": measurement["task"],
                    "num_fewshot": measurement["num_fewshot"],
                    "metric": metric,
                    **score,
                }
            )
    return found


def markdown(results: dict[str, Any]) -> str:
    """The table of a result, with its conditions above it."""
    results = inlined(results)
    suite = SUITES.get(results["suite"])
    scores = _paper_table(results) if suite and suite.paper else _list_table(results)
    return f"{_conditions(results)}\n\n{scores}\n"


def _conditions(results: dict[str, Any]) -> str:
    lines = [
        f"Suite {results['suite']}: {_name(results)}, {results['checkpoint']}",
        "",
        f"- values are mean +- standard error; follows_input={str(results['follows_input']).lower()}, "
        f"{context_read(results)}",
    ]
    if results["limit"] is not None:
        lines.append(f"- only the first {results['limit']} questions of each task: no figure to publish")
    for note in dict.fromkeys(results["data"].values()):
        tasks = [task for task, own in results["data"].items() if own == note]
        lines.append(f"- {', '.join(tasks)}: {note}")
    lines.append(f"- {as_line(results['machine'])}")
    return "\n".join(lines)


def context_read(results: dict[str, Any]) -> str:
    """How much of the requests a model was given: scores of models that read less of them are lower for that alone."""
    lost = f"{results['truncated_requests']} requests lost the beginning of their context"
    return f"at most {results['max_length']} tokens, {lost}"


def _paper_table(results: dict[str, Any]) -> str:
    suite = SUITES[results["suite"]]
    ours = rows(results)
    total = average(results)
    assert total is not None
    chances = [row["chance"] for row in ours]
    head = ["", *(row["label"] for row in ours), "Average"]
    body = [
        [f"**{_name(results)}**", *(plus_minus(row["value"], row["stderr"]) for row in ours), plus_minus(*total)],
        ["questions", *(str(row["n"]) for row in ours), ""],
        ["chance", *(plus_minus(chance, None) for chance in chances), plus_minus(sum(chances) / len(chances), None)],
    ]
    for method, values, printed in suite.paper:
        cells = [plus_minus(v, implied_stderr(v, c)) for v, c in zip(values, suite.columns, strict=True)]
        body.append([f"paper: {method}", *cells, plus_minus(printed, None)])
    note = (
        "The paper prints no errors: those beside its numbers are the binomial ones of its tasks' full sizes. Its models "
        "were trained on far more than a small run, so its rows are no target for one."
    )
    for method, values, printed in suite.paper:
        if abs((mean := sum(values) / len(values)) - printed) > 2e-4:
            note += f" The average printed for {method}, {printed:.4f}, is not its columns' mean, {mean:.4f}."
    return f"{table(head, body, 'l')}\n\n{note}"


def _list_table(results: dict[str, Any]) -> str:
    head = ["task", "shots", "metric", "value", "questions", "chance"]
    body = [
        [
            row["label"],
            str(row["num_fewshot"]),
            row["metric"],
            plus_minus(row["value"], row["stderr"]),
            str(row["n"]),
            "" if row["chance"] is None else plus_minus(row["chance"], None),
        ]
        for row in rows(results)
    ]
    return table(head, body, "l")


def csv_text(results: dict[str, Any]) -> str:
    """The table as CSV: ours, then the paper's rows with the standard errors that their task sizes imply."""
    head = ["method", "label", "task", "num_fewshot", "metric", "value", "stderr", "n", "chance"]
    lines: list[list[Any]] = [[_name(results), *(row[key] for key in head[1:])] for row in rows(results)]
    if (total := average(results)) is not None:
        lines.append([_name(results), "Average", "", "", "acc", *total, "", ""])
    suite = SUITES.get(results["suite"])
    for method, values, printed in suite.paper if suite else ():
        assert suite is not None
        for value, column in zip(values, suite.columns, strict=True):
            stderr = implied_stderr(value, column)
            lines.append(
                [f"paper: {method}", column.label, column.task, column.num_fewshot, "acc", value, stderr, "", ""]
            )
        lines.append([f"paper: {method}", "Average", "", "", "acc", printed, "", "", ""])
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([head, *lines])
    return out.getvalue()


def comparison_markdown(a: dict[str, Any], b: dict[str, Any], differences: Sequence[Difference]) -> str:
    """The table of a comparison, with a sentence on what it can say."""
    a, b = inlined(a), inlined(b)
    head = ["", "metric", "questions", "A", "B", "B - A", "95 % interval", "only A : only B", "p", "p (Holm)", ""]
    body = [
        [
            inline(d.label),
            inline(d.metric),
            str(d.n),
            f"{d.a:.4f}",
            f"{d.b:.4f}",
            f"{d.difference:+.4f}",
            interval(d.interval),
            "" if d.only_a is None else f"{d.only_a} : {d.only_b}",
            f"{d.p:.3f}",
            f"{d.p_adjusted:.3f}",
            d.verdict,
        ]
        for d in differences
    ]
    seen = [d for d in differences if d.verdict != NO_DIFFERENCE]
    summary = (
        f"A difference is seen in {', '.join(inline(d.label) for d in seen)}."
        if seen
        else "No difference can be seen in any column."
    )
    lost = any(results["truncated_requests"] for results in (a, b))
    names = [
        f"{letter}: {_name(results)}, {results['checkpoint']}{f', {context_read(results)}' if lost else ''}"
        for letter, results in (("A", a), ("B", b))
    ]
    return (
        f"{names[0]}\n{names[1]}\n\n"
        f"{table(head, body, 'l')}\n\n{summary} Intervals are paired bootstraps over the same questions, p is McNemar's exact "
        "test (a permutation test for what is not right or wrong), p (Holm) allows for the number of rows. One training run "
        "of each is compared: what another seed would give is not in the intervals.\n"
    )


def write_tables(results: dict[str, Any], stem: Path) -> list[Path]:
    """Write ``stem.md`` and ``stem.csv``."""
    paths = [stem.with_name(f"{stem.name}.md"), stem.with_name(f"{stem.name}.csv")]
    for path, text in zip(paths, (markdown(results), csv_text(results)), strict=True):
        path.write_text(text)
    return paths


def _name(results: dict[str, Any]) -> str:
    return attention_name(results["attention"], results["follows_input"])
