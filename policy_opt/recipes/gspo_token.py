"""GSPO-token: Group Sequence Policy Optimization, token-level form. Zheng et al. 2025, arXiv 2507.18071.

For advantages that differ between tokens (credit per turn, say): the value of the sequence ratio, the
gradient of the token.

    s_{i,t} = sg[s_i] pi_{i,t} / sg[pi_{i,t}],   s_i as in GSPO
    l_{i,t} = max(-A_{i,t} s_{i,t}, -A_{i,t} clip(s_{i,t}, 1 - eps_low, 1 + eps_high))
    L       = mean_i (1/L_i) sum_t m_{i,t} l_{i,t}

With A_{i,t} = A_i, value and gradient are GSPO's.
"""

from policy_opt.recipe import Recipe
from policy_opt.recipes.gspo import recipe as GSPO
from policy_opt.surrogates import SequenceTokenClip
from policy_opt.terms import Term
from policy_opt.vectors import Vectors

recipe: Recipe = GSPO.replace(
    slug="gspo_token",
    title="GSPO for advantages per token: value of the sequence ratio, gradient of the token",
    level="token",
    evidence="read in code (verl compute_policy_loss_gspo is this form)",
    terms=(Term(SequenceTokenClip(clip_low=3e-4, clip_high=4e-4)),),
    vectors=Vectors(
        params={"eps_low": "terms.clip_low", "eps_high": "terms.clip_high"},
        outputs={"seq_ratio": lambda t: t.report("ratio")},
        stages=(),
    ),
)
