"""Intervals against published values, against exact enumeration, and in how often they cover the truth."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import stats
from agents.stats import Interval


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_reproduces_newcombe_1998_table_1(successes, n, low, high):
    interval = stats.wilson(successes, n)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


@given(st.integers(1, 5000), st.data())
def test_wilson_holds_the_estimate_and_mirrors(n, data):
    c = data.draw(st.integers(0, n))
    one, other = stats.wilson(c, n), stats.wilson(n - c, n)
    assert 0 <= one.low <= one.mean <= one.high <= 1
    assert one.low == pytest.approx(1 - other.high, abs=1e-12)
    assert stats.wilson(c, n, 0.99).high >= one.high


def test_wilson_covers_at_its_level():
    """Exact coverage by the binomial law, averaged over p, is within a point of 95 %."""
    n, cover = 50, []
    intervals = [stats.wilson(c, n) for c in range(n + 1)]
    for p in np.linspace(0.02, 0.98, 97):
        inside = [c for c, i in enumerate(intervals) if i.low <= p <= i.high]
        cover.append(sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in inside))
    assert abs(np.mean(cover) - 0.95) < 0.01 and min(cover) > 0.90


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_average_over_all_subsets(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    outcomes = [1] * c + [0] * (n - c)
    exact = np.mean([max(subset) for subset in itertools.combinations(outcomes, k)])
    assert stats.pass_at_k(n, c, k) == pytest.approx(exact, abs=1e-12)


def test_pass_at_k_is_stable_for_large_n():
    assert stats.pass_at_k(100_000, 1, 1) == pytest.approx(1e-5, rel=1e-9)
    assert stats.pass_at_k(10_000, 5_000, 5_001) == 1.0


@given(st.lists(st.lists(st.integers(0, 1), min_size=4, max_size=4), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_pass_at_k_grows_with_k_and_starts_at_success(correct):
    intervals = [stats.pass_at_k_interval(correct, k) for k in (1, 2, 4)]
    means = [i.mean for i in intervals]
    assert means == sorted(means)
    assert means[0] == pytest.approx(np.mean(correct))
    assert all(0 <= i.low <= i.mean <= i.high <= 1 for i in intervals)


def test_no_interval_has_width_zero_where_all_tasks_agree():
    nothing = [[0, 0]] * 10
    assert stats.success_interval(nothing).high > 0.1
    assert stats.pass_at_k_interval(nothing, 2).high > 0.1
    assert stats.paired_difference(nothing, nothing).high > 0.1
    gained = stats.paired_difference([[1]] * 10, [[0]] * 10)
    assert gained.mean == 1.0 and gained.low < 0.95


def test_repeated_tasks_count_less_than_fresh_ones():
    rng = np.random.default_rng(3)
    independent = rng.integers(0, 2, (100, 4)).tolist()
    cloned = np.repeat(rng.integers(0, 2, (100, 1)), 4, axis=1).tolist()
    assert stats.effective_n(cloned) == pytest.approx(100, rel=0.02)
    assert stats.effective_n(independent) > 300
    width = [i.high - i.low for i in map(stats.success_interval, (cloned, independent))]
    assert width[0] > 1.6 * width[1]
    assert stats.success_interval([[1], [0], [1]]) == stats.wilson(2, 3)


def test_clustered_intervals_cover_at_their_level():
    rng = np.random.default_rng(11)
    hits, trials = {"wilson": 0, "pass": 0, "paired": 0}, 200
    truth_pass = 1 - np.mean((1 - np.linspace(0.01, 0.99, 9901)) ** 2)
    for trial in range(trials):
        skill_N = rng.uniform(0.01, 0.99, 120)
        correct = (rng.random((120, 4)) < skill_N[:, None]).astype(int).tolist()
        other = (rng.random((120, 4)) < skill_N[:, None] * 0.8).astype(int).tolist()
        a = stats.success_interval(correct)
        b = stats.pass_at_k_interval(correct, 2, seed=trial)
        c = stats.paired_difference(correct, other, seed=trial)
        hits["wilson"] += a.low <= 0.5 <= a.high
        hits["pass"] += b.low <= truth_pass <= b.high
        hits["paired"] += c.low <= 0.1 <= c.high
    assert all(0.89 <= h / trials <= 0.99 for h in hits.values()), hits


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(5)
    before = rng.integers(0, 2, 400)
    after = np.where(rng.random(400) < 0.05, 1, before)
    paired = stats.paired_difference(after[:, None].tolist(), before[:, None].tolist())
    assert paired.low > 0 and paired.high - paired.low < 0.05
    swapped = stats.paired_difference(before[:, None].tolist(), after[:, None].tolist())
    assert swapped.mean == -paired.mean


def test_ratio_of_tool_calls():
    before = [[2.0], [4.0], [6.0]] * 20
    after = [[1.0], [2.0], [3.0]] * 20
    assert stats.paired_ratio(after, before) == pytest.approx((0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="above 0"):
        stats.paired_ratio(before, [[0.0]] * 60)


def test_mean_interval_weighs_episodes_not_tasks():
    assert stats.mean_interval([[1.0, 1.0, 1.0], [5.0]]).mean == 2.0


def test_bootstrap_is_reproducible_and_leaves_global_generators_alone():
    states = random.getstate(), np.random.get_state()[1].tolist()
    values = np.random.default_rng(0).normal(size=(50, 1)).tolist()
    assert stats.mean_interval(values, seed=4) == stats.mean_interval(values, seed=4)
    assert stats.mean_interval(values, seed=4) != stats.mean_interval(values, seed=5)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.wilson(0, 0),
        lambda: stats.wilson(3, 2),
        lambda: stats.wilson(1, 2, level=1.0),
        lambda: stats.pass_at_k(3, 1, 4),
        lambda: stats.pass_at_k_interval([[1, 0], [1]], 2),
        lambda: stats.success_interval([]),
        lambda: stats.mean_interval([[1.0], []]),
        lambda: stats.paired_difference([[1]], [[1], [0]]),
    ],
)
def test_impossible_questions_are_refused(call):
    with pytest.raises(ValueError, match=r"\d|needs"):
        call()


def test_an_interval_reads_well():
    assert str(Interval(0.5, 0.4, 0.61)) == "0.500 [0.400, 0.610]"
