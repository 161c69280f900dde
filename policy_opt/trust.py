"""Trust regions: bounds that differ from row to row, and penalties and targets on the ratio in place of a clip.

Widths are columns, written by one credit part and changed by others, so that rules multiply: eps_low_B and
eps_high_B are the widths below and above 1 of each row, eps_low_BT and eps_high_BT of each token. `Clip`'s constant
widths stand in `policy_opt.surrogates`, gates without a minimum in `policy_opt.gates`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from policy_opt.advantages import groups, norm_scale
from policy_opt.bank import ModelSpec
from policy_opt.baselines import lower_median
from policy_opt.batch import Batch
from policy_opt.need import ENTROPY_OLD, LOGP, LOGP_OLD, KLTo, Need
from policy_opt.part import Ctx, Part
from policy_opt.surrogates import (
    LOG_RATIO_LIMIT,
    Streams,
    at_most,
    check_dual_clip,
    check_widths,
    clipped,
    log_ratio,
    outside,
    ratio,
)


@dataclass(frozen=True)
class MinMax(Part):
    """`into` = (x - min x) / (max x - min x + eps) over the policy tokens of a row or of the batch; 0 elsewhere.

    Equal values all give 0.
    """

    stage: ClassVar[str] = "signals"
    by: str = ENTROPY_OLD.name
    """x: a [B, T] column."""
    into: str = "share_BT"
    """The column that is written."""
    over: Literal["row", "batch"] = "row"
    """Where minimum and maximum are taken."""
    reverse: bool = False
    """(max x - x) in the numerator: the smallest x gets most."""
    eps: float = 1e-8

    @property
    def needs(self) -> tuple[Need, ...]:
        return (ENTROPY_OLD,) if self.by == ENTROPY_OLD.name else ()

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({self.by})

    @property
    def writes(self) -> frozenset[str]:
        return frozenset({self.into})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        x_BT = b[self.by]
        low_B = torch.where(b.mask_BT, x_BT, torch.inf).amin(1)
        high_B = torch.where(b.mask_BT, x_BT, -torch.inf).amax(1)
        if self.over == "batch":
            low_B, high_B = low_B.amin().expand_as(low_B), high_B.amax().expand_as(high_B)
        span_B1 = (high_B - low_B + self.eps)[:, None]
        # With eps = 0 equal values would be 0 / 0.
        top_BT = high_B[:, None] - x_BT if self.reverse else x_BT - low_B[:, None]
        found_BT = top_BT / span_B1.where(span_B1 != 0, torch.ones_like(span_B1))
        return b.put(**{self.into: torch.where(b.mask_BT, found_BT, 0)})


# -- widths from columns ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipWithin(Part):
    """PPO's clipped surrogate within each row's or token's own bounds: max(-A rho, -A clip(rho, 1 - low, 1 + high))."""

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "row"
    gives: ClassVar[str] = "BT"
    dual_clip: float | None = None
    """c >= 1: where A < 0 the loss is at most -c A. None: off."""

    def __post_init__(self) -> None:
        check_dual_clip(self.dual_clip)

    needs = LOGP, LOGP_OLD
    reads = frozenset({"adv", "eps_low", "eps_high"})

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        adv_BT, low_BT, high_BT = (b.per_token(stem) for stem in ("adv", "eps_low", "eps_high"))
        return at_most(clipped(ratio(log_ratio(s, b)), adv_BT, low_BT, high_BT), adv_BT, self.dual_clip)

    def report(self, s: Streams, b: Batch) -> dict[str, Tensor]:
        adv_BT, low_BT, high_BT = (b.per_token(stem) for stem in ("adv", "eps_low", "eps_high"))
        rho_BT = ratio(log_ratio(s, b))
        return {"ratio": rho_BT, "clip_frac": outside(rho_BT, adv_BT, low_BT, high_BT)}


@dataclass(frozen=True)
class Widths(Part):
    """eps_low_B, eps_high_B: the same for every row, to be changed by the parts after it."""

    stage: ClassVar[str] = "credit"
    low: float = 0.2
    """Width of the trust region below 1."""
    high: float = 0.2
    """Width above 1."""

    def __post_init__(self) -> None:
        check_widths(self.low, self.high)

    writes = frozenset({"eps_low_B", "eps_high_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        one_B = torch.ones_like(b.logp_sampler_BT[:, 0])
        return b.put(eps_low_B=self.low * one_B, eps_high_B=self.high * one_B)


_WIDTHS = frozenset({"eps_low_B", "eps_high_B"})


def widen(b: Batch, factor_B: Tensor) -> Batch:
    """The batch with both widths multiplied."""
    return b.over(eps_low_B=b["eps_low_B"] * factor_B, eps_high_B=b["eps_high_B"] * factor_B)


@dataclass(frozen=True)
class WidenByAdvantage(Part):
    """Widths times a_i = 1 + alpha tanh(|A_i|): more room for rows with more signal."""

    stage: ClassVar[str] = "credit"
    alpha: float = 0.5
    """0: no change."""

    reads = frozenset({"adv_B"}) | _WIDTHS
    writes = frozenset({"micro_B"})
    overwrites = _WIDTHS

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        micro_B = 1 + self.alpha * b["adv_B"].abs().tanh()
        return widen(b, micro_B).put(micro_B=micro_B)


@dataclass(frozen=True)
class WidenByVariance(Part):
    """Widths times b_g = 1 + alpha v_g, v_g = min(4 Var_g R, 1): more room where the outcome is most uncertain.

    The population variance of 0/1 rewards is at most 1/4, reached at a pass rate of 1/2.
    """

    stage: ClassVar[str] = "credit"
    alpha: float = 0.5
    """0: no change."""

    reads = frozenset({"reward_B", "group_B"}) | _WIDTHS
    writes = frozenset({"variance_B", "macro_B"})
    overwrites = _WIDTHS

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        g = groups(b)
        variance_B = (4 * g.sums(g.centred_B.square()) / g.size_Q).clamp(0, 1)[g.index_B]
        macro_B = 1 + self.alpha * variance_B
        return widen(b, macro_B).put(variance_B=variance_B, macro_B=macro_B)


@dataclass(frozen=True)
class CapWidths(Part):
    """Widths of at most `most`."""

    stage: ClassVar[str] = "credit"
    most: float = 0.9
    """Below 1 the lower bound of the ratio stays positive."""

    def __post_init__(self) -> None:
        if self.most <= 0:
            raise ValueError(f"most is a width > 0, not {self.most}")

    reads = _WIDTHS
    overwrites = _WIDTHS

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        return b.over(**{name: b[name].clamp(max=self.most) for name in ("eps_low_B", "eps_high_B")})


# -- penalties on the distance to the old policy ----------------------------------------------------------


@dataclass(frozen=True)
class RatioVariance(Part):
    """(rho - 1)^2 - budget per token: the ratio's second central moment under the old policy, against its budget.

    As the constraint of a Lagrangian: with a `Dual` of this term's value as coefficient, lambda (V - budget).
    """

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "row"
    gives: ClassVar[str] = "BT"
    budget: float = 0.0
    """delta; 0 is a plain penalty."""

    needs = LOGP, LOGP_OLD

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        return (ratio(log_ratio(s, b)) - 1).square() - self.budget

    def report(self, s: Streams, b: Batch) -> dict[str, Tensor]:
        return {"ratio_variance": (ratio(log_ratio(s, b)) - 1).square()}


@dataclass(frozen=True)
class SampledKL(Part):
    """KL(pi || pi_old) from tokens of pi_old: rho log rho - (rho - 1) >= 0, d / d logp = rho log rho."""

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "row"
    gives: ClassVar[str] = "BT"

    needs = LOGP, LOGP_OLD

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        x_BT = log_ratio(s, b).clamp(max=LOG_RATIO_LIMIT)
        return x_BT.exp() * x_BT - x_BT.expm1()


@dataclass(frozen=True)
class ExactKL(Part):
    """KL(pi || pi_old) summed over the vocabulary, against a snapshot that follows the policy every iteration."""

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "row"
    gives: ClassVar[str] = "BT"

    needs = (Need("kl_old_BT", KLTo("old"), when="loss"),)
    models = {"old": ModelSpec("copy", sync_every=1)}  # noqa: RUF012

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        return s["kl_old_BT"]


# -- a target for the ratio -------------------------------------------------------------------------------


@dataclass(frozen=True)
class MedianSignal(Part):
    """signal_B = (R_i - median_g R) / (std_g R + eps) / temperature; the median of an even group is a midpoint.

    A group of one has median 0 and std 1.
    """

    stage: ClassVar[str] = "advantage"
    eps: float = 1e-6
    ddof: Literal[0, 1] | None = 1
    """1: sample standard deviation; 0: the population's; None: no division by std + eps."""
    temperature: float = 1e-4
    """tau: towards 0 the signal becomes a sign."""

    def __post_init__(self) -> None:
        if self.eps < 0 or self.temperature <= 0:
            raise ValueError(f"eps >= 0 and temperature > 0, not {self.eps}, {self.temperature}")

    reads = frozenset({"reward_B", "group_B"})
    writes = frozenset({"signal_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        g = groups(b)
        # The lower median from above is the upper one.
        median_Q = (lower_median(b, g, g.reward_B) - lower_median(b, g, -g.reward_B)) / 2
        median_Q = torch.where(g.size_Q == 1, 0, median_Q)
        signal_B = g.reward_B - median_Q[g.index_B]
        if self.ddof is not None:
            signal_B = signal_B / norm_scale(g, self.eps, self.ddof)[g.index_B]
        return b.put(signal_B=signal_B / self.temperature)


@dataclass(frozen=True)
class RatioTarget(Part):
    """|rho - rho*| |A|: the ratio is drawn to a target instead of pushed to a clip.

    rho* = 1 - clip_low + (clip_low + clip_high) sigmoid(signal). Beyond the target the gradient restores.
    Bounded ratio RL, arXiv 2604.18578.
    """

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "row"
    gives: ClassVar[str] = "BT"
    clip_low: float = 0.2
    """The target's reach below 1."""
    clip_high: float = 0.2
    """Its reach above 1."""

    def __post_init__(self) -> None:
        check_widths(self.clip_low, self.clip_high)

    needs = LOGP, LOGP_OLD
    reads = frozenset({"adv", "signal"})

    def target(self, signal: Tensor) -> Tensor:
        """rho*, of the signal's shape."""
        return 1 - self.clip_low + (self.clip_low + self.clip_high) * signal.sigmoid()

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        gap_BT = ratio(log_ratio(s, b)) - self.target(b.per_token("signal"))
        return gap_BT.abs() * b.per_token("adv").abs()

    def report(self, s: Streams, b: Batch) -> dict[str, Tensor]:
        rho_BT = ratio(log_ratio(s, b))
        return {
            "ratio": rho_BT,
            "target_ratio": self.target(b["signal_BT"] if "signal_BT" in b else b["signal_B"]),
            "clip_frac": (rho_BT < 1 - self.clip_low) | (rho_BT > 1 + self.clip_high),
        }
