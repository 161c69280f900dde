"""Orders with a memory: which tasks to play next, from how earlier episodes of them went.

A task's memory is a number in a Store, keyed by its index in the pool; what was played reaches an order through
`played`, rejected groups included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from policy_opt.batch import Batch, floating
from policy_opt.diversity import Said, distinct, edit_distance, self_bleu
from policy_opt.part import Ctx, Part
from policy_opt.protocols import Job
from policy_opt.state import Store

_SCORING = -(1 << 40)
"""Group ids of episodes that only rate a task lie below this, so that they meet no other group's."""


def pass_rates(b: Batch) -> tuple[Tensor, Tensor]:
    """(task_Q, rate_Q): share of right answers among each task's finished trajectories."""
    tasks_Q, index_B = torch.unique(b["task_B"], return_inverse=True)
    done_B = b.once() & (b["finished_B"] != 0) if "finished_B" in b else b.once()
    right_B = floating(b["correct_B"]) * done_B
    count_Q = torch.bincount(index_B[done_B], minlength=tasks_Q.numel())
    rate_Q = torch.zeros(tasks_Q.numel(), dtype=right_B.dtype).index_add_(0, index_B, right_B) / count_Q.clamp(min=1)
    return tasks_Q[count_Q > 0], rate_Q[count_Q > 0]


def draw(log_weight_N: Tensor, n: int, generator: torch.Generator) -> list[int]:
    """n different indices, one after the other with probability proportional to exp(log_weight) (Gumbel top-n)."""
    noise_N = -torch.empty(log_weight_N.numel(), dtype=torch.float64).exponential_(generator=generator).log()
    return (log_weight_N + noise_N).topk(n).indices.tolist()


@dataclass(frozen=True)
class Frontier(Part):
    """Tasks that are neither solved nor hopeless, by a Gaussian around a pass rate (FG-ExPO, arXiv 2605.11403).

        p_q <- a p_q + (1 - a) (pass rate of q in this rollout),  1/2 at the start
        P(q) = exp(-(p_q - mu)^2 / (2 sigma^2)) / sum,            without replacement inside an iteration
    """

    stage: ClassVar[str] = "order"
    sigma: float = 0.35
    """Width; inf: uniform."""
    centre: float = 0.5
    """mu, the pass rate that is drawn most."""
    ema: float = 0.9
    """a: how much of the old estimate stays."""
    start: float = 0.5
    """Estimate of a task that was never played."""

    def check(self) -> None:
        if self.sigma <= 0 or not 0 <= self.ema <= 1:
            raise ValueError(f"sigma is positive and ema in [0, 1], not {self.sigma}, {self.ema}")

    def table(self, ctx: Ctx) -> Store:
        """Task -> smoothed pass rate."""
        return ctx.state(self).setdefault("pass_rate", Store())

    def log_weights(self, rate_N: Tensor) -> Tensor:
        """log w of tasks with these smoothed pass rates: [N]."""
        return -(rate_N - self.centre).square() / (2 * self.sigma**2)

    def probabilities(self, rate_N: Tensor) -> Tensor:
        """P of the first draw: [N]."""
        return self.log_weights(rate_N).softmax(0)

    def __call__(self, n: int, tasks: int, ctx: Ctx) -> list[int]:
        """n tasks; one comes again only after all others have come in this iteration."""
        state = ctx.state(self)
        if state.get("step") != ctx.step:
            state |= {"step": ctx.step, "calls": 0, "drawn": []}
        log_weight_N = self.log_weights(self.table(ctx).column(torch.arange(tasks), self.start))
        chosen: list[int] = []
        while len(chosen) < n:
            if len(state["drawn"]) >= tasks:
                state["drawn"] = []
            log_weight_N[state["drawn"]] = -torch.inf
            count = min(n - len(chosen), tasks - len(state["drawn"]))
            found = draw(log_weight_N, count, ctx.generator("frontier", ctx.step, state["calls"]))
            state |= {"calls": state["calls"] + 1, "drawn": [*state["drawn"], *found]}
            chosen += found
        return chosen

    def played(self, b: Batch, ctx: Ctx) -> None:
        """Move the estimates of what was played; the others stay."""
        table = self.table(ctx)
        for task, rate in zip(*(x.tolist() for x in pass_rates(b)), strict=True):
            before = table.get(task)
            before = self.start if before is None else before
            table.put(task, self.ema * before + (1 - self.ema) * rate)


class Rating(NamedTuple):
    """How much there is to learn from each task, by several fresh responses to it."""

    task_Q: Tensor
    pass_rate_Q: Tensor
    ovs_Q: Tensor
    """Outcome variance score, P (1 - P): at most 1/4."""
    tds_Q: Tensor
    """Trajectory diversity score."""
    vps_Q: Tensor
    """Variance promotion score, alpha ovs + beta tds."""


def proportional(weight_N: Tensor) -> Tensor:
    """Probabilities proportional to weights; uniform where all are 0: [N]."""
    total = weight_N.sum()
    return weight_N / total if total > 0 else torch.full_like(weight_N, 1 / max(weight_N.numel(), 1))


def min_max(score_N: Tensor, eps: float) -> Tensor:
    """(x - min) / (max - min + eps): [N]."""
    return (score_N - score_N.min()) / (score_N.max() - score_N.min() + eps)


def walk(pool: Sequence[int], position: int, n: int) -> tuple[list[int], int]:
    """The next n of a fixed sequence, and where to go on; it starts anew where fewer than n are left."""
    if position + n > len(pool):
        position = 0
    taken = [pool[i % len(pool)] for i in range(position, position + n)]
    return taken, position + n if position + n <= len(pool) else (position + n) % len(pool)


def alternate(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """One of each in turn, then the rest of the longer one."""
    both = [i for pair in zip(first, second, strict=False) for i in pair]
    short = min(len(first), len(second))
    return [*both, *first[short:], *second[short:]]


@dataclass(frozen=True)
class VarianceAware(Part):
    """A share of the tasks by the variance that they promise, the rest uniformly (VAS: MMR1, arXiv 2509.21268).

        VPS(x) = alpha P (1 - P) + beta diversity,   from `rollouts` fresh responses to every task, which train nothing

    floor(mix n) of n tasks are drawn with replacement with probability proportional to their weights; the others come
    from a walk over a fixed permutation. The tasks are rated again every `every` iterations.
    """

    stage: ClassVar[str] = "order"
    alpha: float = 0.8
    """Weight of the outcome's variance."""
    beta: float = 0.2
    """Weight of the responses' diversity."""
    mix: float = 0.5
    """lambda: share of weighted draws; 0 is uniform."""
    diversity: Literal["distinct_n", "inverse_self_bleu", "edit_distance"] = "distinct_n"
    """edit_distance: relative to the longer response, so that it can be mixed with the rest."""
    n: int = 3
    """Length of the n-grams of distinct_n."""
    rollouts: int = 32
    """Responses per task when it is rated."""
    every: int = 35
    """Iterations between two ratings; 0: once per pass over the pool."""
    refresh: Literal["rescore", "online"] = "rescore"
    """online: training's own groups rate their tasks, and only tasks not seen since the last rating are played."""
    weights: Literal["proportional", "minmax"] = "proportional"
    """Weight of a task: its score (the paper), or the score scaled to [0, 1] over the pool (the authors' code)."""
    momentum: float = 0.0
    """Share of the old weight that stays when tasks are rated again."""
    minmax_eps: float = 1e-8
    chunk: int = 64
    """Tasks that are rated in one call of the actor."""

    def check(self) -> None:
        if not (0 <= self.mix <= 1 and 0 <= self.momentum <= 1):
            raise ValueError(f"mix and momentum lie in [0, 1], not {self.mix}, {self.momentum}")
        if min(self.n, self.rollouts, self.chunk) < 1 or min(self.every, self.alpha, self.beta) < 0:
            raise ValueError("n, rollouts and chunk are at least 1; every, alpha and beta at least 0")

    # -- scores and weights -------------------------------------------------------------------------------

    def rate(self, b: Batch) -> Rating:
        """The scores of the tasks in a batch."""
        task_Q, rate_Q = pass_rates(b)
        said = Said.of(b, "task_B")
        played_Q = torch.isin(torch.unique(b["task_B"]), task_Q)
        tds_Q = self.spread(said)[played_Q]
        ovs_Q = rate_Q.double() * (1 - rate_Q.double())
        return Rating(task_Q, rate_Q, ovs_Q, tds_Q, self.alpha * ovs_Q + self.beta * tds_Q)

    def spread(self, said: Said) -> Tensor:
        """The diversity that is asked for: [Q]."""
        if self.diversity == "distinct_n":
            return distinct(said, self.n)
        return 1 - self_bleu(said) if self.diversity == "inverse_self_bleu" else edit_distance(said, relative=True)

    def weigh(self, vps_N: Tensor, before_N: Tensor | None) -> Tensor:
        """New weights of all tasks from their scores and their old weights (None: there are none): [N]."""
        now_N = min_max(vps_N, self.minmax_eps) if self.weights == "minmax" else vps_N
        return now_N if before_N is None else self.momentum * before_N + (1 - self.momentum) * now_N

    # -- in a run -----------------------------------------------------------------------------------------

    def __call__(self, n: int, tasks: int, ctx: Ctx) -> list[int]:
        """n tasks: weighted and walked ones in turn."""
        state = ctx.state(self)
        if ctx.step >= state.get("due", 0):
            self.renew(tasks, ctx)
            state["due"] = ctx.step + (self.every or -(-tasks // n))
        weight_N = self.store(ctx, "weight").column(torch.arange(tasks), 0.0)
        count = self.weighted(n)
        calls = state["calls"] = state.get("calls", 0) + 1
        drawn: list[int] = []
        if count:
            generator = ctx.generator("variance", calls)
            drawn = proportional(weight_N).multinomial(count, replacement=True, generator=generator).tolist()
        pool = torch.randperm(tasks, generator=ctx.generator("walk")).tolist()
        walked, state["position"] = walk(pool, state.get("position", 0), n - count)
        return alternate(drawn, walked)

    def weighted(self, n: int) -> int:
        """How many of n tasks are weighted draws."""
        return int(n * self.mix)

    def store(self, ctx: Ctx, name: str) -> Store:
        """Task -> weight, score, or the iteration of its last rating."""
        return ctx.state(self).setdefault(name, Store())

    def renew(self, tasks: int, ctx: Ctx) -> None:
        """Rate the tasks that are due, then weigh all."""
        if self.mix == 0:
            return
        last = self.store(ctx, "rated")
        since = ctx.step - max(self.every, 1) if self.refresh == "online" else ctx.step
        stale = [task for task in range(tasks) if (found := last.get(task)) is None or found < since]
        for start in range(0, len(stale), self.chunk):
            self.play(stale[start : start + self.chunk], tasks, ctx)
        every_N = torch.arange(tasks)
        weights = self.store(ctx, "weight")
        old_N = weights.column(every_N, 0.0) if len(weights) else None
        for task, weight in enumerate(self.weigh(self.store(ctx, "score").column(every_N, 0.0), old_N).tolist()):
            weights.put(task, weight)

    def play(self, some: Sequence[int], tasks: int, ctx: Ctx) -> None:
        """Fresh responses to some tasks, for their scores alone."""
        assert ctx.actor is not None
        first = _SCORING - ctx.step * tasks
        jobs = [Job(task, first - task, member) for task in some for member in range(self.rollouts)]
        self.remember(self.rate(ctx.actor.play(jobs)), ctx)
        ctx.log("rating_episodes", ctx.metrics.get("rating_episodes", 0.0) + len(jobs))

    def remember(self, rating: Rating, ctx: Ctx) -> None:
        """Keep the scores of these tasks."""
        score, rated = self.store(ctx, "score"), self.store(ctx, "rated")
        for task, value in zip(rating.task_Q.tolist(), rating.vps_Q.tolist(), strict=True):
            score.put(task, value)
            rated.put(task, ctx.step)

    def played(self, b: Batch, ctx: Ctx) -> None:
        """Training's own groups as a rating."""
        if self.refresh == "online" and self.mix > 0:
            self.remember(self.rate(b), ctx)
