"""DAPO: Decoupled Clip and Dynamic sAmpling Policy Optimization. Yu et al. 2025, arXiv 2503.14476.

GRPO with four changes: a soft penalty on overlong answers, groups without contrast are replaced by others,
the clip is wider above than below, and every token has the same weight.

    R'_i = R_i + factor pen(L_i),   pen = 0 up to L_max - L_cache, falling linearly to -1 at L_max
    keep a group iff 0 < #correct < G (before shaping); refill until the batch is full, in bounded rounds
    A_i  = (R'_i - mean_g R') / (std_g R' + delta)
    l    = max(-A rho, -A clip(rho, 1 - eps_low, 1 + eps_high)),   eps_high > eps_low
    L    = sum_{i,t} m l / sum_{i,t} m

Overlong filtering (rows cut off leave the loss), which the paper describes but its best run does not use, is
`--set credit+=mask_truncated`.
"""

from policy_opt.advantages import GroupNorm
from policy_opt.aggregate import TokenMean
from policy_opt.curriculum import Curriculum, Mixed
from policy_opt.recipe import Recipe
from policy_opt.rewards import Overlong
from policy_opt.surrogates import Clip
from policy_opt.terms import Term
from policy_opt.vectors import Vectors


def sampling(recipe: Recipe, dynamic: bool) -> Recipe:
    """The param dynamic_sampling: false keeps every group."""
    return recipe if dynamic else recipe.set("curriculum.accept=None")


recipe = Recipe(
    slug="dapo",
    title="clip-higher, token mean, overlong penalty, groups without contrast are replaced",
    level="token",
    cite="Yu et al. 2025, arXiv 2503.14476",
    evidence="read in code and docs (verl core_algos.py, reward_manager/dapo.py, docs/algo/dapo.md)",
    deviations="the overlong penalty has its floor at -1 beyond L_max (verl's length cannot exceed it)",
    curriculum=Curriculum(accept=Mixed(by="correct_B"), max_rounds=10),
    reward=(Overlong(max_len=20480, cache_len=4096, factor=1.0),),
    advantage=(GroupNorm(eps=1e-6, ddof=1),),
    terms=(Term(Clip(clip_low=0.2, clip_high=0.28), agg=TokenMean()),),
    vectors=Vectors(
        params={
            "max_len": "reward.max_len",
            "cache_len": "reward.cache_len",
            "overlong_factor": "reward.factor",
            "dynamic_sampling": sampling,
        },
        outputs={
            "overlong_penalty": lambda t: t["overlong_B"],
            "shaped_rewards": lambda t: t["reward_B"],
            "group_keep": lambda t: t.keep_B,
            "advantages": lambda t: t["adv_B"] * t.keep_B,
        },
    ),
)
