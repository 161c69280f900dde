"""CISPO: Clipped IS-weight Policy Optimization (MiniMax-M1). MiniMax 2025, arXiv 2506.13585.

Clips the importance weight, not the update: every token keeps a gradient.

    w_{i,t} = sg[ clip(rho_{i,t}, 1 - eps_low, 1 + eps_high) ]
    L       = - sum_{i,t} m w_{i,t} A_i logp_{i,t} / sum_{i,t} m,   A_i as in GRPO

eps_low >= 1 means no lower bound, as in the paper. The loss has a meaningful gradient, not a meaningful
value.
"""

from policy_opt.advantages import GroupNorm
from policy_opt.aggregate import TokenMean
from policy_opt.gates import CappedWeight
from policy_opt.mapping import reported
from policy_opt.recipe import Recipe
from policy_opt.terms import Term
from policy_opt.vectors import Vectors

recipe = Recipe(
    slug="cispo",
    title="REINFORCE with a detached, clipped importance weight; no token is cut off",
    level="token",
    cite="MiniMax 2025, arXiv 2506.13585",
    evidence="read in code (verl compute_policy_loss_cispo, TRL loss_type cispo)",
    deviations="the upper bound is 1 + clip_high as in verl (TRL's epsilon_high is the bound itself)",
    advantage=(GroupNorm(eps=1e-6, ddof=1),),
    terms=(Term(CappedWeight(clip_low=1.0, clip_high=0.28), agg=TokenMean()),),
    vectors=Vectors(
        outputs=reported("is_weight"),
    ),
)
