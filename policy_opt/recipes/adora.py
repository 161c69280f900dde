"""ADORA: Training Reasoning Models with Dynamic Advantage Estimation. Ren et al. 2026, arXiv 2602.10019.

Groups that are worth more at this moment of training get a larger advantage: those whose questions are still hard,
or whose longest success is longer than the average failure.

    a_i = (R_i - mean_g R) / (std_g R + 1e-6)
    advantageous: #success / G <= 0.5   or   max length of successes > mean length of failures
    A_i = 2 a_i where the group is advantageous, else a_i
    L   = sum_{i,t} m [ l_{i,t} + beta k_{i,t} ] / sum_{i,t} m,   l, k as in GRPO

Failures that were cut off do not count. How the paper joins the two criteria could not be read: "either" is a
reconstruction from reviews. The authors' releases attenuate instead, by the length criterion alone, 1 and 0.1:
`--set variant=llm_release` (without successes: attenuated) and `--set variant=vl_release` (without successes:
weight 1; without counted failures: attenuated).
"""

from collections.abc import Mapping
from typing import Any

from policy_opt.advantages import GroupNorm
from policy_opt.aggregate import TokenMean
from policy_opt.group_weights import AdvantageousWeight
from policy_opt.mapping import by_id
from policy_opt.recipe import Recipe
from policy_opt.surrogates import K3, Clip
from policy_opt.terms import Term
from policy_opt.vectors import Vectors

PAPER = "paper_reconstruction"
JOINED = {"and": "both", "or": "either"}
OPTIONS = {"criterion": "criterion", "tau": "tau", "w_s": "advantageous"}


def form(recipe: Recipe, variant: str | Mapping[str, Any]) -> Recipe:
    """The param variant."""
    chosen = variant if isinstance(variant, str) else variant.get("variant", PAPER)
    if chosen != PAPER:
        return recipe.set(f"variant={chosen}")
    if isinstance(variant, str):
        return recipe
    name = variant.get("criterion", "or")
    given = {**variant, "criterion": JOINED.get(name, name)}
    return recipe.set(*(f"advantage.{option}={given[key]}" for key, option in OPTIONS.items() if key in given))


ATTENUATE = ("advantage.criterion=length", "advantage.advantageous=1", "advantage.other=0.1")

recipe = Recipe(
    slug="adora",
    title="groups whose question is hard, or whose successes are long, weigh twice",
    level="token",
    cite="Ren et al. 2026, arXiv 2602.10019",
    evidence="length criterion and attenuation read in code (ADORA core_algos.py, experience_maker_vl.py); difficulty "
    "criterion and amplification from reviews of the paper; how they are joined is reconstructed",
    deviations="success is the verdict's own (code: a threshold on the reward); KL coefficient 0 unless set (code "
    "0.001)",
    reconstructed=True,
    advantage=(GroupNorm(eps=1e-6, ddof=1), AdvantageousWeight("either", tau=0.5, advantageous=2.0, other=1.0)),
    terms=(
        Term(Clip(clip_low=0.2, clip_high=0.2), agg=TokenMean()),
        Term(K3(), agg=TokenMean(), coef=0.0, name="kl", weights=()),
    ),
    variants={
        "llm_release": ATTENUATE,
        "vl_release": (*ATTENUATE, "advantage.empty=plus", "advantage.eps=1e-9"),
    },
    vectors=Vectors(
        params={
            "variant": form,
            "lambda": "advantage.other",
            "correct_score": "advantage.correct_above",
            "max_length_threshold": "advantage.max_length",
        },
        columns={"lengths": ("length_B",)},
        outputs={"group_weight": lambda t: by_id(t, t["group_weight_B"]), "advantage_per_traj": lambda t: t["adv_B"]},
    ),
)
