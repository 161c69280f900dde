"""MinPRO: Minimum Prefix Ratio. Lei et al. 2026, arXiv 2601.22718.

The off-policy gradient weighs a token by the product of all ratios up to it; that product is replaced by the
smallest earlier ratio times the token's own. CISPO otherwise: a detached, capped weight, and no token cut off.

    rho_t  = exp(logp - logp_behaviour),   low_t = min over earlier policy tokens j < t of rho_j;   1 for the first
    w_t    = sg[ clip(low_t rho_t, 1 - eps_low, 1 + eps_high) ]
    L      = - sum_{i,t} m w_{i,t} A_i logp_{i,t} / sum_{i,t} m,   A_i as in GRPO

The behaviour policy is logp_old, stored with the data: stale once the batch has been stepped on, or replayed. low_t
is not capped at 1. The prefix runs across the turns of a trajectory; `--set terms.prefix=turn` starts it anew.
As a gate, `minpro.prefix_min`, the prefix can stand in other surrogates too.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from policy_opt.advantages import GroupNorm
from policy_opt.aggregate import TokenMean
from policy_opt.batch import Batch
from policy_opt.gates import CappedWeight
from policy_opt.mapping import reported
from policy_opt.part import Part
from policy_opt.recipe import Recipe
from policy_opt.schedule import Schedule, Step
from policy_opt.surrogates import LOG_PRODUCT_LIMIT, ratio
from policy_opt.terms import Term
from policy_opt.vectors import Vectors


def earlier_min(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Smallest x of the row's earlier masked tokens, 0 where there is none: [B, T]."""
    low_BT = torch.where(mask_BT, x_BT, torch.inf).cummin(1).values
    before_BT = torch.nn.functional.pad(low_BT[:, :-1], (1, 0), value=torch.inf)
    return torch.where(before_BT == torch.inf, 0, before_BT)


@dataclass(frozen=True)
class PrefixMin(Part):
    """G = low rho, low = the smallest earlier ratio, 1 for a first token."""

    stage: ClassVar[str] = "gate"
    scope: ClassVar[str] = "row"
    prefix: Literal["trajectory", "turn"] = "trajectory"
    """What the earlier tokens are earlier tokens of."""

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"turn_BT"} if self.prefix == "turn" else ())

    def lowest(self, log_BT: Tensor, b: Batch) -> Tensor:
        """log of the smallest earlier ratio, 0 for a first token: [B, T]."""
        if self.prefix == "trajectory":
            return earlier_min(log_BT, b.mask_BT)
        # Each turn is lifted above all later ones, so that the running minimum forgets what was before it.
        turn_BT, span = b["turn_BT"], 1 + 2 * log_BT.detach().abs().amax(1, keepdim=True)
        lift_BT = -span * turn_BT
        first_BT = torch.where(b.mask_BT, turn_BT, -1).cummax(1).values
        before_BT = torch.nn.functional.pad(first_BT[:, :-1], (1, 0), value=-1) == turn_BT
        return torch.where(before_BT, earlier_min(log_BT + lift_BT, b.mask_BT) - lift_BT, 0)

    def __call__(self, log_BT: Tensor, b: Batch) -> Tensor:
        return ratio(self.lowest(log_BT, b) + log_BT, LOG_PRODUCT_LIMIT)

    def report(self, log_BT: Tensor, b: Batch) -> dict[str, Tensor]:
        return {"prefix_min_ratio": ratio(self.lowest(log_BT, b)), "unclipped_weight": self(log_BT, b)}


recipe = Recipe(
    slug="minpro",
    title="capped weight: the smallest earlier ratio times the token's own, for stale data",
    level="token",
    cite="Lei et al. 2026, arXiv 2601.22718",
    evidence="idea read in the abstract; objective, stop-gradient and clip in a secondary summary; no code found",
    deviations="clip widths are CISPO's: the paper's were not found",
    advantage=(GroupNorm(eps=1e-6, ddof=1),),
    terms=(Term(CappedWeight(clip_low=1.0, clip_high=0.28, gate=PrefixMin()), agg=TokenMean()),),
    schedule=Schedule((Step(minibatches=4),)),
    vectors=Vectors(
        outputs=reported("prefix_min_ratio", "unclipped_weight", "is_weight"),
    ),
)
