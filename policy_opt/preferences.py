"""Preferences: losses over pairs of trajectories, and what the descendants of DPO share.

A trajectory is one action here: its log-prob is the sum over its policy tokens, over all of its rows where its record
has several segments. Pairs (pairs_P2: preferred, other) come with the data or from `policy_opt.pairs`. A loss is the
mean over the mini-batch's pairs, 0 where there are none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from policy_opt.bank import WITH_REFERENCE
from policy_opt.batch import Batch
from policy_opt.need import LOGP, LOGP_REF
from policy_opt.part import Ctx, Part
from policy_opt.state import Store
from policy_opt.surrogates import Streams

_PAIRED = frozenset({"pairs_P2"})


def whole(b: Batch, value_B: Tensor) -> Tensor:
    """Sum over the rows of each trajectory, on each of its rows: [B]."""
    if not b.branched:
        return value_B
    root_B = b.roots()
    return torch.zeros_like(value_B).index_add(0, root_B, value_B)[root_B]


def lengths(b: Batch, like: Tensor) -> Tensor:
    """Policy tokens of each trajectory, in the dtype of `like`: [B]."""
    return whole(b, b.mask_BT.sum(1)).to(like.dtype)


def log_ratios(s: Streams, b: Batch, length_normalised: bool = False) -> Tensor:
    """s(y) = sum_t m (logp - logp_ref), or its mean over the policy tokens; 0 for a row without any: [B]."""
    found_B = whole(b, ((s["logp_BT"] - b["logp_ref_BT"]) * b.mask_BT).sum(1))
    return found_B / lengths(b, found_B).clamp(min=1) if length_normalised else found_B


def contrast(b: Batch, value_B: Tensor) -> Tensor:
    """A row quantity of the preferred minus that of the other: [P]."""
    better_P, worse_P = b["pairs_P2"].unbind(1)
    return value_B[better_P] - value_B[worse_P]


def logistic(margin_P: Tensor, label_P: Tensor | float = 1.0) -> Tensor:
    """-[l log sigmoid(d) + (1 - l) log sigmoid(-d)]: cross-entropy of a preference that holds with probability l."""
    return -(label_P * logsigmoid(margin_P) + (1 - label_P) * logsigmoid(-margin_P))


def mean_over_pairs(loss_P: Tensor) -> Tensor:
    """The mean, 0 without pairs."""
    return loss_P.sum() / max(loss_P.numel(), 1)


@dataclass(frozen=True)
class LogisticPairs(Part):
    """DPO: -log sigmoid(beta Delta), Delta = s(y_w) - s(y_l), per pair. Rafailov et al. 2023, arXiv 2305.18290."""

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "batch"
    gives: ClassVar[str] = ""
    beta: float = 0.1
    """Strength of the pull to the reference: small lets the policy go far."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong (cDPO): the pair counts the other way round with this weight."""
    length_normalised: bool = False
    """s as a mean per token ("sigmoid_norm" in TRL)."""
    soft_labels: bool = False
    """Take each pair's probability of being right from label_P (see `DynamicLabels`)."""

    def __post_init__(self) -> None:
        if self.beta <= 0 or not 0 <= self.label_smoothing <= 0.5:
            raise ValueError(f"beta > 0, label_smoothing in [0, 0.5], not {self.beta}, {self.label_smoothing}")

    def check(self) -> None:
        if self.soft_labels and self.label_smoothing:
            raise ValueError("soft_labels and label_smoothing both say how sure a label is; set one, not both")

    needs = LOGP, LOGP_REF
    models = WITH_REFERENCE

    @property
    def reads(self) -> frozenset[str]:
        return _PAIRED | {"label_P"} if self.soft_labels else _PAIRED

    def delta(self, s: Streams, b: Batch) -> Tensor:
        """Delta: [P]."""
        return contrast(b, log_ratios(s, b, self.length_normalised))

    def losses(self, s: Streams, b: Batch) -> Tensor:
        """Per pair: [P]."""
        label_P = b["label_P"] if self.soft_labels else 1 - self.label_smoothing
        return logistic(self.beta * self.delta(s, b), label_P)

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        return mean_over_pairs(self.losses(s, b))

    def report(self, s: Streams, b: Batch) -> dict[str, Tensor]:
        return said(self.beta, log_ratios(s, b), self.beta * self.delta(s, b))


@dataclass(frozen=True)
class SquaredPairs(Part):
    """IPO: (h - 1 / (2 tau))^2, h = s(y_w)/|y_w| - s(y_l)/|y_l|, per pair. Azar et al. 2023, arXiv 2310.12036, Eq. 17.

    The margin has a target, so a pair that is told apart well enough stops pulling.
    """

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "batch"
    gives: ClassVar[str] = ""
    tau: float = 0.1
    """The target margin is 1 / (2 tau) nats: per token, or per sequence without length_normalised."""
    length_normalised: bool = True
    """As in TRL, and by its comment in the authors' runs; False: Eq. 17 as printed."""

    def __post_init__(self) -> None:
        if self.tau <= 0:
            raise ValueError(f"tau must be positive, not {self.tau}")

    needs = LOGP, LOGP_REF
    models = WITH_REFERENCE
    reads = _PAIRED

    def delta(self, s: Streams, b: Batch) -> Tensor:
        """h: [P]."""
        return contrast(b, log_ratios(s, b, self.length_normalised))

    def losses(self, s: Streams, b: Batch) -> Tensor:
        """Per pair: [P]."""
        return (self.delta(s, b) - 1 / (2 * self.tau)).square()

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        return mean_over_pairs(self.losses(s, b))

    def report(self, s: Streams, b: Batch) -> dict[str, Tensor]:
        return said(self.tau, log_ratios(s, b), self.tau * self.delta(s, b))


def said(beta: float, log_ratio_B: Tensor, margin_P: Tensor) -> dict[str, Tensor]:
    """What a pair loss reports: implicit rewards, margins, and the share of pairs that the policy has right."""
    return {
        "log_ratio": log_ratio_B,
        "implicit_reward": beta * log_ratio_B,
        "margin_P": margin_P,
        "preferred_P": margin_P > 0,
    }


@dataclass(frozen=True)
class DynamicLabels(Part):
    """label_P: each pair's probability of being right, moved after every visit towards what the policy says of it.

        l <- (1 - gamma) l + gamma sigmoid(d)          after the loss, d = the loss's margin, detached; at first l = 1

    Labels are kept by pair (group, seat, members) and so live across epochs. Rashidinejad and Tian 2024, arXiv
    2412.09544: a pair whose label contradicts what the model persistently believes loses its gradient.
    """

    stage: ClassVar[str] = "credit"
    when: ClassVar[Literal["rollout", "step"]] = "step"
    gamma: float = 0.1
    """Share of the way per visit; 0: labels stay."""
    capacity: int = 100_000
    """Labels kept; those of the lowest group ids, the oldest, go first."""

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1 or self.capacity < 1:
            raise ValueError(f"gamma in [0, 1] and capacity >= 1, not {self.gamma}, {self.capacity}")

    reads = frozenset({"pairs_P2", "group_B", "seat_B", "member_B"})
    writes = frozenset({"label_P"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        label_P = self.store(ctx).column(self.keys(b), missing=1.0)
        return b.put(label_P=label_P.to(b.logp_sampler_BT.dtype))

    def store(self, ctx: Ctx) -> Store:
        """Pair -> label."""
        return ctx.state(self).setdefault("labels", Store())

    def keys(self, b: Batch) -> Tensor:
        """A number per pair that is the same whenever these two trajectories meet: [P]."""
        better_P, worse_P = b["pairs_P2"].unbind(1)
        unit_P = b["group_B"][better_P] * 64 + b["seat_B"][better_P]
        return (unit_P * 4096 + b["member_B"][better_P]) * 4096 + b["member_B"][worse_P]

    def after_step(self, b: Batch, ctx: Ctx) -> None:
        """Move the labels; a step whose loss had no margins leaves them."""
        if "margin_P" not in ctx.step_reports:
            return
        belief_P = ctx.step_reports["margin_P"].sigmoid()
        moved_P = (1 - self.gamma) * b["label_P"] + self.gamma * belief_P
        store = self.store(ctx)
        for key, label in zip(self.keys(b).tolist(), moved_P.tolist(), strict=True):
            store.put(key, label)
        if len(store) > self.capacity:
            for key in sorted(store.values)[: -self.capacity]:
                del store.values[key]
