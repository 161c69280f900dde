"""DPO: Direct Preference Optimization. Rafailov et al. 2023, arXiv 2305.18290.

A pair says that y_w is better than y_l; the policy is its own reward model.

    s(y)  = sum_t m_t (logp - logp_ref)                       token sum, the reference is frozen
    Delta = s(y_w) - s(y_l)
    L     = mean over pairs of -log sigmoid(beta Delta)

Online, pairs are made of each group's verdicts: every better member with every worse one, at most 16 a group. Pairs
that come with the data are taken as they are. Tokens of tools have mask 0 in both rows. `terms.length_normalised=True`
is TRL's "sigmoid_norm", `terms.label_smoothing` is cDPO.
"""

from policy_opt.pairs import GroupPairs
from policy_opt.preferences import LogisticPairs
from policy_opt.recipe import Recipe
from policy_opt.terms import Term
from policy_opt.vectors import Vectors

recipe = Recipe(
    slug="dpo",
    title="logistic loss on the log-ratio margin of preferred over other trajectories",
    level="preference",
    cite="Rafailov et al. 2023, arXiv 2305.18290",
    evidence="loss, log-ratios, masking and defaults read in code (TRL dpo_trainer.py, sigmoid) and executed",
    deviations="pairs from the verdicts of groups instead of a fixed data set",
    advantage=(GroupPairs(),),
    terms=(Term(LogisticPairs(beta=0.1)),),
    learns="pairs",
    vectors=Vectors(
        params={"beta": "terms.beta"},
        columns={"pairs_chosen_rejected": ("pairs_P2",)},
        outputs={
            "seq_logratio": lambda t: t.report("log_ratio"),
            "delta": lambda t: t.recipe.terms[0].loss.delta(t.clean, t.batch),
            "per_pair_loss": lambda t: t.recipe.terms[0].loss.losses(t.clean, t.batch),
            "chosen_reward": lambda t: t.report("implicit_reward")[t["pairs_P2"][:, 0]],
            "rejected_reward": lambda t: t.report("implicit_reward")[t["pairs_P2"][:, 1]],
        },
        stages=(),
    ),
)
