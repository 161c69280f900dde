"""Question weights: A <- w_q A, one weight per group from what its rewards and lengths say of the question.

All rules have one form, so that any of them can follow any advantage: a function of the whole batch that
multiplies adv and group_weight_B. A weight is never negative: signs stay, and a group that sums to 0 still
does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from policy_opt.advantages import Groups, groups
from policy_opt.baselines import spread
from policy_opt.batch import Batch, floating
from policy_opt.part import Ctx, Part

SETS = frozenset({"adv", "group_weight_B"})
"""What every rule replaces."""


def weigh_groups(b: Batch, weight_B: Tensor) -> Batch:
    """The batch with adv and group_weight_B multiplied by a weight per row, the same in a group."""
    name = "adv_BT" if "adv_BT" in b else "adv_B"
    adv = b[name] * (weight_B if name == "adv_B" else weight_B[:, None])
    total_B = b["group_weight_B"] * weight_B if "group_weight_B" in b else weight_B
    return b.over(**{name: adv, "group_weight_B": total_B})


def varied(g: Groups) -> Tensor:
    """Groups whose rewards differ: standard deviation above 1e-8; a group of one has none: [Q]."""
    return spread(g) > 1e-8


# -- Beta normalisation ---------------------------------------------------------------------------------


class BetaFit(NamedTuple):
    """Success rates of the prompts, the Beta(a, b) fitted to them, and the normaliser's parameters."""

    rate_Q: Tensor
    """p_q, mean reward of the prompt in [0, 1]."""
    fitted_Q: Tensor
    """Prompts that have a rate."""
    mean: Tensor
    var: Tensor
    a: Tensor
    b: Tensor
    alpha: Tensor
    beta: Tensor


@dataclass(frozen=True)
class BetaWeight(Part):
    """w_q = min(1 / f(p_q), cap) / (high - low): division by a Beta density fitted to the success rates.

        p_q = mean of (R - low) / (high - low);  mu, v = mean and sample variance of p over the prompts
        nu = mu (1 - mu) / v - 1,  a = nu mu,  b = nu (1 - mu)                     (method of moments)
        alpha = max(1, 1 + a / divisor),  beta = max(1, 1 + b / divisor)
        f(p) = p^(alpha - 1) (1 - p)^(beta - 1) / B(alpha, beta),  0^0 = 1

    alpha = beta = 1 leaves the advantage, alpha = beta = 3/2 is division by the standard deviation. One prompt,
    or prompts that all have one rate: alpha = beta = 1. The division by the range makes the advantage one of
    rewards in [0, 1]. Xiao et al. 2025, arXiv 2506.02864.
    """

    stage: ClassVar[str] = "advantage"
    low: float = 0.0
    """Smallest reward."""
    high: float = 1.0
    """Largest reward."""
    cap: float = 1e6
    """Largest weight; it acts where f(p) = 0, which is where all rewards are equal."""
    divisor: float = 3.0
    singles: Literal["leave", "zero"] = "leave"
    """A prompt with one trajectory. leave: it is not in the fit and has weight 1; zero: its rate is 0 and its
    baseline too, as in the released code (the advantage before this one must be the centred reward)."""

    def check(self) -> None:
        if not (self.low < self.high and self.cap > 0 and self.divisor > 0):
            raise ValueError(f"low < high, cap > 0, divisor > 0, not {self}")

    reads = frozenset({"reward_B", "group_B", "adv"})
    overwrites = SETS

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        index_B = b.index()[0]
        fit = self.fit(b, floating(b["reward_B"]))
        for name in ("alpha", "beta"):
            ctx.log(f"beta_weight_{name}", float(getattr(fit, name)))
        if self.singles == "zero" and "adv_B" in b:
            g = groups(b)
            b = b.over(adv_B=torch.where(g.size_Q[index_B] == 1, g.reward_B - self.low, b["adv_B"]))
        weight_Q = self.weights(fit).to(b["adv_BT" if "adv_BT" in b else "adv_B"].dtype)
        return weigh_groups(b, weight_Q[index_B] / (self.high - self.low))

    def fit(self, b: Batch, reward_B: Tensor) -> BetaFit:
        """Rates and moments, in float64."""
        g = groups(b.over(reward_B=(reward_B.double() - self.low) / (self.high - self.low)))
        several_Q = g.size_Q > 1
        rate_Q = g.sums(g.reward_B) / g.size_Q
        if self.singles == "zero":
            rate_Q = torch.where(several_Q, rate_Q, 0)
            several_Q = torch.ones_like(several_Q)
        p_Q = rate_Q[several_Q]
        mean, var = p_Q.new_zeros(()), p_Q.new_ones(())
        if p_Q.numel() > 1:
            mean, var = p_Q.mean(), p_Q.var()
        flat = var < 1e-12
        nu = torch.where(flat, 0, mean * (1 - mean) / var.where(~flat, 1) - 1)
        a, beta = nu * mean, nu * (1 - mean)
        alphas = [(1 + x / self.divisor).clamp(min=1) for x in (a, beta)]
        return BetaFit(rate_Q, several_Q, mean, var, a, beta, *alphas)

    def weights(self, fit: BetaFit) -> Tensor:
        """min(1 / f(p_q), cap), without the range; 1 where a prompt has no rate: [Q]."""
        log_b = fit.alpha.lgamma() + fit.beta.lgamma() - (fit.alpha + fit.beta).lgamma()
        p_Q = fit.rate_Q.clamp(0, 1)
        log_f_Q = torch.xlogy(fit.alpha - 1, p_Q) + torch.xlogy(fit.beta - 1, 1 - p_Q) - log_b
        return torch.where(fit.fitted_Q, (-log_f_Q).exp().clamp(max=self.cap), 1)


# -- difficulty -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DifficultyWeight(Part):
    """w_q = B_v softmax(-m / T) over the B_v questions whose rewards differ, m = mean main reward; others 1.

    Harder questions weigh more; the weights of the valid questions have mean 1, and differ by a factor of
    exp(1 / T) at most for main rewards in [0, 1]. DQW of Dai et al. 2026, arXiv 2601.20614.
    """

    stage: ClassVar[str] = "advantage"
    temperature: float = 2.0
    by: str = "correct_B"
    """The main reward: the column that says how hard a question is."""
    unsolved: Literal["easiest", "hardest"] = "easiest"
    """A valid question none of whose main rewards differs from 0 (only, say, the format varies). easiest: m = 1, as
    in the released code; hardest: m = 0."""

    def check(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"reward_B", "group_B", "adv", self.by})

    overwrites = SETS

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        g = groups(b)
        valid_Q = varied(g)
        main_B = b[self.by].to(g.reward_B.dtype)
        mean_Q = g.sums(main_B) / g.size_Q
        if self.unsolved == "easiest":
            mean_Q = torch.where(g.sums((main_B != 0).to(main_B.dtype)) == 0, 1, mean_Q)
        logit_Q = torch.where(valid_Q, -mean_Q / self.temperature, -torch.inf)
        weight_Q = torch.where(valid_Q, valid_Q.sum() * logit_Q.softmax(0), 1)
        return weigh_groups(b, weight_Q[g.index_B])


@dataclass(frozen=True)
class SignalMask(Part):
    """contrast_BT: the policy's tokens in groups whose rewards differ, for a loss averaged over those only.

    `terms.policy.den=contrast` divides by their number: groups without contrast, whose advantages are 0, then no
    longer dilute the others, as if they had been filtered out (valid-token averaging, arXiv 2601.20614).
    """

    stage: ClassVar[str] = "credit"

    reads = frozenset({"reward_B", "group_B"})
    writes = frozenset({"contrast_BT"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        return b.put(contrast_BT=b.mask_BT & self.valid(b)[:, None])

    def valid(self, b: Batch) -> Tensor:
        """Rows of groups whose rewards differ: [B]."""
        g = groups(b)
        return varied(g)[g.index_B]


# -- temporarily advantageous samples -------------------------------------------------------------------


@dataclass(frozen=True)
class AdvantageousWeight(Part):
    """w_q = `advantageous` where the group meets the criterion, else `other`.

        length:      the longest success is longer than the mean counted failure
        difficulty:  share of successes <= tau

    A failure that was cut off at the length limit does not count. Ren et al. 2026, arXiv 2602.10019.
    """

    stage: ClassVar[str] = "advantage"
    criterion: Literal["length", "difficulty", "both", "either"] = "either"
    tau: float = 0.5
    """Largest success rate of a difficult question."""
    advantageous: float = 2.0
    other: float = 1.0
    correct_above: float | None = None
    """A reward above this is a success; None: the verdict's own `correct`."""
    max_length: int | None = None
    """A failure of this many tokens or more was cut off; None: the actor says which (truncated_B)."""
    empty: Literal["minus", "plus"] = "minus"
    """The length criterion without successes or without counted failures. minus: their lengths are -infinity, so
    without a success it is not met, with successes alone it is (the released LLM code). plus: without a success
    the weight is 1, with successes alone it is not met (the released VLM code)."""

    def check(self) -> None:
        if not (self.advantageous >= 0 and self.other >= 0):
            raise ValueError(f"weights must be >= 0, not {self.advantageous}, {self.other}")

    @property
    def reads(self) -> frozenset[str]:
        success = "correct_B" if self.correct_above is None else "reward_B"
        limit = {"truncated_B"} if self.max_length is None else set()
        return frozenset({"length_B", "group_B", "adv", success, *limit})

    overwrites = SETS

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        g = groups(b)
        length_B = b["length_B"].to(g.reward_B.dtype)
        good_B = b["correct_B"] > 0.5 if self.correct_above is None else g.reward_B > self.correct_above
        cut_B = b["truncated_B"] > 0 if self.max_length is None else length_B >= self.max_length
        bad_B = (~good_B & ~cut_B).to(length_B.dtype)
        good_Q, bad_Q = g.sums(good_B.to(length_B.dtype)), g.sums(bad_B)
        nothing_Q = torch.full_like(good_Q, -torch.inf)
        longest_Q = nothing_Q.scatter_reduce(0, g.index_B, torch.where(good_B, length_B, -torch.inf), "amax")
        mean_Q = torch.where(bad_Q > 0, g.sums(length_B * bad_B) / bad_Q.clamp(min=1), -torch.inf)
        long_Q = longest_Q > mean_Q
        if self.empty == "plus":
            long_Q = long_Q & (bad_Q > 0)
        hard_Q = good_Q / g.size_Q <= self.tau
        by_name = {"length": long_Q, "difficulty": hard_Q, "both": long_Q & hard_Q, "either": long_Q | hard_Q}
        met_Q = by_name[self.criterion]
        weight_Q = torch.where(met_Q, self.advantageous, self.other).to(length_B.dtype)
        if self.empty == "plus":
            weight_Q = torch.where(good_Q == 0, 1, weight_Q)
        ctx.log("groups_advantageous", float(met_Q.double().mean()))
        return weigh_groups(b, weight_Q[g.index_B])
