"""Paired tests against textbook definitions, brute force and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spattn_olmoe.evaluation.compare import NO_DIFFERENCE, average, compare
from spattn_olmoe.evaluation.report import comparison_markdown
from spattn_olmoe.evaluation.statistics import bootstrap_interval, holm, mcnemar, mean_stderr, sign_flip
from spattn_olmoe.evaluation.suites import SUITES


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (8, 2), (2, 8), (30, 31), (400, 300)])
def test_mcnemar_is_the_exact_binomial_test(b, c):
    scipy = pytest.importorskip("scipy.stats")
    expected = scipy.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(expected, rel=1e-9)


def test_bootstrap_interval_is_that_of_resampling_one_by_one():
    generator = np.random.default_rng(1)
    d = generator.choice([-1.0, 0.0, 1.0], p=[0.1, 0.6, 0.3], size=200)
    means = [generator.choice(d, len(d)).mean() for _ in range(10_000)]
    assert bootstrap_interval(d) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.008)
    floats = generator.normal(0.3, 1, 5000)  # more distinct values than fit one chunk
    lo, hi = bootstrap_interval(floats)
    stderr = mean_stderr(floats)
    assert (lo, hi) == pytest.approx((floats.mean() - 1.96 * stderr, floats.mean() + 1.96 * stderr), abs=0.1 * stderr)


def test_sign_flip_counts_the_signs_that_are_as_extreme():
    assert sign_flip([1.0] * 4) == pytest.approx(2 / 16, abs=0.02)
    assert sign_flip([1.0, -1.0]) == 1.0
    assert sign_flip([0.5] * 40) < 0.001


def test_holm_by_hand():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def results(right: dict[str, list[int]], suite: str = "table2", **changes: object) -> dict:
    """A result whose questions were answered right or wrong as given, by column of the suite."""
    measurements = {}
    for column in SUITES[suite].columns:
        answers = right[column.key]
        value = float(np.mean(answers))
        measurements[column.key] = {
            "task": column.task,
            "num_fewshot": column.num_fewshot,
            "metrics": {"acc": {"value": value, "stderr": 0.0, "n": len(answers), "chance": 0.25}},
            "questions": {column.task: {"doc_hash": [str(i) for i in range(len(answers))], "acc": answers}},
        }
    columns = [vars(column) for column in SUITES[suite].columns]
    layers = [{"name": "standard", "n_heads": 4, "band_length": 32, "follows_input": False}]
    base = {"suite": suite, "columns": columns, "offline": True, "limit": None, "measurements": measurements}
    read = {"max_length": 32, "truncated_requests": 0}
    return {**base, **read, "attention": layers, "follows_input": False, "checkpoint": "run/step1", **changes}


KEYS = [column.key for column in SUITES["table2"].columns]


def test_equal_accuracy_of_different_answers_is_no_difference():
    a, b = [1, 0] * 50, [0, 1] * 50
    rows = compare(results(dict.fromkeys(KEYS, a)), results(dict.fromkeys(KEYS, b)))
    assert [row.verdict for row in rows] == [NO_DIFFERENCE] * 5
    assert (rows[0].only_a, rows[0].only_b, rows[0].difference, rows[0].n) == (50, 50, 0.0, 100)
    assert rows[0].interval[0] < -0.1 < 0.1 < rows[0].interval[1]


def test_four_points_of_a_hundred_questions_are_no_difference_but_forty_are():
    a = [1] * 57 + [0] * 43
    barely, plainly = [1] * 61 + [0] * 39, [1] * 97 + [0] * 3
    same = dict.fromkeys(KEYS, a)
    copa = next(key for key in KEYS if key.startswith("copa"))
    rows = {r.label: r for r in compare(results(same), results({**same, copa: plainly}))}
    assert rows["COPA"].verdict == "B is higher" and rows["COPA"].interval[0] > 0.25
    assert rows["Wino"].verdict == NO_DIFFERENCE and rows["Wino"].interval == (0.0, 0.0)
    a_, b_ = results(same), results({**same, copa: barely})
    rows = {r.label: r for r in compare(a_, b_)}
    assert rows["COPA"].p == pytest.approx(2 / 16) and rows["COPA"].verdict == NO_DIFFERENCE
    assert "No difference can be seen in any column." in comparison_markdown(a_, b_, list(rows.values()))
    backwards = {r.label: r for r in compare(results({**same, copa: plainly}), results(same))}
    assert backwards["COPA"].verdict == "A is higher"


def test_many_columns_ask_for_more_than_one_does():
    a = [0] * 100
    b = [1] * 6 + [0] * 94  # McNemar p = 0.031 alone
    rows = compare(results(dict.fromkeys(KEYS, a)), results({**dict.fromkeys(KEYS, a), KEYS[0]: b}))
    assert rows[0].p == pytest.approx(0.03125) and rows[0].p_adjusted == pytest.approx(
        5 * 0.03125, rel=0.1
    )  # the average's is drawn
    assert rows[0].verdict == NO_DIFFERENCE


def test_the_average_knows_that_columns_share_questions():
    generator = np.random.default_rng(0)
    answers = {column.key: generator.integers(0, 2, 400).tolist() for column in SUITES["table1"].columns}
    answers["mmlu_stem 5-shot"] = answers["mmlu_stem 0-shot"]
    value, stderr = average(results(answers, "table1"))
    assert value == pytest.approx(np.mean([np.mean(x) for x in answers.values()]))
    # four independent columns of weight 1, and the shared questions with weight 2: (4 + 2^2) / 6^2 variances
    assert stderr == pytest.approx(math.sqrt(8 / 36 * 0.25 / 400), rel=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offline": False}, "A has offline=True but B False"),
        ({"suite": "table1"}, "A has suite=table2 but B table1"),
        (
            {"max_length": 8, "truncated_requests": 900},
            r"A has max_length=32 \(0 requests lost context\) but B 8 \(900\): .* max_length=8$",
        ),
    ],
)
def test_unlike_results_are_not_compared(change, message):
    same = {key: [1, 0] for key in KEYS}
    with pytest.raises(ValueError, match=message):
        compare(results(same), {**results(same), **change})


def test_lengths_that_nothing_was_cut_to_are_compared_and_what_was_cut_is_said():
    same = {key: [1, 0] for key in KEYS}
    a, b = results(same), results(same, max_length=4096)
    assert "lost" not in comparison_markdown(a, b, compare(a, b))
    a, b = (results(same, truncated_requests=n) for n in (0, 3))
    first, second = comparison_markdown(a, b, compare(a, b)).splitlines()[:2]
    assert first.endswith(", at most 32 tokens, 0 requests lost the beginning of their context")
    assert second.endswith(", at most 32 tokens, 3 requests lost the beginning of their context")


def test_other_questions_are_not_compared():
    with pytest.raises(ValueError, match=r"other questions in hellaswag 0-shot"):
        compare(results({key: [1, 0] for key in KEYS}), results({key: [1, 0, 1] for key in KEYS}))


def test_other_columns_or_metrics_are_not_compared():
    a, b = (results({key: [1, 0] for key in KEYS}) for _ in range(2))
    b["columns"] = [{**column, "num_fewshot": None} for column in b["columns"]]
    with pytest.raises(ValueError, match="A has columns="):
        compare(a, b)
    b = results({key: [1, 0] for key in KEYS})
    leaf = next(iter(b["measurements"][KEYS[0]]["questions"].values()))
    leaf["other"] = leaf.pop("acc")
    with pytest.raises(ValueError, match="other metrics in"):
        compare(a, b)
