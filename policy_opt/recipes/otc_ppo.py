"""OTC-PPO: Optimal Tool Calls via RL. Wang et al. 2025, arXiv 2504.14870 (v2), Eqs. 5 and 7.

PPO in which every tool call lowers the reward of a right answer; no per-question state.

    r_tool = cos(m pi / (2m + c)),   m = calls of this rollout
    R      = alpha r_tool R_base
"""

from policy_opt.recipe import Recipe
from policy_opt.recipes.ppo import recipe as PPO
from policy_opt.tool_rewards import FewCalls
from policy_opt.vectors import Vectors

recipe: Recipe = PPO.replace(
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
