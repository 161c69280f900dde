"""OTC-PPO: Optimal Tool Calls via RL. Wang et al. 2025, arXiv 2504.14870 (v2), Eqs. 5 and 7.

PPO in which every tool call lowers the reward of a right answer; no per-question state.

    r_tool = cos(m pi / (2m + c)),   m = calls of this rollout
    R      = alpha r_tool R_base
"""

from dataclasses import dataclass
from typing import ClassVar

from policy_opt.batch import Batch, floating
from policy_opt.part import Ctx, Part
from policy_opt.recipes.otc_grpo import cosine, log_productivity, right
from policy_opt.recipes.ppo import recipe as PPO
from policy_opt.vectors import Vectors


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


recipe = PPO.replace(
    slug="otc_ppo",
    title="PPO; every tool call lowers what a right answer earns",
    cite="Wang et al. 2025, arXiv 2504.14870",
    evidence="read in the paper text (v2, Eqs. 5-7)",
    deviations="a negative reward is not scaled by the tool coefficient",
    reward=(FewCalls(c=4.0, alpha=1.0), *PPO.reward),
    vectors=Vectors(
        method="otc",
        params={
            "c": "reward.c",
            "alpha": "reward.alpha",
            "correct_threshold": "reward.correct_above",
            "std_ddof": (),
            "eps": (),
        },
        outputs={
            "r_tool_ppo": lambda t: t["r_tool_B"],
            "shaped_reward_ppo": lambda t: t["reward_B"],
        },
        stages=("reward",),
    ),
)
