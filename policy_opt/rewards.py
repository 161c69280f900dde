"""Rewards: from verdicts to numbers. A part here may replace reward_B or spread it over tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from policy_opt.bank import WITH_REFERENCE, ModelSpec
from policy_opt.batch import Batch, floating
from policy_opt.errors import BatchError
from policy_opt.need import LOGP_OLD, LOGP_REF, Need
from policy_opt.part import Ctx, Part


def last_BT(mask_BT: Tensor) -> Tensor:
    """True on each row's last policy token: [B, T]."""
    later_BT = mask_BT.flip(1).cumsum(1).flip(1)
    return mask_BT & (later_BT == 1)


@dataclass(frozen=True)
class TokenReward(Part):
    """r_t = R [t is the row's last policy token] - kl_beta (logp_old - logp_ref), for every policy token.

    The KL is the k1 estimator, a constant in the reward and not differentiated.
    """

    stage: ClassVar[str] = "reward"
    kl_beta: float = 0.0
    """Weight of the KL to the reference; 0: no reference model is needed."""
    finished_only: bool = False
    """An episode that goes on in a later iteration (finished_B = 0) has no R yet."""

    @property
    def facts(self) -> frozenset[str]:
        return frozenset({"finished_B"} if self.finished_only else ())

    @property
    def needs(self) -> tuple[Need, ...]:
        return (LOGP_OLD, LOGP_REF) if self.kl_beta else ()

    @property
    def models(self) -> Mapping[str, ModelSpec]:
        return WITH_REFERENCE if self.kl_beta else {}

    reads = frozenset({"reward_B"})
    writes = frozenset({"token_reward_BT"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        reward_B = floating(b["reward_B"])
        if self.finished_only:
            reward_B = torch.where(b["finished_B"] != 0, reward_B, 0)
        reward_BT = reward_B[:, None] * last_BT(b.mask_BT)
        if self.kl_beta:
            reward_BT = reward_BT - torch.where(
                b.mask_BT, self.kl_beta * (b["logp_old_BT"] - b["logp_ref_BT"]), 0
            )
        return b.put(token_reward_BT=reward_BT)


@dataclass(frozen=True)
class KLPenalty(Part):
    """R <- R - kl_beta sum_t (logp_old - logp_ref) over the row's policy tokens (RLOO). A constant."""

    stage: ClassVar[str] = "reward"
    kl_beta: float = 0.0
    """0: no reference model is needed, the reward stays."""

    @property
    def needs(self) -> tuple[Need, ...]:
        return (LOGP_OLD, LOGP_REF) if self.kl_beta else ()

    @property
    def models(self) -> Mapping[str, ModelSpec]:
        return WITH_REFERENCE if self.kl_beta else {}

    reads = frozenset({"reward_B"})
    overwrites = frozenset({"reward_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        if not self.kl_beta:
            return b
        gap_B = torch.where(b.mask_BT, b["logp_old_BT"] - b["logp_ref_BT"], 0).sum(1)
        return b.over(reward_B=floating(b["reward_B"]) - self.kl_beta * gap_B)


@dataclass(frozen=True)
class Overlong(Part):
    """DAPO's soft penalty on length: 0 up to L_max - L_cache, falling linearly to -1 at L_max, times factor.

    arXiv 2503.14476, Eq. 13, with the floor at -1 beyond L_max.
    """

    stage: ClassVar[str] = "reward"
    max_len: int = 20480
    """L_max in tokens."""
    cache_len: int = 4096
    """L_cache: the stretch before L_max in which the penalty grows."""
    factor: float = 1.0
    length_of: Literal["generated", "all"] = "generated"
    """generated: the policy's tokens (length_B); all: every token from the policy's first one on."""

    def check(self) -> None:
        if not 0 <= self.cache_len <= self.max_len:
            raise ValueError(f"0 <= cache_len <= max_len, not {self.cache_len}, {self.max_len}")

    reads = frozenset({"reward_B", "length_B"})
    writes = frozenset({"overlong_B"})
    overwrites = frozenset({"reward_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        if self.length_of == "generated":
            length_B = b["length_B"]
        else:
            length_B = ((b.mask_BT.cumsum(1) > 0) & b.real_BT).sum(1)
        reward_B = floating(b["reward_B"])
        room_B = self.max_len - self.cache_len - length_B.to(reward_B.dtype)
        # Without a cache the fall is a step: any token beyond L_max costs the whole penalty.
        penalty_B = self.factor * (room_B / max(self.cache_len, 1e-9)).clamp(-1, 0)
        return b.put(overlong_B=penalty_B).over(reward_B=reward_B + penalty_B)


@dataclass(frozen=True)
class WeightedScores(Part):
    """R = sum_k weights_k scores_BK[:, k]: the verdict's named scores as one reward."""

    stage: ClassVar[str] = "reward"
    weights: tuple[float, ...]
    """One per score, in the order of the verdict's names."""

    reads = frozenset({"scores_BK"})
    overwrites = frozenset({"reward_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        scores_BK = floating(b["scores_BK"])
        if scores_BK.shape[1] != len(self.weights):
            raise BatchError(f"scores_BK has shape {tuple(scores_BK.shape)}, but there are {len(self.weights)} weights")
        return b.over(reward_B=scores_BK @ scores_BK.new_tensor(self.weights))
