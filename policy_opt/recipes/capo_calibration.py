"""CAPO: Calibration-Aware Policy Optimization. Wang et al. 2026, arXiv 2604.12632 (ACL 2026).

GRPO maximises reward and ruins calibration: its advantage is blind to how sure the policy is. Here each pair of a
right and a wrong answer counts by how badly its confidences are ordered, which is the gradient of a logistic AUC.

    c_i  = mean_t logp_old(i, t)                                              (confidence: -log perplexity)
    A_i  = 1/G sum_(j wrong) sigmoid(-(c_i - c_j) / tau) / tau                for a right answer i
    A_j  = -1/G sum_(i right) sigmoid(-(c_i - c_j) / tau) / tau               for a wrong answer j
    m_i  = [ppl_ref(i) <= ref_high] if right, [ppl_ref(i) >= ref_low] if wrong;   ppl_ref = exp(-mean logp_ref)
    l    = max(-m A rho, -m A clip(rho, 1 - eps, 1 + eps)),   L = mean_i mean_t l

Dropped answers (lucky guesses, near-misses) stay in the sums of the others. No KL, no entropy bonus. The constant
in front of the sums is not printed: 1/G makes the linear surrogate (`advantage.pairs=linear`) exactly Dr. GRPO;
`advantage.norm=sum` is the literal form. The thresholds belong to the paper's base models: see ReferenceFilter.
"""

from policy_opt.calibration import RankPairs, ReferenceFilter
from policy_opt.recipe import Recipe
from policy_opt.surrogates import Clip
from policy_opt.terms import Term
from policy_opt.vectors import Vectors, aggregation

recipe = Recipe(
    slug="capo_calibration",
    title="pairs of right and wrong answers count by how badly their confidences are ordered",
    level="trajectory",
    cite="Wang et al. 2026, arXiv 2604.12632",
    evidence="abstract, and equations in a detailed secondary summary; constant of the sums and aggregation not stated",
    deviations="1/G in front of the pair sums; 1/tau kept in the derivative",
    advantage=(RankPairs(tau=0.6, norm="group"),),
    credit=(ReferenceFilter(high=2.5, low=1.05),),
    terms=(Term(Clip(clip_low=0.2, clip_high=0.2)),),
    vectors=Vectors(
        params={
            "tau": "advantage.tau",
            "norm": "advantage.norm",
            "ref_high": "credit.high",
            "ref_low": "credit.low",
            "agg": aggregation,
        },
        outputs={
            "lpm": lambda t: t["confidence_B"],
            "ref_ppl": lambda t: t["ref_ppl_B"],
            "advantages_unmasked": lambda t: t["adv_B"],
            "noise_keep": lambda t: t["w_B"],
            "advantages": lambda t: t["adv_B"] * t["w_B"],
        },
    ),
)
