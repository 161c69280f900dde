"""Rewards that price tool calls (OTC: Wang et al. 2025, arXiv 2504.14870, Eqs. 5 to 7).

Both multiply a right answer's reward by a coefficient in [0, 1] that falls with the calls that were made. A
reward that is not positive is only scaled: multiplying it would pay for calls on failures.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import ClassVar

import torch
from torch import Tensor

from policy_opt.batch import Batch, floating
from policy_opt.part import Ctx, Part
from policy_opt.state import Store


def cosine(calls_B: Tensor, c: float) -> Tensor:
    """cos(m pi / (2m + c)), Eq. 5: 1 without a call, 1/2 at m = c, towards 0."""
    return torch.cos(calls_B * pi / (2 * calls_B + c))


def right(b: Batch, correct_above: float | None) -> Tensor:
    """Whose final answer counts as correct: [B]."""
    return b["correct_B"] > 0.5 if correct_above is None else b["reward_B"] > correct_above


def log_productivity(b: Batch, right_B: Tensor, ctx: Ctx) -> None:
    """The paper's metrics: calls per episode, and correct answers per call (not logged without any call)."""
    calls = float(b["tool_calls_B"].sum())
    ctx.log("mean_tool_calls", calls / b.B)
    if calls:
        ctx.log("tool_productivity", float(right_B.sum()) / calls)


@dataclass(frozen=True)
class LeanCalls(Part):
    """R = alpha r_tool(m, n) R_base with n tracked per task."""

    stage: ClassVar[str] = "reward"
    c: float = 4.0
    """Smoothing of the cosine; the environment's largest number of calls."""
    alpha: float = 1.0
    """Scale of the reward."""
    persist: bool = True
    """Remember n per task over the run (the paper's choice); False: the group's own minimum."""
    correct_above: float | None = None
    """A base reward above this counts as correct; None: the verdict's own `correct`."""

    facts = frozenset({"tool_calls_B"})
    reads = frozenset({"reward_B", "correct_B", "task_B"})
    writes = frozenset({"calls_needed_B", "calls_mapped_B", "r_tool_B"})
    overwrites = frozenset({"reward_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        log_productivity(b, right(b, self.correct_above), ctx)
        reward_B = floating(b["reward_B"])
        m_B = b["tool_calls_B"].to(reward_B.dtype)
        n_B = self.needed(b, m_B, ctx)
        f_B = torch.where(n_B == 0, m_B, 2 * n_B * m_B / (m_B + n_B))
        r_B = torch.where(n_B == 0, cosine(m_B, self.c), torch.sin(f_B * pi / (2 * n_B)))
        r_B = torch.where(n_B.isnan(), 1.0, r_B)
        shaped_B = self.alpha * reward_B * torch.where(reward_B > 0, r_B, 1.0)
        return b.put(calls_needed_B=n_B, calls_mapped_B=f_B, r_tool_B=r_B).over(reward_B=shaped_B)

    def needed(self, b: Batch, m_B: Tensor, ctx: Ctx) -> Tensor:
        """n of each row's task; NaN while it is undefined."""
        index_B, count = b.index("task_B")
        right_m_B = torch.where(right(b, self.correct_above), m_B, torch.inf)
        least_Q = torch.full((count,), torch.inf, dtype=m_B.dtype, device=m_B.device)
        least_B = least_Q.scatter_reduce_(0, index_B, right_m_B, "amin")[index_B]
        if self.persist:
            least_B = torch.minimum(least_B, self.store(ctx).column(b["task_B"], torch.inf).to(m_B.dtype))
        return torch.where(least_B.isinf(), torch.nan, least_B)

    def store(self, ctx: Ctx) -> Store:
        """Task -> n."""
        return ctx.state(self).setdefault("needed", Store())

    def observe(self, b: Batch, ctx: Ctx) -> None:
        """Write n back; it never rises."""
        for task, n in zip(b["task_B"].tolist(), b["calls_needed_B"].tolist(), strict=True):
            if n == n:
                self.store(ctx).put(task, n)


@dataclass(frozen=True)
class FewCalls(Part):
    """R = alpha cos(m pi / (2m + c)) R_base; a reward that is not positive is only scaled by alpha."""

    stage: ClassVar[str] = "reward"
    c: float = 4.0
    """Smoothing; the environment's largest number of calls. Smaller is harsher."""
    alpha: float = 1.0
    """Scale of the reward."""
    correct_above: float | None = None
    """A base reward above this counts as correct in the metrics; None: the verdict's own `correct`."""

    facts = frozenset({"tool_calls_B"})
    reads = frozenset({"reward_B", "correct_B"})
    writes = frozenset({"r_tool_B"})
    overwrites = frozenset({"reward_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        log_productivity(b, right(b, self.correct_above), ctx)
        reward_B = floating(b["reward_B"])
        r_B = cosine(b["tool_calls_B"].to(reward_B.dtype), self.c)
        factor_B = r_B.where(reward_B > 0, 1.0)
        return b.put(r_tool_B=r_B).over(reward_B=self.alpha * factor_B * reward_B)
