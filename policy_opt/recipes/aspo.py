"""ASPO: Advantage Shaping Policy Optimization. Lin & Xu 2025, arXiv 2508.19201 (tool-integrated reasoning).

DAPO that teaches *when* to call a tool without touching what a right answer is worth: the advantage, not the reward,
is moved, and by less than its own size.

    A_i  = (R_i - mean_g R) / (std_g R + 1e-6)                      correctness alone
    S    = {i in g : right and with a tool call},   p_i = tokens before its first call,   L_i = its length
    b_i  = clip(delta (p_i - mean_S p) / mean_S L, -k A_i, k A_i)   for i in S, else 0;   A'_i = A_i + b_i
    l    = max(-A' rho, -A' clip(rho, 1 - eps_low, 1 + eps_high)),   L = sum m l / sum m

delta < 0 favours calls earlier than the group's. With k < 1 a right answer stays better than its group's mean; a
group that is all right gets nothing (shaping the *reward* would there punish about half of the right answers).
p and L count the policy's own tokens. Paper: delta, k = -2.0, 0.7 (conservative) or -2.5, 0.9 (`variant=aggressive`).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from policy_opt.advantages import GroupNorm
from policy_opt.batch import Batch, floating
from policy_opt.mapping import every_group
from policy_opt.part import Ctx, Part
from policy_opt.recipe import Recipe
from policy_opt.recipes.dapo import recipe as DAPO
from policy_opt.vectors import Vectors


@dataclass(frozen=True)
class Earlier(Part):
    """A right answer's advantage moves by delta (x - mean x) / mean scale, at most k |A|; x < 0: it has no x.

    Means are over the group's right answers that have an x. Any statistic of behaviour may stand for x.
    """

    stage: ClassVar[str] = "advantage"
    delta: float = -2.0
    """Negative: smaller x than the group's is better."""
    k: float = 0.7
    """Bound, as a share of the advantage."""
    by: str = "first_call_B"
    """x: a fact of the episode."""
    scale: str = "length_B"

    @property
    def facts(self) -> frozenset[str]:
        return frozenset({self.by})

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({self.scale, "correct_B", "group_B", "adv_B"})

    writes = frozenset({"bias_B"})
    overwrites = frozenset({"adv_B"})

    def check(self) -> None:
        if self.k < 0:
            raise ValueError(f"k is a bound >= 0, not {self.k}")

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        index_B, count = b.index()
        adv_B, x_B = b["adv_B"], floating(b[self.by]).to(b["adv_B"].dtype)
        in_B = (b["correct_B"] > 0.5) & (x_B >= 0)
        counts_B = (in_B & b.once()).to(x_B.dtype)

        def sums(value_B: Tensor) -> Tensor:
            return x_B.new_zeros(count).index_add_(0, index_B, value_B * counts_B)[index_B]

        n_B = sums(torch.ones_like(x_B)).clamp(min=1)
        mean_B = sums(floating(b[self.scale]).to(x_B.dtype)) / n_B
        move_B = self.delta * (x_B - sums(x_B) / n_B) / torch.where(mean_B > 0, mean_B, 1)
        bound_B = self.k * adv_B.clamp(min=0)
        bias_B = torch.where(in_B, torch.minimum(torch.maximum(move_B, -bound_B), bound_B), 0)
        return b.put(bias_B=bias_B).over(adv_B=adv_B + bias_B)


def calls(positions: Any) -> dict[str, Tensor]:
    """The input first_tool_pos; null: no call."""
    return {"first_call_B": torch.tensor([-1.0 if p is None else float(p) for p in positions], dtype=torch.float64)}


recipe: Recipe = DAPO.replace(
    slug="aspo",
    title="DAPO; a right answer's advantage grows where the first tool call came early",
    level="trajectory",
    cite="Lin & Xu 2025, arXiv 2508.19201",
    evidence="read in the paper text (Sec. 3.3 and 4.5); DAPO's own constants are its defaults, not the paper's text",
    deviations="positions and lengths in the policy's own tokens; no penalty on overlong answers",
    reward=(),
    advantage=(GroupNorm(eps=1e-6, ddof=1), Earlier(delta=-2.0, k=0.7)),
    variants={"aggressive": ("advantage.delta=-2.5", "advantage.k=0.9")},
    vectors=Vectors(
        params={
            "delta": "advantage.delta",
            "k": "advantage.k",
        },
        columns={
            "first_tool_pos": calls,
            "response_len": ("length_B",),
            "correct": ("correct_B",),
        },
        adapt=every_group,
        outputs={
            "advantages_correctness": lambda t: t.after(GroupNorm)["adv_B"],
            "bias": lambda t: t["bias_B"],
        },
    ),
)
