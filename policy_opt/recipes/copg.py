"""CoPG: Contrastive Policy Gradient. Flet-Berliac et al. 2024, arXiv 2406.19185.

Any two responses to a prompt should differ in log-ratio as they differ in reward: a squared loss, right on policy and
off it, without importance weights.

    u_i  = sum_t m (logp - logp_ref)                                             log-ratio of the trajectory
    Rb_i = R_i - beta u_i
    L    = scale mean_g 1/(k-1) sum_{i>j in g} (Rb_i - Rb_j)^2                   k members of the group
    dL/du_i = -2 beta scale/G A_i,    A_i = k/(k-1) (Rb_i - mean_g Rb)           RLOO on the regularised reward

`--set terms.scale=unit` is 1 / (2 beta): the gradient is then RLOO's. With k = 2 and R = +-1/2 it is IPO. A group of
one has no pair: it adds 0, and counts in G. There is no other form: the sources name no mean over pairs instead of
prompts, no division of u by length, no clip; tokens of tools are outside u.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from policy_opt.advantages import Groups, groups
from policy_opt.bank import WITH_REFERENCE
from policy_opt.batch import Batch, floating
from policy_opt.need import LOGP, LOGP_REF
from policy_opt.part import Part
from policy_opt.preferences import log_ratios
from policy_opt.recipe import Recipe
from policy_opt.surrogates import Streams
from policy_opt.terms import Term
from policy_opt.vectors import Vectors


@dataclass(frozen=True)
class RewardContrast(Part):
    """Squared differences of regularised rewards inside each group, 1/(k-1) of their sum, mean over groups."""

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "batch"
    gives: ClassVar[str] = ""
    beta: float = 0.05
    """Strength of the pull to the reference; the optimum is pi_ref exp(R / beta)."""
    scale: float | Literal["unit"] = 1.0
    """Factor on the loss; unit: 1 / (2 beta)."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, not {self.beta}")

    needs = LOGP, LOGP_REF
    models = WITH_REFERENCE
    reads = frozenset({"reward_B", "group_B"})

    def regularised(self, s: Streams, b: Batch) -> Tensor:
        """Rb: [B]."""
        return floating(b["reward_B"]) - self.beta * log_ratios(s, b)

    def groups(self, s: Streams, b: Batch) -> tuple[Groups, Tensor]:
        """Rb as deviations from its group's mean, and k/(k-1) per group, 0 for a group of one: [Q]."""
        g = groups(b.over(reward_B=self.regularised(s, b)))
        return g, torch.where(g.size_Q > 1, g.size_Q / (g.size_Q - 1).clamp(min=1), 0)

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        g, share_Q = self.groups(s, b)
        scale = 1 / (2 * self.beta) if self.scale == "unit" else self.scale
        # sum over pairs of squared differences = k * sum of squared deviations.
        return scale * (share_Q * g.sums(g.centred_B.square())).mean()

    def report(self, s: Streams, b: Batch) -> dict[str, Tensor]:
        g, share_Q = self.groups(s, b)
        return {
            "log_ratio": log_ratios(s, b),
            "regularised_reward": g.reward_B,
            "contrast": share_Q[g.index_B] * g.centred_B,
        }


recipe = Recipe(
    slug="copg",
    title="squared loss on differences of regularised rewards inside a group, right off policy too",
    level="trajectory",
    cite="Flet-Berliac et al. 2024, arXiv 2406.19185",
    evidence="pair loss, k-sample form and RLOO limit read in secondary summaries; gradient derived and checked",
    deviations="the beta of the paper's runs was not read; mean over prompts, not over pairs",
    reconstructed=True,
    terms=(Term(RewardContrast()),),
    vectors=Vectors(
        params={"beta": "terms.beta", "scale": "terms.scale"},
        outputs={
            "seq_log_ratio": lambda t: t.report("log_ratio"),
            "regularized_reward": lambda t: t.report("regularised_reward"),
            "contrastive_advantage": lambda t: t.report("contrast"),
        },
    ),
)
