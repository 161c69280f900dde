"""Orders with a memory: which tasks to play next, from how earlier episodes of them went.

A task's memory is a number in a Store, keyed by its index in the pool; what was played reaches an order through
`played`, rejected groups included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from policy_opt.batch import Batch, floating
from policy_opt.part import Ctx, Part
from policy_opt.state import Store


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
