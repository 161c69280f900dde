"""FG-ExPO: Frontier-Guided Exploration-Prioritized Policy Optimization. Lin et al. 2026, arXiv 2605.11403.

GRPO that is held to its reference only as far as it succeeds, and is asked what it sometimes can do.

    A_i      = (R_i - mean_g R) / (std_g R + delta), std over the population (1/G)
    beta_eff = beta rho(acc),   rho(x) = (tanh(x) + 1) / 2,   acc = share of right answers in the whole rollout
    L        = token-mean(max(-A r, -A clip(r, 1 - eps, 1 + eps))) + beta_eff token-mean(exp(d) - d - 1)
               r = exp(logp - logp_old),  d = logp_ref - logp
    p_q     <- a p_q + (1 - a) (pass rate of q now), 1/2 at the start;  others unchanged
    P(q)     = exp(-(p_q - 1/2)^2 / (2 sigma^2)) / sum: the next tasks, without replacement

A group without contrast keeps the KL's gradient alone. Means over tokens follow the DAPO recipe that the paper
names for its other settings; replacement is not stated there. A group of one has advantage 0.
"""

from dataclasses import dataclass
from math import tanh
from typing import ClassVar

import torch

from policy_opt.advantages import GroupNorm
from policy_opt.aggregate import TokenMean
from policy_opt.curriculum import Curriculum
from policy_opt.orders import Frontier
from policy_opt.part import Ctx, Part
from policy_opt.recipe import Recipe
from policy_opt.surrogates import K3, Clip
from policy_opt.terms import Term
from policy_opt.vectors import Trace, Vectors


@dataclass(frozen=True)
class ByAccuracy(Part):
    """base (tanh(acc) + 1) / 2, acc = success of all that was played in this iteration: 0.5 to 0.88 of base."""

    stage: ClassVar[str] = "coef"
    base: float = 0.02
    """beta."""

    def rho(self, ctx: Ctx) -> float:
        """The factor now."""
        return (tanh(ctx.metrics["correct"]) + 1) / 2

    def value(self, ctx: Ctx) -> float:
        """The coefficient in this iteration."""
        return self.base * self.rho(ctx)


def order(t: Trace) -> Frontier:
    """The recipe's sampler of questions."""
    return t.recipe.curriculum.order


def remember(t: Trace) -> None:
    """The input pass_rate_ema: the table before the step."""
    for question, rate in enumerate(t.inputs["pass_rate_ema"]):
        order(t).table(t.ctx).put(question, rate)


def after(t: Trace) -> torch.Tensor:
    """The table after the step."""
    return order(t).table(t.ctx).column(torch.arange(len(t.inputs["pass_rate_ema"])))


recipe = Recipe(
    slug="fg_expo",
    title="KL grows with success; tasks near a pass rate of one half come more often",
    level="token",
    cite="Lin et al. 2026, arXiv 2605.11403",
    evidence="read in the paper text (Sec. 3.2 to 4.1); clip width not printed there",
    deviations="tasks of an iteration are drawn without replacement",
    curriculum=Curriculum(order=Frontier(sigma=0.35, ema=0.9)),
    advantage=(GroupNorm(eps=1e-6, ddof=0, single="zero"),),
    terms=(
        Term(Clip(clip_low=0.2, clip_high=0.2), agg=TokenMean()),
        Term(K3(), agg=TokenMean(), coef=ByAccuracy(base=0.02), name="kl", weights=()),
    ),
    vectors=Vectors(
        params={
            "beta": "terms.kl.base",
            "sigma": "curriculum.order.sigma",
            "ema": "curriculum.order.ema",
        },
        arrange=lambda given: {
            **given,
            "task": [given["group_question"][list(dict.fromkeys(given["group"])).index(g)] for g in given["group"]],
        },
        columns={"task": ("task_B",)},
        prime=remember,
        outputs={
            "acc_bar": lambda t: t.ctx.metrics["correct"],
            "rho": lambda t: t.recipe.terms[1].coef.rho(t.ctx),
            "beta_eff": lambda t: t.recipe.terms[1].coef.value(t.ctx),
            "sampling_prob_before": lambda t: order(t).probabilities(
                torch.tensor(t.inputs["pass_rate_ema"], dtype=torch.float64)
            ),
            "pass_rate_ema_after": after,
            "sampling_prob_after": lambda t: order(t).probabilities(after(t)),
        },
    ),
)
