"""Proximity: how near to the solution an episode came, and a reward that pays for it in zones (SSL: Wu et al. 2026,
arXiv 2601.22491, whose zones, widths and values are reconstructed).

Environments deliver a proximity as a fact, or the raw material from which the signals here derive it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor

from policy_opt.batch import Batch, floating
from policy_opt.errors import BatchError
from policy_opt.part import Ctx, Part

ROUNDING = {torch.float64: 1e-9}
"""A proximity on the border of two zones counts as on it, whatever the last digit says (other types: 1e-6)."""


@dataclass(frozen=True)
class ClickProximity(Part):
    """exp(-d^2 / 2) of a click from the target box, d^2 = sum over axes ((x - centre) / (sigma size))^2."""

    stage: ClassVar[str] = "signals"
    sigma: float = 0.5
    """Standard deviation as a share of the box: 0.5 gives 0.61 at the middle of an edge, 0.37 at a corner."""

    facts = frozenset({"click_x_B", "click_y_B", "box_left_B", "box_top_B", "box_right_B", "box_bottom_B"})
    writes = frozenset({"click_distance_B", "click_proximity_B", "click_inside_B"})

    def check(self) -> None:
        if self.sigma <= 0:
            raise ValueError(f"sigma must be positive, not {self.sigma}")

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        square_B, inside_B = torch.zeros(b.B), torch.ones(b.B, dtype=torch.bool)
        for at, low, high in (("click_x", "box_left", "box_right"), ("click_y", "box_top", "box_bottom")):
            at_B, low_B, high_B = (floating(b[f"{name}_B"]) for name in (at, low, high))
            width_B = (self.sigma * (high_B - low_B)).clamp(min=1e-9)
            square_B = square_B + ((at_B - (low_B + high_B) / 2) / width_B).square()
            inside_B = inside_B & (low_B <= at_B) & (at_B <= high_B)
        return b.put(
            click_distance_B=square_B,
            click_proximity_B=(-square_B / 2).exp(),
            click_inside_B=inside_B.to(square_B.dtype),
        )


@dataclass(frozen=True)
class BlockProximity(Part):
    """Share of right cells in each block of a square grid, and whether the whole grid is right.

    Facts: cells_BN and solution_BN, the grids row by row. Blocks at the edge may be smaller.
    """

    stage: ClassVar[str] = "signals"
    block: int = 3
    """Side of a block: 3 for a 9 x 9 Sudoku, 2 for 4 x 4."""

    facts = frozenset({"cells_BN", "solution_BN"})
    writes = frozenset({"blocks_BS", "solved_B"})

    def check(self) -> None:
        if self.block < 1:
            raise ValueError(f"a block has at least one cell, not {self.block}")

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        right_BN = (b["cells_BN"] == b["solution_BN"]).double()
        cells = right_BN.shape[1]
        side = isqrt(cells)
        if side * side != cells:
            raise BatchError(f"cells_BN of shape {tuple(right_BN.shape)} is no square grid")
        at_n = torch.arange(side) // self.block
        across = int(at_n.max()) + 1 if side else 0
        block_N = (at_n[:, None] * across + at_n).flatten()
        size_S = torch.bincount(block_N, minlength=across**2)
        blocks_BS = right_BN.new_zeros(b.B, across**2).index_add_(1, block_N, right_BN) / size_S
        return b.put(blocks_BS=blocks_BS, solved_B=(right_BN == 1).all(1).to(b.logp_sampler_BT.dtype))


@dataclass(frozen=True)
class SweetSpot(Part):
    """R = C + alpha Z: the outcome, and how near the episode came in `zones` equal zones, Z in {0, 1/K, ..., 1}.

    upper: Z = ceil(K S - 1e-9) / K, the innermost zone is paid in full (distances, e.g. a click). lower: Z =
    floor(K S + 1e-9) / K, only S = 1 reaches 1 (progress, e.g. steps or cells). Inside a zone R is constant;
    with alpha < 1 a right answer is always worth more than a wrong one.
    """

    stage: ClassVar[str] = "reward"
    alpha: float = 0.5
    """What full proximity is worth, in [0, 1]."""
    zones: int = 4
    """K: few are near to a binary reward, many to a noisy continuous one."""
    rule: Literal["upper", "lower"] | None = None
    """None: upper for the proximity of a click, which is a distance; lower for everything else."""
    by: str = "proximity_B"
    """Proximity in [0, 1]: one per row, or several (steps, blocks) in a column [B, S] with NaN where a row has none."""
    outcome: str = "correct_B"
    """C in {0, 1}."""
    several: Literal["mean", "last", "zones"] = "mean"
    """Of several: the zone of their mean, the zone of the last one, or the mean of their zones."""
    values: Literal["linear", "amplified"] = "linear"
    """What zone k is worth: k / K, or (2^k - 1) / (2^K - 1)."""
    failures: bool = True
    """Is proximity paid for where C = 0 too?"""

    def check(self) -> None:
        if self.zones < 1 or not 0 <= self.alpha <= 1:
            raise ValueError(f"zones >= 1 and 0 <= alpha <= 1, not {self.zones}, {self.alpha}")

    @property
    def facts(self) -> frozenset[str]:
        return frozenset({self.by, self.outcome})

    writes = frozenset({"nearness_B", "zone_B"})
    overwrites = frozenset({"reward_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        near = b[self.by] if b[self.by].is_floating_point() else b[self.by].double()
        near_BS = near[:, None] if near.ndim == 1 else near
        near_B = self.one(near_BS)
        zone_B = average(self.zone(near_BS), ~near_BS.isnan()) if self.several == "zones" else self.zone(near_B)
        right_B = b[self.outcome].double()
        paid_B = zone_B if self.failures else zone_B * right_B
        reward_B = (right_B + self.alpha * paid_B).to(b.logp_sampler_BT.dtype)
        return b.put(nearness_B=near_B, zone_B=zone_B).over(reward_B=reward_B)

    def one(self, near_BS: Tensor) -> Tensor:
        """S: the mean, or the last, of what a row has; 0 where it has none: [B]."""
        there_BS = ~near_BS.isnan()
        if self.several == "last":
            last_BS = there_BS & (there_BS.flip(1).cumsum(1).flip(1) == 1)
            return average(near_BS, last_BS)
        return average(near_BS, there_BS)

    def zone(self, near: Tensor) -> Tensor:
        """The value of the zone of each proximity, float64."""
        scaled, slack = near.clamp(0, 1).double() * self.zones, ROUNDING.get(near.dtype, 1e-6)
        rule = self.rule or ("upper" if self.by == "click_proximity_B" else "lower")
        k = (scaled - slack).ceil() if rule == "upper" else (scaled + slack).floor()
        k = k.clamp(0, self.zones)
        return k / self.zones if self.values == "linear" else (k.exp2() - 1) / (2**self.zones - 1)


def average(value_BS: Tensor, there_BS: Tensor) -> Tensor:
    """Mean over what is there, 0 where nothing is: [B]."""
    return torch.where(there_BS, value_BS, 0).sum(1) / there_BS.sum(1).clamp(min=1)
