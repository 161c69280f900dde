"""PPO with a critic. Schulman et al. 2017, arXiv 1707.06347; GAE: 1506.02438; dual clip: 1912.09729.

    r_t     = R [t is the last policy token] - beta (logp_old - logp_ref)
    delta_t = r_t + gamma V_next - V_t,   A_t = delta_t + gamma lambda A_next,   next = the next policy token
    G_t     = A_t + V_old;   A is then whitened over all policy tokens of the batch
    l_t     = max(-A rho, -A clip(rho, 1 - eps, 1 + eps));   dual clip: where A < 0, min(l_t, -c A)
    L       = token-mean(l) + c_v 1/2 token-mean(max((V - G)^2, (clip(V, V_old +- eps_v) - G)^2)) - c_H H

A tool's output between two turns changes nothing: value and trace are carried across it.
"""

from policy_opt.advantages import GAE, Whiten
from policy_opt.aggregate import TokenMean
from policy_opt.recipe import Recipe
from policy_opt.rewards import TokenReward
from policy_opt.schedule import Schedule, Step
from policy_opt.surrogates import Clip, ClippedValue, NegativeEntropy
from policy_opt.terms import Term
from policy_opt.vectors import Vectors

recipe = Recipe(
    slug="ppo",
    title="critic, generalised advantage estimation across tool turns, clipped ratio and value",
    level="value",
    cite="Schulman et al. 2017, arXiv 1707.06347",
    evidence="read in code (verl core_algos.py: GAE, vanilla policy loss, value loss)",
    deviations="one pass by default, as in most language-model runs; advantages are 0 outside the mask",
    learns="critic",
    reward=(TokenReward(kl_beta=0.0),),
    advantage=(GAE(gamma=1.0, lam=0.95), Whiten()),
    terms=(
        Term(Clip(clip_low=0.2, clip_high=0.2), agg=TokenMean()),
        Term(ClippedValue(value_clip=0.2), agg=TokenMean(), name="value", weights=()),
        Term(NegativeEntropy(), agg=TokenMean(), coef=0.0, name="entropy", weights=()),
    ),
    schedule=Schedule((Step(minibatches=4),)),
    vectors=Vectors(
        params={
            "gamma": "advantage.gamma",
            "lam": "advantage.lam",
            "kl_reward_beta": "reward.kl_beta",
        },
        outputs={
            "loss": lambda t: t.term("policy")[0],
            "grad_logp_new": lambda t: t.gradient(t.term("policy")),
            "token_rewards": lambda t: t["token_reward_BT"],
            "advantages_raw": lambda t: t.after(GAE)["adv_BT"],
            "returns": lambda t: t["returns_BT"],
            "advantages_whitened": lambda t: t["adv_BT"],
            "dual_clip_frac": lambda t: t.share("dual_clip_frac"),
            "value_loss": lambda t: t.term("value")[0],
            "grad_values_new": lambda t: t.gradient(t.term("value"), "values_BT"),
        },
    ),
)
