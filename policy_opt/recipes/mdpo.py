"""MDPO: Mirror Descent Policy Optimization. Tomar et al. 2020, arXiv 2005.09814.

Each iteration solves a proximal problem around the policy that played it: importance-weighted advantages against
KL(new || old), by several steps on the same batch. No clip.

    L   = - mean(rho A) + (1 / t_k) mean KL(pi || pi_old),   rho = pi / pi_old,   t_k = max(1 - k / K, floor)
    KL  is estimated on tokens of pi_old by rho log rho - (rho - 1)

At the first step the KL has no gradient, so one step per batch would be plain policy gradient. A_i as in GRPO: the
language-model form is a specialisation of this project. `--set variant=exact` sums the KL over the vocabulary,
against a snapshot of the policy; `--set variant=critic` is the paper's on-policy method with it: GAE, advantages
standardised over the batch, a clipped value loss. `--set terms.kl.loss=mdpo.tsallis(q=1.5)` is the Tsallis form.

Off-policy (the parts alone, for golden numbers and for a loop of one's own):

    L     = E_s sum_a pi (kappa log pi + (lambda - kappa) log pi_old - Q_1)
    V(s)  = sum_a pi (min(Q_1, Q_2) - lambda log pi),     y = r + gamma (1 - d) V_target(s')

No run of it: it is a method for control. It wants two Q critics with a number per action, a target of V and a replay
of single transitions, none of which a policy over a vocabulary has; `mdpo.soft_improvement` is refused where nothing
writes q1_BTA. Not covered either: Gaussian policies, with their penalty on mean and deviation.

The authors' t_k uses (k - 1) from k = 0, so that its first value is 1 + 1/K; here it starts at 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from policy_opt.advantages import GroupNorm
from policy_opt.aggregate import TokenMean
from policy_opt.batch import Batch
from policy_opt.controllers import InverseAnnealed
from policy_opt.gates import Gated
from policy_opt.logit_cases import one_state_per_row, play
from policy_opt.need import LOGP, LOGP_OLD, Need, TopKIds, TopKLogProb, When
from policy_opt.options import assign
from policy_opt.part import Ctx, Part
from policy_opt.recipe import Recipe
from policy_opt.schedule import Schedule, Step
from policy_opt.surrogates import Streams
from policy_opt.terms import Term
from policy_opt.trust import SampledKL
from policy_opt.vectors import Vectors


@dataclass(frozen=True)
class Tsallis(Part):
    """log_q'(pi) - log_q'(pi_old) of the sampled token, q' = 2 - q, log_q'(x) = (x^(1 - q') - 1) / (1 - q')."""

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "row"
    gives: ClassVar[str] = "BT"
    q: float = 1.5
    """Not 1: that is the KL."""

    def __post_init__(self) -> None:
        if self.q == 1:
            raise ValueError("q = 1 is the KL, not a Tsallis form")

    needs = LOGP, LOGP_OLD

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        power = self.q - 1
        return ((power * s["logp_BT"]).exp() - (power * b["logp_old_BT"]).exp()) / power


def distribution(name: str, actions: int, when: When) -> tuple[Need, Need]:
    """Log-probs of all actions, and which they are; ids are no stream, so those of the loss are taken at the step."""
    ids = Need(f"{name}_ids_BTK", TopKIds(actions), when="step" if when == "loss" else when)
    return Need(f"{name}_BTK", TopKLogProb(actions), when=when), ids


def logp_of_actions(name: str, values: Mapping[str, Tensor] | Batch, b: Batch) -> Tensor:
    """The former in the order of the actions: [B, T, A]."""
    return torch.zeros_like(values[f"{name}_BTK"]).scatter(-1, b[f"{name}_ids_BTK"], values[f"{name}_BTK"])


@dataclass(frozen=True)
class SoftImprovement(Part):
    """sum_a pi (kappa log pi + (lambda - kappa) log pi_old - Q_1) of each state, over all its actions."""

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "row"
    gives: ClassVar[str] = "BT"
    kl_coef: float = 1.0
    """kappa = 1 / t_k."""
    entropy_coef: float = 0.2
    """lambda; equal to kappa it is the soft actor-critic's loss."""
    actions: int = 64
    """At most so many actions; a policy with more is not meant."""

    @property
    def needs(self) -> tuple[Need, ...]:
        return *distribution("top", self.actions, "loss"), *distribution("top_old", self.actions, "rollout")

    reads = frozenset({"q1_BTA"})

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        logp_BTA, old_BTA = logp_of_actions("top", s, b), logp_of_actions("top_old", b, b)
        cost_BTA = self.kl_coef * logp_BTA + (self.entropy_coef - self.kl_coef) * old_BTA - b["q1_BTA"]
        return (logp_BTA.exp() * cost_BTA).sum(-1)

    def optimum(self, b: Batch) -> Tensor:
        """The policy that minimises it: exp((Q_1 + (kappa - lambda) log pi_old) / kappa), normalised: [B, T, A]."""
        goal_BTA = b["q1_BTA"] + (self.kl_coef - self.entropy_coef) * logp_of_actions("top_old", b, b)
        return (goal_BTA / self.kl_coef).softmax(-1)


@dataclass(frozen=True)
class SoftTargets(Part):
    """v_target_BT and q_target_BT: what the critics of the off-policy form are regressed to."""

    stage: ClassVar[str] = "signals"
    when = "step"
    gamma: float = 0.99
    entropy_coef: float = 0.2
    """lambda."""
    actions: int = 64
    """As in SoftImprovement."""

    @property
    def needs(self) -> tuple[Need, ...]:
        return distribution("top_now", self.actions, "step")

    reads = frozenset({"q1_BTA", "q2_BTA", "step_reward_BT", "done_BT", "next_value_BT"})
    writes = frozenset({"v_target_BT", "q_target_BT"})

    def __call__(self, b: Batch, ctx: Ctx) -> Batch:
        logp_BTA = logp_of_actions("top_now", b, b)
        value_BTA = torch.minimum(b["q1_BTA"], b["q2_BTA"]) - self.entropy_coef * logp_BTA
        later_BT = self.gamma * (1 - b["done_BT"]) * b["next_value_BT"]
        return b.put(v_target_BT=(logp_BTA.exp() * value_BTA).sum(-1), q_target_BT=b["step_reward_BT"] + later_BT)


def form(recipe: Recipe, name: str) -> Recipe:
    """The param form; the advantages of the on-policy one are given, and only standardised."""
    if name == "on_policy":
        return recipe.set("variant=exact", "advantage=whiten(eps=1e-30, ddof=0)")
    if name == "off_policy":
        term = Term(SoftImprovement(), agg=TokenMean())
        return recipe.replace(advantage=(), signals=(SoftTargets(),), terms=(term,))
    return recipe


def tsallis(recipe: Recipe, q: float) -> Recipe:
    """The param tsallis_q; 1 is the KL."""
    return recipe if q == 1 else recipe.set(f"terms.kl.loss=mdpo.tsallis(q={q!r})")


def either(sampled, categorical):
    """An output of the forms with sampled tokens, or of those with whole distributions."""
    return lambda t: categorical(play(t)) if "logits_new" in t.inputs else sampled(t)


recipe = Recipe(
    slug="mdpo",
    title="several steps against KL(new || old) with a growing weight, no clip",
    level="token",
    cite="Tomar et al. 2020, arXiv 2005.09814",
    evidence="read in the authors' code (mdpo_on, mdpo_off); the language-model form is this project's specialisation",
    deviations="t_k starts at 1 (code: 1 + 1/K) with a floor; the learning rate is not annealed with it",
    advantage=(GroupNorm(eps=1e-6, ddof=1),),
    terms=(
        Term(Gated(), agg=TokenMean()),
        Term(SampledKL(), agg=TokenMean(), coef=InverseAnnealed(iterations=500), name="kl", weights=()),
    ),
    schedule=Schedule((Step(epochs=5),)),
    variants={
        "exact": ("terms.kl.loss=exact_kl()",),
        "critic": (
            "terms.kl.loss=exact_kl()",
            "reward=token_reward()",
            "advantage=(gae(gamma=1.0, lam=0.95), whiten(eps=1e-8, ddof=0))",
            "terms+=term(clipped_value(0.2), agg=token_mean, coef=0.5, name=value, weights=())",
        ),
    },
    vectors=Vectors(
        params={
            "form": form,
            "t_k": lambda r, t_k: assign(r, "terms.kl.coef", 1 / t_k),
            "tsallis_q": tsallis,
            "kl_coef": "terms.kl_coef",
            "lambda_ent": ("terms.entropy_coef", "signals.entropy_coef"),
            "gamma": "signals.gamma",
        },
        columns={
            "actions": ("tokens_BT",),
            "advantages_raw": ("adv_B",),
            "q1": ("q1_BTA",),
            "q2": ("q2_BTA",),
            "reward": ("step_reward_BT",),
            "done": ("done_BT",),
            "v_next_target": ("next_value_BT",),
        },
        arrange=one_state_per_row,
        outputs={
            "loss": either(lambda t: t.total[0], lambda p: p.loss),
            "kl": either(lambda t: t.term("kl")[0], lambda p: p.values["kl"]),
            "grad_logits_new": lambda t: play(t).grad_NM,
            "ratio": lambda t: play(t).reports["ratio"][:, 0],
            "v_target": lambda t: play(t).batch["v_target_BT"][:, 0],
            "q_target": lambda t: play(t).batch["q_target_BT"][:, 0],
            "closed_form_optimum_probs": lambda t: t.recipe.terms[0].loss.optimum(play(t).batch)[:, 0],
        },
    ),
)
