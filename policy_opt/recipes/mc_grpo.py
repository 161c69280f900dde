"""MC-GRPO: Median-Centered GRPO for small rollouts. Kim 2026, arXiv 2601.22582.

With few rollouts the group's mean is a noisy baseline. One more rollout is sampled per prompt, n = G + 1 in all,
the baseline is their median, and the one that is the median leaves the update.

    m   = median(R_1..R_n),  d = median |R_i - m|          the lower median where n is even
    A_i = (R_i - m) / (d + 1e-3)
    L   = mean over the G kept rows of (1/L_i) sum_t m_{i,t} [ l_{i,t} + beta k_{i,t} ],   l, k as in GRPO

The pivot, one trajectory with R = m, is in neither numerator nor denominator; others that equal m stay with A = 0.
With binary rewards d is 0 and the minority gets +-1000: keep the gradient's norm clipped, or an optimizer that is
free of scale. Choose an even group size, so that n is odd.

`--set variant=gsm` is the authors' other trainer: non-zero advantages times n / #nonzero. Which of several
median-valued rollouts is dropped is the lowest member; `--set advantage.pivot=torch` takes torch.median's, as in
the code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from policy_opt.baselines import MedianCentre
from policy_opt.batch import Batch
from policy_opt.curriculum import Curriculum
from policy_opt.mapping import own
from policy_opt.part import Ctx, Part
from policy_opt.recipe import Recipe
from policy_opt.recipes.grpo import recipe as GRPO
from policy_opt.schedule import Schedule, Step
from policy_opt.vectors import Vectors


@dataclass(frozen=True)
class DropPivot(Part):
    """The group's pivot leaves numerator and denominator."""

    stage: ClassVar[str] = "credit"

    reads = frozenset({"pivot_B"})
    overwrites = frozenset({"mask_BT"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        return b.silence(~b["pivot_B"].bool())


recipe: Recipe = GRPO.replace(
    slug="mc_grpo",
    title="one rollout more, the group's median as baseline, the median rollout dropped",
    cite="Kim 2026, arXiv 2601.22582",
    evidence="read in code (MC-GRPO grpo_trainer_math.py, grpo_trainer_gsm.py); the paper's own equations not seen",
    deviations="ties of the pivot go to the lowest member (code: torch.median's index); KL coefficient 0 unless set "
    "(code 0.04)",
    curriculum=Curriculum(extra=1),
    advantage=(MedianCentre(eps=1e-3, scale="mad"),),
    credit=(DropPivot(),),
    schedule=Schedule((Step(epochs=2),)),
    variants={"gsm": ("advantage.rescale=True",)},
    vectors=Vectors(
        params={
            "rollouts_per_group": (),
            "mad_eps": "advantage.eps",
            "rescale_by_nonzero": "advantage.rescale",
            "loss_agg": (),
            "pivot_rule": lambda recipe, _: recipe.set("advantage.pivot=torch"),
        },
        outputs={
            "median": lambda t: own(t, MedianCentre).statistics(t.batch)[0],
            "mad": lambda t: own(t, MedianCentre).statistics(t.batch)[1],
            "advantage_per_traj": lambda t: t["adv_B"],
            "pivot": lambda t: t["pivot_B"],
            "keep": lambda t: 1 - t["pivot_B"].double(),
        },
    ),
)
