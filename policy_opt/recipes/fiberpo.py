"""FiberPO: Fibration Policy Optimization. Chang Li et al. 2026, arXiv 2603.08239v1.

The ratio is split into a trajectory's common drift and what is left of each token; each has a trust region of
its own. No minimum with the ungated ratio: beyond the budget the drift is rolled back, not cut off.

    log s+ = (1/T) sum_t m max(log r_t, 0),   log s- = (1/T) sum_t m max(-log r_t, 0)              per trajectory
    g(x, C, k) = x if |x| <= C;   sign(x) (k + 1) C - k x if |x| < (1 + 1/k) C;   0 beyond
    log w  = g(log s+, C+, T) - g(log s-, C-, T)
    log f  = clip(log r - log s+, +-eps) + clip(log s-, +-eps)   where log r >= 0
             clip(log r + log s-, +-eps) - clip(log s+, +-eps)   otherwise                             (Eqs. 6-16)
    L      = -mean_i (1/L_i) sum_t m exp(log w + log f) A_i

`--set variant=domain` gates the drift at three levels, domain (level_B), group and trajectory (Eqs. 30-33), and
keeps domains whole in a mini-batch. `--set variant=apc` is the source objective with one budget of total variation
per state (Eqs. 2-3), a token mean. Where groups differ in size, `--set credit+=equal_groups` gives the paper's mean
over groups of their means.
"""

from policy_opt.advantages import GroupNorm
from policy_opt.gates import Fiber, Gated
from policy_opt.mapping import optional, reported, variant
from policy_opt.recipe import Recipe
from policy_opt.schedule import Schedule, Step
from policy_opt.terms import Term
from policy_opt.vectors import Vectors

recipe = Recipe(
    slug="fiberpo",
    title="ratio split into trajectory drift with a rolled-back budget and a clipped token residual",
    level="trajectory",
    cite="Li et al. 2026, arXiv 2603.08239",
    evidence="every formula read in the paper text (v1, Eqs. 2-16, 20, 30-33); the paper releases no code",
    deviations="budgets are those of the paper's figure, which gives no training defaults",
    advantage=(GroupNorm(eps=1e-6, ddof=1),),
    terms=(Term(Gated(Fiber(eps=0.04, c_plus=0.12, c_minus=0.05))),),
    schedule=Schedule((Step(minibatches=4),)),
    variants={
        "domain": ("terms.gate=fiber_domain(eps=0.04, c_plus=0.12, c_minus=0.05)", "schedule.unit=level_B"),
        "apc": ("signals=prefix_state", "terms.gate=state_budget(delta=0.2)", "terms.agg=token_mean"),
    },
    vectors=Vectors(
        params={
            "form": variant("trajectory"),
            "eps": optional("terms.gate.eps"),
            "C_plus": optional("terms.gate.c_plus"),
            "C_minus": optional("terms.gate.c_minus"),
            "delta": optional("terms.gate.delta"),
        },
        columns={"domain": ("level_B",), "state": ("state_BT",)},
        outputs=reported(
            "log_s_plus", "log_s_minus", "log_base_weight", "log_fiber_residual", "gated_ratio", "budget"
        ),
    ),
)
