"""OTC-GRPO: Optimal Tool Calls via RL. Wang et al. 2025, arXiv 2504.14870 (v2), Eqs. 6 and 7.

GRPO in which a right answer earns most with as few tool calls as the question needs.

    n      = fewest calls of any correct rollout of this question, now or in an earlier iteration
    f(m,n) = 0 if m = n = 0;   m if n = 0;   2nm / (m + n) otherwise,      m = calls of this rollout
    r_tool = 1 if f = n = 0;   cos(m pi / (2m + c)) if n = 0;   sin(f pi / (2n)) if n > 0
    R      = alpha r_tool R_base

For n > 0, r_tool is 1 exactly at m = n and lower on both sides. While no rollout of a question was ever
right, n is undefined and r_tool is 1. The penalty multiplies, and acts on positive rewards only: otherwise it
would pay for calls on failures.
"""

from dataclasses import dataclass
from math import pi
from typing import ClassVar

import torch
from torch import Tensor

from policy_opt.batch import Batch, floating
from policy_opt.part import Ctx, Part
from policy_opt.recipes.grpo import recipe as GRPO
from policy_opt.state import Store
from policy_opt.vectors import Trace, Vectors


def cosine(calls_B: Tensor, c: float) -> Tensor:
    """cos(m pi / (2m + c)), Eq. 5: 1 without a call, 1/2 at m = c, towards 0."""
    return torch.cos(calls_B * pi / (2 * calls_B + c))


def right(b: Batch, correct_above: float | None) -> Tensor:
    """Whose final answer counts as correct: [B]."""
    return b["correct_B"] > 0.5 if correct_above is None else b["reward_B"] > correct_above


def log_productivity(b: Batch, right_B: Tensor, ctx: Ctx) -> None:
    """The paper's metrics: correct answers per call (not logged where there is no call), and calls per
    episode.
    """
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


def by_question(t: Trace, value_B: Tensor) -> dict[str, float | None]:
    """A row quantity that all rows of a question share, keyed by the question's id; null for NaN."""
    values = [int(v) if v == v else None for v in value_B.tolist()]
    return {str(t.ids[i]): v for i, v in zip(t["task_B"].tolist(), values, strict=True)}


def remember(t: Trace) -> None:
    """The param n_history: the store before the step."""
    (part,) = t.recipe.reward
    for question, n in t.inputs["n_history"].items():
        known = {str(name): i for i, name in enumerate(t.ids)}
        if n is not None and question in known:
            part.store(t.ctx).put(known[question], n)


recipe = GRPO.replace(
    slug="otc_grpo",
    title="GRPO; a right answer earns most with as few tool calls as ever sufficed",
    cite="Wang et al. 2025, arXiv 2504.14870",
    evidence="read in the paper text (v2, Eqs. 5-7)",
    deviations="a negative reward is not scaled by the tool coefficient; KL coefficient 0 unless set",
    reward=(LeanCalls(c=4.0, alpha=1.0),),
    vectors=Vectors(
        method="otc",
        params={
            "c": "reward.c",
            "alpha": "reward.alpha",
            "correct_threshold": "reward.correct_above",
            "std_ddof": "advantage.ddof",
            "eps": "advantage.eps",
        },
        outputs={
            "n_used": lambda t: by_question(t, t["calls_needed_B"]),
            "n_history_after": lambda t: by_question(t, t.recipe.reward[0].store(t.ctx).column(t["task_B"])),
            "f_map": lambda t: [v if v == v else None for v in t["calls_mapped_B"].tolist()],
            "r_tool_grpo": lambda t: t["r_tool_B"],
            "shaped_reward_grpo": lambda t: t["reward_B"],
            "advantages_grpo": lambda t: t["adv_B"],
            "tool_productivity": lambda t: t.ctx.metrics.get("tool_productivity"),
            "mean_tool_calls": lambda t: t.ctx.metrics["mean_tool_calls"],
        },
        stages=("reward", "advantage"),
        prime=remember,
    ),
)
