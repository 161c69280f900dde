"""Advantages: from rewards to adv_B (one number per row) or adv_BT (one per token). Constants: no gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from policy_opt.batch import Batch
from policy_opt.part import Ctx, Part


def group_sums(value_B: Tensor, index_B: Tensor, count: int) -> Tensor:
    """Sum of a row quantity over each group: [Q]."""
    return torch.zeros(count, dtype=value_B.dtype, device=value_B.device).index_add_(0, index_B, value_B)


@dataclass(frozen=True)
class GroupNorm(Part):
    """A_i = (R_i - mean_g R) / (std_g R + eps), constant over the row's tokens (GRPO).

    A group of one has no spread: its member gets R / (1 + eps), as in verl.
    """

    stage: ClassVar[str] = "advantage"
    eps: float = 1e-6
    """delta: 1e-6 in verl, 1e-4 in TRL."""
    ddof: int = 1
    """1: sample standard deviation, dividing by G - 1; 0: by G."""

    def __post_init__(self) -> None:
        if self.ddof not in (0, 1) or self.eps < 0:
            raise ValueError(f"ddof is 0 or 1 and eps >= 0, not {self.ddof}, {self.eps}")

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"reward_B", "group_B"})

    @property
    def writes(self) -> frozenset[str]:
        return frozenset({"adv_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        index_B, count = b.index()
        reward_B = floating(b["reward_B"])
        size_Q = torch.bincount(index_B, minlength=count).to(reward_B.dtype)
        single_Q = size_Q == 1
        mean_Q = torch.where(single_Q, 0, group_sums(reward_B, index_B, count) / size_Q)
        centred_B = reward_B - mean_Q[index_B]
        var_Q = group_sums(centred_B.square(), index_B, count) / (size_Q - self.ddof).clamp(min=1)
        scale_Q = torch.where(single_Q, 1, var_Q.sqrt()) + self.eps
        # Equal rewards must give exactly 0, also with eps = 0 and where the mean is rounded.
        same_Q = _equal(reward_B, index_B, count) & ~single_Q
        return b.put(adv_B=torch.where(same_Q[index_B], 0, centred_B / scale_Q[index_B]))


def _equal(value_B: Tensor, index_B: Tensor, count: int) -> Tensor:
    """Groups whose members all have one value: [Q]."""
    first_Q = torch.empty(count, dtype=value_B.dtype, device=value_B.device).index_copy_(0, index_B, value_B)
    other_Q = torch.zeros(count, dtype=torch.long, device=value_B.device)
    other_Q.index_add_(0, index_B, (value_B != first_Q[index_B]).long())
    return other_Q == 0


def floating(value: Tensor) -> Tensor:
    """Integers as the default float type, floats as they are."""
    return value if value.is_floating_point() else value.to(torch.get_default_dtype())
