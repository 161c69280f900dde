"""T-PPO: Truncated Proximal Policy Optimization. Fan et al. 2025, arXiv 2506.15050.

PPO on responses that need not be finished: an episode is cut at the iteration's budget of tokens, waits in a pool,
and goes on in the next iteration with the updated policy; finished ones make room for new tasks.

    delta_t = r_t + gamma V_next - V_t;   V after the last token: 0 if finished, else V of the last token itself
    A_t     = delta_t + gamma lambda A_next   (EGAE; GAE where every episode is finished)
    l_t     = max(-A rho, -A clip(rho, 1 +- eps))         on tokens of the current window only
    G_t     = sum_k gamma^k r_(t+k)                       Monte-Carlo target, on finished episodes only
    v_t     = max(1/2 (V - G)^2, 1/2 (clip(V, V_old +- c_v) - G)^2)
    L       = token-mean over the window(l) + token-mean over finished episodes(v)

The window is what the current policy version sampled, so every token enters the policy's loss once. Without any
finished episode the critic takes no step. With `credit.tokens=all` older tokens take part again, weighed against
the policy at the iteration's start; add `credit+=tis` to correct for the version that sampled them.

Read: abstract, EGAE, policy on partial and value on finished data. Reconstructed: value target, window and token
filter, lambda, clip widths, no whitening (`advantage+=whiten` adds it).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from policy_opt.advantages import GAE
from policy_opt.aggregate import TokenMean
from policy_opt.batch import Batch
from policy_opt.curriculum import Curriculum
from policy_opt.part import Ctx, Part
from policy_opt.recipe import Recipe
from policy_opt.rewards import TokenReward
from policy_opt.surrogates import Clip, ClippedValue
from policy_opt.terms import Term
from policy_opt.vectors import Vectors


@dataclass(frozen=True)
class Truncation(Part):
    """Two masks: window_BT, the tokens that the policy learns from, and done_BT, those of finished episodes."""

    stage: ClassVar[str] = "credit"
    tokens: Literal["window", "all"] = "window"
    """The policy's tokens: those of the current version, or all that were sampled so far."""

    facts = frozenset({"finished_B"})
    reads = frozenset({"version_BT"})
    writes = frozenset({"window_BT", "done_BT"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        fresh_BT = b.mask_BT & (b.version_BT >= ctx.version)
        done_BT = b.mask_BT & (b["finished_B"] != 0)[:, None]
        return b.put(window_BT=fresh_BT if self.tokens == "window" else b.mask_BT, done_BT=done_BT)


def versions(given: Mapping[str, Any]) -> dict[str, Any]:
    """window_start as policy versions: 0, the iteration's own, from there on, and -1 before."""
    width = len(given["mask"][0])
    return {**given, "version": [[-int(t < start) for t in range(width)] for start in given["window_start"]]}


recipe = Recipe(
    slug="t_ppo",
    title="PPO on unfinished responses: a pool of partial rollouts, extended GAE, critic on finished ones",
    level="value",
    cite="Fan et al. 2025, arXiv 2506.15050",
    evidence="abstract read; EGAE in a secondary summary and public reviews; value target, token filter and "
    "constants reconstructed",
    deviations="Monte-Carlo value target, policy on the current window, no whitening",
    reconstructed=True,
    learns="critic",
    curriculum=Curriculum(resume=True, window=8192),
    reward=(TokenReward(kl_beta=0.0, finished_only=True),),
    advantage=(GAE(gamma=1.0, lam=0.95, after="repeat", returns="monte_carlo"),),
    credit=(Truncation(tokens="window"),),
    terms=(
        Term(Clip(clip_low=0.2, clip_high=0.2), num="window", den="window", agg=TokenMean()),
        Term(ClippedValue(value_clip=0.5), num="done", den="done", agg=TokenMean(), name="value", weights=()),
    ),
    vectors=Vectors(
        params={
            "gamma": "advantage.gamma",
            "lam": "advantage.lam",
            "value_loss": (),
            "loss_agg": (),
        },
        columns={
            "token_rewards": ("token_reward_BT",),
            "finished": ("finished_B",),
            "version": ("version_BT",),
        },
        arrange=versions,
        stages=("advantage", "credit"),
        outputs={
            "egae_advantages": lambda t: t["adv_BT"],
            "policy_mask": lambda t: t["window_BT"],
            "value_mask": lambda t: t["done_BT"],
            "value_targets": lambda t: t["returns_BT"] * t["done_BT"],
            "policy_loss": lambda t: t.term("policy")[0],
            "grad_logp_new": lambda t: t.gradient(t.term("policy")),
            "value_loss": lambda t: t.term("value")[0],
            "grad_values_new": lambda t: t.gradient(t.term("value"), "values_BT"),
        },
    ),
)
