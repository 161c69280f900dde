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

from policy_opt.mapping import by_id, own
from policy_opt.recipe import Recipe
from policy_opt.recipes.grpo import recipe as GRPO
from policy_opt.tool_rewards import LeanCalls
from policy_opt.vectors import Trace, Vectors


def remember(t: Trace) -> None:
    """The param n_history: the store before the step."""
    part = own(t, LeanCalls)
    for i, question in enumerate(t.ids):
        n = t.inputs["n_history"].get(str(question))
        if n is not None:
            part.store(t.ctx).put(i, n)


recipe: Recipe = GRPO.replace(
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
            "eps": "advantage.eps",
        },
        outputs={
            "n_used": lambda t: by_id(t, t["calls_needed_B"]),
            "n_history_after": lambda t: by_id(t, own(t, LeanCalls).store(t.ctx).column(t["task_B"])),
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
