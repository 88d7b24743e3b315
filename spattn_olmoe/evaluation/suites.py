"""Which tasks a suite has, and what the paper printed for them.

Source of the columns and of every printed number: arXiv 2511.09596, Tables 1 to 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import nearest

FULL_SIZE = {
    "winogrande": 1267,
    "copa": 100,
    "hellaswag": 10042,
    "mmlu_stem": 3153,
    "mmlu_social_sciences": 3077,
    "mmlu_humanities": 4705,
}
"""Questions of the tasks in the paper's tables: what the printed numbers' standard errors follow from."""


@dataclass(frozen=True)
class Column:
    """One column of a table.

    :param label: its heading, the paper's own in the paper's tables.
    :param task: a task or group of lm-eval.
    :param num_fewshot: worked examples before each question; None leaves it to the task.
    :param metric: the metric that the column shows; None shows all that the task has.
    """

    label: str
    task: str
    num_fewshot: int | None = None
    metric: str | None = None

    @property
    def key(self) -> str:
        """Names the measurement: columns with equal keys share it."""
        return self.task if self.num_fewshot is None else f"{self.task} {self.num_fewshot}-shot"


@dataclass(frozen=True)
class Suite:
    """A named list of columns.

    :param paper: printed rows as (method, values in the order of the columns, printed average).
    """

    name: str
    columns: tuple[Column, ...]
    paper: tuple[tuple[str, tuple[float, ...], float], ...] = ()


_MAIN = (
    Column("Winogrande", "winogrande", 0, "acc"),
    Column("COPA", "copa", 0, "acc"),
    Column("STEM", "mmlu_stem", 0, "acc"),
    Column("SocSci", "mmlu_social_sciences", 0, "acc"),
    Column("STEM (5-shot)", "mmlu_stem", 5, "acc"),
    Column("Humanities (5-shot)", "mmlu_humanities", 5, "acc"),
)

_SUITES = (
    Suite(
        "table1",
        _MAIN,
        (
            ("0.25B-1.75B Standard Attention", (0.5130, 0.6400, 0.2528, 0.2640, 0.2440, 0.2520), 0.3610),
            ("0.25B-1.75B SPAttention", (0.5154, 0.6600, 0.2666, 0.2552, 0.2664, 0.2468), 0.3684),
            ("1B-7B Standard Attention", (0.5040, 0.5900, 0.2926, 0.2181, 0.1809, 0.2553), 0.3402),
            ("1B-7B SPAttention", (0.4956, 0.6100, 0.3022, 0.2533, 0.2000, 0.2578), 0.3532),
        ),
    ),
    Suite(
        "table2",
        (
            Column("Hella", "hellaswag", 0, "acc"),
            Column("Wino", "winogrande", 0, "acc"),
            Column("COPA", "copa", 0, "acc"),
            Column("STEM", "mmlu_stem", 0, "acc"),
        ),
        (
            ("Longformer", (0.2789, 0.5178, 0.5700, 0.2200), 0.3967),
            ("Reformer", (0.2778, 0.5185, 0.5600, 0.2211), 0.3944),
            ("BigBird", (0.2772, 0.5241, 0.5300, 0.2250), 0.3891),
            ("Standard", (0.2778, 0.5170, 0.5700, 0.2122), 0.3943),
            ("SPAttention", (0.2856, 0.5263, 0.5800, 0.2271), 0.4048),
        ),
    ),
    Suite(
        "table3",
        _MAIN,
        (
            ("GBHALF", (0.5099, 0.5200, 0.2599, 0.2306, 0.2349, 0.2336), 0.3315),
            ("EBALL", (0.5091, 0.4800, 0.2577, 0.2361, 0.2548, 0.2353), 0.3289),
            ("Sliding Window", (0.5178, 0.5300, 0.2688, 0.2128, 0.2333, 0.2425), 0.3376),
            ("SPAttention", (0.5272, 0.5400, 0.2661, 0.2221, 0.2608, 0.2440), 0.3434),
        ),
    ),
    Suite(
        "core",
        tuple(
            Column(task, task, 0)
            for task in ("arc_easy", "arc_challenge", "piqa", "boolq", "sciq", "openbookqa", "lambada_openai")
        ),
    ),
)
SUITES = {suite.name: suite for suite in _SUITES}


def find_suite(name: str) -> Suite:
    """A suite by name.

    :raises ValueError: no such suite; the message names the nearest.
    """
    if name not in SUITES:
        raise ValueError(f"--suite {name}: no such suite{nearest(name, SUITES)} (known: {', '.join(SUITES)})")
    return SUITES[name]


def suite_of_tasks(names: Iterable[str], num_fewshot: int | None = None) -> Suite:
    """A suite of any tasks of lm-eval, with all their metrics."""
    return Suite("tasks", tuple(Column(name, name, num_fewshot) for name in names))


def implied_stderr(accuracy: float, column: Column) -> float:
    """The binomial standard error of an accuracy over all questions of a column of the paper's tables."""
    return math.sqrt(accuracy * (1 - accuracy) / FULL_SIZE[column.task])
