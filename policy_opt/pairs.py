"""Pairs: which trajectories are preferred to which, from the verdicts of whole groups.

A part here stands at the stage `advantage` and writes pairs_P2. Losses over pairs (`policy_opt.preferences`) read it
as they would read pairs that came with the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from policy_opt.batch import Batch
from policy_opt.part import Ctx, Part

_UNITS = ("group_B", "seat_B", "member_B", "segment_BT")


def members(b: Batch) -> Tensor:
    """Trajectories by group and seat, in order of their ids: row indices [Q, M], -1 where a group has fewer."""
    order_R = b.order(*_UNITS)
    order_R = order_R[b.once()[order_R]]
    key_R2 = torch.stack([b["group_B"], b["seat_B"]], 1)[order_R]
    unit_R = torch.unique_consecutive(key_R2, dim=0, return_inverse=True)[1]
    size_Q = torch.bincount(unit_R)
    start_Q = size_Q.cumsum(0) - size_Q
    place_R = torch.arange(unit_R.numel(), device=unit_R.device) - start_Q[unit_R]
    widest = int(size_Q.max()) if size_Q.numel() else 0
    found_QM = torch.full((size_Q.numel(), widest), -1, dtype=torch.long, device=unit_R.device)
    found_QM[unit_R, place_R] = order_R
    return found_QM


def bounded(unit_P: Tensor, draw_P: Tensor, limit: int) -> Tensor:
    """True on the `limit` pairs of each unit that drew the smallest numbers; unit_P ascends: [P]."""
    order_P = draw_P.argsort(stable=True)
    order_P = order_P[unit_P[order_P].argsort(stable=True)]
    size_Q = torch.bincount(unit_P)
    rank_P = torch.arange(unit_P.numel(), device=unit_P.device) - (size_Q.cumsum(0) - size_Q)[unit_P]
    keep_P = torch.empty_like(unit_P, dtype=torch.bool)
    keep_P[order_P] = rank_P < limit
    return keep_P


@dataclass(frozen=True)
class GroupPairs(Part):
    """Every (better, worse) couple of one group's members, at most `per_group` of them.

    Pairs, their order and the choice among them follow from unit ids, not from the order of rows. Trajectories of
    several rows are paired by their first one; seats have prompts of their own and are never paired with each other.
    """

    stage: ClassVar[str] = "advantage"
    by: str = "reward_B"
    """What decides: a number per row."""
    best: Literal["high", "low"] = "high"
    """Which end of it is preferred."""
    margin: float = 0.0
    """A pair must differ by more than this."""
    per_group: int | None = 16
    """At most so many pairs of a group, drawn at random; None: all."""

    def __post_init__(self) -> None:
        if self.margin < 0 or (self.per_group is not None and self.per_group < 1):
            raise ValueError(f"margin >= 0 and per_group >= 1, not {self.margin}, {self.per_group}")

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({self.by, "group_B", "seat_B", "member_B"})

    writes = frozenset({"pairs_P2"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        row_QM = members(b)
        value_QM = b[self.by][row_QM] * (1 if self.best == "high" else -1)
        gap_QMM = value_QM[:, :, None] - value_QM[:, None, :]
        here_QM = row_QM >= 0
        pair_QMM = (gap_QMM > self.margin) & here_QM[:, :, None] & here_QM[:, None, :]
        unit_P, better_P, worse_P = pair_QMM.nonzero(as_tuple=True)
        pairs_P2 = torch.stack([row_QM[unit_P, better_P], row_QM[unit_P, worse_P]], 1)
        if self.per_group is not None and unit_P.numel():
            draw_P = torch.rand(unit_P.numel(), generator=ctx.generator("pairs", ctx.step)).to(unit_P.device)
            pairs_P2 = pairs_P2[bounded(unit_P, draw_P, self.per_group)]
        ctx.log("pairs", pairs_P2.shape[0])
        return b.put(pairs_P2=pairs_P2)
