"""Success of a policy on an environment: intervals, pass@k, tool use, and what went wrong.

One function for every kind of policy. A `Player` plays jobs: tokens through an engine, or text through a
server or a script. Episodes that end without a verdict count as wrong *and* are counted beside the score;
above 1 % they mark the evaluation, because then the score says little.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from agents import stats
from agents.engines.base import Speaker
from agents.rollout import Limits, MakeEnv, OnProgress, play_text
from agents.stats import Interval
from agents.trajectory import Trajectory
from policy_opt.protocols import Job

MARK = 0.01
"""Share of episodes without a verdict above which an evaluation is marked."""


class Player(Protocol):
    """Whoever plays: `agents.actor.Player` (tokens through an engine) or `TextPlayer`."""

    @property
    def make_env(self) -> MakeEnv:
        """Builds the environments that are played."""
        ...

    def __call__(
        self,
        jobs: Sequence[Job],
        *,
        seed: int | None = None,
        options: Mapping[str, Any] | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[Trajectory]:
        """Trajectories in the order of the jobs."""
        ...


@dataclass(frozen=True)
class TextPlayer:
    """A policy that speaks text: a server or a script."""

    make_env: MakeEnv
    """Builds an environment."""
    speaker: Speaker
    """Says the turns."""
    limits: Limits
    """What an episode may use up."""
    threads: int | None = None
    """Episodes that run at once; 0 one by one; None: one for each worker that `make_env` has, if it has any."""

    def __call__(
        self,
        jobs: Sequence[Job],
        *,
        seed: int | None = None,
        options: Mapping[str, Any] | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[Trajectory]:
        """Trajectories in the order of the jobs."""
        return play_text(
            jobs, self.make_env, self.speaker, self.limits, seed or 0, on_progress,
            options=options, threads=self.threads,
        )  # fmt: skip


@dataclass(frozen=True)
class LevelRow:
    """One difficulty level of an evaluation."""

    level: int
    """The environment's level."""
    success: Interval
    """Share of correct episodes."""
    tool_calls: float
    """Mean per episode."""
    minimal_calls: float | None
    """Mean of what would have been enough, where the environment knows it."""
    productivity: float | None
    """Correct episodes per tool call; None where there was no call."""
    episodes: int
    """Number of episodes."""


@dataclass(frozen=True)
class EvalResult:
    """One evaluation. Intervals are 95 %, over tasks where a task was played more than once."""

    label: str
    """`before`, `after`, `harder`, ... or empty."""
    env: str
    """Spec string of the environment."""
    split: str
    """Split of the tasks."""
    level: Any
    """Level that was asked for; None for the environment's default mix."""
    player: str
    """Who played."""
    seed: int
    """Seed of the sampling."""
    episodes: int
    """Episodes played."""
    samples: int
    """Episodes per task."""
    success: Interval
    """Share of correct episodes: Wilson, at the effective sample size where tasks repeat."""
    pass_at: Mapping[int, Interval]
    """Unbiased pass@k by k."""
    reward: Interval
    """Mean reward."""
    tool_calls: Interval
    """Tool calls per episode."""
    productivity: float | None
    """Correct episodes per tool call; None where there was no call."""
    length: float
    """Sampled tokens per episode; 0 where they are not known."""
    turns: float
    """Turns per episode."""
    levels: tuple[LevelRow, ...]
    """One row per difficulty level."""
    stop_reasons: Mapping[str, int]
    """Episodes by the reason of their end."""
    tool_errors: Mapping[str, int]
    """Tool calls that failed, by kind: unreadable, unknown tool, wrong arguments, ..."""
    failures: Mapping[str, int]
    """Episodes that do not judge the policy, by kind: verifier, environment or engine failed."""
    failure_share: float
    """Their share."""
    marked: bool
    """Whether that share is above 1 %, so that the score says little."""
    correct: tuple[tuple[int, ...], ...]
    """Per task, per sample: 1 if correct."""
    calls: tuple[tuple[int, ...], ...]
    """Per task, per sample: tool calls."""
    tasks_key: str
    """Digest of the tasks' names in order: evaluations of one key can be paired."""
    seconds: float = 0.0
    """Wall time."""
    step: int | None = None
    """Training step, where there is one."""
    note: str = ""
    """What should be known, for instance that there were fewer tasks than asked for."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as written to `eval.jsonl`."""
        return asdict(self) | {"pass_at": {str(k): list(v) for k, v in self.pass_at.items()}}

    def paired(self, before: EvalResult) -> Interval:
        """Difference of success (this less `before`) over the same tasks; ValueError where they differ."""
        self._same_tasks(before)
        return stats.paired_difference(self.correct, before.correct)

    def paired_calls(self, before: EvalResult) -> Interval:
        """Ratio of tool calls (this over `before`) over the same tasks; ValueError without calls before."""
        self._same_tasks(before)
        return stats.paired_ratio(self.calls, before.calls)

    def _same_tasks(self, other: EvalResult) -> None:
        if self.tasks_key != other.tasks_key:
            raise ValueError(
                f"evaluations of different tasks cannot be paired: {self.env} {self.split} level "
                f"{self.level} ({len(self.correct)} tasks) and {other.env} {other.split} level {other.level} "
                f"({len(other.correct)} tasks)"
            )


@dataclass(frozen=True)
class Subject:
    """What an evaluation is of."""

    env: str
    """Spec string of the environment."""
    player: str
    """Who plays."""
    split: str = "eval"
    """Split of the tasks."""
    level: Any = None
    """Level asked for; None for the environment's default mix."""
    seed: int = 0
    """Seed of the sampling."""
    label: str = ""
    """`before`, `after`, `harder`, ... or empty."""
    step: int | None = None
    """Training step, where there is one."""
    note: str = ""
    """What should be known, for instance that there were fewer tasks than asked for."""


def evaluate(
    player: Player,
    env: str,
    *,
    episodes: int = 400,
    k: Sequence[int] = (1,),
    split: str = "eval",
    level: Any = None,
    env_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    label: str = "",
    step: int | None = None,
    name: str = "",
    on_progress: OnProgress | None = None,
    keep: Callable[[Sequence[Trajectory]], object] | None = None,
) -> EvalResult:
    """Play `episodes` episodes, max(k) of each task, and summarise them.

    The tasks are the first ones of the split, so evaluations of one env, split and level can be paired.

    Args:
        player: plays the jobs, in environments of its own making.
        env: spec string of its environments, for the record.
        episodes: number of episodes, rounded up to whole tasks.
        k: the pass@k that are wanted.
        split: split of the tasks.
        level: level or mix of levels; None takes the environments' own.
        env_kwargs: arguments that the player's environments were made with, for the record.
        seed: seed of the sampling.
        label: `before`, `after`, `harder`, ...
        step: training step.
        name: who plays.
        on_progress: told whenever episodes end.
        keep: is handed the episodes, by task and then by sample.

    Raises:
        ValueError: no episodes, or k below 1.
    """
    samples = max(k, default=0)
    if samples < 1 or min(k) < 1:
        raise ValueError(f"k must be at least 1, got {tuple(k)}")
    if episodes < 1:
        raise ValueError(f"an evaluation needs at least one episode, got {episodes}")
    wanted = -(-episodes // samples)
    known = _task_count(player.make_env, split)
    tasks = wanted if known is None else min(wanted, known)
    jobs = [Job(task, task, member, split) for task in range(tasks) for member in range(samples)]
    start = time.monotonic()
    options = {} if level is None else {"level": level}
    trajectories = player(jobs, seed=seed, options=options, on_progress=on_progress)
    if keep is not None:
        keep(trajectories)
    own_level = level if level is not None else (env_kwargs or {}).get("level")
    note = f"the split has {known} tasks, {wanted} were asked for" if tasks < wanted else ""
    subject = Subject(env, name, split, own_level, seed, label, step, note)
    return replace(summarise(trajectories, samples, k, subject), seconds=time.monotonic() - start)


@dataclass
class _Tally:
    """Per task the numbers of its episodes, and counts over all."""

    correct: list[list[int]] = field(default_factory=list)
    calls: list[list[int]] = field(default_factory=list)
    rewards: list[list[float]] = field(default_factory=list)
    stops: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)


def summarise(
    trajectories: Sequence[Trajectory], samples: int, k: Sequence[int], subject: Subject
) -> EvalResult:
    """The numbers of episodes that stand by task, `samples` of each."""
    if not trajectories or len(trajectories) % samples:
        raise ValueError(f"{len(trajectories)} trajectories are not {samples} of each task")
    tally = _Tally()
    for start in range(0, len(trajectories), samples):
        group = trajectories[start : start + samples]
        tally.correct.append([is_correct(t) for t in group])
        tally.calls.append([tool_calls(t) for t in group])
        tally.rewards.append([t.reward for t in group])
        for t in group:
            tally.stops[t.stop_reason or "unknown"] += 1
            tally.errors.update(e for turn in t.turns for e in turn.errors)
            kind = failure_of(t)
            tally.failures.update([kind] if kind else [])
    n = len(trajectories)
    share = sum(tally.failures.values()) / n
    return EvalResult(
        **asdict(subject),
        episodes=n,
        samples=samples,
        success=stats.success_interval(tally.correct),
        pass_at={x: stats.pass_at_k_interval(tally.correct, x) for x in sorted(set(k))},
        reward=stats.mean_interval(tally.rewards),
        tool_calls=stats.mean_interval(tally.calls),
        productivity=_productivity(sum(map(sum, tally.correct)), sum(map(sum, tally.calls))),
        length=sum(t.length for t in trajectories) / n,
        turns=sum(len(t.turns) for t in trajectories) / n,
        levels=_levels(trajectories),
        stop_reasons=dict(tally.stops.most_common()),
        tool_errors=dict(tally.errors.most_common()),
        failures=dict(tally.failures.most_common()),
        failure_share=share,
        marked=share > MARK,
        correct=tuple(map(tuple, tally.correct)),
        calls=tuple(map(tuple, tally.calls)),
        tasks_key=_key(trajectories[::samples]),
    )


def is_correct(t: Trajectory) -> int:
    """1 where the verdict says so; without a verdict, or with one that failed, 0."""
    if t.verdict is None or t.verdict.failure:
        return 0
    return int(t.verdict.scores.get("correct", 0.0) >= 0.5)


def tool_calls(t: Trajectory) -> int:
    """Tool calls by the verdict's facts, or as counted in the turns where there are no such facts."""
    counted = t.verdict.facts.get("tool_calls") if t.verdict is not None else None
    return int(counted) if isinstance(counted, int | float) else sum(len(turn.calls) for turn in t.turns)


def failure_of(t: Trajectory) -> str | None:
    """Why an episode says nothing of the policy: the verifier's failure, or the error that ended it."""
    if t.verdict is not None and t.verdict.failure:
        return str(t.verdict.failure)[:80]
    if t.stop_reason.startswith("error:"):
        return f"{t.stop_reason} {t.facts.get('error', '')}".strip()[:120]
    return "no verdict" if t.verdict is None else None


def _levels(trajectories: Sequence[Trajectory]) -> tuple[LevelRow, ...]:
    by_level: dict[int, dict[str, list[Trajectory]]] = {}
    for t in trajectories:
        by_level.setdefault(t.level, {}).setdefault(t.task_id, []).append(t)
    rows = []
    for level, tasks in sorted(by_level.items()):
        members = [t for group in tasks.values() for t in group]
        calls, right = sum(map(tool_calls, members)), sum(map(is_correct, members))
        minimal = [t.verdict.facts.get("minimal_calls") for t in members if t.verdict is not None]
        least = [float(m) for m in minimal if isinstance(m, int | float)]
        rows.append(LevelRow(
            level=level,
            success=stats.success_interval([[is_correct(t) for t in group] for group in tasks.values()]),
            tool_calls=calls / len(members),
            minimal_calls=sum(least) / len(least) if least else None,
            productivity=_productivity(right, calls),
            episodes=len(members),
        ))  # fmt: skip
    return tuple(rows)


def _productivity(correct: int, calls: int) -> float | None:
    return correct / calls if calls else None


def _key(firsts: Sequence[Trajectory]) -> str:
    names = "\n".join(f"{t.task_id}\t{t.split}\t{t.level}" for t in firsts)
    return hashlib.sha256(names.encode("utf-8", "replace")).hexdigest()[:16]


def _task_count(make_env: MakeEnv, split: str) -> int | None:
    env = make_env()
    try:
        return env.unwrapped.task_count(split)
    finally:
        env.close()
