"""Intervals for numbers that come from few episodes: Wilson scores, pass@k, paired differences.

Closed forms and a bootstrap over tasks on plain numpy. Episodes of one task are not independent, so what is
resampled is a task, and a Wilson interval over repeated tasks is widened by the design effect.
Every bootstrap draws from a generator of its own, so a number printed twice is the same number.

Sources: Wilson, JASA 22 (1927); Newcombe, Stat. Med. 17 (1998) 857-872 (reference values in the tests);
Chen et al., arXiv 2107.03374 (unbiased pass@k); Kish, Survey Sampling (1965) (design effect);
Bonett and Price, JEBS 37 (2012) (paired differences where the data show no spread).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

Samples = Sequence[Sequence[float]]
"""Per task (outer) the values of its episodes (inner); tasks may differ in length."""

RESAMPLES = 4000
"""Bootstrap resamples; the end points then move by about 2 % of the width from seed to seed."""


class Interval(NamedTuple):
    """A point estimate with a two-sided interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def normal_quantile(level: float) -> float:
    """The z with P(|Z| <= z) = level; ValueError outside (0, 1)."""
    if not 0.0 < level < 1.0:
        raise ValueError(f"a confidence level lies between 0 and 1, got {level}")
    return NormalDist().inv_cdf(0.5 + level / 2)


def wilson(successes: float, n: float, level: float = 0.95) -> Interval:
    """Wilson score interval of a proportion; `n` may be fractional (an effective sample size)."""
    if n <= 0:
        raise ValueError("an interval needs at least one episode, got n = 0")
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie in [0, n]; got {successes} of {n}")
    z = normal_quantile(level)
    mean = successes / n
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return Interval(mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))


def effective_n(correct: Samples) -> float:
    """Episodes that the clustered sample is worth: n / design effect, at least the number of tasks.

    The design effect is the variance of the mean by the totals of tasks over that of independent episodes.
    """
    sizes, totals = _sizes_totals(correct)
    n, tasks = sizes.sum(), len(sizes)
    mean = totals.sum() / n
    independent = mean * (1 - mean) / n
    if independent <= 0 or tasks < 2 or n == tasks:
        return float(tasks if n > tasks else n)
    clustered = tasks / (tasks - 1) * np.sum((totals - sizes * mean) ** 2) / n**2
    return float(np.clip(n * independent / max(clustered, 1e-300), min(tasks, n), n))


def success_interval(correct: Samples, level: float = 0.95) -> Interval:
    """Share of successful episodes with a Wilson interval, at the effective sample size if tasks repeat."""
    sizes, totals = _sizes_totals(correct)
    n = effective_n(correct)
    return wilson(float(totals.sum() / sizes.sum()) * n, n, level)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k samples is correct) from `correct` of `n` samples."""
    if not (1 <= k <= n and 0 <= correct <= n):
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= correct <= n; got {n=}, {correct=}, {k=}")
    if n - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - correct + 1, n + 1))


def pass_at_k_interval(correct: Samples, k: int, level: float = 0.95, seed: int = 0) -> Interval:
    """Mean unbiased pass@k over tasks, with a percentile bootstrap over tasks.

    Where all tasks agree the bootstrap has no spread, and a Wilson interval over tasks stands in.
    """
    sizes, totals = _sizes_totals(correct)
    if sizes.min() < k:
        raise ValueError(f"pass@{k} needs {k} samples of every task; one has {int(sizes.min())}")
    per_task_N = np.array([pass_at_k(int(n), round(float(c)), k) for n, c in zip(sizes, totals, strict=True)])
    if np.ptp(per_task_N) == 0:
        return wilson(float(per_task_N.sum()), len(per_task_N), level)
    return _bootstrap(per_task_N[:, None], lambda mean_K: mean_K[..., 0], level, seed)


def mean_interval(values: Samples, level: float = 0.95, seed: int = 0) -> Interval:
    """Mean per episode of an unbounded quantity (tool calls, tokens), bootstrap over tasks."""
    sizes, totals = _sizes_totals(values)
    return _bootstrap(np.stack([totals, sizes], 1), lambda m: m[..., 0] / m[..., 1], level, seed)


def paired_difference(
    after: Samples, before: Samples, level: float = 0.95, seed: int = 0, bound: float | None = 1.0
) -> Interval:
    """Mean over tasks of (after - before), played on the same tasks in the same order; bootstrap over tasks.

    `bound` is the largest difference possible (1 for success, None where there is none). Where all tasks
    differ by the same amount the bootstrap has no spread, and the Bonett-Price interval stands in if a bound
    is known.
    """
    difference_N = _task_means(after) - _task_means(before, len(after))
    if bound is not None and np.ptp(difference_N) == 0:
        return _bonett_price(difference_N / bound, level, bound)
    return _bootstrap(difference_N[:, None], lambda mean_K: mean_K[..., 0], level, seed)


def paired_ratio(after: Samples, before: Samples, level: float = 0.95, seed: int = 0) -> Interval:
    """Ratio of means after / before over the same tasks (tool calls saved = 1 - ratio); bootstrap over tasks.

    ValueError if the mean before is 0 in the data; resamples in which it is count as an infinite ratio.
    """
    both_N2 = np.stack([_task_means(after), _task_means(before, len(after))], 1)
    if both_N2[:, 1].mean() == 0:
        raise ValueError("a ratio needs a mean above 0 before")

    def ratio(mean_K: np.ndarray) -> np.ndarray:
        safe = np.where(mean_K[..., 1] == 0, 1.0, mean_K[..., 1])
        return np.where(mean_K[..., 1] == 0, np.inf, mean_K[..., 0] / safe)

    return _bootstrap(both_N2, ratio, level, seed)


def _sizes_totals(values: Samples) -> tuple[np.ndarray, np.ndarray]:
    """Per task the number of episodes and the sum of their values, as float64 [N]."""
    if not values or any(len(v) == 0 for v in values):
        raise ValueError("an interval needs at least one task, and at least one episode of every task")
    return np.array([float(len(v)) for v in values]), np.array([math.fsum(v) for v in values])


def _task_means(values: Samples, expected: int | None = None) -> np.ndarray:
    sizes, totals = _sizes_totals(values)
    if expected is not None and len(sizes) != expected:
        raise ValueError(f"paired numbers need the same tasks on both sides; got {expected} and {len(sizes)}")
    return totals / sizes


def _bootstrap(
    rows_NK: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], level: float, seed: int
) -> Interval:
    """Percentile bootstrap of `statistic(mean over rows)`; `statistic` maps [..., K] to [...]."""
    normal_quantile(level)  # refuses a level outside (0, 1)
    n = len(rows_NK)
    rng = np.random.default_rng((seed, n, RESAMPLES))
    chunk = max(1, 1_000_000 // n)  # bounds the index table at 8 MB
    parts = []
    for start in range(0, RESAMPLES, chunk):
        index = rng.integers(0, n, size=(min(chunk, RESAMPLES - start), n))
        parts.append(statistic(rows_NK[index].mean(axis=1)))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(parts), [tail, 1 - tail], method="inverted_cdf")
    mean = float(statistic(rows_NK.mean(axis=0)))
    return Interval(mean, min(mean, float(low)), max(mean, float(high)))


def _bonett_price(difference_N: np.ndarray, level: float, bound: float) -> Interval:
    """Interval of a paired difference in [-1, 1] from Laplace-adjusted counts, in units of `bound`."""
    n = len(difference_N) + 2
    centre = float(difference_N.sum()) / n
    spread = math.sqrt(((float((difference_N**2).sum()) + 2) / n - centre**2) / n)
    half = normal_quantile(level) * spread
    mean = float(difference_N.mean())
    low, high = max(-1.0, min(mean, centre - half)), min(1.0, max(mean, centre + half))
    return Interval(mean * bound, low * bound, high * bound)
