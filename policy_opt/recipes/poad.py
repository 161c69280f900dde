"""POAD: Policy Optimization with Action Decomposition. Wen et al. 2024, arXiv 2405.15821 (NeurIPS 2024).

PPO on tokens in which time passes between actions only: an action is a turn of n tokens, the discount gamma
applies from its last token to the next turn, and inside it nothing is discounted, so the optimum does not
depend on how many tokens an action takes (Bellman backup with action decomposition, BAD).

    delta_tj = V_t(j+1) - V_tj                      inside a turn (gamma_w = 1)
    delta_tn = r_t + gamma V_(t+1)1 - V_tn          at its last token; V = 0 after the episode's last turn
    A_tj     = delta_tj + gamma_tj lambda A_next,   gamma_tj = gamma at a turn's last token, else gamma_w
    G_tj     = A_tj + V_tj;   A is then (A - mean) / (std + 1e-8) over the tokens of each mini-batch
    l        = max(-A rho, -A clip(rho, 1 +- eps)) - c_H H;   no policy step where mean(rho - 1 - log rho) > 0.02
    L        = token-mean(l) + c_V token-mean(max of clipped and plain 1/2 (V - G)^2)

`--set variant=ntpo` is the naive form that the paper argues against: gamma at every token. lambda decays per
token, as in the authors' code; `advantage.lam=1` decays at turns only (lambda there: `advantage.turn_lam`). The
authors' code takes mean and deviation of A over entries that are not exactly 0: `advantage.over=nonzero`. It
also stores windows of episodes, and V of the state after a window: `advantage.after=value`, for an actor that
delivers finished_B and bootstrap_B. Ours play episodes to their end, so it is refused here; where a budget cuts
them (`curriculum.resume=True`), `advantage.after=repeat` takes V of the last token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from policy_opt.action_cases import by_action, one_episode_per_row
from policy_opt.advantages import GAE, Whiten
from policy_opt.aggregate import TokenMean
from policy_opt.recipe import Recipe
from policy_opt.rewards import TokenReward
from policy_opt.schedule import Schedule, Step
from policy_opt.surrogates import Clip, ClippedValue, EarlyStop, NegativeEntropy
from policy_opt.terms import Term
from policy_opt.vectors import Trace, Vectors


def standard(t: Trace) -> list[list[float]]:
    """The whitened advantages; the authors' code takes padding through the same formula as a 0."""
    return by_action(t, t["adv_BT"], -t.ctx.metrics["adv_mean"] / (t.ctx.metrics["adv_std"] + 1e-8))


def as_in_code(recipe: Recipe, inputs: Mapping[str, Any]) -> Recipe:
    """The file is the authors' code's, whose statistics leave out zeros, and whose losses are those before the
    decision to stop.
    """
    never = ("terms.policy.kl_max=1e300", "terms.entropy.kl_max=1e300")
    return recipe.set("advantage.over=nonzero", "advantage.after=value", *never)


recipe = Recipe(
    slug="poad",
    title="critic per token, discount per turn: credit inside an action is not discounted",
    level="value",
    cite="Wen et al. 2024, arXiv 2405.15821",
    evidence="read in code (morning9393/ADRL: advantages, losses, settings); theory from secondary summaries",
    deviations="A is whitened over the token mask; policy and critic step together; the reward stands at the end",
    learns="critic",
    reward=(TokenReward(kl_beta=0.0),),
    advantage=(
        GAE(gamma=1.0, lam=0.95, turn_gamma=0.95, turn_lam=0.95),
        Whiten(eps=1e-8, ddof=0, eps_on="deviation", per="step"),
    ),
    terms=(
        Term(EarlyStop(Clip(clip_low=0.2, clip_high=0.2), kl_max=0.02), agg=TokenMean()),
        Term(EarlyStop(NegativeEntropy(), 0.02), agg=TokenMean(), coef=0.01, name="entropy", weights=()),
        Term(ClippedValue(value_clip=0.2), agg=TokenMean(), coef=0.5, name="value", weights=()),
    ),
    schedule=Schedule((Step(epochs=5),)),
    variants={"ntpo": ("advantage.gamma=0.95",)},
    vectors=Vectors(
        params={
            "algo": (),  # POAD and NTPO differ in the discounts, which are given apart
            "gamma_action": "advantage.turn_gamma",
            "gamma_token": "advantage.gamma",
            "lam": ("advantage.lam", "advantage.turn_lam"),
            "lam_intra": "advantage.lam",
            "entropy_coef": "terms.entropy.coef",
            "value_loss_coef": "terms.value.coef",
            "value_loss": (),
        },
        columns={
            "token_rewards": ("token_reward_BT",),
            "turns": ("turn_BT",),
            "finished": ("finished_B",),
            "after": ("bootstrap_B",),
        },
        arrange=one_episode_per_row,
        adapt=as_in_code,
        stages=("advantage",),
        outputs={
            "advantages_raw": lambda t: by_action(t, t.after(GAE)["adv_BT"]),
            "returns": lambda t: by_action(t, t["returns_BT"]),
            "adv_mean": lambda t: t.ctx.metrics["adv_mean"],
            "adv_std": lambda t: t.ctx.metrics["adv_std"],
            "advantages_normalised": standard,
            "policy_loss": lambda t: t.weighted("policy", "entropy"),
            "grad_logp_new": lambda t: by_action(t, t.gradient(t.total)),
            "approx_kl": lambda t: t.share("approx_kl"),
            "value_loss": lambda t: t.weighted("value"),
            "grad_values_new": lambda t: by_action(t, t.gradient(t.total, "values_BT")),
        },
    ),
)
