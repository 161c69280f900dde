"""PIPO: Policy Improvement Policy Optimization. Wang et al. 2026, arXiv 2604.00860.

Whether an update was an improvement shows in the next batch. Each iteration first goes back to the batch before it
and reinforces that update where the mean reward rose, or undoes some of it where it fell; then it takes the usual
step on its own batch.

    xi_t  = clip(mu_t - mu_his, -5, 5) / sigma_his               mu_his, sigma_his over the last 8 mean rewards
    a_i   = G A_i / (sum_g |A| + 1e-6)                           A of the batch before
    R^_i  = clip(a_i xi_t, -10, 10)
    L_1   = c sum m max(-R^ rho, -R^ clip(rho, 1 - eps, 1 + eps)) / sum m,   c = 1, or lambda = 0.1 where xi_t < 0
    L_2   = the loss of GRPO on the batch of iteration t, as a token mean

rho is against the policy that played the batch. The retrospective step begins after 8 iterations. Its KL term is
`--set schedule.kl.coef=...`, the other step's `terms.kl.coef`.

`--set variant=release`: the code's retrospective loss, -min(rho, clip(rho)) R^, which has no lower clip for negative
coefficients and no gradient above 1 + eps whatever the sign. `--set variant=gate`: the code's form for a critic,
PPO in which the current advantages are multiplied by clip(xi_t, -2, 2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from policy_opt.advantages import GroupNorm
from policy_opt.aggregate import TokenMean
from policy_opt.batch import Batch
from policy_opt.mapping import optional, own
from policy_opt.need import LOGP, LOGP_OLD
from policy_opt.part import Part
from policy_opt.progress import Progress, ProgressGate, Retrospect, progress
from policy_opt.recipe import Recipe
from policy_opt.schedule import Schedule, Step
from policy_opt.surrogates import K3, Clip, Streams, check_widths, log_ratio, ratio
from policy_opt.terms import Loss, Term
from policy_opt.vectors import Trace, Vectors


@dataclass(frozen=True)
class LowRatio(Part):
    """-min(rho, clip(rho, 1 - eps, 1 + eps)) A = -min(rho, 1 + eps) A: capped above whatever the sign of A."""

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "row"
    gives: ClassVar[str] = "BT"
    clip_high: float = 0.2

    def __post_init__(self) -> None:
        check_widths(0.0, self.clip_high)

    needs = LOGP, LOGP_OLD
    reads = frozenset({"adv"})

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        return -ratio(log_ratio(s, b)).clamp(max=1 + self.clip_high) * b.per_token("adv")


# -- golden numbers: a case holds the batch before, the window, and the mean reward since ------------------------


def window(recipe: Recipe) -> Retrospect | ProgressGate:
    """The part that compares iterations."""
    return next(part for _, part in recipe.parts if isinstance(part, Retrospect | ProgressGate))


def seen(t: Trace) -> Progress:
    """The case's progress."""
    return progress(t.given["history"], t.given["mu_t"], window(t.recipe).spread)


def judged(t: Trace) -> Batch:
    """The batch before, as the retrospective step takes it."""
    return own(t, Retrospect).judged(t.batch, seen(t))


def retrospective(t: Trace, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Value and gradients of one term of the retrospective step."""
    terms = t.recipe.schedule.steps[0].terms or ()
    alone = tuple(dataclasses.replace(term, coef=1.0) for term in terms if term.name == name)
    return Loss.of(alone, judged(t), t.ctx, torch.float64).cotangents(t.streams, judged(t))


def remember(t: Trace) -> None:
    """The window before the iteration."""
    t.ctx.state(window(t.recipe))["history"] = list(t.given["history"])


def rewarded(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """A case of the gate: every trajectory has the batch's mean reward."""
    return {**inputs, "rewards": [inputs["mu_t"]] * len(inputs["mask"])} if "token_advantages" in inputs else inputs


CURRENT = (
    Term(Clip(clip_low=0.2, clip_high=0.2), agg=TokenMean()),
    Term(K3(), agg=TokenMean(), coef=0.0, name="kl", weights=()),
)
BEFORE = (
    Term(Clip(clip_low=0.2, clip_high=0.2), agg=TokenMean(), weights=("w", "w_retrospect")),
    Term(LowRatio(clip_high=0.2), agg=TokenMean(), coef=0.0, name="release", weights=("w", "w_retrospect")),
    Term(K3(), agg=TokenMean(), coef=0.0, name="kl", weights=()),
)
GATE = (
    "reward=token_reward()",
    "advantage=(gae(), whiten(), progress_gate())",
    "terms=(term(clip(), agg=token_mean()), term(clipped_value(), agg=token_mean(), name=value, weights=()))",
    "schedule.steps=step(minibatches=4)",
)

recipe = Recipe(
    slug="pipo",
    title="the batch before once more, its update reinforced or undone by the progress of the mean reward since",
    level="token",
    cite="Wang et al. 2026, arXiv 2604.00860",
    evidence="read in code (pipo_verl layback_utils.py, core_algos.py, ray_trainer.py); the paper's Eqs. 7-11 in a "
    "summary",
    deviations="the window leaves out the iteration itself and holds each one once (code: itself too, and twice); "
    "standard clip in the retrospective step; KL coefficient 0 unless set (code 0.001)",
    advantage=(GroupNorm(eps=1e-6, ddof=1),),
    terms=CURRENT,
    schedule=Schedule((Step(source=Retrospect(window=8, warmup=8, negative=0.1), terms=BEFORE), Step())),
    variants={"release": ("schedule.terms.policy.coef=0", "schedule.terms.release.coef=1"), "gate": GATE},
    vectors=Vectors(
        params={
            "variant": lambda recipe, _: recipe.set(
                "variant=gate", "reward=none", "advantage=progress_gate(warmup=1)", "terms-=value"
            ),
            "lambda_neg": "schedule.negative",
            "clip": optional(
                *("terms.policy.clip_low", "terms.policy.clip_high"),
                *("schedule.terms.policy.clip_low", "schedule.terms.policy.clip_high"),
                "schedule.terms.release.clip_high",
            ),
            "coefficient_clamp": "schedule.limit",
            "std": optional("schedule.spread", "advantage.spread"),
            "eps": "schedule.eps",
            "grpo_eps": "advantage.eps",
            "gate_min": "advantage.low",
            "gate_max": "advantage.high",
        },
        arrange=rewarded,
        prime=remember,
        outputs={
            "mu_his": lambda t: seen(t).mean,
            "sigma_his": lambda t: seen(t).std,
            "xi": lambda t: seen(t).xi,
            "attribution": lambda t: own(t, Retrospect).attribution(t.batch),
            "coefficient": lambda t: judged(t)["adv_B"],
            "loss_scale": lambda t: float(judged(t)["w_retrospect_B"][0]),
            "loss_release": lambda t: retrospective(t, "release")[0],
            "grad_release": lambda t: t.gradient(retrospective(t, "release")),
            "loss_standard_ppo_clip": lambda t: retrospective(t, "policy")[0],
            "grad_standard_ppo_clip": lambda t: t.gradient(retrospective(t, "policy")),
            "phi": lambda t: own(t, ProgressGate).gate(seen(t)),
            "scaled_advantages": lambda t: t.per_token("adv"),
        },
    ),
)
