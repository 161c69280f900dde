"""IPO: Identity Preference Optimization. Azar et al. 2023, arXiv 2310.12036.

DPO with a squared loss: a margin has a target, beyond which the pair pulls back, so deterministic preferences do not
drive the policy away from the reference.

    h = s(y_w) / |y_w| - s(y_l) / |y_l|,   s(y) = sum_t m_t (logp - logp_ref),  |y| = policy tokens, at least 1
    L = mean over pairs of (h - 1 / (2 tau))^2

Eq. 17 of the paper does not divide by |y|: `terms.length_normalised=False`. TRL does, and says that the authors
confirmed it. tau is TRL's beta: 0.1 asks for 5 nats per token, 0.5 for one.
"""

from dataclasses import replace

from policy_opt.preferences import SquaredPairs
from policy_opt.recipe import Recipe
from policy_opt.recipes.dpo import recipe as DPO
from policy_opt.terms import Term

assert DPO.vectors is not None
recipe: Recipe = DPO.replace(
    slug="ipo",
    title="squared loss: the margin of preferred over other trajectories has a target",
    cite="Azar et al. 2023, arXiv 2310.12036",
    evidence="loss and normalisation read in code (TRL dpo_trainer.py, ipo) and executed",
    deviations="log-ratios are means per token (TRL; Eq. 17 has sums); pairs from the verdicts of groups",
    terms=(Term(SquaredPairs(tau=0.1)),),
    vectors=replace(DPO.vectors, params={"beta": "terms.tau"}),
)
