"""CAPO (curvature): curvature-aware policy optimization. Melo et al. 2025, arXiv 2510.00819 (ICLR 2026).

Before each step a model of the head predicts how far every single token would push objective and policy; the few
that would push too far are left out, so that an aggressive learning rate stays stable.

    A_i  = (R_i - mean_g R) / (std_g R + 1e-4)
    keep_{i,t} = m_F < tau_F and -tau_H < m_H < tau_H         (m_F, m_H: policy_opt.curvature)
    l    = max(-A rho, -A clip(rho, 1 - eps, 1 + eps))
    L    = mean_i ( sum_t keep l / max(1, sum_t keep) )       over all rows, also those without a token kept

One-sided (closest to the condition of monotonic improvement): `--set credit.low=0`, m_H in [0, tau_H). The model
of the optimizer is Adam with the trainer's betas, its moments kept per vocabulary id and saved with the run; on
the first step, without moments, a plain gradient. Hidden states are those that predict the token; the authors'
code takes them one position later. Thresholds by base: GRPO 1e-4, 0.01; Dr. GRPO 1e-3, 5e-4 (`variant=dr`);
REINFORCE 1e-5, 0.1. Their learning rate is 1.5e-5, five times the usual.
"""

import torch

from policy_opt.advantages import GroupNorm
from policy_opt.aggregate import SequenceMean
from policy_opt.curvature import Curvature
from policy_opt.recipe import Recipe
from policy_opt.surrogates import Clip
from policy_opt.terms import Term
from policy_opt.vectors import Trace, Vectors


def sides(recipe: Recipe, symmetric: bool) -> Recipe:
    """The param symmetric: false is the one-sided test of m_H."""
    return recipe.set(f"credit.low={None if symmetric else 0.0}")


def remember(t: Trace) -> None:
    """The input adam_state."""
    (part,) = t.recipe.credit
    given = t.inputs.get("adam_state")
    if given:
        ids = sorted(given["m"], key=int)
        width = len(t.inputs["hidden"][0][0])
        m, v = (torch.tensor([given[k][i] for i in ids], dtype=torch.float64).view(-1, width) for k in ("m", "v"))
        ids_M = torch.tensor([int(i) for i in ids], dtype=torch.long)
        t.ctx.state(part).update(t=given["t"], ids=ids_M, first=m, second=v)


def after(t: Trace) -> dict[str, object]:
    """The moments after the step, by id."""
    state = t.stepped().state(t.recipe.credit[0])
    ids = [str(i) for i in state["ids"].tolist()]
    m, v = (dict(zip(ids, state[k].tolist(), strict=True)) for k in ("first", "second"))
    return {"t": state["t"], "m": m, "v": v}


recipe = Recipe(
    slug="capo_curvature",
    title="tokens whose own step would move policy or objective too far are left out",
    level="token",
    cite="Melo et al. 2025, arXiv 2510.00819",
    evidence="gradient, Hessian and Fisher terms, Adam model, masks, loss, thresholds: read in code "
    "(luckeciano/stable-pg-llm); theory and results: secondary summary",
    deviations="hidden states of the producing position (code: one later)",
    advantage=(GroupNorm(eps=1e-4, ddof=1),),
    credit=(Curvature(k=50, tau_f=1e-4, tau_h=0.01),),
    terms=(Term(Clip(clip_low=0.2, clip_high=0.2), agg=SequenceMean(across="all")),),
    variants={
        "dr": (
            "advantage=group_centre()",
            "terms.agg=constant_length()",
            "credit.tau_f=1e-3",
            "credit.tau_h=5e-4",
        )
    },
    smoke=("credit.tau_f=3.0", "credit.tau_h=3.0"),
    vectors=Vectors(
        params={
            "lr": "credit.lr",
            "tau_F": "credit.tau_f",
            "tau_H": "credit.tau_h",
            "symmetric": sides,
            "optimizer": "credit.model",
            "beta1": "credit.beta1",
            "beta2": "credit.beta2",
            "eps": "credit.eps",
        },
        columns={
            "action_ids": ("tokens_BT",),
            "topk_ids": ("top_ids_now_BTK",),
            "topk_probs": lambda p: {"top_logp_now_BTK": torch.tensor(p, dtype=torch.float64).log()},
            "hidden": ("hidden_now_BTD",),
        },
        prime=remember,
        outputs={
            "g_dot_update": lambda t: t["gain_BT"],
            "hessian_quadratic": lambda t: t["hessian_BT"],
            "fisher_quadratic": lambda t: t["fisher_BT"],
            "m_H": lambda t: t["objective_shift_BT"],
            "m_F": lambda t: t["policy_shift_BT"],
            "keep": lambda t: t["mask_BT"],
            "rejected_fraction": lambda t: t.ctx.metrics["rejected_tokens"],
            "adam_state_after": after,
        },
    ),
)
