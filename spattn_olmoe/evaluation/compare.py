"""Two results over the same questions: what follows about their difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..json_files import check_shape
from . import statistics
from .suites import SUITES, Column

NO_DIFFERENCE = "no difference can be seen"


@dataclass(frozen=True)
class Difference:
    """One column's paired difference, B minus A.

    :param interval: 95 % confidence interval of the difference, by a paired bootstrap over questions.
    :param only_a: questions that only A answered right; None where the metric is not right or wrong.
    :param p: McNemar's exact test for right or wrong, else a paired permutation test.
    :param p_adjusted: ``p`` after Holm, for all that one table shows (:func:`together`): what the verdict goes by.
    """

    label: str
    metric: str
    n: int
    a: float
    b: float
    interval: tuple[float, float]
    only_a: int | None
    only_b: int | None
    p: float
    p_adjusted: float

    @property
    def difference(self) -> float:
        """By how much B exceeds A."""
        return self.b - self.a

    @property
    def verdict(self) -> str:
        """Which one is higher, where the adjusted p-value allows to tell."""
        if self.p_adjusted >= statistics.LEVEL:
            return NO_DIFFERENCE
        return "B is higher" if self.difference > 0 else "A is higher"


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[Difference]:
    """Paired differences of two results, column by column, and of their average in the paper's tables.

    :raises ValueError: they are not of the same questions in the same order and form.
    """
    _check_comparable(a, b)
    found = []
    for column in columns_of(a):
        for metric in mean_metrics(a["measurements"][column.key], column):
            x, y = (question_values(r["measurements"][column.key], metric) for r in (a, b))
            found.append(_difference(column, metric, x, y))
    if _has_average(a):
        found.append(_average_difference(a, b))
    return together([[Difference(**d, p_adjusted=d["p"]) for d in found]])[0]


def together(comparisons: Sequence[Sequence[Difference]]) -> list[list[Difference]]:
    """Several comparisons that one table shows, their p-values adjusted for all of its differences."""
    adjusted = iter(statistics.holm([d.p for differences in comparisons for d in differences]))
    return [[replace(d, p_adjusted=next(adjusted)) for d in differences] for differences in comparisons]


_SHAPE = {
    "suite": str,
    "offline": bool,
    "checkpoint": str,
    "follows_input": bool,
    "limit": (int, None),
    "max_length": int,
    "truncated_requests": int,
    "attention": [{"name": str}],
    "columns": [{"task": str, "label": str, "num_fewshot": (int, None), "metric": (str, None)}],
    "measurements": {
        str: {
            "task": str,
            "num_fewshot": (int, None),
            "metrics": {str: {"value": float, "stderr": (float, None), "n": int, "chance": (float, None)}},
            "questions": {str: {"doc_hash": [str]}},
        }
    },
}


def check_results(results: Any, where: str) -> None:
    """Raise unless a results file holds what its own columns speak of, in numbers.

    :raises ValueError: naming the first thing that is missing, or no finite number.
    """
    check_shape(results, _SHAPE, where)
    if not results["attention"] or not results["columns"]:
        raise ValueError(f"{where}: names no attention or no column")
    try:
        columns = columns_of(results)
    except TypeError as error:
        raise ValueError(f"{where}: columns: {error}") from None
    if results["suite"] in SUITES and columns != SUITES[results["suite"]].columns:
        raise ValueError(f"{where}: has other columns than suite {results['suite']}")
    for column in columns:
        measurement = results["measurements"].get(column.key)
        if measurement is None:
            raise ValueError(f"{where}: has a column {column.key!r} and no measurement of it")
        if column.metric is not None and column.metric not in measurement["metrics"]:
            raise ValueError(f"{where}: measurements.{column.key} has no metric {column.metric!r}")
        for leaf, questions in measurement["questions"].items():
            place, n = f"measurements.{column.key}.questions.{leaf}", len(questions["doc_hash"])
            if column.metric is not None and column.metric not in questions:
                raise ValueError(f"{where}: {place} has no {column.metric!r}")
            for metric, values in questions.items():
                if metric != "doc_hash":
                    check_shape(values, [(float, bool)], where, f"{place}.{metric}")
                if not n or len(values) != n:
                    raise ValueError(f"{where}: {place}.{metric} has {len(values)} values for {n} questions")


def columns_of(results: dict[str, Any]) -> tuple[Column, ...]:
    """The columns of a result's table."""
    return tuple(Column(**column) for column in results["columns"])


def mean_metrics(measurement: dict[str, Any], column: Column) -> list[str]:
    """The metrics that a column shows and that are means over its questions."""
    shown = [column.metric] if column.metric else list(measurement["metrics"])
    return [
        metric
        for metric in shown
        if all(metric in leaf for leaf in measurement["questions"].values())
        and abs(np.mean(question_values(measurement, metric)) - measurement["metrics"][metric]["value"]) < 1e-9
    ]


def question_values(measurement: dict[str, Any], metric: str) -> np.ndarray:
    """Every question's value of a metric, task by task."""
    return np.concatenate([np.asarray(leaf[metric], dtype=float) for leaf in measurement["questions"].values()])


def average(results: dict[str, Any]) -> tuple[float, float] | None:
    """The mean of a paper table's columns and its standard error; None for other suites.

    Columns that ask the same questions, 0- and 5-shot, err together: a question counts with all that it adds.
    """
    if not _has_average(results):
        return None
    value = sum(_contributions(results).values())
    return value, math.sqrt(sum(x * x for x in _contributions(results, centred=True).values()))


def _has_average(results: dict[str, Any]) -> bool:
    return results["suite"] in SUITES and bool(SUITES[results["suite"]].paper)


def _contributions(results: dict[str, Any], *, centred: bool = False) -> dict[tuple[str, int], float]:
    """What each question adds to the average of the columns.

    :param centred: less the column's mean, so that the sum is zero.
    """
    columns = columns_of(results)
    added: dict[tuple[str, int], float] = {}
    for column in columns:
        assert column.metric is not None
        measurement = results["measurements"][column.key]
        score = measurement["metrics"][column.metric]
        for leaf, questions in measurement["questions"].items():
            for index, x in enumerate(questions[column.metric]):
                place = leaf, index
                x = x - score["value"] if centred else x
                added[place] = added.get(place, 0.0) + x / (score["n"] * len(columns))
    return added


def _average_difference(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    x, y = _contributions(a), _contributions(b)
    d = np.array([y[place] - x[place] for place in x])
    lo, hi = statistics.bootstrap_interval(d)
    return {
        "label": "Average",
        "metric": "acc",
        "n": len(d),
        "a": sum(x.values()),
        "b": sum(y.values()),
        "interval": (lo * len(d), hi * len(d)),
        "only_a": None,
        "only_b": None,
        "p": statistics.sign_flip(d),
    }


def _difference(column: Column, metric: str, x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    binary = bool(np.isin(np.concatenate([x, y]), (0.0, 1.0)).all())
    only_a, only_b = (int((x > y).sum()), int((y > x).sum())) if binary else (None, None)
    p = statistics.mcnemar(only_a, only_b) if only_a is not None and only_b is not None else statistics.sign_flip(y - x)
    return {
        "label": column.label,
        "metric": metric,
        "n": len(x),
        "a": float(x.mean()),
        "b": float(y.mean()),
        "interval": statistics.bootstrap_interval(y - x),
        "only_a": only_a,
        "only_b": only_b,
        "p": p,
    }


def _check_comparable(a: dict[str, Any], b: dict[str, Any]) -> None:
    for key in ("suite", "offline", "columns"):
        if a[key] != b[key]:
            raise ValueError(f"--compare: A has {key}={a[key]} but B {b[key]}: evaluate both alike")
    lengths, lost = ([results[key] for results in (a, b)] for key in ("max_length", "truncated_requests"))
    if lengths[0] != lengths[1] and any(lost):
        raise ValueError(
            f"--compare: A has max_length={lengths[0]} ({lost[0]} requests lost context) but B {lengths[1]} ({lost[1]}): "
            f"evaluate both alike, such as with max_length={min(lengths)}"
        )
    if a["measurements"].keys() != b["measurements"].keys():
        different = sorted(a["measurements"].keys() ^ b["measurements"].keys())
        raise ValueError(f"--compare: only one of A and B has {', '.join(different)}: evaluate both on the same tasks")
    for key, measurement in a["measurements"].items():
        other = b["measurements"][key]
        hashes = [{leaf: q["doc_hash"] for leaf, q in m["questions"].items()} for m in (measurement, other)]
        metrics = [{leaf: sorted(q) for leaf, q in m["questions"].items()} for m in (measurement, other)]
        if hashes[0] != hashes[1] or measurement["num_fewshot"] != other["num_fewshot"]:
            raise ValueError(
                f"--compare: A and B have other questions in {key} (limit {a['limit']} and {b['limit']}): "
                "evaluate both with the same limit, data and versions"
            )
        if metrics[0] != metrics[1]:
            raise ValueError(f"--compare: A and B have other metrics in {key}: evaluate both with the same version")
