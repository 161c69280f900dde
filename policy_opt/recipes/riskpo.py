"""RiskPO: Risk-based Policy Optimization. Ren et al. 2025, arXiv 2510.00911.

The mean reward is dominated by what the policy can do already. Here the lower part of the distribution of scores is
raised instead; so that scores have a distribution, the judged unit is a bundle of B questions.

    S_j = sum over the bundle's questions of R, one response of each: a paper; every response is in one paper
    a, b = tracked quantiles of S at levels alpha, beta:   q_s <- q_s + 0.1 (s - #{S < q_s} / M)
    A_j = -(1 + omega) (a - S_j)^+ + (S_j - a)^+ - (S_j - b)^+ + a - b        on every response of the paper
    s_i = exp( (1/L_i) sum_t m (logp - logp_old) )
    L   = mean_i max(-A s_i, -A clip(s_i, 1 - eps, 1 + eps))

This is the gradient's weight of (1 + omega) times the integral of the quantile function up to alpha, plus that from
alpha to beta. No advantage is positive, and a paper above b has none: failures are pushed away, nothing is pulled.

The authors' scripts weight the two parts by their probability mass, divide by the bundle's spread, share the advantage
out to the responses and use token ratios: `--set variant=release` is the one for DAPO-Math, without a - b. The one for
MATH is that with `advantage.natural=True advantage.beta=0.9 advantage.rule=std`. The tracked quantiles reach no later
step in the released snapshot, so there a and b are those of the bundle's own papers, `advantage.quantiles=batch`.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import Any

import torch

from policy_opt.bundles import Bundle, PaperScore, TailRisk
from policy_opt.errors import RecipeError
from policy_opt.mapping import by_id, numbered, optional, own
from policy_opt.recipe import Recipe
from policy_opt.surrogates import SequenceClip
from policy_opt.terms import Term
from policy_opt.vectors import Trace, Vectors


def released(recipe: Recipe, w_mix: float) -> Recipe:
    """The param w_mix: a case of the released code."""
    return recipe.set("variant=release", "advantage.rule=uniform", f"advantage.w_mix={w_mix}")


def dealt(recipe: Recipe, inputs: Mapping[str, Any]) -> Recipe:
    """A case's bundles come with it, the k-th responses of a bundle's questions are a paper."""
    given = [inputs.get(name) is not None for name in ("q_alpha", "q_beta")]
    if given[0] != given[1]:
        raise RecipeError(f"{recipe.slug}: q_alpha and q_beta are both tracked, or both null")
    known = "scores" in inputs or given[0]
    return recipe.set("reward.permute=False", f"advantage.quantiles={'tracked' if known else 'batch'}")


def singles(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Questions by bundle and name. A case of the tracker: every score is a bundle's, of one question and response."""
    if "scores" not in inputs:
        return {**inputs, "group": list(zip(inputs["bundle"], inputs["group"], strict=True))}
    ids = list(range(len(inputs["scores"])))
    return {**inputs, "rewards": inputs["scores"], "group": ids, "bundle": ids}


def remember(t: Trace) -> None:
    """The inputs q and alphas, or q_alpha and q_beta: the tracker's state, for every size of bundle."""
    part = own(t, TailRisk)
    if "scores" in t.inputs:
        levels, q = t.inputs["alphas"], t.inputs["q"]
    elif t.inputs.get("q_alpha") is not None:
        levels, q = (part.alpha, part.beta), (t.inputs["q_alpha"], t.inputs["q_beta"])
    else:
        return
    table_L2 = torch.tensor([levels, q], dtype=torch.float64).T
    questions = dict(zip(t.inputs["group"], t.inputs["bundle"], strict=True))
    for bundle in set(questions.values()):
        t.ctx.state(part)[str(list(questions.values()).count(bundle))] = table_L2


def scores(t: Trace) -> dict[str, list[float]]:
    """The papers of each bundle, in order."""
    papers = zip(t["paper_B"].tolist(), t.inputs["bundle"], t["paper_score_B"].tolist(), strict=True)
    found: dict[str, list[float]] = {str(bundle): [] for bundle in t.inputs["bundle"]}
    for paper, bundle, score in sorted(set(papers), key=itemgetter(0)):
        if paper >= 0:
            found[str(bundle)].append(score)
    return found


recipe = Recipe(
    slug="riskpo",
    title="bundles of questions, their low scores weigh most, high ones nothing",
    level="sequence",
    cite="Ren et al. 2025, arXiv 2510.00911",
    evidence="read in code (RiskPO core_algos.py, ray_trainer.py, scripts); the paper's form of the advantage and the "
    "sequence ratio in two summaries that agree",
    deviations="one tracker per size of bundle; where a bundle's spread is divided by, up to 1e-3 is taken as 1 (code: "
    "no floor)",
    signals=(Bundle(size=5),),
    reward=(PaperScore(),),
    advantage=(TailRisk(alpha=0.2, beta=0.8, omega=0.5, rate=0.1),),
    terms=(Term(SequenceClip(clip_low=0.2, clip_high=0.2)),),
    variants={
        "release": (
            "advantage.form=release",
            "advantage.normalise=True",
            "advantage.floor=0",
            "advantage.natural=False",
            "advantage.quantiles=batch",
            "advantage+=share_out(rule=sum_mean)",
            "terms=term(clip(dual_clip=3.0), agg=token_mean())",
        ),
    },
    vectors=Vectors(
        params={
            "variant": (),
            "w_mix": released,
            "alpha": "advantage.alpha",
            "beta": "advantage.beta",
            "omega": "advantage.omega",
            "natural_baseline": "advantage.natural",
            "norm_by_bundle_std": "advantage.normalise",
            "credit": lambda recipe, rule: recipe.set(f"advantage.rule={rule.replace('-', '_')}"),
            "eps": optional("advantage.tail_risk.eps", "advantage.share_out.eps"),
            "lr_q": "advantage.rate",
        },
        columns={"bundle": lambda ids: {"bundle_B": torch.tensor(numbered(ids))}},
        adapt=dealt,
        arrange=singles,
        prime=remember,
        outputs={
            "bundle_scores": scores,
            "q_alpha_used": lambda t: by_id(t, t["quantile_low_B"], "bundle"),
            "q_beta_used": lambda t: by_id(t, t["quantile_high_B"], "bundle"),
            "advantage_per_traj": lambda t: t["adv_B"],
            "advantages": lambda t: t.per_token("adv"),
            "q_next": lambda t: t.ctx.state(own(t, TailRisk))["1"][:, 1],
        },
    ),
)
