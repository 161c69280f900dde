"""Credit: weights and masks per token or row, from columns alone.

Weights multiply a term's token losses (numerator only): w_BT per token, w_B per row; several parts multiply.
A part that takes tokens out of numerator and denominator replaces mask_BT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from policy_opt.batch import Batch
from policy_opt.metrics import over_mask
from policy_opt.need import LOGP_OLD
from policy_opt.part import Ctx, Part
from policy_opt.surrogates import ratio, ratio_product

Level = Literal["token", "sequence"]


def mismatch(b: Batch, level: Level) -> Tensor:
    """pi_old / sampler on the sampled tokens: per token [B, T], or their product per row [B]."""
    gap_BT = torch.where(b.mask_BT, b["logp_old_BT"] - b.logp_sampler_BT, 0)
    return ratio(gap_BT) if level == "token" else ratio_product(gap_BT)


def weigh(b: Batch, weight: Tensor) -> Batch:
    """The batch with w multiplied by a [B, T] or [B] weight."""
    name = "w_BT" if weight.ndim == 2 else "w_B"
    return b.over(**{name: b[name] * weight if name in b else weight})


@dataclass(frozen=True)
class TIS(Part):
    """Truncated importance sampling: w = min(pi_old / sampler, cap), for a sampler that is not pi_old."""

    stage: ClassVar[str] = "credit"
    cap: float = 2.0
    """Upper bound of the weight."""
    level: Level = "token"

    def __post_init__(self) -> None:
        if self.cap <= 0:
            raise ValueError(f"cap must be positive, not {self.cap}")

    needs = (LOGP_OLD,)

    @property
    def overwrites(self) -> frozenset[str]:
        return frozenset({"w_BT" if self.level == "token" else "w_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        weight = mismatch(b, self.level)
        ctx.log("importance_capped", over_mask((weight > self.cap).double(), b))
        return weigh(b, weight.clamp(max=self.cap))


@dataclass(frozen=True)
class MIS(Part):
    """Masked importance sampling: w = pi_old / sampler where it lies in [low, high], else 0.

    Dropped tokens stay in the denominators.
    """

    stage: ClassVar[str] = "credit"
    low: float = 0.5
    high: float = 2.0
    level: Level = "token"

    def check(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ValueError(f"0 <= low <= high, not {self.low}, {self.high}")

    needs = (LOGP_OLD,)

    @property
    def overwrites(self) -> frozenset[str]:
        return frozenset({"w_BT" if self.level == "token" else "w_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        weight = mismatch(b, self.level)
        keep = (weight >= self.low) & (weight <= self.high)
        ctx.log("importance_dropped", over_mask((~keep).double(), b))
        return weigh(b, torch.where(keep, weight, 0))


@dataclass(frozen=True)
class MaskTruncated(Part):
    """Rows that were cut off leave the loss altogether ("overlong filtering", arXiv 2503.14476)."""

    stage: ClassVar[str] = "credit"

    reads = frozenset({"truncated_B"})
    overwrites = frozenset({"mask_BT"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        return b.silence(b["truncated_B"] == 0)


@dataclass(frozen=True)
class EqualGroups(Part):
    """Every group counts the same, whatever its size: w = rows / (groups * members), of rows that have tokens.

    With a mean over rows this is the mean over groups of their means; equal groups get weight 1.
    """

    stage: ClassVar[str] = "credit"

    reads = frozenset({"group_B"})
    overwrites = frozenset({"w_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        index_B, count = b.index()
        some_B = b.mask_BT.any(1).to(b.logp_sampler_BT.dtype)
        size_Q = some_B.new_zeros(count).index_add_(0, index_B, some_B)
        groups = (size_Q > 0).sum().clamp(min=1)
        return weigh(b, some_B.sum() / (groups * size_Q.clamp(min=1))[index_B])
