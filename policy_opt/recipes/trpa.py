"""TRPA: Trust Region Preference Approximation. Su et al. 2025, arXiv 2504.04524.

Rules sort a group's trajectories into preference levels; every pair of different levels is a DPO pair, and a KL to the
old policy keeps the step small. No advantage, no critic.

    level 1 right, 2 wrong, 3 no answer that could be read, 4 wrong format
    s_i  = mean_t m logp - mean_t m logp_ref
    h_ij = k_i beta (s_i - s_j),   level_i < level_j in one group,   k_i = anisotropy if level_i = 1, else 1
    L_p  = mean over all pairs of the batch of -log sigmoid(h_ij)
    K    = mean over all tokens of clamp(exp(d) - d - 1, -10, 10),   d = logp_old - logp
    L    = L_p + c K,   or L_p + c sqrt(K + 0.25) with sqrt

Without any pair in the batch, L_p = mean_i of -log sigmoid(s_i if level 1, else -s_i). Groups without pairs add
nothing while others have some. The paper's form has each side's own k, k_i s_i - k_j s_j: `scale_mode=per_response`.
The authors' code pairs inside micro-batches and so loses pairs; here a mini-batch is paired as a whole.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from policy_opt.bank import WITH_REFERENCE
from policy_opt.batch import Batch
from policy_opt.need import LOGP, LOGP_OLD, LOGP_REF
from policy_opt.pairs import GroupPairs
from policy_opt.part import Ctx, Part
from policy_opt.preferences import contrast, log_ratios, logistic, mean_over_pairs
from policy_opt.recipe import Recipe
from policy_opt.surrogates import LOG_RATIO_LIMIT, Streams
from policy_opt.terms import Term
from policy_opt.vectors import Vectors


@dataclass(frozen=True)
class RuleLevels(Part):
    """rank_B: 1 right, 2 wrong, 3 without an answer, 4 with a score `format` of at most 0.5, if there is that score."""

    stage: ClassVar[str] = "reward"

    reads = frozenset({"correct_B", "scores_BK"})
    facts = frozenset({"answer_B"})
    writes = frozenset({"rank_B"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        rank_B = torch.where(b["correct_B"] > 0.5, 1, torch.where(b["answer_B"] < 0, 3, 2))
        names = b.names.get("scores_BK", ())
        if "format" in names:
            rank_B = torch.where(b["scores_BK"][:, names.index("format")] > 0.5, rank_B, 4)
        return b.put(rank_B=rank_B)


@dataclass(frozen=True)
class LevelPairs(Part):
    """-log sigmoid(k beta (s_i - s_j)) per pair; without pairs, level 1 up and all others down."""

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "batch"
    gives: ClassVar[str] = ""
    beta: float = 0.1
    anisotropy: float = 2.5
    """Scale of pairs whose better side is of level 1."""
    scale_mode: Literal["pair", "per_response"] = "pair"
    """pair: the whole margin has the better side's scale (code); per_response: each side its own (paper)."""

    def __post_init__(self) -> None:
        if self.beta <= 0 or self.anisotropy <= 0:
            raise ValueError(f"beta and anisotropy must be positive, not {self.beta}, {self.anisotropy}")

    needs = LOGP, LOGP_REF
    models = WITH_REFERENCE
    reads = frozenset({"pairs_P2", "rank_B"})

    def margins(self, s: Streams, b: Batch) -> Tensor:
        """h: [P]."""
        s_B = log_ratios(s, b, length_normalised=True)
        k_B = torch.where(b["rank_B"] == 1, s_B.new_tensor(self.anisotropy), s_B.new_ones(()))
        if self.scale_mode == "per_response":
            return self.beta * contrast(b, k_B * s_B)
        return self.beta * k_B[b["pairs_P2"][:, 0]] * contrast(b, s_B)

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        if b["pairs_P2"].shape[0]:
            return mean_over_pairs(logistic(self.margins(s, b)))
        s_B = log_ratios(s, b, length_normalised=True)
        return logistic(torch.where(b["rank_B"] == 1, s_B, -s_B))[b.once()].mean()

    def report(self, s: Streams, b: Batch) -> dict[str, Tensor]:
        margin_P = self.margins(s, b)
        log_ratio_B = log_ratios(s, b, length_normalised=True)
        return {"log_ratio": log_ratio_B, "margin_P": margin_P, "preferred_P": margin_P > 0}


@dataclass(frozen=True)
class TrustRegion(Part):
    """K, the token mean of k3 to the old policy, or sqrt(K + 0.25)."""

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "batch"
    gives: ClassVar[str] = ""
    sqrt: bool = False

    needs = LOGP, LOGP_OLD

    def kl(self, s: Streams, b: Batch) -> Tensor:
        """K."""
        d_BT = ((b["logp_old_BT"] - s["logp_BT"]) * b.mask_BT).clamp(max=LOG_RATIO_LIMIT)
        k3_BT = (d_BT.exp() - d_BT - 1).clamp(-10, 10)
        return k3_BT.sum() / b.mask_BT.sum().clamp(min=1)

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        k = self.kl(s, b)
        return (k + 0.25).sqrt() if self.sqrt else k


recipe = Recipe(
    slug="trpa",
    title="logistic loss on pairs of rule-made preference levels, KL to the old policy",
    level="preference",
    cite="Su et al. 2025, arXiv 2504.04524",
    evidence="pairs, loss, fall-back, KL, levels and settings read in official code; per-response scale in a summary",
    deviations="pairs from the whole mini-batch (authors: from micro-batches)",
    reward=(RuleLevels(),),
    advantage=(GroupPairs(by="rank_B", best="low", per_group=None),),
    terms=(Term(LevelPairs(), name="preference"), Term(TrustRegion(), coef=0.001, name="trust_region")),
    variants={"per_response": ("terms.scale_mode=per_response",), "sqrt": ("terms.trust_region.sqrt=True",)},
    learns="pairs",
    vectors=Vectors(
        params={
            "beta": "terms.beta",
            "anisotropy": "terms.anisotropy",
            "tr_kl_coef": "terms.trust_region.coef",
            "sqrt_kl": "terms.trust_region.sqrt",
        },
        columns={"levels": ("rank_B",)},
        outputs={
            "log_ratio": lambda t: t.report("log_ratio"),
            "num_pairs": lambda t: t["pairs_P2"].shape[0],
            "pref_loss": lambda t: t.term("preference")[0],
            "tr_kl": lambda t: t.recipe.terms[1].loss.kl(t.clean, t.batch),
        },
        stages=("advantage",),
    ),
)
