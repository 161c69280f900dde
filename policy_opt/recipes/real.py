"""REAL: Rewards as Labels. Zhai et al. 2026, arXiv 2602.05630.

Policy improvement as classification: the length-normalised log-ratio of a sequence is a logit, its reward a label.
No advantage, no clip, no KL.

    s_i = (1/L_i) sum_t m (logp - logp_old)
    L_q = log(1 + sum_{i in P} exp(-s_i / tau)) + log(1 + sum_{j in N} exp(s_j / tau))       P: right, N: wrong
    L   = (1/Q) sum_q L_q,   Q = all prompts; those with one class only add 0

The 1 is an anchor logit 0 that every right answer must beat and every wrong one must stay below. The weights of
either class sum to less than 1 / tau, whatever their number. `--set variant=bce` is the plain form: the mean over
all samples of prompts with both classes of BCE(s / tau, label); `--set variant=product` has no anchor:
softplus(logsumexp_N(s / tau) + logsumexp_P(-s / tau)), derived, as the authors' function raises a NameError.
Trajectories without tokens are left out; groups may differ in size.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from policy_opt.batch import Batch
from policy_opt.need import LOGP, LOGP_OLD
from policy_opt.part import Part
from policy_opt.recipe import Recipe
from policy_opt.schedule import Schedule, Step
from policy_opt.surrogates import Streams, mean_log_ratio
from policy_opt.terms import Term
from policy_opt.vectors import Vectors


class Classes(NamedTuple):
    """Who is right and who is wrong, and which prompts have both."""

    index_B: Tensor
    """Prompt of each row."""
    right_B: Tensor
    wrong_B: Tensor
    both_Q: Tensor
    prompts: Tensor
    """Number of prompts that have any row with tokens, at least 1."""


def log_sum_exp(x_B: Tensor, pick_B: Tensor, of: Classes, anchor: bool) -> Tensor:
    """log of the sum over each prompt's picked rows of exp(x), plus 1 with an anchor; 0 for an empty sum: [Q]."""
    count = of.both_Q.numel()
    held_B = torch.where(pick_B, x_B.detach(), -torch.inf)
    top_Q = held_B.new_full((count,), 0.0 if anchor else -torch.inf).scatter_reduce(0, of.index_B, held_B, "amax")
    top_Q = torch.where(top_Q == -torch.inf, 0, top_Q)
    part_B = torch.where(pick_B, x_B - top_Q[of.index_B], 0).exp() * pick_B
    none_Q = (-top_Q).exp() if anchor else torch.zeros_like(top_Q)
    sum_Q = none_Q.index_add(0, of.index_B, part_B)
    return torch.where(sum_Q > 0, sum_Q, 1).log() + top_Q


@dataclass(frozen=True)
class RewardLabels(Part):
    """Classification of each prompt's sequences into right and wrong by their mean log-ratio."""

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "batch"
    gives: ClassVar[str] = ""
    tau: float = 0.5
    """Temperature of the logits."""
    form: Literal["real", "bce", "product"] = "real"
    above: float = 0.5
    """A reward above it is the label 1."""

    def __post_init__(self) -> None:
        if self.tau <= 0:
            raise ValueError(f"tau must be positive, not {self.tau}")

    needs = LOGP, LOGP_OLD
    reads = frozenset({"reward_B", "group_B"})

    def classes(self, b: Batch) -> Classes:
        """Labels of the rows that have tokens."""
        index_B, count = b.index()
        some_B = b.mask_BT.any(1)
        right_B, wrong_B = some_B & (b["reward_B"] > self.above), some_B & ~(b["reward_B"] > self.above)
        none_Q = torch.zeros(count, dtype=torch.long, device=index_B.device)
        right_Q, wrong_Q = (none_Q.index_add(0, index_B, rows_B.long()) for rows_B in (right_B, wrong_B))
        prompts = (right_Q + wrong_Q > 0).sum().clamp(min=1)
        return Classes(index_B, right_B, wrong_B, (right_Q > 0) & (wrong_Q > 0), prompts)

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        of, logit_B = self.classes(b), mean_log_ratio(s, b) / self.tau
        if self.form == "bce":
            use_B = of.both_Q[of.index_B] & (of.right_B | of.wrong_B)
            each_B = binary_cross_entropy_with_logits(logit_B, of.right_B.to(logit_B.dtype), reduction="none")
            return (each_B * use_B).sum() / use_B.sum().clamp(min=1)
        anchor = self.form == "real"
        right_Q = log_sum_exp(-logit_B, of.right_B, of, anchor)
        wrong_Q = log_sum_exp(logit_B, of.wrong_B, of, anchor)
        each_Q = right_Q + wrong_Q if anchor else softplus(right_Q + wrong_Q)
        return (each_Q * of.both_Q).sum() / of.prompts

    def report(self, s: Streams, b: Batch) -> dict[str, Tensor]:
        return {"score": mean_log_ratio(s, b)}


recipe = Recipe(
    slug="real",
    title="rewards are labels, mean log-ratios are logits: classification with an anchor, per prompt",
    level="sequence",
    cite="Zhai et al. 2026, arXiv 2602.05630",
    evidence="losses and defaults read in the authors' code (Red-RL/REAL core_algos.py); Eq. 8 in their figures",
    deviations="groups may differ in size; rewards above 0.5 are the label 1 (code: exactly 1 or 0)",
    terms=(Term(RewardLabels(tau=0.5)),),
    schedule=Schedule((Step(minibatches=4),)),
    variants={"bce": ("terms.form=bce",), "product": ("terms.form=product",)},
    vectors=Vectors(
        params={"form": "terms.form", "tau": "terms.tau"},
        outputs={
            "scores": lambda t: t.report("score"),
            # s is the mean over a row's tokens, so the row's token gradients add up to d loss / d s.
            "dloss_dscore": lambda t: t.gradient(t.total).sum(1),
        },
    ),
)
