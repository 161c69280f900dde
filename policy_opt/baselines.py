"""Baselines and scales beside the group's mean and standard deviation: medians, absolute deviations, a level
for the whole prompt, one advantage per score.

As in `policy_opt.advantages`, groups are keyed by id and a trajectory counts once.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from math import log
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from policy_opt.advantages import Groups, groups
from policy_opt.batch import Batch, floating
from policy_opt.errors import BatchError
from policy_opt.part import Ctx, Part, run


def starts(b: Batch, *units: str) -> tuple[Tensor, Tensor]:
    """(the first row of each trajectory, sorted by group and then by `units`; its group number): [N]."""
    row_B = b.order("group_B", *units)
    row_N = row_B[b.once()[row_B]] if b.branched else row_B
    return row_N, b.index()[0][row_N]


def lower_median(b: Batch, g: Groups, value_B: Tensor) -> Tensor:
    """The element of rank floor((n - 1) / 2) of each group's trajectories, never a midpoint: [Q]."""
    row_N = b.once().nonzero().squeeze(1)
    row_N = row_N[value_B[row_N].argsort(stable=True)]
    row_N = row_N[g.index_B[row_N].argsort(stable=True)]
    size_Q = g.size_Q.long()
    at_Q = size_Q.cumsum(0) - size_Q + (size_Q - 1).clamp(min=0) // 2
    return value_B[row_N[at_Q.clamp(max=row_N.numel() - 1)]]


def spread(g: Groups) -> Tensor:
    """Sample standard deviation of each group's rewards, 0 for a group of one: [Q]."""
    return (g.sums(g.centred_B.square()) / (g.size_Q - 1).clamp(min=1)).sqrt()


def share(g: Groups, value_B: Tensor, eps: float) -> Tensor:
    """G x_i / (sum_g |x| + eps): the absolute values of a group sum to its size: [B]."""
    return value_B * (g.size_Q / (g.sums(value_B.abs()) + eps))[g.index_B]


@dataclass(frozen=True)
class MedianCentre(Part):
    """A_i = (R_i - median_g R) / (scale_g + eps), and pivot_B: one median-valued trajectory of each group.

    The median is the lower one, an element of the group, so its own advantage is exactly 0. With binary
    rewards the median absolute deviation is 0 and the minority gets +-1 / eps: with the default eps the method
    relies on an optimizer that is free of scale, or on clipping of the gradient's norm.
    Kim 2026, arXiv 2601.22582.
    """

    stage: ClassVar[str] = "advantage"
    eps: float = 1e-3
    scale: Literal["mad", "std", "none"] = "mad"
    """mad: median absolute deviation from the median (no factor 1.4826); std: sample standard deviation; none:
    1, without eps."""
    rescale: bool = False
    """Multiply a group's advantages by its size / how many of them are not 0 (|A| > 1e-6)."""
    pivot: Literal["first", "torch"] = "first"
    """Which of several median-valued members is the pivot: the lowest member, or the one whose index
    torch.median gives, as in the released code."""

    def check(self) -> None:
        if self.eps <= 0:
            raise ValueError(f"eps must be positive, not {self.eps}")

    reads = frozenset({"reward_B", "group_B", "member_B"})
    writes = frozenset({"adv_B", "pivot_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        g = groups(b)
        even = int((g.size_Q % 2 == 0).sum())
        if even:
            warnings.warn(f"{ctx.recipe}: {even} groups of even size take the lower median", stacklevel=2)
        centre_Q, scale_Q = self.statistics(b)
        eps = 0.0 if self.scale == "none" else self.eps
        adv_B = (g.reward_B - centre_Q[g.index_B]) / (scale_Q + eps)[g.index_B]
        if self.rescale:
            some_Q = g.sums((adv_B.abs() > 1e-6).to(adv_B.dtype))
            factor_B = (g.size_Q / some_Q.clamp(min=1))[g.index_B]
            adv_B = torch.where(adv_B.abs() > 1e-6, adv_B * factor_B, adv_B)
        return b.put(adv_B=adv_B, pivot_B=self.pivots(b, g))

    def statistics(self, b: Batch) -> tuple[Tensor, Tensor]:
        """Median of each group's rewards, and their scale, 1 where it is none: [Q], [Q]."""
        g = groups(b)
        centre_Q = lower_median(b, g, g.reward_B)
        if self.scale == "none":
            return centre_Q, torch.ones_like(centre_Q)
        gap_B = (g.reward_B - centre_Q[g.index_B]).abs()
        return centre_Q, lower_median(b, g, gap_B) if self.scale == "mad" else spread(g)

    def pivots(self, b: Batch, g: Groups) -> Tensor:
        """True on all rows of one trajectory per group whose reward is the group's median: [B]."""
        pivot_B = torch.zeros(b.B, dtype=torch.bool, device=g.index_B.device)
        row_N, group_N = starts(b, "member_B")
        if self.pivot == "first":
            at_N = (g.reward_B == lower_median(b, g, g.reward_B)[g.index_B])[row_N]
            row_N, group_N = row_N[at_N], group_N[at_N]
            first_N = torch.ones_like(group_N, dtype=torch.bool)
            first_N[1:] = group_N[1:] != group_N[:-1]
            pivot_B[row_N[first_N]] = True
        else:
            # torch.median's choice depends on the whole row, so groups of one size go together, unpadded.
            size_N = g.size_Q[group_N]
            for size in size_N.unique():
                row_QG = row_N[size_N == size].view(-1, int(size))
                at_Q1 = g.reward_B[row_QG].median(1, keepdim=True).indices
                pivot_B[row_QG.gather(1, at_Q1)] = True
        return pivot_B[b.roots()] if b.branched else pivot_B


@dataclass(frozen=True)
class Balanced(Part):
    """A_i = G (R_i - mean_g R) / (sum_g |R - mean_g R| + eps): every group's |A| sum to its size.

    Division by the mean absolute deviation: groups of every difficulty have the same weight. DGAE of Dai et
    al. 2026, arXiv 2601.20614.
    """

    stage: ClassVar[str] = "advantage"
    eps: float = 1e-4

    def check(self) -> None:
        if self.eps <= 0:
            raise ValueError(f"eps must be positive, not {self.eps}")

    reads = frozenset({"reward_B", "group_B"})
    writes = frozenset({"adv_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        g = groups(b)
        return b.put(adv_B=share(g, g.centred_B, self.eps))


@dataclass(frozen=True)
class PromptNorm(Part):
    """One advantage for all rows of a prompt: its mean reward, standardised over the prompts of the batch.

    R_q = c_q mean_g R;  A_q = (R_q - mean_Q R) / (std_Q R + eps), every prompt counted once, std over Q - 1;
    0 where the batch has one prompt. It is written as adv_prompt_B. Han et al. 2025, arXiv 2508.04138.
    """

    stage: ClassVar[str] = "advantage"
    eps: float = 1e-6
    by_consistency: bool = False
    """c_q = 1 - H_q (1 - 1/n) / log2 n, with the entropy H_q of the prompt's answers in bits: 1 where all n
    agree, 1/n where all differ. False: c_q = 1."""

    def check(self) -> None:
        if self.eps <= 0:
            raise ValueError(f"eps must be positive, not {self.eps}")

    @property
    def reads(self) -> frozenset[str]:
        entropy = {"answer_entropy_B"} if self.by_consistency else set()
        return frozenset({"reward_B", "group_B", *entropy})

    writes = frozenset({"adv_prompt_B", "prompt_reward_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        g = groups(b)
        mean_Q = g.sums(g.reward_B) / g.size_Q
        if self.by_consistency:
            n_Q = g.size_Q
            # A group of one agrees with itself: no division by log2 1.
            slope_Q = torch.where(n_Q > 1, (1 - 1 / n_Q) / n_Q.clamp(min=2).log2(), 0)
            entropy_Q = torch.empty_like(n_Q).index_copy_(0, g.index_B, b["answer_entropy_B"].to(n_Q.dtype))
            mean_Q = mean_Q * (1 - slope_Q * entropy_Q)
        gap_Q = mean_Q - mean_Q[:1]
        gap_Q = gap_Q - gap_Q.mean()
        std = (gap_Q.square().sum() / max(gap_Q.numel() - 1, 1)).sqrt()
        return b.put(adv_prompt_B=(gap_Q / (std + self.eps))[g.index_B], prompt_reward_B=mean_Q[g.index_B])


class Answers(NamedTuple):
    """The different answers of every group."""

    index_B: Tensor
    """Number of each row's answer among those of all groups."""
    group_A: Tensor
    """Group number of each answer, as in b.index()."""
    share_A: Tensor
    """Share of the group's trajectories that gave it."""


def answers(b: Batch, answer_B: Tensor) -> Answers:
    """Rows of a group with the same number in answer_B (int64) gave the same answer; a trajectory counts once."""
    once_B = b.once().to(b.logp_sampler_BT.dtype)
    index_B = b.index()[0]
    pair_A2, answer_B = torch.unique(torch.stack([index_B, answer_B], 1), dim=0, return_inverse=True)
    group_A = pair_A2[:, 0]
    return Answers(answer_B, group_A, torch.bincount(answer_B, once_B) / torch.bincount(index_B, once_B)[group_A])


@dataclass(frozen=True)
class AnswerEntropy(Part):
    """Entropy in bits of the final answers of each group: -sum p log2(p + eps), p = share of an answer.

    Rows without an answer (answer_B = -1) count as one more answer: they agree that there is none.
    """

    stage: ClassVar[str] = "signals"
    eps: float = 1e-8

    facts = frozenset({"answer_B"})
    reads = frozenset({"group_B"})
    writes = frozenset({"answer_entropy_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        of, (index_B, count) = answers(b, b["answer_B"].long()), b.index()
        bits_A = -torch.xlogy(of.share_A, of.share_A + self.eps) / log(2)
        return b.put(answer_entropy_B=bits_A.new_zeros(count).index_add_(0, of.group_A, bits_A)[index_B])


@dataclass(frozen=True)
class PerScore(Part):
    """A = mean over the scores k of the advantage that `each` gives with scores_BK[:, k] as the reward.

    Scores keep their own baselines and scales, instead of being summed before (advantage decomposition, Xiao
    et al. 2025, arXiv 2506.02864).
    """

    stage: ClassVar[str] = "advantage"
    each: tuple[Part, ...] = ()
    """Advantage parts, run once per score; the last one leaves adv_B."""

    def check(self) -> None:
        if "adv_B" not in frozenset().union(*(part.writes for part in self.each)):
            raise ValueError("none of its parts writes adv_B")

    @property
    def facts(self) -> frozenset[str]:
        return frozenset().union(*(part.facts for part in self.each))

    @property
    def reads(self) -> frozenset[str]:
        names: frozenset[str] = frozenset().union(*(part.reads for part in self.each))
        return (names - {"reward_B", "adv", "adv_B"}) | {"scores_BK"}

    writes = frozenset({"adv_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        scores_BK = floating(b["scores_BK"])
        if not scores_BK.shape[1]:
            raise BatchError(f"scores_BK has shape {tuple(scores_BK.shape)}: there is no score")
        found = []
        for k in range(scores_BK.shape[1]):
            one = b.over(reward_B=scores_BK[:, k])
            for i, part in enumerate(self.each):
                one = run(f"each.{i}", part, one, ctx)
            found.append(one["adv_B"])
        return b.put(adv_B=torch.stack(found).mean(0))
