"""HAPO: heterogeneous adaptive policy optimization. Liu et al. 2025, arXiv 2509.16591.

One number per token, its entropy's place among all tokens, steers temperature, trust region and advantage.

    e = log max(H, 1e-8);  med = rho-quantile of e over the policy's tokens (nearest),  s = sqrt(mean (e - med)^2)
    x = (e - med) / s;  h = x / max x  where x > 0,  h = x / |min x|  where x <= 0:  h in [-1, 1]     (signed)
    T_t      = T_0 (1 + tau h_t),  with med, s, max, min of the last iteration's batch       (sampler only)
    A_i      = (R_i - mu_g) / (sigma_g + 1e-6) over the group's *tokens*;  GRPO's where any |A| >= 5
    low_t    = eps_low (1 - alpha h) if h <= 0 else eps_low;  high_t = eps_high (1 + alpha h) if h > 0 else eps_high
    A'_{i,t} = A (1 + beta h)  where h > 0 and the ratio is clear, or h <= 0 and it is neutral;  else A
               neutral: 1 - low_t / 2 < rho < 1 + high_t / 2
    l        = max(-A' rho, -A' clip(rho, 1 - low_t, 1 + high_t)), at most -c A' where A' < 0
    L        = sum m l / sum m

Everything but rho in l is a constant. Entropies for h are those of the current policy on the mini-batch, for
the sampler those of the policy that played. Log-probs are at T_0: the rule is not part of the ratio.

The published code divides by min x, which is negative, so that h >= 0 and its low-entropy branches never act:
`--set signals.signed=False`. Its statistics are over a micro-batch. Its base, DAPO's filter and overlong penalty,
is `variant=dapo_base`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from policy_opt.aggregate import TokenMean
from policy_opt.batch import Batch
from policy_opt.need import ENTROPY_NOW, ENTROPY_OLD, LOGP, LOGP_OLD, Need
from policy_opt.part import Ctx, Part
from policy_opt.protocols import Sampler
from policy_opt.recipe import Recipe
from policy_opt.sampling import RULES
from policy_opt.surrogates import Streams, check_dual_clip, log_ratio, ratio
from policy_opt.terms import Term
from policy_opt.token_credit import TokenGroupNorm
from policy_opt.trust import ClipWithin, Widths
from policy_opt.vectors import OUTPUTS, Form, Trace, Vectors

STATISTICS = ("median", "std", "scale_pos", "scale_neg")


def log(entropy: Tensor) -> Tensor:
    """log max(H, 1e-8)."""
    return entropy.clamp(min=1e-8).log()


@dataclass(frozen=True)
class EntropyPlace(Part):
    """place_BT: h of each token, 0 outside the mask; and, for the next rollout, the sampler's statistics."""

    stage: ClassVar[str] = "signals"
    when: ClassVar[Any] = "step"
    pivot: float = 0.8
    """rho: quantile in (0, 1) at which h is 0."""
    signed: bool = True
    """False: as in the published code, h = |h|."""
    tau: float = 0.05
    """Temperature moves by at most this share; 0: the plain temperature."""

    def check(self) -> None:
        if not (0 < self.pivot < 1 and 0 <= self.tau < 1):
            raise ValueError(f"pivot is in (0, 1) and tau in [0, 1), not {self.pivot}, {self.tau}")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (ENTROPY_NOW, ENTROPY_OLD) if self.tau else (ENTROPY_NOW,)

    @property
    def hook(self) -> str | None:
        return "entropy_temperature" if self.tau else None

    reads = frozenset({ENTROPY_NOW.name})
    writes = frozenset({"place_BT"})

    def statistics(self, entropy_N: Tensor) -> Tensor:
        """(median, std, scale_pos, scale_neg) of N entropies, in the logarithm; of none, zeros: h is 0."""
        if not entropy_N.numel():
            return entropy_N.new_zeros(4)
        log_N = log(entropy_N)
        rank = round(self.pivot * (log_N.numel() - 1))
        median = log_N.kthvalue(rank + 1).values
        std = (log_N - median).square().mean().clamp(min=1e-8).sqrt()
        x_N = (log_N - median) / std
        top, bottom = x_N.amax().clamp(min=1e-8), x_N.amin().clamp(max=-1e-8)
        return torch.stack([median, std, 1 / top, (-1 if self.signed else 1) / bottom])

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        entropy_BT = b[ENTROPY_NOW.name]
        if not b.mask_BT.any():
            return b.put(place_BT=torch.zeros_like(entropy_BT))
        median, std, above, below = self.statistics(entropy_BT[b.mask_BT])
        x_BT = (log(entropy_BT) - median) / std
        return b.put(place_BT=torch.where(b.mask_BT, x_BT * torch.where(x_BT > 0, above, below), 0))

    def observe(self, b: Batch, ctx: Ctx) -> None:
        if self.tau and b.mask_BT.any():
            found = self.statistics(b[ENTROPY_OLD.name][b.mask_BT])
            ctx.state(self)["statistics"] = dict(zip(STATISTICS, found.tolist(), strict=True))

    def sampling(self, sampler: Sampler, ctx: Ctx) -> Sampler:
        """The rule with the last batch's statistics; without any yet, the plain temperature."""
        known = ctx.state(self).get("statistics")
        return replace(sampler, hook=self.hook, options={**known, "tau": self.tau}) if known else sampler


@dataclass(frozen=True)
class WidenByPlace(Part):
    """Widths times 1 + alpha |h|: the lower one where h < 0, the upper one where h > 0."""

    stage: ClassVar[str] = "credit"
    when: ClassVar[Any] = "step"
    alpha: float = 1.0
    """0: no change."""

    reads = frozenset({"place_BT", "eps_low", "eps_high"})
    writes = frozenset({"eps_low_BT", "eps_high_BT"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        return b.put(
            eps_low_BT=b.per_token("eps_low") * (1 - self.alpha * b["place_BT"].clamp(max=0)),
            eps_high_BT=b.per_token("eps_high") * (1 + self.alpha * b["place_BT"].clamp(min=0)),
        )


@dataclass(frozen=True)
class RedistributedClip(Part):
    """The clipped surrogate within each token's bounds, of an advantage that depends on the ratio (a constant)."""

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "row"
    gives: ClassVar[str] = "BT"
    beta: float = 1.0
    """0: the advantage as it is."""
    dual_clip: float = 10.0
    """c >= 1: where A' < 0 the loss is at most -c A'."""

    needs = LOGP, LOGP_OLD
    reads = frozenset({"adv", "place_BT", "eps_low", "eps_high"})

    def check(self) -> None:
        check_dual_clip(self.dual_clip)

    def advantage(self, rho_BT: Tensor, b: Batch) -> Tensor:
        """A': [B, T]."""
        adv_BT, place_BT = b.per_token("adv"), b["place_BT"]
        neutral_BT = (rho_BT > 1 - b.per_token("eps_low") / 2) & (rho_BT < 1 + b.per_token("eps_high") / 2)
        moved_BT = neutral_BT ^ (place_BT > 0)
        return torch.where(moved_BT, adv_BT * (1 + self.beta * place_BT), adv_BT)

    def moved(self, s: Streams, b: Batch) -> Batch:
        """The batch with A' in place of A."""
        return b.over(adv_BT=self.advantage(ratio(log_ratio(s, b)).detach(), b))

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        return ClipWithin(self.dual_clip)(s, self.moved(s, b))

    def report(self, s: Streams, b: Batch) -> dict[str, Tensor]:
        moved = self.moved(s, b)
        return {**ClipWithin(self.dual_clip).report(s, moved), "adv_moved": moved["adv_BT"]}


def warmth(t: Trace) -> Tensor:
    """Temperatures of the next rollout, were it of the same entropies."""
    sampler = t.recipe.signals[0].sampling(t.recipe.sampler, t.ctx)
    return RULES["entropy_temperature"](t["entropy_old_BT"], sampler.temperature, sampler.options) * t["mask_BT"]


BLOCK: dict[str, Callable[[Trace], Any]] = {
    "h_hat": lambda t: t["place_BT"],
    "norm_stats_median_std_scalepos_scaleneg": lambda t: t.recipe.signals[0].statistics(
        t["entropy_old_BT"][t.batch.mask_BT]
    ),
    "clip_low": lambda t: t.per_token("eps_low"),
    "clip_high": lambda t: t.per_token("eps_high"),
    "advantages_redistributed": lambda t: t.report("adv_moved"),
    "loss": OUTPUTS["loss"],
    "grad_logp_new": OUTPUTS["grad_logp_new"],
    "temperature_next_rollout": warmth,
}

recipe = Recipe(
    slug="hapo",
    title="each token's entropy steers temperature, trust region and advantage",
    level="token",
    cite="Liu et al. 2025, arXiv 2509.16591",
    evidence="read in code (starriver030515/HAPO: core_algos.py, recipe/train.md; temperature: its vLLM sampler.py); "
    "the sign for low entropies: abstract and comments, which the code contradicts",
    deviations="h is signed as the paper says; its statistics are over the mini-batch",
    signals=(EntropyPlace(pivot=0.8, tau=0.05),),
    advantage=(TokenGroupNorm(),),
    credit=(Widths(low=0.2, high=0.2), WidenByPlace(alpha=1.0)),
    terms=(Term(RedistributedClip(beta=1.0, dual_clip=10.0), agg=TokenMean()),),
    variants={
        "dapo_base": ("curriculum.accept=mixed()", "reward=overlong(max_len=10240, cache_len=4096)"),
        "as_published": ("signals.signed=False",),
    },
    vectors=Vectors(
        params={
            "entropy_pivot": "signals.pivot",
            "clip_low": "credit.widths.low",
            "clip_high": "credit.widths.high",
            "clip_alpha": "credit.alpha",
            "adv_beta": "terms.beta",
            "clip_ratio_c": "terms.dual_clip",
            "temperature": "sampler.temperature",
            "temperature_tau": "signals.tau",
        },
        columns={"entropy": ("entropy_old_BT", "entropy_now_BT")},
        stages=("signals", "reward", "advantage", "credit"),
        outputs={
            "advantages_token_group_avg": lambda t: t.per_token("adv"),
            "as_published_code": Form(("signals.signed=False",), BLOCK),
            "signed_as_described_in_paper": Form(("signals.signed=True",), BLOCK),
        },
    ),
)
