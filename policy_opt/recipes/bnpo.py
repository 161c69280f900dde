"""BNPO: Beta Normalization Policy Optimization. Xiao et al. 2025, arXiv 2506.02864.

The centred reward is divided by a Beta density of the prompt's success rate, whose parameters follow the batch:
REINFORCE with a baseline and GRPO are two points of the family.

    p_q = mean_g R in [0, 1];  a, b = Beta fit of p over the batch's prompts by moments
    alpha = max(1, 1 + a/3),  beta = max(1, 1 + b/3)
    f(p) = p^(alpha-1) (1-p)^(beta-1) / B(alpha, beta),   A_i = (R_i - p_q) min(1/f(p_q), 1e6)
    l    = max(-A rho, -A clip(rho, 1 - 0.2, 1 + 0.28)), at most -10 A where A < 0
    L    = mean_i sum_t m_{i,t} l_{i,t}

alpha = beta = 1 is R - p, alpha = beta = 3/2 is proportional to (R - p) / sqrt(p (1 - p)). Several rewards
(`--set variant=several`): each score has its own fit, and A is the mean over the scores. A prompt with one
trajectory is not in the fit and has weight 1; `--set advantage.singles=zero` is the released code's baseline 0.
Not to be confused with TRL's loss_type "bnpo", which is a token mean.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from policy_opt.advantages import GroupCentre
from policy_opt.aggregate import SequenceSum
from policy_opt.baselines import PerScore
from policy_opt.batch import floating
from policy_opt.errors import RecipeError
from policy_opt.group_weights import BetaWeight
from policy_opt.mapping import own
from policy_opt.recipe import Recipe
from policy_opt.surrogates import Clip
from policy_opt.terms import Term
from policy_opt.vectors import Trace, Vectors


def scores(value: Sequence[Any]) -> dict[str, Tensor]:
    """The input rewards: [B], or [K, B] for several."""
    scores_KB = torch.tensor(value, dtype=torch.float64).reshape(-1, len(value[-1]) if scored(value) else len(value))
    return {"scores_BK": scores_KB.T, "reward_B": scores_KB.sum(0), "correct_B": scores_KB.sum(0)}


def scored(value: Sequence[Any]) -> bool:
    """Is it a list per score?"""
    return isinstance(value[0], Sequence)


def several(recipe: Recipe, count: int) -> Recipe:
    """The param n_components."""
    return recipe if count == 1 else recipe.set("variant=several")


def as_released(recipe: Recipe, inputs: Mapping[str, Any]) -> Recipe:
    """The file has the released code's numbers, which fits prompts with one trajectory too."""
    if scored(inputs["rewards"]) and len(inputs["rewards"]) > 1 and not isinstance(recipe.advantage[0], PerScore):
        raise RecipeError(f"{recipe.slug}: {len(inputs['rewards'])} lists of rewards, but the param n_components is 1")
    return recipe.set("advantage.singles=zero")


def components(t: Trace) -> list[dict[str, Any]]:
    """The fit of each reward."""
    part, found = own(t, BetaWeight), []
    for reward_B in floating(t["scores_BK"]).T:
        fit = part.fit(t.batch, reward_B)
        named = {"mean": fit.mean, "var": fit.var, "a": fit.a, "b": fit.b, "alpha": fit.alpha, "beta": fit.beta}
        by_group = {"p": fit.rate_Q, "weight": part.weights(fit)}
        found.append(named | {k: dict(zip(t.ids, v.tolist(), strict=True)) for k, v in by_group.items()})
    return found


recipe = Recipe(
    slug="bnpo",
    title="centred reward over a Beta density fitted to the batch's success rates",
    level="token",
    cite="Xiao et al. 2025, arXiv 2506.02864",
    evidence="read in code (BNPO bnpo_ray_trainer.py, run.sh); the form of the advantage also in the abstract",
    deviations="equal success rates of all prompts give weight 1 (code: NaN); a prompt with one trajectory is left out "
    "of the fit (code: its rate is 0)",
    advantage=(GroupCentre(), BetaWeight(cap=1e6, divisor=3.0)),
    terms=(Term(Clip(clip_low=0.2, clip_high=0.28, dual_clip=10.0), agg=SequenceSum()),),
    variants={"several": ("advantage=per_score(each=(group_centre(), beta_weight()))",)},
    vectors=Vectors(
        params={
            "n_components": several,
            "reward_min": "advantage.low",
            "reward_max": "advantage.high",
            "weight_max": "advantage.cap",
        },
        columns={"rewards": scores},
        adapt=as_released,
        outputs={"components": components, "advantages": lambda t: t.per_token("adv")},
    ),
)
