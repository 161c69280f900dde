"""EARL: entropy-aware RL for RTL code. Shi et al. 2025, arXiv 2511.12033 (v2).

Most tokens of a hardware description follow from the ones before; the policy gradient is kept for the few at
which the model is uncertain, while a KL to the reference holds all of them.

    A_i     = (R_i - mean_g R) / (std_g R + 1e-6)
    M_{i,t} = 1[H_{i,t} >= tau_i],   tau_i = the ceil(rho n_i)-th largest entropy of response i   (ties kept)
    l       = max(-A rho_t, -A clip(rho_t, 1 - eps_low, 1 + eps_high)),   k = k3 against the reference
    L       = sum_{i,t} M l / sum_i |o_i| + beta sum_{i,t} k / sum_i |o_i|

Entropies are those of the policy that played. The denominator counts all tokens, so the step shrinks with rho.
Gate, threshold, normalisation and every number are reconstructed: the abstract says that gradients are gated
to high-entropy tokens with thresholds per response. What else it might have been stands in the variants.
`forking` is the same gate with one threshold for the batch. The staged reward of an RTL verifier
(format, compiles, interface, testbench), our weights, is `--set reward=earl.staged()`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from policy_opt.advantages import GroupNorm
from policy_opt.aggregate import TokenMean
from policy_opt.batch import Batch
from policy_opt.errors import BatchError
from policy_opt.part import Ctx, Part
from policy_opt.recipe import Recipe
from policy_opt.surrogates import K3, Clip
from policy_opt.terms import Term
from policy_opt.token_credit import KeepTop
from policy_opt.vectors import Vectors


@dataclass(frozen=True)
class Staged(Part):
    """R = sum_k w_k s_k [every stage before k holds], over named scores of the verdict."""

    stage: ClassVar[str] = "reward"
    stages: tuple[str, ...] = ("format", "compiles", "interface", "functional")
    """Names of scores in [0, 1], in order; a stage holds at 1, so the last may be a fraction of checks."""
    weights: tuple[float, ...] = (0.1, 0.2, 0.1, 0.6)
    """One for each stage."""

    reads = frozenset({"scores_BK"})
    overwrites = frozenset({"reward_B"})

    def check(self) -> None:
        if len(self.stages) != len(self.weights):
            raise ValueError(f"{len(self.stages)} stages and {len(self.weights)} weights")

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        names = b.names.get("scores_BK", ())
        missing = [name for name in self.stages if name not in names]
        if missing:
            raise BatchError(f"scores_BK has no score `{missing[0]}`; it has {list(names)}")
        score_BK = b["scores_BK"][:, [names.index(name) for name in self.stages]].double()
        held_BK = (score_BK >= 1).double().cumprod(1)
        open_BK = torch.cat([torch.ones_like(held_BK[:, :1]), held_BK[:, :-1]], 1)
        return b.over(reward_B=(score_BK * open_BK) @ score_BK.new_tensor(self.weights))


recipe = Recipe(
    slug="earl",
    title="clipped policy gradient on each response's most uncertain tokens, KL to the reference on all",
    level="token",
    cite="Shi et al. 2025, arXiv 2511.12033",
    evidence="gating by entropy, thresholds per response, KL: read in the abstract and a secondary summary; objective, "
    "kept fraction, KL coefficient, reward values: not seen, reconstructed",
    reconstructed=True,
    deviations="every number is a default of ours; no code was found",
    advantage=(GroupNorm(eps=1e-6, ddof=1),),
    credit=(KeepTop(fraction=0.2, scope="row", ties="all"),),
    terms=(
        Term(Clip(clip_low=0.2, clip_high=0.28), num="keep", den="mask", agg=TokenMean()),
        Term(K3(), coef=0.001, agg=TokenMean(), name="kl", weights=()),
    ),
    variants={
        "kl_on_gated_only": ("terms.kl.num=keep",),
        "normalise_by_kept": ("terms.policy.den=keep",),
        "forking": ("credit.scope=batch",),
    },
    vectors=Vectors(
        params={
            "rho": "credit.fraction",
            "beta": "terms.kl.coef",
        },
        columns={"entropy": ("entropy_old_BT",)},
        outputs={"entropy_threshold": lambda t: t["threshold_B"], "gate": lambda t: t["keep_BT"]},
    ),
)
