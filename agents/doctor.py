"""The doctor: what a run's numbers say about its health, each finding with a bound and a sentence of advice.

`diagnose` is a pure function of the metrics so far (one mapping a step) and the evaluations so far, cheap
enough to be called after every step. A check whose metric is missing says nothing. Rates look at the last
`WINDOW` steps, because a run that has recovered is healthy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

Level = Literal["ok", "warn", "bad"]
WINDOW = 10
"""Steps that a rate is averaged over: a collapse takes about as many."""


@dataclass(frozen=True)
class Finding:
    """One check of one run."""

    name: str
    """Stable identifier of the check."""
    level: Level
    """ok: within bounds; warn: look at it; bad: the run loses time or its numbers are not to be trusted."""
    value: float
    """What was measured."""
    threshold: float
    """The bound that was crossed, or the nearer bound where the check is ok."""
    advice: str
    """One sentence: what to do."""
    seen: str = ""
    """One phrase: what the value is."""

    def __str__(self) -> str:
        return f"{self.name} {_number(self.value)} (bound {_number(self.threshold)}): {self.advice}"


@dataclass(frozen=True)
class Bounds:
    """Where a value is worth a warning and where it is bad; `low` means that small values are the trouble."""

    warn: float
    """Crossing it is worth a look."""
    bad: float
    """Crossing it needs action."""
    low: bool = False
    """True: values below the bounds are the trouble."""

    def judge(self, value: float) -> tuple[Level, float]:
        """The level of a value, and the bound it crossed or comes near; what is not a number is bad."""
        if math.isnan(value):
            return "bad", self.bad
        sign = -1.0 if self.low else 1.0
        if sign * value >= sign * self.bad:
            return "bad", self.bad
        return ("warn" if sign * value >= sign * self.warn else "ok"), self.warn


@dataclass(frozen=True)
class Thresholds:
    """Every bound of the doctor; the defaults suit group-based methods with verifiable rewards."""

    zero_variance: Bounds = Bounds(0.5, 0.9)
    """Share of groups whose rewards are all equal: they cost rollouts and bring no gradient."""
    truncation: Bounds = Bounds(0.1, 0.3)
    """Share of episodes cut by a limit on length or context."""
    logp_gap: Bounds = Bounds(1e-4, 1e-2)
    """max |log p by the trainer - log p by the sampler|; in process, float32. Raise it for other engines."""
    entropy_floor: Bounds = Bounds(0.01, 0.002, low=True)
    """Nats per sampled token; judged only while tasks are still being failed."""
    clip_share: Bounds = Bounds(0.3, 0.6)
    """Share of tokens (or rows) whose ratio was clipped."""
    start_low: Bounds = Bounds(0.05, 0.01, low=True)
    """Success before the first step below which a group rarely holds a success to reinforce."""
    start_high: Bounds = Bounds(0.9, 0.98)
    """Success before the first step above which little is left to learn."""
    collapse: Bounds = Bounds(0.5, 0.25, low=True)
    """Success of the last 3 steps over the best 5-step mean so far."""
    grad_spike: Bounds = Bounds(10.0, 100.0)
    """Largest gradient norm of the last steps over the median of the run."""
    failures: Bounds = Bounds(1e-9, 0.01)
    """Share of episodes without a verdict: the verifier raised, or the environment or the engine was lost."""


DEFAULT = Thresholds()
Metrics = Sequence[Mapping[str, Any]]


def diagnose(
    history: Metrics, evals: Sequence[Mapping[str, Any]] = (), thresholds: Thresholds = DEFAULT
) -> list[Finding]:
    """Every check that has data, worst first.

    `history` holds one mapping a step (`metrics.jsonl`), `evals` one mapping an evaluation (`eval.jsonl`).
    Values that are not numbers are skipped, so a damaged line in a run folder cannot break its report.
    """
    checks = (
        _success_collapse(history, thresholds.collapse),
        _zero_variance(history, thresholds.zero_variance),
        _start(history, evals, thresholds),
        _entropy(history, thresholds.entropy_floor),
        _truncation(history, thresholds.truncation),
        _logp_gap(history, thresholds.logp_gap),
        _clip_share(history, thresholds.clip_share),
        _grad_norm(history, thresholds.grad_spike),
        _failures(history, evals, thresholds.failures),
    )
    order = {"bad": 0, "warn": 1, "ok": 2}
    return sorted((c for c in checks if c is not None), key=lambda f: order[f.level])


def troubles(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that are not ok."""
    return [f for f in findings if f.level != "ok"]


def _series(history: Metrics, key: str) -> list[float]:
    """The numbers under `key`, oldest first; NaN and infinities stay, since they are a finding."""
    values = (row.get(key) for row in history)
    return [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]


def _recent(history: Metrics, key: str) -> float | None:
    values = _series(history[-WINDOW:], key)
    return _mean(values) if values else None


def _mean(values: Sequence[float]) -> float:
    """Never raises: numbers near the largest float do not overflow, infinities of both signs give NaN."""
    return sum(value / len(values) for value in values)


def _finding(name: str, bounds: Bounds, value: float, seen: str, advice: str) -> Finding:
    level, threshold = bounds.judge(value)
    return Finding(name, level, value, threshold, advice, seen)


def _success_collapse(history: Metrics, bounds: Bounds) -> Finding | None:
    """All of the last 3 steps far under the best 5-step mean, by more than the noise of a batch."""
    success = _series(history, "correct")
    if len(success) < 4 or any(math.isnan(s) for s in success):
        return None
    width = min(5, len(success) - 3)
    best = max(_mean(success[i : i + width]) for i in range(len(success) - width + 1))
    last = max(success[-3:])
    fell = best >= 0.1 and best - last >= 0.1
    return _finding(
        "success_collapse", bounds, last / best if fell else 1.0,
        "best of the last 3 steps over the best 5-step mean",
        "Resume from the last good checkpoint with a third of the learning rate: a policy at zero "
        "has nothing left to reinforce.",
    )  # fmt: skip


def _zero_variance(history: Metrics, bounds: Bounds) -> Finding | None:
    value = _recent(history, "zero_variance_groups")
    if value is None:
        return None
    success = _recent(history, "correct")
    if success is not None and success > 0.5:
        advice = (
            "Most tasks are always solved: raise the level or refill with undecided groups (--algo dapo)."
        )
    else:
        advice = "Most tasks are never solved: lower the level, enlarge the group, or warm-start longer."
    return _finding("zero_variance_groups", bounds, value, f"mean of the last {WINDOW} steps", advice)


def _start(history: Metrics, evals: Sequence[Mapping[str, Any]], thresholds: Thresholds) -> Finding | None:
    before = [e for e in evals if e.get("label") == "before"]
    success = _success_of(before[0]) if before else next(iter(_series(history, "correct")), None)
    if success is None:
        return None
    if success > 0.5:
        advice = "There is little left to learn: choose a harder level."
        return _finding("start", thresholds.start_high, success, "success before the first step", advice)
    advice = (
        "Successes are too rare to reinforce: give more demonstrations, an easier level or larger groups."
    )
    return _finding("start", thresholds.start_low, success, "success before the first step", advice)


def _entropy(history: Metrics, bounds: Bounds) -> Finding | None:
    """A policy that has stopped exploring; low entropy is no trouble where nearly every episode succeeds."""
    value, success = _recent(history, "entropy"), _recent(history, "correct")
    if value is None:
        return None
    finding = _finding(
        "entropy", bounds, value, f"nats per sampled token, mean of the last {WINDOW} steps",
        "Exploration has stopped before the tasks are solved: lower the learning rate, raise the upper clip "
        "bound, or add an entropy term.",
    )  # fmt: skip
    if finding.level != "ok" and not math.isnan(value) and success is not None and success >= 0.9:
        return Finding("entropy", "ok", value, finding.threshold, finding.advice, finding.seen)
    return finding


def _truncation(history: Metrics, bounds: Bounds) -> Finding | None:
    value = _recent(history, "truncated")
    advice = "Raise the limits on new tokens, turns or context: an episode that is cut teaches little."
    seen = f"share of episodes cut by a limit, mean of the last {WINDOW} steps"
    return None if value is None else _finding("truncation", bounds, value, seen, advice)


def _logp_gap(history: Metrics, bounds: Bounds) -> Finding | None:
    values = _series(history[-WINDOW:], "logp_gap")
    if not values:
        return None
    worst = math.nan if any(math.isnan(v) for v in values) else max(values)
    advice = (
        "Trainer and sampler disagree: check weight sync, dtype and sampler settings, or correct for it with "
        "truncated importance sampling."
    )
    return _finding("logp_gap", bounds, worst, f"largest of the last {WINDOW} steps", advice)


def _clip_share(history: Metrics, bounds: Bounds) -> Finding | None:
    value = _recent(history, "clip_frac")
    advice = "Updates leave the trust region: lower the learning rate or take fewer steps per rollout."
    seen = f"share clipped, mean of the last {WINDOW} steps"
    return None if value is None else _finding("clip_share", bounds, value, seen, advice)


def _grad_norm(history: Metrics, bounds: Bounds) -> Finding | None:
    """Spikes against the median of the run; steps without any gradient do not set the scale."""
    norms = _series(history, "grad_norm")
    if not norms:
        return None
    advice = "Look at the trajectories of that step; clip gradients harder or lower the learning rate."
    seen = f"largest of the last {WINDOW} steps over the median of the run"
    if any(not math.isfinite(n) for n in norms[-WINDOW:]):
        return Finding("grad_norm", "bad", math.nan, bounds.bad, advice, seen)
    usual = [n for n in norms if math.isfinite(n) and n > 0]
    spike = max(norms[-WINDOW:]) / median(usual) if len(usual) >= 5 else 1.0
    return _finding("grad_norm", bounds, spike, seen, advice)


def _failures(history: Metrics, evals: Sequence[Mapping[str, Any]], bounds: Bounds) -> Finding | None:
    """The worst of the training window and of any evaluation."""
    shares = [e.get("failure_share") for e in evals]
    values = [float(s) for s in shares if isinstance(s, int | float)]
    recent = _recent(history, "failures")
    values += [] if recent is None else [recent]
    if not values:
        return None
    advice = "Verdicts are missing: look at the stop reasons and fix the verifier, tool or engine they name."
    return _finding("verifier_failures", bounds, max(values), "share of episodes without a verdict", advice)


def _success_of(evaluation: Mapping[str, Any]) -> float | None:
    success = evaluation.get("success")
    first = success[0] if isinstance(success, list | tuple) and success else success
    return float(first) if isinstance(first, int | float) else None


def _number(value: float) -> str:
    return f"{value:.3g}"
