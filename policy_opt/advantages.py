"""Advantages: from rewards to adv_B (one number per row) or adv_BT (one per token). Constants: no gradient.

Groups are keyed by id. Rows that continue a trajectory in another segment (parent_B >= 0) share its advantage
and do not count again in the group's statistics.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from policy_opt.bank import WITH_CRITIC
from policy_opt.batch import Batch, floating
from policy_opt.need import VALUES_OLD
from policy_opt.part import Ctx, Part


class Groups(NamedTuple):
    """Rewards as deviations from their group's mean."""

    index_B: Tensor
    """Group number of each row."""
    size_Q: Tensor
    """Members of each group, in the rewards' dtype."""
    reward_B: Tensor
    """Rewards as floats."""
    centred_B: Tensor
    """R - mean_g R; exactly 0 where all members have one reward."""
    once_B: Tensor | None
    """1 for the first row of each trajectory, 0 for its further segments; None where there are none."""

    def sums(self, value_B: Tensor) -> Tensor:
        """Sum over each group's members: [Q]."""
        value_B = value_B if self.once_B is None else value_B * self.once_B
        return torch.zeros_like(self.size_Q).index_add_(0, self.index_B, value_B)


def groups(b: Batch, unit: str = "group_B") -> Groups:
    """Group statistics of reward_B."""
    index_B, count = b.index(unit)
    reward_B = floating(b["reward_B"])
    once_B = b.once().to(reward_B.dtype) if b.branched else None
    size_Q = torch.bincount(index_B, once_B, minlength=count).to(reward_B.dtype)
    # Subtracting one member's reward first makes equal rewards exactly 0, and loses no digits to an offset. The
    # offset falls out of the result, so it is a constant also where rewards depend on a stream.
    first_Q = torch.empty_like(size_Q).index_copy_(0, index_B, reward_B.detach())
    shifted_B = reward_B - first_Q[index_B]
    found = Groups(index_B, size_Q, reward_B, shifted_B, once_B)
    return found._replace(centred_B=shifted_B - (found.sums(shifted_B) / size_Q)[index_B])


_ROW = frozenset({"reward_B", "group_B"})


def norm_scale(g: Groups, eps: float, ddof: int) -> Tensor:
    """std_g R + eps, with 1 for the std of a group of one: [Q]."""
    std_Q = (g.sums(g.centred_B.square()) / (g.size_Q - ddof).clamp(min=1)).sqrt()
    # With eps = 0 an all-equal group would be 0 / 0.
    return torch.where((g.size_Q == 1) | (std_Q + eps == 0), 1.0, std_Q) + eps


@dataclass(frozen=True)
class GroupNorm(Part):
    """A_i = (R_i - mean_g R) / (std_g R + eps), the same on every token of the row (GRPO).

    A group of one has no spread: its member gets R / (1 + eps), as in verl, unless told otherwise.
    """

    stage: ClassVar[str] = "advantage"
    eps: float = 1e-6
    """delta: 1e-6 in verl, 1e-4 in TRL."""
    ddof: int = 1
    """1: sample standard deviation, dividing by G - 1; 0: by G."""
    single: Literal["reward", "zero"] = "reward"
    """What the member of a group of one gets: R / (1 + eps), or 0 as the formula with std 0 has it."""

    def __post_init__(self) -> None:
        if self.ddof not in (0, 1) or self.eps < 0:
            raise ValueError(f"ddof is 0 or 1 and eps >= 0, not {self.ddof}, {self.eps}")

    reads = _ROW
    writes = frozenset({"adv_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        g = groups(b)
        top_B = g.centred_B
        if self.single == "reward":
            top_B = torch.where((g.size_Q == 1)[g.index_B], g.reward_B, top_B)
        return b.put(adv_B=top_B / norm_scale(g, self.eps, self.ddof)[g.index_B])


@dataclass(frozen=True)
class GroupCentre(Part):
    """A_i = R_i - mean_g R: no division by the spread (Dr. GRPO); a group of one gets 0 unless told otherwise."""

    stage: ClassVar[str] = "advantage"
    single: Literal["reward", "zero"] = "zero"
    """What the member of a group of one gets: 0, or R."""

    reads = _ROW
    writes = frozenset({"adv_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        g = groups(b)
        if self.single == "zero":
            return b.put(adv_B=g.centred_B)
        return b.put(adv_B=torch.where((g.size_Q == 1)[g.index_B], g.reward_B, g.centred_B))


@dataclass(frozen=True)
class LeaveOneOut(Part):
    """A_i = R_i - mean of the other members' rewards = G / (G - 1) (R_i - mean_g R) (RLOO).

    A group of one has no others: 0, as in TRL, with a warning (verl keeps R).
    """

    stage: ClassVar[str] = "advantage"

    reads = _ROW
    writes = frozenset({"adv_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        g = groups(b)
        singles = int((g.size_Q == 1).sum())
        if singles:
            warnings.warn(f"{ctx.recipe}: {singles} groups of one member learn nothing", stacklevel=2)
        return b.put(adv_B=g.centred_B * (g.size_Q / (g.size_Q - 1).clamp(min=1))[g.index_B])


def recur(x_BT: Tensor, mask_BT: Tensor, factor: float | Tensor) -> Tensor:
    """y_t = x_t + factor * y_(t+1) on policy tokens, y_t = y_(t+1) on all others, y = 0 after the end: [B, T].

    factor: one number, or one per token [B, T].
    """
    x_TB = torch.where(mask_BT, x_BT, 0).T.contiguous()
    one = x_TB.new_tensor(1.0)
    factor_BT = factor if isinstance(factor, Tensor) else x_TB.new_tensor(factor)
    factor_TB = torch.where(mask_BT, factor_BT, one).T.contiguous()
    found = [x_TB.new_zeros(x_TB.shape[1])]
    for x_B, factor_B in zip(reversed(x_TB.unbind()), reversed(factor_TB.unbind()), strict=True):
        found.append(torch.addcmul(x_B, factor_B, found[-1]))
    return torch.stack(found[:0:-1], 1)


def next_action(mask_BT: Tensor) -> Tensor:
    """Position of the next policy token after each position, T where there is none: [B, T]."""
    rows, width = mask_BT.shape
    flat = mask_BT.flatten()
    place_M = torch.nn.functional.pad(flat.nonzero().squeeze(1), (0, 1), value=rows * width)
    next_BT = place_M[flat.cumsum(0)].view(rows, width)
    start_B1 = torch.arange(0, rows * width, width, device=mask_BT.device)[:, None]
    return (next_BT - start_B1).clamp(max=width)


@dataclass(frozen=True)
class GAE(Part):
    """Generalised advantage estimation over the policy's tokens (Schulman et al. 2015, arXiv 1506.02438).

        delta_t = r_t + gamma_t V_next - V_t,   A_t = delta_t + gamma_t lambda_t A_next,   next = next policy token

    Tokens outside the mask are skipped: value and trace are carried across a tool's output, so inserting one
    changes nothing. gamma_t and lambda_t may differ where a turn ends (a row's end is a turn's end). The value
    after the last token is 0, unless the episode goes on later. returns = advantage + value.
    """

    stage: ClassVar[str] = "advantage"
    gamma: float = 1.0
    """Discount per policy token."""
    lam: float = 0.95
    """lambda: 1 is Monte Carlo, 0 the one-step error."""
    turn_gamma: float | None = None
    """Discount from the last token of a turn to the next turn; None: gamma."""
    turn_lam: float | None = None
    """lambda there; None: lam."""
    after: Literal["zero", "repeat", "value"] = "zero"
    """Value after the last token of an episode whose finished_B is 0: 0, the last token's own (EGAE), or the
    column bootstrap_B."""
    returns: Literal["lambda", "monte_carlo"] = "lambda"
    """Critic's target: A + V, or the discounted sum of the rewards that were observed."""

    needs = (VALUES_OLD,)
    models = WITH_CRITIC
    reads = frozenset({"token_reward_BT", "turn_BT"})
    writes = frozenset({"adv_BT", "returns_BT"})

    @property
    def facts(self) -> frozenset[str]:
        names = {"zero": (), "repeat": ("finished_B",), "value": ("finished_B", "bootstrap_B")}
        return frozenset(names[self.after])

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        reward_BT = b["token_reward_BT"]
        value_BT = torch.where(b.mask_BT, b["values_old_BT"], 0)
        next_BT = next_action(b.mask_BT)
        last_BT, at_BT = next_BT == b.T, next_BT.clamp(max=b.T - 1)
        gamma, lam = self.rates(b, last_BT | (b["turn_BT"].gather(1, at_BT) != b["turn_BT"]), value_BT)
        then_BT = torch.where(last_BT, self.ends(b, value_BT), value_BT.gather(1, at_BT))
        delta_BT = reward_BT + gamma * then_BT - value_BT
        adv_BT = torch.where(b.mask_BT, recur(delta_BT, b.mask_BT, gamma * lam), 0)
        if self.returns == "lambda":
            return b.put(adv_BT=adv_BT, returns_BT=adv_BT + value_BT)
        return b.put(adv_BT=adv_BT, returns_BT=torch.where(b.mask_BT, recur(reward_BT, b.mask_BT, gamma), 0))

    def rates(self, b: Batch, ends_BT: Tensor, like: Tensor) -> tuple[float | Tensor, float | Tensor]:
        """gamma_t and lambda_t: numbers, or [B, T] where turns' ends have their own."""
        if self.turn_gamma is None and self.turn_lam is None:
            return self.gamma, self.lam
        gamma = self.gamma if self.turn_gamma is None else self.turn_gamma
        lam = self.lam if self.turn_lam is None else self.turn_lam
        return (
            torch.where(ends_BT, like.new_tensor(gamma), like.new_tensor(self.gamma)),
            torch.where(ends_BT, like.new_tensor(lam), like.new_tensor(self.lam)),
        )

    def ends(self, b: Batch, value_BT: Tensor) -> Tensor:
        """Value after the last token, on every position: [B, T] or [B, 1]."""
        if self.after == "zero":
            return value_BT.new_zeros(b.B, 1)
        known_BT = value_BT if self.after == "repeat" else b["bootstrap_B"][:, None]
        return torch.where((b["finished_B"] == 0)[:, None], known_BT, 0)


@dataclass(frozen=True)
class RewardToGo(Part):
    """A_t = r_t + gamma A_(next policy token): discounted return, carried across tokens outside the mask."""

    stage: ClassVar[str] = "advantage"
    gamma: float = 1.0
    """Discount per policy token."""

    reads = frozenset({"token_reward_BT"})
    writes = frozenset({"adv_BT"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        return b.put(adv_BT=torch.where(b.mask_BT, recur(b["token_reward_BT"], b.mask_BT, self.gamma), 0))


@dataclass(frozen=True)
class Whiten(Part):
    """(A - mean) / sqrt(var + eps) over all policy tokens of the batch.

    An advantage per row stays per row, and counts as often as the row has tokens.
    """

    stage: ClassVar[str] = "advantage"
    eps: float = 1e-8
    ddof: int = 1
    """1: var with Bessel's correction; 0: the population's."""
    eps_on: Literal["variance", "deviation"] = "variance"
    """deviation: divide by std + eps instead."""
    over: Literal["tokens", "nonzero"] = "tokens"
    """nonzero: mean and spread leave out advantages that are exactly 0, which some codes take for padding."""
    per: Literal["rollout", "step"] = "rollout"
    """step: over every mini-batch, before its optimizer step."""

    reads = frozenset({"adv"})
    overwrites = frozenset({"adv"})

    def check(self) -> None:
        if self.ddof not in (0, 1) or self.eps <= 0:
            raise ValueError(f"ddof is 0 or 1 and eps > 0, not {self.ddof}, {self.eps}")

    @property
    def when(self) -> Literal["rollout", "step"]:
        return self.per

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        name = "adv_BT" if "adv_BT" in b else "adv_B"
        adv = b[name]
        there = (b.mask_BT if name == "adv_BT" else b.mask_BT.sum(1)).to(adv.dtype)
        weight = there * (adv != 0) if self.over == "nonzero" else there
        count = weight.sum().clamp(min=1)
        centred = adv - (adv * weight).sum() / count
        var = (centred.square() * weight).sum() / (count - self.ddof).clamp(min=1)
        scale = (var + self.eps).sqrt() if self.eps_on == "variance" else var.sqrt() + self.eps
        ctx.log("adv_mean", float((adv * weight).sum() / count))
        ctx.log("adv_std", float(var.sqrt()))
        return b.over(**{name: torch.where(there > 0, centred / scale, 0)})
