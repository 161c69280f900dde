"""Token credit: which tokens a loss looks at, and advantages whose statistics are over tokens.

A part that keeps some tokens writes a mask column, and terms name it: `Term(..., num="keep", den="mask")` takes
the others out of the numerator only, `den="keep"` out of both. Entropies are those of the policy that played
the batch, so that a choice stays the same over the steps taken on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from policy_opt.batch import Batch
from policy_opt.controllers import current
from policy_opt.need import ENTROPY_OLD, Need
from policy_opt.part import Ctx, Part


def in_order(flag_BT: Tensor, b: Batch) -> Tensor:
    """1, 2, ... on the set entries in order of (trajectory, position), whatever the order of rows: [B, T].

    Trajectories are ordered by (member, group, seat); a later segment comes after an earlier one.
    """
    order_B = b.order("member_B", "group_B", "seat_B", "segment_BT")
    count_BT = flag_BT[order_B].long().flatten().cumsum(0).view_as(flag_BT)
    return torch.empty_like(count_BT).index_copy_(0, order_B, count_BT)


def confidence(logp_BT: Tensor, mask_BT: Tensor, fraction: float) -> Tensor:
    """exp of the mean over the max(1, ceil(fraction * n)) least likely of a row's n masked tokens: [B].

    In (0, 1]; 1 for a row without tokens.
    """
    count_B = mask_BT.sum(1)
    ranked_BT = torch.where(mask_BT, logp_BT, torch.inf).sort(dim=1).values
    low_B = (fraction * count_B.double()).ceil().clamp(min=1)
    low_BT = mask_BT.new_ones(mask_BT.shape).cumsum(1) <= torch.minimum(low_B, count_B)[:, None]
    return (torch.where(low_BT, ranked_BT, 0).sum(1) / low_B).exp().to(logp_BT.dtype)


@dataclass(frozen=True)
class KeepTop(Part):
    """keep_BT: the ceil(fraction * n) policy tokens with the largest `by`, of each row or of the whole batch.

    threshold_B is the smallest value that is kept (0 for a row without tokens). A row keeps at least one of
    its tokens.
    """

    stage: ClassVar[str] = "credit"
    by: str = ENTROPY_OLD.name
    """A [B, T] column: the entropy (asked for by itself), or whatever a part before has written."""
    fraction: Any = 0.2
    """Share of the tokens in (0, 1]: a number, or a controller."""
    scope: Literal["row", "batch"] = "row"
    """What n counts and what is ranked."""
    ties: Literal["all", "first"] = "all"
    """At the threshold: keep all that are equal, or exactly the count, those first in (trajectory, position)."""

    def __post_init__(self) -> None:
        if isinstance(self.fraction, int | float) and not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is in (0, 1], not {self.fraction}")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (ENTROPY_OLD,) if self.by == ENTROPY_OLD.name else ()

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({self.by})

    writes = frozenset({"keep_BT", "threshold_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        fraction = current(self.fraction, ctx)
        score_BT = torch.where(b.mask_BT, b[self.by], -torch.inf)
        count_B = b.mask_BT.sum(1)
        if self.scope == "batch":
            count_B = count_B.sum().expand(b.B)
            wanted_B = (fraction * count_B.double()).ceil().long()
            threshold_B = _largest(score_BT[b.mask_BT], int(wanted_B.max())).expand(b.B)
        else:
            wanted_B = (fraction * count_B.double()).ceil().long()
            ranked_BT = score_BT.sort(dim=1, descending=True).values
            threshold_B = ranked_BT.gather(1, (wanted_B - 1).clamp(min=0)[:, None]).squeeze(1)
        threshold_B = torch.where(count_B > 0, threshold_B, 0)
        keep_BT = b.mask_BT & (score_BT >= threshold_B[:, None])
        if self.ties == "first":
            keep_BT = self.break_ties(keep_BT, score_BT == threshold_B[:, None], wanted_B, b)
        ctx.log("kept_tokens", float(keep_BT.sum() / b.mask_BT.sum().clamp(min=1)))
        return b.put(keep_BT=keep_BT, threshold_B=threshold_B)

    def break_ties(self, keep_BT: Tensor, equal_BT: Tensor, wanted_B: Tensor, b: Batch) -> Tensor:
        """keep_BT with as many of the equal tokens as are still wanted."""
        above_BT, equal_BT = keep_BT & ~equal_BT, keep_BT & equal_BT
        if self.scope == "batch":
            return above_BT | (equal_BT & (in_order(equal_BT, b) <= wanted_B[:1] - above_BT.sum()))
        return above_BT | (equal_BT & (equal_BT.long().cumsum(1) <= (wanted_B - above_BT.sum(1))[:, None]))


def _largest(value_N: Tensor, k: int) -> Tensor:
    """The k-th largest of some numbers; 0 where k is 0."""
    return value_N.kthvalue(value_N.numel() - k + 1).values if k else value_N.new_zeros(())
