"""Means over runs and sequences: against textbook tests where there is one, and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from spattn_olmoe.evaluation.statistics import crossed


def test_one_run_is_a_t_test_over_sequences():
    values = np.random.default_rng(0).normal(0.2, 1, (1, 30))
    found = crossed(values)
    expected = stats.ttest_1samp(values[0], 0)
    assert (found.mean, found.p) == pytest.approx((values.mean(), expected.pvalue))
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_runs_alone_are_a_t_test_over_runs():
    effects = np.array([0.1, 0.4, 0.2])
    found = crossed(np.repeat(effects[:, None], 50, axis=1))  # no sequence differs from another
    expected = stats.ttest_1samp(effects, 0)
    assert (found.df, found.p) == pytest.approx((2, expected.pvalue))
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))


@pytest.mark.parametrize(("runs", "sequences", "rest"), [(1, 0, 1), (0, 1, 1), (1, 1, 1), (0, 0, 1)])
def test_intervals_cover_the_mean_as_often_as_they_say(runs, sequences, rest):
    generator = np.random.default_rng(3)
    S, Q, hits, trials = 3, 40, 0, 600
    for _ in range(trials):
        values = 1.0 + runs * generator.normal(size=(S, 1)) / 4 + sequences * generator.normal(size=(1, Q))
        lo, hi = crossed(values + rest * generator.normal(size=(S, Q))).interval
        hits += lo <= 1.0 <= hi
    assert hits / trials > 0.925


def test_no_difference_at_all_is_no_difference():
    found = crossed(np.zeros((3, 5)))
    assert (found.interval, found.p) == ((0.0, 0.0), 1.0)
    assert crossed(np.full((2, 4), 0.5)).p == 0.0
