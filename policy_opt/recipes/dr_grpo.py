"""Dr. GRPO: Understanding R1-Zero-Like Training. Liu et al. 2025, arXiv 2503.20783.

GRPO without its two normalisations: no division by the group's spread, which favours tasks that are nearly
always or nearly never solved, and a constant instead of the row's own length, which favours long wrong
answers.

    A_i = R_i - mean_g R
    L   = 1 / (B L_max) sum_i sum_t m_{i,t} l_{i,t},   l as in GRPO

L_max is a constant (the generation budget), never the padding.
"""

from policy_opt.advantages import GroupCentre
from policy_opt.aggregate import ConstantLength
from policy_opt.recipe import Recipe
from policy_opt.surrogates import Clip
from policy_opt.terms import Term
from policy_opt.vectors import Vectors

recipe = Recipe(
    slug="dr_grpo",
    title="GRPO without division by spread and by length",
    level="token",
    cite="Liu et al. 2025, arXiv 2503.20783",
    evidence="read in code (verl norm_adv_by_std_in_grpo=False; TRL loss_type dr_grpo)",
    deviations="divided by B L_max as in TRL (verl divides by L_max only); a group of one gets advantage 0",
    advantage=(GroupCentre(),),
    terms=(Term(Clip(clip_low=0.2, clip_high=0.2), agg=ConstantLength(1024)),),
    vectors=Vectors(
        params={"max_completion_length": "terms.agg.length"},
    ),
)
