"""Aggregations: how token losses become one number.

Every aggregation is linear, so it is given as coefficients: loss = sum(c_BT * loss_BT), or sum(c_B * loss_B)
where the surrogate's loss is already per row. The coefficients depend on masks only, never on streams: a
micro-batch needs nothing but its own rows of them, and the whole-batch denominator is right by construction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from policy_opt.part import Part


def _over(num: Tensor, den: Tensor) -> Tensor:
    """num / den, and 0 where den is 0 (an empty mask is no loss, not a NaN)."""
    return num / den.where(den != 0, den.new_ones(())) * (den != 0)


@dataclass(frozen=True)
class TokenMean(Part):
    """Sum over all tokens / number of tokens: every token has the same weight, whatever its row's length."""

    stage: ClassVar[str] = "agg"

    def tokens(self, num_BT: Tensor, den_BT: Tensor) -> Tensor:
        """num / sum(den): [B, T]."""
        return _over(num_BT, den_BT.sum())

    def rows(self, num_BT: Tensor, den_BT: Tensor) -> Tensor:
        """A row's loss counts as often as the row has tokens: [B]."""
        return _over(num_BT.sum(1), den_BT.sum())


@dataclass(frozen=True)
class SequenceMean(Part):
    """Mean over a row's tokens, then mean over the rows that have any ("seq-mean-token-mean", GRPO)."""

    stage: ClassVar[str] = "agg"
    across: Literal["filled", "all", "sum"] = "filled"
    """filled: the mean over rows with tokens; all: over all rows, empty ones included; sum: the rows' sum."""

    def count(self, some_B: Tensor) -> Tensor:
        """What the sum over rows is divided by; some_B is True on rows with den > 0."""
        if self.across == "filled":
            return some_B.sum()
        return some_B.new_tensor(some_B.shape[0] if self.across == "all" else 1, dtype=torch.long)

    def tokens(self, num_BT: Tensor, den_BT: Tensor) -> Tensor:
        """num / (row's sum of den * count of rows): [B, T]."""
        length_B = den_BT.sum(1)
        return _over(num_BT, (length_B * self.count(length_B > 0))[:, None])

    def rows(self, num_BT: Tensor, den_BT: Tensor) -> Tensor:
        """1 / count of rows, for rows with any num: [B]."""
        count = self.count(den_BT.sum(1) > 0).to(num_BT.dtype)
        return _over((num_BT.sum(1) > 0).to(num_BT.dtype), count)


@dataclass(frozen=True)
class SequenceSum(Part):
    """Sum over a row's tokens, then mean over all rows, empty ones included (REINFORCE on sequences)."""

    stage: ClassVar[str] = "agg"

    def tokens(self, num_BT: Tensor, den_BT: Tensor) -> Tensor:
        """num / B: [B, T]."""
        return num_BT / max(num_BT.shape[0], 1)

    def rows(self, num_BT: Tensor, den_BT: Tensor) -> Tensor:
        """1 / B: [B]."""
        return num_BT.new_full((num_BT.shape[0],), 1.0 / max(num_BT.shape[0], 1))


@dataclass(frozen=True)
class ConstantSum(Part):
    """Sum over all tokens, or rows, / constant: more rows weigh more (NFT)."""

    stage: ClassVar[str] = "agg"
    divisor: float = 1000.0

    def __post_init__(self) -> None:
        if self.divisor <= 0:
            raise ValueError(f"divisor must be positive, not {self.divisor}")

    def tokens(self, num_BT: Tensor, den_BT: Tensor) -> Tensor:
        """num / divisor: [B, T]."""
        return num_BT / self.divisor

    def rows(self, num_BT: Tensor, den_BT: Tensor) -> Tensor:
        """1 / divisor: [B]."""
        return num_BT.new_full((num_BT.shape[0],), 1.0 / self.divisor)


@dataclass(frozen=True)
class ConstantLength(Part):
    """Sum over all tokens / (rows * length): a constant instead of the row's own length (Dr. GRPO)."""

    stage: ClassVar[str] = "agg"
    length: int = 1024
    """L_max, the generation budget in tokens; unrelated to padding."""

    def __post_init__(self) -> None:
        if self.length <= 0:
            raise ValueError(f"length must be positive, not {self.length}")

    def tokens(self, num_BT: Tensor, den_BT: Tensor) -> Tensor:
        """num / (B * length): [B, T]."""
        return num_BT / (max(num_BT.shape[0], 1) * self.length)

    def rows(self, num_BT: Tensor, den_BT: Tensor) -> Tensor:
        """A row's loss counts as often as the row has tokens: [B]."""
        return self.tokens(num_BT, den_BT).sum(1)
