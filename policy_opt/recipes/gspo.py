"""GSPO: Group Sequence Policy Optimization. Zheng et al. 2025, arXiv 2507.18071.

The ratio is that of the sequence, normalised by its length, and a sequence is clipped as a whole.

    A_i = (R_i - mean_g R) / (std_g R + delta)
    s_i = exp( (1/L_i) sum_t m_{i,t} (logp - logp_old) )
    L   = mean_i max(-A_i s_i, -A_i clip(s_i, 1 - eps_low, 1 + eps_high))

Clip fractions are two orders above GRPO's with the paper's widths: that is how it is meant. The mean is over
rows that have tokens.
"""

from policy_opt.advantages import GroupNorm
from policy_opt.recipe import Recipe
from policy_opt.schedule import Schedule, Step
from policy_opt.surrogates import SequenceClip
from policy_opt.terms import Term
from policy_opt.vectors import Vectors

recipe = Recipe(
    slug="gspo",
    title="length-normalised sequence ratio, clipped per sequence",
    level="sequence",
    cite="Zheng et al. 2025, arXiv 2507.18071",
    evidence="read in code (verl compute_policy_loss_gspo, TRL importance_sampling_level=sequence)",
    advantage=(GroupNorm(eps=1e-6, ddof=1),),
    terms=(Term(SequenceClip(clip_low=3e-4, clip_high=4e-4)),),
    schedule=Schedule((Step(minibatches=4),)),
    vectors=Vectors(
        outputs={
            "seq_ratio": lambda t: t.report("ratio"),
            "seq_clipped": lambda t: t.report("clip_frac"),
        },
    ),
)
