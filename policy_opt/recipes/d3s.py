"""D3S: dynamic dual-level down-sampling. Wang et al. 2025, arXiv 2509.22115.

Train on the trajectories whose advantages differ most, and of those on the tokens where both the advantage and
the entropy are large: few at first, more and more as training goes on.

    A_i  = (R_i - mean_g R) / (std_g R + 1e-6)                over all rollouts, not recomputed
    N_s  = (1 - p) N_init + p N_final,  n = floor(N_s + 1/2),  K = (1 - p) K_init + p K_final
    rows:   the subset of (number of groups) n rows with the largest Var(A): k largest and the rest smallest
    tokens: the ceil(K n_cand) of the n_cand tokens of these rows with the largest |A_i| H_{i,t}
    L    = mean of max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) over the tokens kept

p is the progress of training in [0, 1] (here: iteration / iterations), H the entropy under the policy that
played. N counts rows of a group; `fraction` is that as a share of the group's size. `intra` selects n rows
inside every group; `gspo` has the sequence ratio over all of a row's tokens, its gradient on the kept ones.
"""

from dataclasses import dataclass
from typing import ClassVar

from policy_opt.advantages import GroupNorm
from policy_opt.aggregate import TokenMean
from policy_opt.batch import Batch
from policy_opt.controllers import Annealed
from policy_opt.mapping import own
from policy_opt.need import ENTROPY_OLD
from policy_opt.part import Ctx, Part
from policy_opt.recipe import Recipe
from policy_opt.surrogates import Clip
from policy_opt.terms import Term
from policy_opt.token_credit import KeepTop, MaxVariance
from policy_opt.vectors import Trace, Vectors


@dataclass(frozen=True)
class AdvantageEntropy(Part):
    """score_BT = |A| H, 0 outside the mask."""

    stage: ClassVar[str] = "credit"

    needs = (ENTROPY_OLD,)
    reads = frozenset({"adv"})
    writes = frozenset({"score_BT"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        return b.put(score_BT=b.per_token("adv").abs() * b["entropy_old_BT"] * b.mask_BT)


def progress(recipe: Recipe, p: float) -> Recipe:
    """The param progress: where both schedules stand."""
    return recipe.set(f"credit.max_variance.fraction.begin={p!r}", f"credit.keep_top.fraction.begin={p!r}")


def counts(recipe: Recipe, n: float) -> Recipe:
    """The param N_init: rows of a group as a number."""
    return recipe.set("credit.max_variance.size=1", f"credit.max_variance.fraction.start={float(n)!r}")


def scope(recipe: Recipe, mode: str) -> Recipe:
    """The param mode: cross | intra."""
    return recipe.set(f"credit.max_variance.scope={ {'cross': 'batch', 'intra': 'group'}[mode] }")


def rows_kept(t: Trace) -> float:
    """N_s, before rounding."""
    return own(t, MaxVariance).fraction.value(t.ctx)


recipe = Recipe(
    slug="d3s",
    title="trajectories of largest advantage variance, then tokens of largest |A| H, more of both over time",
    level="token",
    cite="Wang et al. 2025, arXiv 2509.22115",
    evidence="three components and their formulas: read in a secondary summary that reproduces the equations, and the "
    "abstract; the schedules' end points and the scope of the token ranking: reconstructed",
    reconstructed=True,
    deviations="end points G/4 to G rows and 0.2 to 1 of tokens are ours; no code was found",
    advantage=(GroupNorm(eps=1e-6, ddof=1),),
    credit=(
        AdvantageEntropy(),
        MaxVariance(fraction=Annealed(0.25, 1.0, iterations=100), scope="batch"),
        KeepTop(by="score_BT", fraction=Annealed(0.2, 1.0, iterations=100), scope="batch", ties="first"),
    ),
    terms=(Term(Clip(clip_low=0.2, clip_high=0.2), num="keep", den="keep", agg=TokenMean()),),
    variants={
        "intra": ("credit.max_variance.scope=group",),
        "per_trajectory": ("credit.keep_top.scope=row",),
        "gspo": ("terms.loss=sequence_token_clip()",),
    },
    vectors=Vectors(
        params={
            "N_init": counts,
            "N_final": "credit.max_variance.fraction.end",
            "K_init": "credit.keep_top.fraction.start",
            "K_final": "credit.keep_top.fraction.end",
            "progress": progress,
            "mode": scope,
        },
        columns={"entropy": ("entropy_old_BT",)},
        outputs={
            "N_s": rows_kept,
            "N_s_int": lambda t: int(rows_kept(t) + 0.5),
            "K": lambda t: own(t, KeepTop).fraction.value(t.ctx),
            "selected": lambda t: t["selected_B"].nonzero().squeeze(1),
            "variance_selected": lambda t: t["adv_B"][t["selected_B"] != 0].var(correction=0),
            "score": lambda t: t["score_BT"],
            "token_keep": lambda t: t["keep_BT"],
        },
    ),
)
