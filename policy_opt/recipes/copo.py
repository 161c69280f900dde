"""COPO: Consistency-Aware Policy Optimization. Han et al. 2025, arXiv 2508.04138.

A group whose answers all agree has no contrast and teaches GRPO nothing. Beside the advantage within the group there
is one for the whole prompt; the less a group's answers agree, the more the first one counts.

    H_q   = -sum_answers p log2(p + 1e-8)                                 entropy of the group's final answers
    A_loc = (R_i - mean_g R) / (std_g R + 1e-6)
    A_glo = (R_q - mean_Q R) / (std_Q R + 1e-6),   R_q = mean_g R, prompts of the batch
    w_i   = sigmoid(gamma (H_q - rho)) [i is a success]
    L     = mean_i (1/L_i) sum_t m [ w_i l(A_loc) + (1 - w_i) l(A_glo) ]
    l(A)  = max(-A r, -A clip(r, 1 - 0.2, 1 + 0.2)), at most -3 A where A < 0

Modes of w: `--set credit.mode=...`: soft_with_zero (above, the authors' runs), only_soft, soft_with_forced ([A_loc
!= 0] instead of success), only_zero, only_forced, only_global, no_global (GRPO with dual clip). `--set
advantage.by_consistency=True` scales R_q by 1 - H_q (1 - 1/n) / log2 n. For tasks without a final answer the
environment's answer key stands in (a hash of the final state): an extension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from policy_opt.advantages import GroupNorm
from policy_opt.baselines import AnswerEntropy, PromptNorm
from policy_opt.batch import Batch
from policy_opt.mapping import by_id, numbered
from policy_opt.part import Ctx, Part
from policy_opt.recipe import Recipe
from policy_opt.surrogates import Clip
from policy_opt.terms import Term
from policy_opt.vectors import Vectors

Mode = Literal[
    "soft_with_zero", "only_soft", "soft_with_forced", "only_zero", "only_forced", "only_global", "no_global"
]


@dataclass(frozen=True)
class Blend(Part):
    """w_local_B = w and w_global_B = 1 - w: the shares of the two losses."""

    stage: ClassVar[str] = "credit"
    mode: Mode = "soft_with_zero"
    gamma: float = 20.0
    """Steepness of the sigmoid; 5 in the authors' script."""
    rho: float = 1.5
    """Entropy in bits at which it is 1/2; 1 in the authors' script."""
    success: Literal["correct", "reward"] = "correct"
    """The verdict's own, or any reward but 0 as in the released code."""

    reads = frozenset({"answer_entropy_B", "adv_B", "reward_B", "correct_B"})
    writes = frozenset({"w_local_B", "w_global_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        adv_B = b["adv_B"]
        w_B = torch.full_like(adv_B, 0.0 if self.mode == "only_global" else 1.0)
        if "soft" in self.mode:
            w_B = torch.sigmoid(self.gamma * (b["answer_entropy_B"].to(adv_B.dtype) - self.rho))
        if "zero" in self.mode:
            w_B = w_B * (b["correct_B"] > 0.5 if self.success == "correct" else b["reward_B"] != 0)
        if "forced" in self.mode:
            w_B = w_B * (adv_B != 0)
        return b.put(w_local_B=w_B, w_global_B=1 - w_B)


recipe = Recipe(
    slug="copo",
    title="an advantage of the whole prompt where the group's answers agree",
    level="token",
    cite="Han et al. 2025, arXiv 2508.04138",
    evidence="read in code (copo-code core_algos.py, dp_actor.py, run_copo.sh); gamma, rho in a summary of the paper",
    deviations="success is the verdict's own (code: reward != 0); one prompt in the batch has global advantage 0 "
    "(code: NaN); rows without an answer agree with each other",
    signals=(AnswerEntropy(eps=1e-8),),
    advantage=(GroupNorm(eps=1e-6, ddof=1), PromptNorm(eps=1e-6)),
    credit=(Blend(mode="soft_with_zero", gamma=20.0, rho=1.5),),
    terms=(
        Term(Clip(0.2, 0.2, dual_clip=3.0), name="local", weights=("w", "w_local")),
        Term(Clip(0.2, 0.2, dual_clip=3.0, by="adv_prompt"), name="global", weights=("w", "w_global")),
    ),
    vectors=Vectors(
        params={
            "global_flag": lambda recipe, mode: recipe.set(
                f"credit.mode={mode.replace(' ', '_').replace('-', '_')}", "credit.success=reward"
            ),
            "k": "credit.gamma",
            "b": "credit.rho",
            "reward_coef": "advantage.by_consistency",
            "clip_low": ("terms.local.clip_low", "terms.global.clip_low"),
            "clip_high": ("terms.local.clip_high", "terms.global.clip_high"),
            "dual_clip_c": ("terms.local.dual_clip", "terms.global.dual_clip"),
            "eps": ("advantage.group_norm.eps", "advantage.prompt_norm.eps"),
            "entropy_log_base": (),
            "entropy_eps": "signals.eps",
        },
        columns={"answers": lambda texts: {"answer_B": torch.tensor(numbered(texts))}},
        outputs={
            "consistency_entropy": lambda t: by_id(t, t["answer_entropy_B"]),
            "global_reward": lambda t: by_id(t, t["prompt_reward_B"]),
            "local_advantage": lambda t: t["adv_B"],
            "global_advantage": lambda t: t["adv_prompt_B"],
            "local_weight": lambda t: t["w_local_B"],
        },
        stages=("signals", "reward", "advantage", "credit"),
    ),
)
