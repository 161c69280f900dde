"""GBPO: Group-relative Bounded Policy Optimization. Ao et al. 2026, arXiv 2604.18578.

The ratio is regressed to a target inside the trust region, above 1 for what beats the group's median, below 1 for
what falls behind it; the size of the advantage weighs the regression.

    A_i    = (R_i - mean_g R) / (std_g R + delta)
    z_i    = (R_i - median_g R) / (std_g R + delta) / tau
    rho*_i = 1 - eps_low + (eps_low + eps_high) sigmoid(z_i)
    L      = sum_{i,t} m |rho_{i,t} - rho*_i| |A_i| / sum_{i,t} m

Beyond the target the gradient pulls back, where a clip would only stop. With binary rewards and more than half of
the group right the median is 1, so the right ones stay and only the wrong ones move; below a half, the reverse.
Their scripts add a KL to the reference with a coefficient of their own: `--set terms.kl.coef=0.001`.
The authors' README leaves out the division by std in z; their code, followed here, divides.
"""

from policy_opt.advantages import GroupCentre, GroupNorm
from policy_opt.aggregate import TokenMean
from policy_opt.options import assign
from policy_opt.recipe import Recipe
from policy_opt.schedule import Schedule, Step
from policy_opt.surrogates import K3
from policy_opt.terms import Term
from policy_opt.trust import MedianSignal, RatioTarget
from policy_opt.vectors import Vectors


def norm_std(recipe: Recipe, divide: bool) -> Recipe:
    """The param norm_std: false divides neither the advantage nor the signal by the spread."""
    if divide:
        return recipe
    signal = assign(recipe, "advantage.median_signal.ddof", None).advantage[1]
    return recipe.replace(advantage=(GroupCentre(single="reward"), signal))


recipe = Recipe(
    slug="gbpo",
    title="ratio regressed to a target around 1 set by the group's median, weighted by the advantage's size",
    level="token",
    cite="Ao et al. 2026, arXiv 2604.18578",
    evidence="formulas and defaults read in the authors' code (core_algos.py of bounded_ratio_rl)",
    deviations="tau is the scripts' (config: 1); 5 epochs at 0.3 of the trainer's rate (an L1 loss overshoots)",
    advantage=(GroupNorm(eps=1e-6, ddof=1), MedianSignal(eps=1e-6, ddof=1, temperature=1e-4)),
    terms=(
        Term(RatioTarget(clip_low=0.3, clip_high=0.3), agg=TokenMean()),
        Term(K3(), agg=TokenMean(), coef=0.0, name="kl", weights=()),
    ),
    schedule=Schedule((Step(epochs=5, lr_scale=0.3),)),
    vectors=Vectors(
        params={
            "adv_eps": ("advantage.group_norm.eps", "advantage.median_signal.eps"),
            "std_ddof": ("advantage.group_norm.ddof", "advantage.median_signal.ddof"),
            "temperature": "advantage.temperature",
            "norm_std": norm_std,
        },
        outputs={
            "median_target_signal": lambda t: t["signal_B"],
            "target_ratio": lambda t: t.report("target_ratio"),
        },
    ),
)
