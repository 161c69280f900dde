"""NFT: Negative-aware Fine-Tuning. Chen et al. 2025, arXiv 2505.18116.

Supervised learning on right answers, and on wrong ones through an implicit negative policy: the old policy is a
mixture of what it does on right and on wrong answers, with the group's success rate q as the weight.

    q   = success rate of the group, clamped to [0.02, 0.98];   c_i = 1 if i is right, else 0
    R   = exp(min(logp - logp_old, 10))                                        per token, or of the whole sequence
    N   = (1 - q R) / (1 - q)                                                  the negative policy's ratio
    l   = -log sc(R, clamp_positive)  if c = 1,   -neg_weight log sc(N, clamp_negative)  if c = 0
    L   = sum_{i,t} m omega(q) l / 1000,    omega = 1 - q (normalize=1), sqrt((1 - q)/q) (2), 1 (0)

sc(x, lo) has the value max(x, lo) and the gradient of x. On policy, omega = 1 - q gives the gradient of Dr. GRPO and
sqrt((1 - q)/q) that of GRPO. neg_weight = 0 is rejection fine-tuning; the authors' -1 means DAPO: use that recipe.
`--set variant=sequence` has one R per trajectory and no 1000; the authors' code breaks there with normalize 1 or 2
(a [B] loss times a [B, T] weight), here a trajectory has one weight. Groups that are all right or all wrong are
replaced by others.
"""

from dataclasses import dataclass
from math import log
from typing import ClassVar, Literal

import torch
from torch import Tensor

from policy_opt.advantages import groups
from policy_opt.aggregate import ConstantSum
from policy_opt.batch import Batch
from policy_opt.curriculum import Curriculum, Mixed
from policy_opt.mapping import every_group, losses, variant
from policy_opt.need import LOGP, LOGP_OLD
from policy_opt.part import Ctx, Part
from policy_opt.preferences import whole
from policy_opt.recipe import Recipe
from policy_opt.surrogates import Streams, log_ratio
from policy_opt.terms import Term
from policy_opt.vectors import Vectors

LOG_RATIO_MAX = 10.0
"""Above it R is constant."""
FLOOR = 1e-6
"""Where clamp_negative is lower, N is still no less than this inside the logarithm."""


@dataclass(frozen=True)
class SuccessRate(Part):
    """success_rate_B: share of the group's trajectories that are right, kept away from 0 and 1."""

    stage: ClassVar[str] = "advantage"
    low: float = 0.02
    high: float = 0.98

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high < 1:
            raise ValueError(f"0 < low <= high < 1, not {self.low}, {self.high}")

    reads = frozenset({"correct_B", "group_B"})
    writes = frozenset({"success_rate_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        g = groups(b.over(reward_B=(b["correct_B"] > 0.5).to(b.logp_sampler_BT.dtype)))
        rate_Q = (g.sums(g.reward_B) / g.size_Q).clamp(self.low, self.high)
        return b.put(success_rate_B=rate_Q[g.index_B])


@dataclass(frozen=True)
class ImplicitNegative(Part):
    """omega(q) times -log R on right answers, -neg_weight log N on wrong ones, with straight-through clamps."""

    stage: ClassVar[str] = "surrogate"
    ratio_type: Literal["token", "sequence"] = "token"
    """What has a ratio of its own."""
    clamp_negative: float = 1.0
    """Lower bound of N inside the logarithm."""
    clamp_positive: float = 0.0
    """Lower bound of R inside the logarithm."""
    neg_weight: float = 1.0
    """Weight of wrong answers; 0: rejection fine-tuning."""
    normalize: Literal[0, 1, 2] = 1
    """omega: 1: 1 - q; 2: sqrt((1 - q) / q); 0: 1."""

    def __post_init__(self) -> None:
        if min(self.clamp_negative, self.clamp_positive, self.neg_weight) < 0:
            raise ValueError(
                f"clamps and neg_weight are at least 0, not {self.clamp_negative}, {self.clamp_positive}, "
                f"{self.neg_weight}"
            )

    @property
    def scope(self) -> str:
        """A trajectory may have several rows."""
        return "row" if self.ratio_type == "token" else "batch"

    @property
    def gives(self) -> str:
        """A loss per token or per row."""
        return "BT" if self.ratio_type == "token" else "B"

    needs = LOGP, LOGP_OLD
    reads = frozenset({"correct_B", "success_rate_B"})

    def log_r(self, s: Streams, b: Batch) -> Tensor:
        """log R: [B, T] or [B]."""
        gap_BT = log_ratio(s, b)
        gap = gap_BT if self.ratio_type == "token" else whole(b, gap_BT.sum(1))
        return gap.clamp(max=LOG_RATIO_MAX)

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        log_r = self.log_r(s, b)
        q, right = b["success_rate_B"].to(log_r.dtype), b["correct_B"] > 0.5
        if self.ratio_type == "token":
            q, right = q[:, None], right[:, None]
        positive = log_r
        if self.clamp_positive > 0:
            r = log_r.exp()
            held = log(self.clamp_positive) + (r - r.detach()) / self.clamp_positive
            positive = torch.where(r >= self.clamp_positive, log_r, held)
        n = (1 - q * log_r.exp()) / (1 - q)
        bound = n.detach().clamp(min=max(self.clamp_negative, FLOOR))
        negative = bound.log() + (n - n.detach()) / bound
        omega = {0: torch.ones_like(q), 1: 1 - q, 2: ((1 - q) / q).sqrt()}[self.normalize]
        loss = -omega * torch.where(right, positive, self.neg_weight * negative)
        return loss if self.ratio_type == "token" else loss * b.once()

    def report(self, s: Streams, b: Batch) -> dict[str, Tensor]:
        return {"ratio": self.log_r(s, b).exp()}


recipe = Recipe(
    slug="nft",
    title="imitation of right answers, and of an implicit negative policy on wrong ones",
    level="token",
    cite="Chen et al. 2025, arXiv 2505.18116",
    evidence="loss, clamps, weights, success rate and settings read in official code (NVlabs/NFT)",
    deviations="one step per iteration unless set (authors: 16 mini-batches); sequence form has one weight per row",
    curriculum=Curriculum(accept=Mixed()),
    advantage=(SuccessRate(),),
    terms=(Term(ImplicitNegative(), agg=ConstantSum(1000.0)),),
    variants={"sequence": ("terms.ratio_type=sequence", "terms.agg.divisor=1")},
    vectors=Vectors(
        params={
            "ratio_type": variant("token"),
            "clamp_negative": "terms.clamp_negative",
            "clamp_positive": "terms.clamp_positive",
            "neg_weight": "terms.neg_weight",
            "normalize": "terms.normalize",
        },
        adapt=every_group,
        outputs={
            "correct_rate": lambda t: t["success_rate_B"],
            "correct_mask": lambda t: t["correct_B"],
            "per_token_loss": losses,
        },
    ),
)
