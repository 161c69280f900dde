"""ProGRPO (ARM): advantages shifted by the policy's own confidence. Li et al. 2026, arXiv 2602.05281.

Answers that the policy is already sure of lose advantage, right ones that it is not sure of gain, so that one
dominant path does not crowd out the others.

    A_i  = (R_i - mean_g R) / (std_g R + delta)
    c(s) = exp( mean_{t in T_low} l_t ),  T_low: the max(1, ceil(f n)) least likely of the n tokens of s
    A~_i = A_i + alpha (c(prompt) - c(answer_i))  for every i of a group with any correct answer, else A_i
    L    = sum_{i,t} max(-A~ rho, -A~ clip(rho, 1 - eps_low, 1 + eps_high)) / sum_i |o_i|

Confidences are constants, under the policy that played. c(prompt) is the same for the whole group and shifts
it as one. f = 1 makes c the inverse perplexity. eligible="mixed_only" leaves a group alone also where all of its
rewards are positive; correct_only shifts only answers that earned something. alpha is not from the paper.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from policy_opt.advantages import GroupNorm, groups
from policy_opt.aggregate import TokenMean
from policy_opt.batch import Batch
from policy_opt.need import LOGP_OLD, LogProb, Need
from policy_opt.part import Ctx, Part
from policy_opt.recipe import Recipe
from policy_opt.surrogates import Clip
from policy_opt.terms import Term
from policy_opt.token_credit import confidence
from policy_opt.vectors import Vectors

LOGP_PROMPT = Need("logp_prompt_BT", LogProb(), where="prompt")


@dataclass(frozen=True)
class ConfidenceShift(Part):
    """A <- A + alpha (c(prompt) - c(answer)) in eligible groups.

    The prompt is every token before the first of the policy's, but the row's first, which nothing predicts. A
    further segment of a trajectory has confidences of its own.
    """

    stage: ClassVar[str] = "advantage"
    alpha: float = 0.3
    """Strength in [0, 1]; |shift| < alpha."""
    low_prob_fraction: float = 0.2
    """f: share of the tokens that confidence looks at, the least likely ones; 1 = inverse perplexity."""
    eligible: Literal["any_correct", "mixed_only"] = "any_correct"
    """any_correct: groups whose rewards do not sum to 0; mixed_only: and not all of them positive."""
    correct_only: bool = False
    """Shift only rows with a positive reward."""

    needs = LOGP_OLD, LOGP_PROMPT
    reads = frozenset({"reward_B", "group_B", "adv_B"})
    writes = frozenset({"confidence_prompt_B", "confidence_answer_B"})
    overwrites = frozenset({"adv_B"})

    def check(self) -> None:
        if not 0 < self.low_prob_fraction <= 1:
            raise ValueError(f"low_prob_fraction is in (0, 1], not {self.low_prob_fraction}")

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        opening_BT = b.opening_BT & (b.real_BT.cumsum(1) > 1)
        prompt_B = confidence(b[LOGP_PROMPT.name], opening_BT, self.low_prob_fraction)
        answer_B = confidence(b["logp_old_BT"], b.mask_BT, self.low_prob_fraction)
        g = groups(b)
        open_B = (g.sums(g.reward_B) != 0)[g.index_B]
        if self.eligible == "mixed_only":
            open_B = open_B & (g.sums((g.reward_B > 0).to(g.reward_B.dtype)) < g.size_Q)[g.index_B]
        if self.correct_only:
            open_B = open_B & (g.reward_B > 0)
        shift_B = torch.where(open_B, self.alpha * (prompt_B - answer_B), 0)
        found = b.over(adv_B=b["adv_B"] + shift_B)
        return found.put(confidence_prompt_B=prompt_B, confidence_answer_B=answer_B)


def behind_prompt(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Rows with the prompt's tokens, after one that nothing predicts, in front of the answer's."""
    width, answer = opening(inputs), [0.0] * len(inputs["mask"][0])
    gaps = [width - len(row) for row in inputs["prompt_logps"]]
    moved: dict[str, Any] = {
        key: [[0] * width + row for row in inputs[key]] for key in ("logp_new", "logp_old", "mask")
    }
    moved["prompt_logps"] = [[0.0] * n + row + answer for n, row in zip(gaps, inputs["prompt_logps"], strict=True)]
    moved["real"] = [[0] * (n - 1) + [1] * (width - n + 1) + row for n, row in zip(gaps, inputs["mask"], strict=True)]
    return {**inputs, **moved}


def opening(inputs: Mapping[str, Any]) -> int:
    """Columns in front of the answers."""
    return 1 + max(len(row) for row in inputs["prompt_logps"])


recipe = Recipe(
    slug="progrpo",
    title="GRPO's advantage shifted by confidence in prompt minus confidence in answer",
    level="trajectory",
    cite="Li et al. 2026, arXiv 2602.05281",
    evidence="shifted advantage and gate: read in a review that reproduces the equation; low-probability share, clip, "
    "token mean: secondary summaries; the prompt's confidence: reconstructed on the answer's rule",
    reconstructed=True,
    deviations="alpha = 0.3 is ours (not found); no code was found",
    advantage=(GroupNorm(eps=1e-6, ddof=1), ConfidenceShift()),
    terms=(Term(Clip(clip_low=0.2, clip_high=0.28), agg=TokenMean()),),
    vectors=Vectors(
        params={
            "alpha": "advantage.alpha",
            "low_prob_fraction": "advantage.low_prob_fraction",
            "gate": "advantage.eligible",
        },
        columns={"prompt_logps": ("logp_prompt_BT",), "real": ("real_BT",)},
        arrange=behind_prompt,
        outputs={
            "advantages_grpo": lambda t: t.after(GroupNorm)["adv_B"],
            "confidence_prompt": lambda t: t["confidence_prompt_B"],
            "confidence_answer": lambda t: t["confidence_answer_B"],
            "grad_logp_new": lambda t: t.gradient(t.total)[:, opening(t.given) :],
        },
    ),
)
