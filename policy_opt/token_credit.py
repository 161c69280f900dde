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

from policy_opt.advantages import GroupNorm, groups
from policy_opt.batch import Batch, side_by_side
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


def levels(value: Tensor) -> Tensor:
    """The values on a grid so fine that it only makes equal what differs by rounding (order of a sum, say)."""
    step = torch.finfo(value.dtype).eps ** (2 / 3) * value.abs().amax()
    return torch.where(step > 0, (value / step).round() * step, value)


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
        return frozenset({self.by, "mask_BT"})

    writes = frozenset({"keep_BT", "threshold_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        fraction = current(self.fraction, ctx)
        value_BT = b[self.by] if self.ties == "all" else levels(b[self.by])
        score_BT = torch.where(b.mask_BT, value_BT, -torch.inf)
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
        keep_BT = b.mask_BT & (score_BT >= threshold_B[:, None]) & (wanted_B > 0)[:, None]
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


@dataclass(frozen=True)
class TokenGroupNorm(Part):
    """A_i = (R_i - mu_g) / (sigma_g + eps) with statistics over the group's tokens: long rows count for more.

    mu_g and sigma_g (population) are over all policy tokens of the group, each with its row's reward. A group
    in which any row that has tokens reaches |A| >= limit gets GRPO's advantage instead (sample deviation).
    """

    stage: ClassVar[str] = "advantage"
    eps: float = 1e-6
    limit: float = 5.0
    """inf: no such exception."""

    reads = frozenset({"reward_B", "group_B"})
    writes = frozenset({"adv_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        plain_B = GroupNorm(self.eps)(b, ctx)["adv_B"]
        index_B, count = b.index()
        centred_B, length_B = groups(b).centred_B, b.mask_BT.sum(1).to(plain_B.dtype)

        tokens_Q = length_B.new_zeros(count).index_add_(0, index_B, length_B).clamp(min=1)

        def mean(value_B: Tensor) -> Tensor:
            return (torch.zeros_like(tokens_Q).index_add_(0, index_B, value_B * length_B) / tokens_Q)[index_B]

        centred_B = centred_B - mean(centred_B)
        std_B = mean(centred_B.square()).sqrt()
        # With eps = 0 an all-equal group would be 0 / 0.
        adv_B = centred_B / torch.where(std_B + self.eps == 0, 1, std_B + self.eps)
        wild_B = (adv_B.abs() >= self.limit) & (length_B > 0)
        wild_Q = torch.zeros(count, dtype=torch.long, device=index_B.device).index_add_(0, index_B, wild_B.long())
        return b.put(adv_B=torch.where(wild_Q[index_B] > 0, plain_B, adv_B))


@dataclass(frozen=True)
class MaxVariance(Part):
    """Keeps the rows whose advantages vary most; the others leave the loss (their mask becomes empty).

    The subset of n values with the largest variance consists of the k largest and the n - k smallest, for the
    best k. Equal advantages are taken in order of (member, group). Advantages stay as they were.
    """

    stage: ClassVar[str] = "credit"
    fraction: Any = 0.5
    """Rows to keep of each group, as a share of `size`: a number, or a controller. Rounded half up."""
    size: int | None = None
    """None: the group's own size; 1 makes `fraction` a number of rows."""
    scope: Literal["group", "batch"] = "batch"
    """batch: as many rows, chosen among all groups at once."""

    reads = frozenset({"adv_B", "group_B"})
    writes = frozenset({"selected_B"})
    overwrites = frozenset({"mask_BT"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        index_B, count = b.index()
        once_B, root_B = b.once(), b.roots()
        size_Q = torch.bincount(index_B[once_B], minlength=count)
        share_Q = current(self.fraction, ctx) * (size_Q if self.size is None else self.size + 0 * size_Q).double()
        wanted_Q = (share_Q + 0.5).floor().long()
        if self.scope == "batch":
            index_B, count, wanted_Q = torch.zeros_like(index_B), 1, wanted_Q.sum()[None]
        # Rows in order of (advantage, trajectory), then each group's next to each other.
        order_B = b.order("member_B", "group_B", "seat_B")
        order_B = order_B[levels(b["adv_B"])[order_B].argsort(stable=True)]
        items_QG, there_QG = side_by_side(index_B[order_B], count, once_B[order_B])
        rows_QG = order_B[items_QG]
        chosen_QG = extremes(torch.where(there_QG, b["adv_B"][rows_QG], 0), there_QG, wanted_Q)
        keep_B = torch.zeros_like(once_B)
        keep_B[rows_QG[chosen_QG]] = True
        keep_B = keep_B[root_B]
        ctx.log("selected_rows", float(keep_B.double().mean()))
        return b.silence(keep_B).put(selected_B=keep_B)


def extremes(value_QG: Tensor, there_QG: Tensor, wanted_Q: Tensor) -> Tensor:
    """Of each line's ascending values, the `wanted` ones with the largest variance (all, if there are fewer).

    True on the k largest and wanted - k smallest; of equally good k (within 1e-12 of the squares) the smallest. [Q, G]
    """
    size_Q = there_QG.sum(1)
    n_Q = torch.minimum(wanted_Q, size_Q)
    centred_QG = torch.where(there_QG, value_QG - (value_QG.sum(1) / size_Q.clamp(min=1))[:, None], 0)
    sums_QG2 = torch.stack([centred_QG, centred_QG.square()], 2).double().cumsum(1)
    sums_QG2 = torch.nn.functional.pad(sums_QG2, (0, 0, 1, 0))
    k_K = torch.arange(int(n_Q.max()) + 1 if n_Q.numel() else 0, device=n_Q.device)

    def first(count_QK: Tensor) -> Tensor:
        return sums_QG2.gather(1, count_QK.clamp(min=0)[..., None].expand(-1, -1, 2))

    total_QK2 = first(n_Q[:, None] - k_K) + first(size_Q[:, None]) - first(size_Q[:, None] - k_K)
    mean_QK2 = total_QK2 / n_Q.clamp(min=1)[:, None, None]
    variance_QK = mean_QK2[..., 1] - mean_QK2[..., 0].square()
    variance_QK = torch.where(k_K <= n_Q[:, None], variance_QK, -torch.inf)
    near_Q1 = 1e-12 * mean_QK2[..., 1].amax(1, keepdim=True).clamp(min=1)
    best_QK = variance_QK >= variance_QK.amax(1, keepdim=True) - near_Q1
    k_Q = best_QK.long().argmax(1)
    rank_G = torch.arange(value_QG.shape[1], device=n_Q.device)
    low_QG, high_QG = rank_G < (n_Q - k_Q)[:, None], rank_G >= (size_Q - k_Q)[:, None]
    return there_QG & (low_QG | high_QG)
