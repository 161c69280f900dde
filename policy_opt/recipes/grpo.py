"""GRPO: Group Relative Policy Optimization. Shao et al. 2024, arXiv 2402.03300.

The baseline of a trajectory is the mean reward of its group; there is no critic.

    A_i     = (R_i - mean_g R) / (std_g R + delta)                            on every token of i
    l_{i,t} = max(-A_i rho_{i,t}, -A_i clip(rho_{i,t}, 1 - eps, 1 + eps)),    rho = exp(logp - logp_old)
    k_{i,t} = exp(x) - x - 1,  x = logp_ref - logp                            in the loss, differentiated
    L       = mean_i (1/L_i) sum_t m_{i,t} [ l_{i,t} + beta k_{i,t} ]

Standard deviation (divided by G - 1) and delta are not in the paper; both are as in verl. Tokens of tools
have mask 0 and do not count in L_i.
"""

from policy_opt.advantages import GroupNorm
from policy_opt.recipe import Recipe
from policy_opt.surrogates import K3, Clip
from policy_opt.terms import Term
from policy_opt.vectors import Vectors

recipe = Recipe(
    slug="grpo",
    title="reward against the group's mean and spread, clipped token ratio",
    level="token",
    cite="Shao et al. 2024, arXiv 2402.03300",
    evidence="read in code (verl core_algos.py, TRL grpo_trainer.py)",
    deviations="KL coefficient 0 unless set (paper 0.04); no dual clip (verl: 3)",
    advantage=(GroupNorm(eps=1e-6, ddof=1),),
    terms=(
        Term(Clip(clip_low=0.2, clip_high=0.2)),
        Term(K3(), coef=0.0, name="kl", weights=()),
    ),
    vectors=Vectors(
        outputs={
            "pg_loss": lambda t: t.term("policy")[0],
            "kl_loss": lambda t: t.term("kl")[0],
            "ratio": lambda t: t.report("ratio"),
        },
    ),
)
