"""ETR: Outcome-Guided Elastic Trust Regions. Zhang et al. 2026, arXiv 2601.03723. Reconstructed.

GRPO whose clip widens with the signal: per trajectory with the size of its advantage, per group with the variance
of its outcomes.

    a_i      = 1 + alpha_micro tanh(|A_i|),   b_g = 1 + alpha_macro min(4 Var_g R, 1),   A_i as in GRPO
    eps_i    = min(eps a_i b_g, eps_max)                                          below and above 1 alike
    L        = mean_i (1/L_i) sum_t m max(-A_i rho, -A_i clip(rho, 1 - eps_i^low, 1 + eps_i^high))

The abstract names the two proxies and no formula: the shape of both factors and all coefficients are a choice of
this project, and each factor is a part that can be replaced. With both alphas 0 this is GRPO.
"""

from policy_opt.advantages import GroupNorm
from policy_opt.recipe import Recipe
from policy_opt.schedule import Schedule, Step
from policy_opt.terms import Term
from policy_opt.trust import CapWidths, ClipWithin, WidenByAdvantage, WidenByVariance, Widths
from policy_opt.vectors import Vectors

recipe = Recipe(
    slug="etr",
    title="clip widths that grow with the advantage's size and the group's variance (approximate)",
    level="token",
    cite="Zhang et al. 2026, arXiv 2601.03723",
    evidence="reconstructed from the abstract; the two proxies confirmed by secondary notes; no code found",
    deviations="the factors' shape and every coefficient are a choice of this project",
    reconstructed=True,
    advantage=(GroupNorm(eps=1e-6, ddof=1),),
    credit=(
        Widths(low=0.2, high=0.2),
        WidenByAdvantage(alpha=0.5),
        WidenByVariance(alpha=0.5),
        CapWidths(most=0.9),
    ),
    terms=(Term(ClipWithin()),),
    schedule=Schedule((Step(minibatches=4),)),
    vectors=Vectors(
        params={
            "eps_low": "credit.widths.low",
            "eps_high": "credit.widths.high",
            "eps_max": "credit.most",
            "alpha_micro": "credit.widen_by_advantage.alpha",
            "alpha_macro": "credit.widen_by_variance.alpha",
        },
        outputs={
            "group_variance_norm": lambda t: t["variance_B"],
            "micro": lambda t: t["micro_B"],
            "macro": lambda t: t["macro_B"],
            "eps_low_i": lambda t: t["eps_low_B"],
            "eps_high_i": lambda t: t["eps_high_B"],
        },
    ),
)
