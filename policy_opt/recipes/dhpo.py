"""DHPO: Dynamic Hybrid Policy Optimization. Min et al. 2026, arXiv 2601.05607. Reconstructed.

Mixes GRPO's token ratio and GSPO's sequence ratio in one clipped surrogate; each branch is clipped to its own
bounds before they are mixed, so that an outlier of one cannot pass through the other.

    r_{i,t} = exp(logp - logp_old),   s_i = exp( (1/L_i) sum_t m log r_{i,t} )
    w       = alpha ("average"), or (H - min_t H) / (max_t H - min_t H + delta) over the row's tokens, detached
    M       = w r + (1 - w) s,        M^ = w clip(r, 1 -+ eps_tok) + (1 - w) clip(s, 1 -+ eps_seq)
    L       = mean_i (1/L_i) sum_t m max(-M A_i, -M^ A_i),   A_i as in GRPO

`--set variant=entropy` is the entropy-guided mixing: uncertain tokens follow their own ratio, certain ones the
sequence's. Reconstructed from the abstract and notes on Eqs. 8-11; open, and options here: whether the minimum comes
after the mixing or before it (clip_form), whether s_i is differentiated through all tokens or straight through its
own (seq_grad), over what the entropies are normalised (signals.over) and in which direction they act (signals.reverse).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from policy_opt.advantages import GroupNorm
from policy_opt.batch import Batch
from policy_opt.mapping import optional, reported, variant
from policy_opt.need import LOGP, LOGP_OLD
from policy_opt.part import Part
from policy_opt.recipe import Recipe
from policy_opt.schedule import Schedule, Step
from policy_opt.surrogates import Streams, check_widths, clipped, log_ratio, mean_log_ratio, ratio, straight_through
from policy_opt.terms import Term
from policy_opt.vectors import Vectors


@dataclass(frozen=True)
class HybridClip(Part):
    """max(-A M, -A M^): token and sequence ratio, each clipped by itself, then mixed."""

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "row"
    gives: ClassVar[str] = "BT"
    weight: float | str = 0.5
    """w, the token ratio's share: a number in [0, 1], or a [B, T] column."""
    clip_low: float = 0.2
    """Width below 1 of the token branch."""
    clip_high: float = 0.28
    seq_clip_low: float = 3e-4
    """Width below 1 of the sequence branch."""
    seq_clip_high: float = 4e-4
    clip_form: Literal["mix_then_min", "min_then_mix"] = "mix_then_min"
    """min_then_mix: w min(r A, r^ A) + (1 - w) min(s A, s^ A)."""
    seq_grad: Literal["full", "token"] = "full"
    """token: s_i keeps its value and takes the gradient of the token, as in GSPO-token."""

    def __post_init__(self) -> None:
        check_widths(self.clip_low, self.clip_high)
        check_widths(self.seq_clip_low, self.seq_clip_high)
        if not isinstance(self.weight, str) and not 0 <= self.weight <= 1:
            raise ValueError(f"weight is a column or a share in [0, 1], not {self.weight}")

    needs = LOGP, LOGP_OLD

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"adv"} | ({self.weight} if isinstance(self.weight, str) else set()))

    def share(self, b: Batch) -> Tensor:
        """w: [B, T]."""
        if isinstance(self.weight, str):
            return b[self.weight]
        return torch.full_like(b["logp_old_BT"], self.weight)

    def branches(self, s: Streams, b: Batch) -> tuple[Tensor, Tensor]:
        """(r, s), both [B, T]."""
        seq_B1 = ratio(mean_log_ratio(s, b))[:, None]
        if self.seq_grad == "token":
            return ratio(log_ratio(s, b)), straight_through(seq_B1, s)
        return ratio(log_ratio(s, b)), seq_B1.expand(b.B, b.T)

    def mixed(self, s: Streams, b: Batch) -> tuple[Tensor, Tensor]:
        """(M, M^), both [B, T]."""
        (token_BT, seq_BT), w_BT = self.branches(s, b), self.share(b)
        near_BT = token_BT.clamp(1 - self.clip_low, 1 + self.clip_high)
        close_BT = seq_BT.clamp(1 - self.seq_clip_low, 1 + self.seq_clip_high)
        return w_BT * token_BT + (1 - w_BT) * seq_BT, w_BT * near_BT + (1 - w_BT) * close_BT

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        adv_BT = b.per_token("adv")
        if self.clip_form == "mix_then_min":
            free_BT, held_BT = self.mixed(s, b)
            return torch.maximum(-adv_BT * free_BT, -adv_BT * held_BT)
        (token_BT, seq_BT), w_BT = self.branches(s, b), self.share(b)
        own_BT = clipped(token_BT, adv_BT, self.clip_low, self.clip_high)
        return w_BT * own_BT + (1 - w_BT) * clipped(seq_BT, adv_BT, self.seq_clip_low, self.seq_clip_high)

    def report(self, s: Streams, b: Batch) -> dict[str, Tensor]:
        (free_BT, held_BT), adv_BT = self.mixed(s, b), b.per_token("adv")
        return {
            "ratio": ratio(log_ratio(s, b)),
            "seq_ratio": ratio(mean_log_ratio(s, b)),
            "token_weight": self.share(b),
            "mixed_ratio": free_BT,
            "mixed_clipped_ratio": held_BT,
            "clip_frac": adv_BT * held_BT < adv_BT * free_BT,
        }


recipe = Recipe(
    slug="dhpo",
    title="token and sequence ratio mixed in one surrogate, each clipped to its own bounds first",
    level="token",
    cite="Min et al. 2026, arXiv 2601.05607",
    evidence="structure read in the abstract and in notes on Eqs. 8-11; equations reconstructed; no code found",
    deviations="clip widths are GRPO's and GSPO's, not confirmed",
    reconstructed=True,
    advantage=(GroupNorm(eps=1e-6, ddof=1),),
    terms=(Term(HybridClip()),),
    schedule=Schedule((Step(minibatches=4),)),
    variants={"entropy": ("signals=min_max(into='token_share_BT', eps=1e-8)", "terms.weight=token_share_BT")},
    vectors=Vectors(
        params={
            "alpha": "terms.weight",
            "mixing": variant("average"),
            "minmax_eps": optional("signals.eps"),
            "eps_tok_low": "terms.clip_low",
            "eps_tok_high": "terms.clip_high",
            "eps_seq_low": "terms.seq_clip_low",
            "eps_seq_high": "terms.seq_clip_high",
            "clip_form": "terms.clip_form",
            "seq_grad": "terms.seq_grad",
        },
        columns={"entropy": ("entropy_old_BT",)},
        outputs=reported("token_weight", "mixed_ratio", "mixed_clipped_ratio", "seq_ratio"),
        stages=("signals", "reward", "advantage", "credit"),
    ),
)
