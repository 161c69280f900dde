"""RLOO: REINFORCE Leave-One-Out. Ahmadian et al. 2024, arXiv 2402.14740.

The baseline of a trajectory is the mean reward of the others in its group; a trajectory is one action.

    R_i <- R_i - beta sum_t m (logp_old - logp_ref)
    A_i  = R_i - 1/(G-1) sum_{j != i} R_j
    (a)    L = - mean_i A_i sum_t m logp                                      the paper's form
    (b)    L = mean_i max(-A_i rho_i, -A_i clip(rho_i, 1 +- eps)),  rho_i = exp(sum_t m (logp - logp_old))

Form (b), TRL's, is `--set variant=clip`.
"""

from policy_opt.advantages import LeaveOneOut
from policy_opt.aggregate import SequenceSum
from policy_opt.recipe import Recipe
from policy_opt.rewards import KLPenalty
from policy_opt.surrogates import Reinforce, SequenceClip
from policy_opt.terms import Term
from policy_opt.vectors import Vectors

recipe = Recipe(
    slug="rloo",
    title="leave-one-out baseline, a trajectory is one action",
    level="trajectory",
    cite="Ahmadian et al. 2024, arXiv 2402.14740",
    evidence="advantage and clipped form read in code (verl, TRL rloo_trainer.py); plain form from the paper",
    deviations="KL coefficient 0 unless set (paper 0.03); a group of one gets advantage 0, as in TRL",
    reward=(KLPenalty(kl_beta=0.0),),
    advantage=(LeaveOneOut(),),
    terms=(
        Term(Reinforce(), agg=SequenceSum(), name="reinforce"),
        Term(SequenceClip(0.2, 0.2, product=True), agg=SequenceSum(), coef=0.0, name="clip"),
    ),
    variants={"clip": ("terms.reinforce.coef=0", "terms.clip.coef=1")},
    vectors=Vectors(
        params={"kl_reward_beta": "reward.kl_beta"},
        outputs={
            "rewards_with_kl": lambda t: t["reward_B"],
            "loss_reinforce": lambda t: t.term("reinforce")[0],
            "grad_reinforce": lambda t: t.gradient(t.term("reinforce")),
            "seq_ratio_product": lambda t: t.report("ratio", "clip"),
            "loss_seq_clip": lambda t: t.term("clip")[0],
            "grad_seq_clip": lambda t: t.gradient(t.term("clip")),
        },
    ),
)
