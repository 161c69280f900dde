"""Statistics of a comparison: S training runs (seeds) of each of A recipes, all of which play the same T tasks.

Two things are samples here: the runs, few, and the tasks, many. Resampling tasks alone would say how well *these*
runs do; what is asked is how well the recipe does. So every interval has two independent parts:

    runs    Student's t over the S per-run means, exact for normal runs however few, as draws of a Gaussian
            multiplier bootstrap: deviation = sum_s z_s (m_s - mean) / sqrt(S (S - 1)) * sqrt((S - 1) / chi2)
    tasks   bootstrap over the T per-task means, n - 1 of n drawn (Rao and Wu, JASA 83 (1988)), so that the
            variance of a mean has no bias

The draws are shared by all recipes: a seed means the same tasks in the same order for each of them, and a
held-out task is the same question, so differences of draws are paired over both. The noise of single episodes
is in both parts; where it dominates, intervals are wider than they need be, never narrower.

Source of the aggregate: Agarwal et al. 2021, "Deep RL at the edge of the statistical precipice", arXiv 2108.13264.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agents.stats import RESAMPLES, Interval, normal_quantile

CHUNK = 4_000_000
"""Entries of a table of weights that live at once."""


@dataclass(frozen=True)
class Draws:
    """Bootstrap draws of means, the same resamples for every recipe."""

    mean_A: np.ndarray
    """The estimate of each recipe."""
    draw_RA: np.ndarray
    """Draws around it."""

    def interval(self, value: float, draw_R: np.ndarray, level: float = 0.95) -> Interval:
        """Percentile interval of any function of the draws around its value."""
        normal_quantile(level)  # refuses a level outside (0, 1)
        tail = (1 - level) / 2
        low, high = np.quantile(draw_R, [tail, 1 - tail], method="inverted_cdf")
        return Interval(value, min(value, float(low)), max(value, float(high)))

    def mean(self, a: int, level: float = 0.95) -> Interval:
        """Mean of a recipe."""
        return self.interval(float(self.mean_A[a]), self.draw_RA[:, a], level)

    def difference(self, a: int, b: int, level: float = 0.95) -> Interval:
        """Mean of a less mean of b, paired over seeds and tasks."""
        draw_R = self.draw_RA[:, a] - self.draw_RA[:, b]
        return self.interval(float(self.mean_A[a] - self.mean_A[b]), draw_R, level)

    def ratio(self, a: int, b: int, level: float = 0.95) -> Interval | None:
        """Mean of a over mean of b, for quantities >= 0; None where that of b is 0. A draw of b <= 0 is infinite."""
        if self.mean_A[b] <= 0:
            return None
        top_R, bottom_R = np.maximum(self.draw_RA[:, a], 0.0), self.draw_RA[:, b]
        draw_R = np.where(bottom_R > 0, top_R / np.where(bottom_R > 0, bottom_R, 1.0), np.inf)
        return self.interval(float(self.mean_A[a] / self.mean_A[b]), draw_R, level)


def draws(value_AST: np.ndarray, seed: int = 0) -> Draws:
    """Draws of the mean over seeds and tasks.

    Args:
        value_AST: a number for each recipe, seed and task (the mean of its episodes).
        seed: of the resampling; the same call gives the same draws.

    Raises:
        ValueError: an empty axis, or a number that is not finite.
    """
    value_AST = np.asarray(value_AST, dtype=np.float64)
    if value_AST.ndim != 3 or 0 in value_AST.shape:
        raise ValueError(f"draws need numbers of [recipes, seeds, tasks], none of them 0; got {value_AST.shape}")
    if not np.isfinite(value_AST).all():
        raise ValueError("draws need finite numbers")
    _, seeds, tasks = value_AST.shape
    rng = np.random.default_rng((seed, seeds, tasks, RESAMPLES))
    mean_A = value_AST.mean((1, 2))
    run_AS, task_AT = value_AST.mean(2) - mean_A[:, None], value_AST.mean(1) - mean_A[:, None]
    draw_RA = mean_A + _of_runs(run_AS, rng) + _of_tasks(task_AT, rng)
    return Draws(mean_A, draw_RA)


def _of_runs(deviation_AS: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What another set of as many runs would add to the mean: [R, A]; 0 for one run, whose spread is unknown."""
    seeds = deviation_AS.shape[1]
    if seeds == 1:
        return np.zeros((RESAMPLES, len(deviation_AS)))
    z_RS = rng.standard_normal((RESAMPLES, seeds))
    student_R = np.sqrt((seeds - 1) / rng.chisquare(seeds - 1, RESAMPLES))
    return (z_RS @ deviation_AS.T) / math.sqrt(seeds * (seeds - 1)) * student_R[:, None]


def _of_tasks(deviation_AT: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What another set of as many tasks would add to the mean: [R, A]."""
    tasks = deviation_AT.shape[1]
    if tasks == 1:
        return np.zeros((RESAMPLES, len(deviation_AT)))
    chunk, found = max(1, CHUNK // tasks), []
    for start in range(0, RESAMPLES, chunk):
        size = min(chunk, RESAMPLES - start)
        picked_RN = rng.integers(0, tasks, (size, tasks - 1)) + tasks * np.arange(size)[:, None]
        weight_RT = np.bincount(picked_RN.ravel(), minlength=size * tasks).reshape(size, tasks)
        found.append(weight_RT @ deviation_AT.T / (tasks - 1))
    return np.concatenate(found)


def iqm(score: np.ndarray | Sequence[float]) -> float:
    """Interquartile mean: the mean of the middle half, a quarter of the scores cut off at either end, rounded down."""
    sorted_N = np.sort(np.asarray(score, dtype=np.float64), axis=None)
    if not sorted_N.size:
        raise ValueError("an interquartile mean needs at least one score")
    cut = sorted_N.size // 4
    return float(sorted_N[cut : sorted_N.size - cut].mean())


def iqm_interval(score_SK: np.ndarray, level: float = 0.95, seed: int = 0) -> Interval:
    """IQM over runs and families of tasks, with a percentile bootstrap over runs.

    A score is a success rate: single tasks are right or wrong, and the middle half of zeros and ones says less
    than their mean, so tasks are taken by family (difficulty level). A run is resampled with all its scores,
    because here one training plays every family; in Agarwal et al. each score is a training of its own. With
    one run the ends are NaN.
    """
    score_SK = np.asarray(score_SK, dtype=np.float64)
    value = iqm(score_SK)
    seeds = len(score_SK)
    if seeds == 1:
        return Interval(value, math.nan, math.nan)
    rng = np.random.default_rng((seed, seeds, RESAMPLES))
    picked_RSK = score_SK[rng.integers(0, seeds, (RESAMPLES, seeds))]
    sorted_RN = np.sort(picked_RSK.reshape(RESAMPLES, -1), axis=1)
    cut = sorted_RN.shape[1] // 4
    draw_R = sorted_RN[:, cut : sorted_RN.shape[1] - cut].mean(1)
    tail = (1 - level) / 2
    low, high = np.quantile(draw_R, [tail, 1 - tail], method="inverted_cdf")
    return Interval(value, min(value, float(low)), max(value, float(high)))


@dataclass(frozen=True)
class Band:
    """A learning curve of several runs."""

    x: tuple[float, ...]
    """Episodes played in training."""
    mean: tuple[float, ...]
    """Mean over the runs."""
    low: tuple[float, ...]
    """Lowest run."""
    high: tuple[float, ...]
    """Highest run."""


def band(curves: Sequence[tuple[Sequence[float], Sequence[float]]], points: int = 120) -> Band | None:
    """Runs as one curve with a band: their running means, on a common axis as far as all of them reach.

    Args:
        curves: (x, y) of each run, x increasing.
        points: of the curve at most.
    """
    curves = [(x, y) for x, y in curves if len(x)]
    if not curves:
        return None
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    count = min(points, max(len(x) for x, _ in curves)) if end > start else 1
    grid_X = np.linspace(start, max(start, end), count)
    value_SX = np.stack([np.interp(grid_X, x, running_mean(y)) for x, y in curves])
    columns = (grid_X, value_SX.mean(0), value_SX.min(0), value_SX.max(0))
    return Band(*(tuple(float(v) for v in column) for column in columns))


def running_mean(values: Sequence[float]) -> list[float]:
    """Exponential running mean that starts without bias; the longer the curve, the smoother."""
    keep = 0.85 if len(values) > 20 else 0.6 if len(values) > 5 else 0.0
    mean = weight = 0.0
    found = []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        found.append(mean / weight)
    return found
