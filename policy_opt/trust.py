"""Trust regions: bounds that differ from row to row, and penalties and targets on the ratio in place of a clip.

Widths are columns, written by one credit part and changed by others, so that rules multiply:
eps_low_B and eps_high_B are the widths below and above 1 of each row. `Clip`'s constant widths stand in
`policy_opt.surrogates`, gates without a minimum in `policy_opt.gates`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from policy_opt.advantages import groups
from policy_opt.batch import Batch
from policy_opt.need import ENTROPY_OLD, LOGP, LOGP_OLD, Need
from policy_opt.part import Ctx, Part
from policy_opt.surrogates import Streams, check_widths, log_ratio, ratio


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
        found_BT = (x_BT - low_B[:, None]) / span_B1.where(span_B1 != 0, torch.ones_like(span_B1))
        return b.put(**{self.into: torch.where(b.mask_BT, found_BT, 0)})


# -- widths from columns ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipWithin(Part):
    """PPO's clipped surrogate within each row's own bounds: max(-A rho, -A clip(rho, 1 - eps_low, 1 + eps_high))."""

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "row"
    gives: ClassVar[str] = "BT"

    needs = LOGP, LOGP_OLD
    reads = frozenset({"adv", "eps_low_B", "eps_high_B"})

    def bounds(self, b: Batch) -> tuple[Tensor, Tensor]:
        """Lowest and highest ratio: [B, 1] each."""
        return 1 - b["eps_low_B"][:, None], 1 + b["eps_high_B"][:, None]

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        rho_BT, adv_BT = ratio(log_ratio(s, b)), b.per_token("adv")
        low_B1, high_B1 = self.bounds(b)
        return torch.maximum(-adv_BT * rho_BT, -adv_BT * rho_BT.clamp(low_B1, high_B1))

    def report(self, s: Streams, b: Batch) -> dict[str, Tensor]:
        rho_BT, adv_BT = ratio(log_ratio(s, b)), b.per_token("adv")
        low_B1, high_B1 = self.bounds(b)
        clipped_BT = ((adv_BT > 0) & (rho_BT > high_B1)) | ((adv_BT < 0) & (rho_BT < low_B1))
        return {"ratio": rho_BT, "clip_frac": clipped_BT}


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
