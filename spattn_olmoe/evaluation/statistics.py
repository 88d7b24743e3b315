"""Is it a difference? Paired tests over the same questions or sequences.

Resampling is ours where scipy has it too: for the 14,000 questions of MMLU ``scipy.stats.bootstrap`` takes thousands of times as
long as drawing counts of equal values, ``permutation_test`` twenty times as long as a product with signs of one byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

Values = Sequence[float] | np.ndarray

RESAMPLES = 10_000
LEVEL = 0.05
"""Probability of seeing a difference where there is none that verdicts allow, over all comparisons of a table together."""


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test: how likely so uneven a split is if either side were as likely.

    :param only_a: questions that only A answered right.
    :param only_b: questions that only B answered right.
    """
    n = only_a + only_b
    return float(stats.binomtest(only_a, n).pvalue) if n else 1.0


def sign_flip(differences: Values, seed: int = 0) -> float:
    """Two-sided p of a paired permutation test: the mean against those with the signs drawn at random."""
    d = np.asarray(differences, dtype=float)
    d = d[d != 0]  # flipping the sign of a zero changes nothing
    generator = np.random.default_rng(seed)
    extreme, done = 0, 0
    for size in _chunks(len(d)):
        signs = generator.integers(0, 2, (size, len(d)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ d) >= abs(d.sum()) * (1 - 1e-9)).sum())
        done += size
    return (extreme + 1) / (done + 1)


def bootstrap_interval(differences: Values, seed: int = 0, level: float = LEVEL) -> tuple[float, float]:
    """Percentile confidence interval of the mean of paired differences, resampled with replacement."""
    values, counts = np.unique(np.asarray(differences, dtype=float), return_counts=True)
    n = counts.sum()
    generator = np.random.default_rng(seed)
    means = np.concatenate([generator.multinomial(n, counts / n, size) @ values / n for size in _chunks(len(values))])
    lo, hi = np.quantile(means, [level / 2, 1 - level / 2])
    return float(lo), float(hi)


class Crossed(NamedTuple):
    """A mean, its standard error, the degrees of freedom of that, a confidence interval, and p of the mean being zero."""

    mean: float
    stderr: float
    df: float
    interval: tuple[float, float]
    p: float


def crossed(values: np.ndarray, level: float = LEVEL) -> Crossed:
    """The mean over runs and sequences where every run meets every sequence, ``(runs, sequences)``, at least two of one.

    Both are taken as samples of more, so that the interval speaks of other seeds and other text: the variances of the
    runs' means and of the sequences' means add up (what neither explains is in both, which errs on the wide side), with
    Satterthwaite's degrees of freedom. With one run it speaks of other text only.
    """
    parts = [(float(x.var(ddof=1)) / len(x), len(x) - 1) for x in (values.mean(1), values.mean(0)) if len(x) > 1]
    mean, variance = float(values.mean()), sum(part for part, _ in parts)
    stderr = math.sqrt(variance)
    if stderr == 0:
        return Crossed(mean, 0.0, math.inf, (mean, mean), 1.0 if mean == 0 else 0.0)
    df = variance**2 / sum(part**2 / n for part, n in parts)
    reach = float(stats.t.ppf(1 - level / 2, df)) * stderr
    return Crossed(mean, stderr, df, (mean - reach, mean + reach), 2 * float(stats.t.sf(abs(mean) / stderr, df)))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjustment: p-values that may each be read at one level however many there are."""
    adjusted = [0.0] * len(p)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted


def mean_stderr(values: Values) -> float | None:
    """Standard error of a mean; None of fewer than two values."""
    return float(stats.sem(values)) if len(values) > 1 else None


def _chunks(width: int) -> list[int]:
    """Resamples split so that a chunk of them by ``width`` stays small."""
    size = max(1, min(RESAMPLES, (1 << 22) // max(width, 1)))
    return [min(size, RESAMPLES - start) for start in range(0, RESAMPLES, size)]
