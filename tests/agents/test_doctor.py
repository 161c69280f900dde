"""The doctor on synthetic histories: it sees the known collapse in time, and lets healthy runs alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agents.doctor import DEFAULT, Bounds, Finding, diagnose, troubles


def healthy(steps: int, seed: int, start: float = 0.3, end: float = 0.9) -> list[dict[str, float]]:
    """A run that learns: 16 groups of 8, with the noise of a batch of tasks that differ in difficulty."""
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(steps):
        mean = start + (end - start) * step / max(1, steps - 1)
        skill_G = rng.beta(2 * mean, 2 * (1 - mean), 16)
        solved_G = rng.binomial(8, skill_G)
        rows.append({
            "step": step,
            "correct": float(solved_G.mean() / 8),
            "zero_variance_groups": float(np.mean((solved_G == 0) | (solved_G == 8))) * 0.8,
            "entropy": 0.25 * (1 - mean) + 0.02,
            "truncated": 0.01,
            "logp_gap": 2e-6,
            "clip_frac": 0.02,
            "grad_norm": float(rng.lognormal(-1, 0.4)),
            "failures": 0.0,
        })  # fmt: skip
    return rows


def collapsed(seed: int) -> list[dict[str, float]]:
    """The measured collapse: success 0.31 to 0 within ten steps, then every group alike."""
    rows = healthy(12, seed, start=0.31, end=0.31)
    for i in range(10):
        success = 0.31 * (1 - (i + 1) / 10)
        rows.append(rows[-1] | {"correct": success, "zero_variance_groups": 1 - success})
    return rows


def levels(findings: list[Finding]) -> dict[str, str]:
    return {f.name: f.level for f in findings}


@given(st.integers(0, 10_000), st.integers(1, 120))
@settings(max_examples=60, deadline=None)
def test_a_healthy_run_is_never_called_bad(seed, steps):
    rows = healthy(steps, seed)
    for upto in range(1, steps + 1, 7):
        found = levels(diagnose(rows[:upto]))
        assert "bad" not in found.values(), found
        assert found.get("success_collapse", "ok") == "ok"


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_the_known_collapse_is_seen_within_its_ten_steps(seed):
    rows = collapsed(seed)
    assert levels(diagnose(rows))["success_collapse"] == "bad"
    gone = rows + [rows[-1] | {"correct": 0.0, "zero_variance_groups": 1.0}] * 8
    found = {f.name: f for f in diagnose(gone)}
    assert found["success_collapse"].level == "bad" and "learning rate" in found["success_collapse"].advice
    assert found["zero_variance_groups"].level == "bad"
    assert "never solved" in found["zero_variance_groups"].advice


def test_groups_that_are_always_solved_get_the_other_advice():
    rows = [{"correct": 1.0, "zero_variance_groups": 1.0}] * 10
    (finding,) = [f for f in diagnose(rows) if f.name == "zero_variance_groups"]
    assert finding.level == "bad" and "harder" not in finding.advice and "raise the level" in finding.advice


@pytest.mark.parametrize(
    ("name", "key", "values", "level"),
    [
        ("truncation", "truncated", [0.05] * 10, "ok"),
        ("truncation", "truncated", [0.15] * 10, "warn"),
        ("truncation", "truncated", [0.4] * 10, "bad"),
        ("logp_gap", "logp_gap", [1e-6] * 9 + [5e-4], "warn"),
        ("logp_gap", "logp_gap", [1e-6] * 9 + [0.2], "bad"),
        ("logp_gap", "logp_gap", [0.2] + [1e-6] * 10, "ok"),
        ("logp_gap", "logp_gap", [1e-6, math.nan], "bad"),
        ("clip_share", "clip_frac", [0.1] * 10, "ok"),
        ("clip_share", "clip_frac", [0.4] * 10, "warn"),
        ("clip_share", "clip_frac", [0.7] * 10, "bad"),
        ("grad_norm", "grad_norm", [1.0] * 20, "ok"),
        ("grad_norm", "grad_norm", [1.0] * 20 + [30.0], "warn"),
        ("grad_norm", "grad_norm", [1.0] * 20 + [1000.0], "bad"),
        ("grad_norm", "grad_norm", [1.0, math.inf], "bad"),
        ("grad_norm", "grad_norm", [0.0] * 20 + [1.0] * 5, "ok"),
        ("entropy", "entropy", [0.1] * 10, "ok"),
        ("entropy", "entropy", [0.005] * 10, "warn"),
        ("entropy", "entropy", [0.001] * 10, "bad"),
        ("verifier_failures", "failures", [0.0] * 10, "ok"),
        ("verifier_failures", "failures", [0.0] * 9 + [0.02], "warn"),
        ("verifier_failures", "failures", [0.02] * 10, "bad"),
        ("start", "correct", [0.0], "bad"),
        ("start", "correct", [0.03], "warn"),
        ("start", "correct", [0.3], "ok"),
        ("start", "correct", [0.95], "warn"),
    ],
)
def test_thresholds(name, key, values, level):
    found = {f.name: f for f in diagnose([{key: v} for v in values])}
    assert found[name].level == level, found[name]
    assert found[name].advice.endswith(".") and found[name].advice.count(".") == 1, "one sentence"


def test_low_entropy_is_fine_where_the_tasks_are_solved():
    rows = [{"entropy": 1e-4, "correct": 0.97}] * 10
    assert levels(diagnose(rows))["entropy"] == "ok"
    assert levels(diagnose([{"entropy": math.nan, "correct": 0.97}]))["entropy"] == "bad"


def test_the_first_evaluation_decides_the_start():
    evals = [
        {"label": "before", "success": [0.02, 0.01, 0.04]},
        {"label": "after", "success": [0.9, 0.8, 1.0]},
    ]
    assert levels(diagnose([{"correct": 0.5}], evals))["start"] == "warn"


def test_an_evaluation_with_lost_verdicts_is_bad():
    evals = [{"label": "after", "success": [0.5, 0.4, 0.6], "failure_share": 0.03}]
    assert levels(diagnose([], evals))["verifier_failures"] == "bad"


scalars = st.none() | st.booleans() | st.floats() | st.integers(-(10**6), 10**6) | st.text(max_size=3)
keys = st.sampled_from(["correct", "entropy", "grad_norm", "logp_gap", "clip_frac", "truncated", "failures"])


rows_of = st.dictionaries(keys, scalars)


@given(st.lists(rows_of, max_size=15), st.lists(rows_of, max_size=3))
@example([{"clip_frac": 1.7e308}] * 2, [])
@example([{"correct": 1.7e308}, {"correct": -float("inf")}, {"correct": float("inf")}, {"correct": 1.7e308}] * 2, [])
@settings(max_examples=100, deadline=None)
def test_damaged_histories_never_raise_and_findings_come_worst_first(rows, evals):
    findings = diagnose(rows, evals)
    ranks = [("bad", "warn", "ok").index(f.level) for f in findings]
    assert ranks == sorted(ranks)
    assert [f for f in findings if f.level != "ok"] == troubles(findings)
    assert all(str(f) for f in findings)


@given(st.floats(allow_nan=False), st.booleans())
def test_bounds_are_monotone(value, low):
    bounds = Bounds(0.05, 0.01, low=True) if low else Bounds(0.3, 0.6)
    rank = ("ok", "warn", "bad").index
    worse = value - abs(value) - 1 if low else value + abs(value) + 1
    assert rank(bounds.judge(value)[0]) <= rank(bounds.judge(worse)[0])


def test_every_bound_warns_before_it_is_bad():
    for bounds in vars(DEFAULT).values():
        assert bounds.warn > bounds.bad if bounds.low else bounds.warn < bounds.bad
