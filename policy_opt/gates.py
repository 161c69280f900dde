"""Gates: what a token's ratio becomes before it multiplies the advantage (Chang Li et al. 2026, arXiv 2603.08239).

`Gated` is the linear surrogate -A G(rho), without a minimum with the ungated ratio; the gate alone says how far
the policy may go. In `CappedWeight` it is a constant weight of the token's log-prob. A gate is a part with stage
"gate": (log_ratio_BT, b) -> G_BT, differentiable. `scope` says whether it looks beyond its own row, as in
`policy_opt.surrogates`; a gate may `report` what it did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from policy_opt.batch import Batch
from policy_opt.need import LOGP, LOGP_OLD
from policy_opt.part import Ctx, Part
from policy_opt.surrogates import Streams, check_widths, log_ratio, ratio


@dataclass(frozen=True)
class Ungated(Part):
    """G = rho: importance weighting as it is."""

    stage: ClassVar[str] = "gate"
    scope: ClassVar[str] = "row"

    def __call__(self, log_BT: Tensor, b: Batch) -> Tensor:
        return ratio(log_BT)

    def report(self, log_BT: Tensor, b: Batch) -> dict[str, Tensor]:
        return {}


_UNGATED = Ungated()


@dataclass(frozen=True)
class Gated(Part):
    """-A G(rho) per token."""

    stage: ClassVar[str] = "surrogate"
    gives: ClassVar[str] = "BT"
    gate: Any = _UNGATED
    """G."""

    needs = LOGP, LOGP_OLD

    @property
    def scope(self) -> str:
        """As far as the gate looks."""
        return self.gate.scope

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"adv"}) | self.gate.reads

    @property
    def facts(self) -> frozenset[str]:
        return self.gate.facts

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        return -b.per_token("adv") * self.gate(log_ratio(s, b), b)

    def report(self, s: Streams, b: Batch) -> dict[str, Tensor]:
        log_BT = log_ratio(s, b)
        return {"ratio": ratio(log_BT), **self.gate.report(log_BT, b)}


@dataclass(frozen=True)
class CappedWeight(Part):
    """-sg[clip(G(rho), 1 - low, 1 + high)] A logp: REINFORCE with a detached, clipped weight; no token is cut off.

    CISPO, MiniMax 2025, arXiv 2506.13585, where the ratio itself is the weight. Bounds as in verl; TRL's epsilon_high
    is 1 + clip_high.
    """

    stage: ClassVar[str] = "surrogate"
    gives: ClassVar[str] = "BT"
    clip_low: float = 1.0
    """1 or more: no lower bound."""
    clip_high: float = 0.28
    gate: Any = _UNGATED
    """G."""

    def __post_init__(self) -> None:
        check_widths(self.clip_low, self.clip_high)

    needs = LOGP, LOGP_OLD

    @property
    def scope(self) -> str:
        """As far as the gate looks."""
        return self.gate.scope

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"adv"}) | self.gate.reads

    @property
    def facts(self) -> frozenset[str]:
        return self.gate.facts

    def weight(self, free_BT: Tensor) -> Tensor:
        """The weight within its bounds: [B, T]."""
        return free_BT.clamp(1 - self.clip_low, 1 + self.clip_high)

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        return -self.weight(self.gate(log_ratio(s, b).detach(), b)) * b.per_token("adv") * s["logp_BT"]

    def report(self, s: Streams, b: Batch) -> dict[str, Tensor]:
        log_BT = log_ratio(s, b)
        free_BT = self.gate(log_BT, b)
        weight_BT = self.weight(free_BT)
        said = {"ratio": ratio(log_BT), "is_weight": weight_BT, "clip_frac": weight_BT != free_BT}
        return {**said, **self.gate.report(log_BT, b)}


# -- FiberPO ----------------------------------------------------------------------------------------------


class Channels(NamedTuple):
    """How far a trajectory has drifted: up and down apart, so that the two cannot cancel."""

    plus_B: Tensor
    """log s+ = mean_t max(log rho, 0)."""
    minus_B: Tensor
    """log s- = mean_t max(-log rho, 0)."""
    length_B: Tensor
    """T: number of policy tokens, at least 1."""


def channels(log_BT: Tensor, b: Batch) -> Channels:
    """Signed aggregates of each row; a token at rho = 1 belongs to the upper channel."""
    length_B = b.mask_BT.sum(1).clamp(min=1).to(log_BT.dtype)
    return Channels(log_BT.clamp(min=0).sum(1) / length_B, (-log_BT).relu().sum(1) / length_B, length_B)


def rollback(x: Tensor, limit: float, k: Tensor) -> Tensor:
    """x up to the limit, then back to 0 with slope -k, 0 beyond: continuous, and restoring in between."""
    back = x.sign() * (k + 1) * limit - k * x
    size = x.abs()
    zero = torch.zeros_like(x)
    return torch.where(size <= limit, x, torch.where(size < (1 + 1 / k) * limit, back, zero))


def residual(log_BT: Tensor, of: Channels, eps: float) -> Tensor:
    """log f: what is left of a token's log-ratio above its trajectory's aggregate, each half clipped to +-eps."""
    plus_B1, minus_B1 = of.plus_B[:, None], of.minus_B[:, None]
    up_BT = (log_BT - plus_B1).clamp(-eps, eps) + minus_B1.clamp(-eps, eps)
    down_BT = (log_BT + minus_B1).clamp(-eps, eps) - plus_B1.clamp(-eps, eps)
    return torch.where(log_BT >= 0, up_BT, down_BT)


def check_budgets(*widths: float) -> None:
    """ValueError where a width is negative."""
    if min(widths) < 0:
        raise ValueError(f"eps and budgets are widths >= 0, not {widths}")


@dataclass(frozen=True)
class Fiber(Part):
    """FiberPO: G = exp(log w + log f), a gated trajectory weight times a clipped token residual (Eqs. 6-16).

    log w = g(log s+, C+, T) - g(log s-, C-, T) with g from `rollback`. A row is a trajectory.
    """

    stage: ClassVar[str] = "gate"
    scope: ClassVar[str] = "row"
    eps: float = 0.04
    """Bound of each half of the token residual, in nats."""
    c_plus: float = 0.12
    """Budget of the trajectory's upward drift, in nats per token."""
    c_minus: float = 0.05
    """Budget of its downward drift; the paper wants it below c_plus."""

    def __post_init__(self) -> None:
        check_budgets(self.eps, self.c_plus, self.c_minus)

    def base(self, of: Channels, b: Batch) -> Tensor:
        """log w: [B]."""
        up_B = rollback(of.plus_B, self.c_plus, of.length_B)
        return up_B - rollback(of.minus_B, self.c_minus, of.length_B)

    def __call__(self, log_BT: Tensor, b: Batch) -> Tensor:
        of = channels(log_BT, b)
        return (self.base(of, b)[:, None] + residual(log_BT, of, self.eps)).exp()

    def report(self, log_BT: Tensor, b: Batch) -> dict[str, Tensor]:
        return gate_report(self, log_BT, b)


@dataclass(frozen=True)
class FiberDomain(Part):
    """FiberPO-Domain: the trajectory's weight is gated at three levels, domain, group and trajectory (Eqs. 30-33).

    log w = sum over channels of +- [ g(s_D, C, T_D) + g(s_g - s_D, C, T_g) + g(s - s_g, C, T) ], with means over the
    trajectories that have tokens and T summed over them. Mini-batches must hold whole domains.
    """

    stage: ClassVar[str] = "gate"
    scope: ClassVar[str] = "batch"
    eps: float = 0.04
    """Bound of each half of the token residual, in nats."""
    c_plus: float = 0.12
    """Budget of upward drift."""
    c_minus: float = 0.05
    """Budget of downward drift."""
    group_budgets: tuple[float, float] | None = None
    """(C+, C-) of the group's level; None: as the trajectory's."""
    domain_budgets: tuple[float, float] | None = None
    """(C+, C-) of the domain's level; None: as the trajectory's."""
    domain: str = "level_B"
    """Column of domain ids; a group lies in one domain."""

    def __post_init__(self) -> None:
        pairs = (self.group_budgets or (), self.domain_budgets or ())
        check_budgets(self.eps, self.c_plus, self.c_minus, *pairs[0], *pairs[1])

    @property
    def facts(self) -> frozenset[str]:
        return frozenset({self.domain})

    def base(self, of: Channels, b: Batch) -> Tensor:
        """log w: [B]."""
        some_B = b.mask_BT.any(1).to(of.length_B.dtype)
        group, domain = (_Level(*b.index(unit), some_B, of.length_B) for unit in ("group_B", self.domain))
        own = self.c_plus, self.c_minus
        found_B = torch.zeros_like(of.plus_B)
        for i, (sign, here_B) in enumerate(((1, of.plus_B), (-1, of.minus_B))):
            group_B, domain_B = group.mean(here_B), domain.mean(here_B)
            found_B = found_B + sign * (
                rollback(domain_B, (self.domain_budgets or own)[i], domain.length_B)
                + rollback(group_B - domain_B, (self.group_budgets or own)[i], group.length_B)
                + rollback(here_B - group_B, own[i], of.length_B)
            )
        return found_B

    def __call__(self, log_BT: Tensor, b: Batch) -> Tensor:
        of = channels(log_BT, b)
        return (self.base(of, b)[:, None] + residual(log_BT, of, self.eps)).exp()

    def report(self, log_BT: Tensor, b: Batch) -> dict[str, Tensor]:
        return gate_report(self, log_BT, b)


class _Level:
    """Statistics of the trajectories with tokens in each group or domain, read off at every row."""

    def __init__(self, index_B: Tensor, count: int, some_B: Tensor, length_B: Tensor) -> None:
        self.index_B, self.count, self.some_B = index_B, count, some_B
        self.size_B = self.sum(some_B).clamp(min=1)
        self.length_B = self.sum(some_B * length_B).clamp(min=1)

    def sum(self, value_B: Tensor) -> Tensor:
        """Sum over the row's unit: [B]."""
        return value_B.new_zeros(self.count).index_add(0, self.index_B, value_B)[self.index_B]

    def mean(self, value_B: Tensor) -> Tensor:
        """Mean over the unit's trajectories: [B]."""
        return self.sum(value_B * self.some_B) / self.size_B


def gate_report(gate: Fiber | FiberDomain, log_BT: Tensor, b: Batch) -> dict[str, Tensor]:
    """Aggregates, base weight, residual and gated ratio."""
    of = channels(log_BT, b)
    return {
        "log_s_plus": of.plus_B,
        "log_s_minus": of.minus_B,
        "log_base_weight": gate.base(of, b),
        "log_fiber_residual": residual(log_BT, of, gate.eps),
        "gated_ratio": gate(log_BT, b),
    }


# -- a budget per state -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class StateBudget(Part):
    """APC-Obj: the tokens sampled in one state share a budget of total variation (arXiv 2603.08239, Eqs. 2-3).

    G_i = 1 + clip(rho_i - 1, +-max(B_i, 0)),   B_i = T_s delta - sum over the state's other tokens of |rho_j - 1|

    The budget moves with the others' ratios and is differentiated. A state visited once gets clip(rho - 1, +-delta).
    """

    stage: ClassVar[str] = "gate"
    scope: ClassVar[str] = "batch"
    delta: float = 0.2
    """Budget per token."""

    def __post_init__(self) -> None:
        check_budgets(self.delta)

    reads = frozenset({"state_BT"})

    def budget(self, log_BT: Tensor, b: Batch) -> Tensor:
        """B_i, not yet cut at 0: [B, T]."""
        mask_BT = b.mask_BT.to(log_BT.dtype)
        _, index_BT = torch.unique(b["state_BT"], return_inverse=True)
        away_BT = (ratio(log_BT) - 1).abs() * mask_BT
        none_S = log_BT.new_zeros(int(index_BT.max()) + 1 if index_BT.numel() else 0)
        count_S = none_S.index_add(0, index_BT.flatten(), mask_BT.flatten())
        away_S = none_S.index_add(0, index_BT.flatten(), away_BT.flatten())
        return count_S[index_BT] * self.delta - (away_S[index_BT] - away_BT)

    def __call__(self, log_BT: Tensor, b: Batch) -> Tensor:
        width_BT = self.budget(log_BT, b).clamp(min=0)
        return 1 + torch.maximum(torch.minimum(ratio(log_BT) - 1, width_BT), -width_BT)

    def report(self, log_BT: Tensor, b: Batch) -> dict[str, Tensor]:
        return {"budget": self.budget(log_BT, b), "gated_ratio": self(log_BT, b)}


_MIX = (-7046029254386353131, -4658895280553007687, 7046029254386353087)
"""Odd 64-bit constants for scrambling."""


def scramble(x: Tensor, salt: int) -> Tensor:
    """A hash of whole numbers, int64 with wrap-around."""
    x = (x + 1) * _MIX[salt]
    x = (x ^ (x >> 31)) * _MIX[2]
    return x ^ (x >> 29)


@dataclass(frozen=True)
class PrefixState(Part):
    """state_BT: the same id where task and all tokens before are the same, i.e. one state of the text."""

    stage: ClassVar[str] = "signals"

    reads = frozenset({"tokens_BT", "real_BT", "task_B"})
    writes = frozenset({"state_BT"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        at_T = torch.arange(b.T, device=b.tokens_BT.device)
        token_BT = scramble(scramble(b.tokens_BT, 0) + scramble(at_T, 1), 0) * b.real_BT
        before_BT = token_BT.cumsum(1) - token_BT + scramble(b["task_B"], 1)[:, None]
        return b.put(state_BT=torch.unique(before_BT + scramble(at_T, 0), return_inverse=True)[1])
