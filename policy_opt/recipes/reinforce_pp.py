"""REINFORCE++: Hu et al. 2025, arXiv 2501.03262.

PPO without a critic: the return to go, whitened over the whole batch, is the advantage.

    r_t = R [t is the last policy token] - beta (logp_old - logp_ref)
    G_t = r_t + gamma G_next,   next = the next policy token
    A_t = (G_t - mu) / sqrt(sigma^2 + 1e-8),   mu, sigma over all policy tokens of the batch
    l   = max(-A rho, -A clip(rho, 1 - eps, 1 + eps)),   L = sum m l / sum m

`--set variant=baseline` (groups): A_i = R_i - mean_g R, spread over tokens and whitened in the same way. A
tool's output between two turns does not cut the return, as it does in verl.
"""

from policy_opt.advantages import GroupCentre, RewardToGo, Whiten
from policy_opt.aggregate import TokenMean
from policy_opt.mapping import optional
from policy_opt.recipe import Recipe
from policy_opt.rewards import TokenReward, last_BT
from policy_opt.surrogates import Clip
from policy_opt.terms import Term
from policy_opt.vectors import Trace, Vectors


def interior(t: Trace) -> bool:
    """Does some row have a masked token before its last policy token?"""
    mask_BT = t["mask_BT"]
    before_BT = last_BT(mask_BT).flip(1).cumsum(1).flip(1) > 0
    return bool((before_BT & ~mask_BT).any())


recipe = Recipe(
    slug="reinforce_pp",
    title="return to go whitened over the batch, clipped token ratio, no critic",
    level="token",
    cite="Hu et al. 2025, arXiv 2501.03262",
    evidence="read in code (verl compute_reinforce_plus_plus_outcome_advantage, ..._baseline_...)",
    deviations="the return is carried across tool output (verl resets it there); KL coefficient 0 unless set",
    reward=(TokenReward(kl_beta=0.0),),
    advantage=(RewardToGo(gamma=1.0), Whiten()),
    terms=(Term(Clip(clip_low=0.2, clip_high=0.2), agg=TokenMean()),),
    variants={"baseline": ("reward=none", "advantage=(group_centre(), whiten())")},
    vectors=Vectors(
        params={
            "variant": lambda recipe, name: recipe.set("variant=baseline") if "baseline" in name else recipe,
            "gamma": optional("advantage.gamma"),
            "kl_reward_beta": optional("reward.kl_beta"),
        },
        outputs={
            "token_rewards": lambda t: t["token_reward_BT"],
            "returns": lambda t: t.after(RewardToGo)["adv_BT"],
            "group_centred_rewards": lambda t: t.after(GroupCentre)["adv_B"],
            "advantages": lambda t: t.per_token("adv"),
            "interior_mask": interior,
        },
    ),
)
