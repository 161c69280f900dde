"""R2VPO: Ratio-Variance Regularized Policy Optimization. Luo et al. 2026, arXiv 2601.03320. Reconstructed.

No clip: the second central moment of the ratio is held at a budget by a Lagrange multiplier, so that a token far
from 1 is weighted down, then turned back, and never cut off.

    max E[rho A]   s.t.   E[(rho - 1)^2] <= delta,     rho = pi / behaviour policy
    L       = - mean(m rho A) + lambda (V - delta),    V = mean(m (rho - 1)^2)              token means
    lambda <- clip(lambda + eta (V - delta), 0, lambda_max)                                 after every step

A_i as in GRPO. A token's gradient is -rho (A - 2 lambda (rho - 1)) / N: it vanishes at rho = 1 + A / (2 lambda).
`--set variant=replay` mixes groups of earlier iterations into every batch; each keeps the log-probs of the policy
that played it and the advantage it had in its own group.

Reconstructed from the abstract and a third-party toy (L = rho A - lambda (rho - 1)^2, lambda = 0.04): token-level
ratio, 1 as the centre, and dual step, budget and buffer are recommended choices.
"""

from torch import Tensor

from policy_opt.advantages import GroupNorm
from policy_opt.aggregate import TokenMean
from policy_opt.controllers import Dual
from policy_opt.gates import Gated
from policy_opt.mapping import own
from policy_opt.recipe import Recipe
from policy_opt.schedule import Schedule, Step
from policy_opt.terms import Term
from policy_opt.trust import RatioVariance
from policy_opt.vectors import Trace, Vectors


def effective_weight(t: Trace) -> Tensor:
    """rho (A - 2 lambda (rho - 1)): what multiplies each token's log-prob gradient."""
    rho_BT = t.report("ratio")
    return rho_BT * (t.per_token("adv") - 2 * own(t, Dual).value(t.ctx) * (rho_BT - 1)) * t.batch.mask_BT


recipe = Recipe(
    slug="r2vpo",
    title="no clip: the ratio's variance is held at a budget by a Lagrange multiplier (approximate)",
    level="token",
    cite="Luo et al. 2026, arXiv 2601.03320",
    evidence="reconstructed from the abstract and a third-party toy implementation; no authors' code found",
    deviations="delta, eta, lambda_max and the buffer are recommended values, not the paper's",
    reconstructed=True,
    advantage=(GroupNorm(eps=1e-6, ddof=1),),
    terms=(
        Term(Gated(), agg=TokenMean()),
        Term(
            RatioVariance(budget=0.01),
            agg=TokenMean(),
            coef=Dual(target=0.0, of="loss_variance", start=0.04, rate=0.1, limit=10.0),
            name="variance",
            weights=(),
        ),
    ),
    schedule=Schedule((Step(minibatches=4),)),
    variants={"replay": ("schedule.source=replay(groups=16, capacity=64, fresh=True)",)},
    vectors=Vectors(
        params={
            "lambda": "terms.coef.start",
            "delta": "terms.budget",
            "dual_lr": "terms.coef.rate",
            "lambda_max": "terms.coef.limit",
        },
        outputs={
            "surrogate": lambda t: -t.term("policy")[0],
            "ratio_variance": lambda t: t.term("variance")[0] + own(t, RatioVariance).budget,
            "lambda_next": lambda t: own(t, Dual).value(t.stepped()),
            "effective_weight": effective_weight,
        },
    ),
)
