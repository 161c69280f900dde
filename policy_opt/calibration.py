"""Calibration: advantages from how confident right and wrong answers of a question are (CAPO: Wang et al. 2026,
arXiv 2604.12632). A trajectory's confidence is the mean log-prob of its tokens, over all rows that it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from policy_opt.bank import WITH_REFERENCE
from policy_opt.batch import Batch, side_by_side
from policy_opt.credits import weigh
from policy_opt.need import LOGP_OLD, LOGP_REF
from policy_opt.part import Ctx, Part
from policy_opt.preferences import lengths, whole


def mean_logp(b: Batch, logp_BT: Tensor) -> Tensor:
    """Mean log-prob of the trajectory's policy tokens, 0 where it has none; the same on all its rows: [B]."""
    total_B = whole(b, torch.where(b.mask_BT, logp_BT, 0).sum(1))
    return total_B / lengths(b, total_B).clamp(min=1)


@dataclass(frozen=True)
class RankPairs(Part):
    """The AUC of confidence as an advantage: every pair of a right and a wrong answer of a group pulls apart.

        A_i = c sum_(j wrong) w(c_i - c_j)  for a right i,   A_j = -c sum_(i right) w(c_i - c_j)  for a wrong j
        w(x) = sigmoid(-x / tau) / tau      -phi' of phi(x) = log(1 + exp(-x / tau)); c_i: mean log-prob

    Largest where the wrong answer is the more confident one; sum_g A = 0; 0 without a partner.
    """

    stage: ClassVar[str] = "advantage"
    tau: float = 0.6
    """Temperature: differences of mean log-prob much larger than it no longer count."""
    norm: Literal["group", "sum"] = "group"
    """c: 1 / members of the group, or 1."""
    pairs: Literal["logistic", "linear"] = "logistic"
    """linear: w = 1, which with norm=group is R - mean_g R (Dr. GRPO)."""

    def check(self) -> None:
        if self.tau <= 0:
            raise ValueError(f"tau must be positive, not {self.tau}")

    needs = (LOGP_OLD,)
    reads = frozenset({"correct_B", "group_B"})
    writes = frozenset({"confidence_B", "adv_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        sure_B = mean_logp(b, b["logp_old_BT"])
        rows_QG, there_QG = side_by_side(*b.index(), b.once())
        right_QG = there_QG & (b["correct_B"] > 0.5)[rows_QG]
        wrong_QG = there_QG & ~right_QG
        sure_QG = sure_B[rows_QG]
        gap_QGG = (sure_QG[:, :, None] - sure_QG[:, None, :]) / self.tau
        pull_QGG = torch.sigmoid(-gap_QGG) / self.tau if self.pairs == "logistic" else torch.ones_like(gap_QGG)
        pull_QGG = torch.where(right_QG[:, :, None] & wrong_QG[:, None, :], pull_QGG, 0)
        adv_QG = pull_QGG.sum(2) - pull_QGG.sum(1)
        if self.norm == "group":
            adv_QG = adv_QG / there_QG.sum(1, keepdim=True).clamp(min=1)
        adv_B = torch.zeros_like(sure_B).index_copy_(0, rows_QG[there_QG], adv_QG[there_QG])
        return b.put(confidence_B=sure_B, adv_B=adv_B[b.roots()] if b.branched else adv_B)


@dataclass(frozen=True)
class ReferenceFilter(Part):
    """Drops right answers that the reference finds too unlikely (lucky) and wrong ones that it finds too likely.

    w = 1 where exp(-mean log-prob under the reference) is <= high for right, >= low for wrong answers, else 0.
    The thresholds are quartiles of the base model that they were chosen for; `ref_ppl_q25` and `ref_ppl_q75`
    are logged to choose them for another.
    """

    stage: ClassVar[str] = "credit"
    high: float = 2.5
    """Largest reference perplexity of a right answer that counts."""
    low: float = 1.05
    """Smallest reference perplexity of a wrong answer that counts."""

    needs = (LOGP_REF,)
    models = WITH_REFERENCE
    reads = frozenset({"correct_B"})
    writes = frozenset({"ref_ppl_B"})
    overwrites = frozenset({"w_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        ppl_B = (-mean_logp(b, b["logp_ref_BT"])).exp()
        known_B = ppl_B[b.once() & b.mask_BT.any(1)].double().nan_to_num(posinf=1e300)
        for name, share in (("ref_ppl_q25", 0.25), ("ref_ppl_q75", 0.75)) if known_B.numel() else ():
            ctx.log(name, float(known_B.quantile(share, interpolation="nearest")))
        keep_B = torch.where(b["correct_B"] > 0.5, ppl_B <= self.high, ppl_B >= self.low)
        return weigh(b.put(ref_ppl_B=ppl_B), keep_B.to(ppl_B.dtype))
