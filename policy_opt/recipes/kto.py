"""KTO: Kahneman-Tversky Optimization. Ethayarajh et al. 2024, arXiv 2402.01306.

No pairs and no groups: each trajectory is desirable or not, and its value saturates on both sides of a reference point.

    s_i = sum_t m_t (logp - logp_ref)
    z0  = max(0, mean_j [log pi(y'_j | x_j) - log pi_ref(y'_j | x_j)])      y'_j: tokens of another trajectory; detached
    l_i = w_D (1 - sigmoid(beta (s_i - z0)))  if desirable,  w_U (1 - sigmoid(beta (z0 - s_i)))  if not
    L   = mean_i l_i

z0 estimates KL(pi || pi_ref) on mismatched pairs, under the weights of each optimizer step and over its whole
mini-batch, before the clamp. Rule of thumb: (w_D n_D) / (w_U n_U) in [1, 4/3]. `--set variant=apo_zero` is
`apo_zero_unpaired`: z0 = 0 and no mismatched pairs. Where trajectories hold tool outputs, mismatched pairs put policy
tokens after a foreign prompt without them; apo_zero avoids that.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from policy_opt.aggregate import SequenceSum
from policy_opt.bank import WITH_REFERENCE
from policy_opt.batch import Batch
from policy_opt.mapping import losses, own, padded
from policy_opt.need import LOGP, LOGP_REF, LogProb, Mismatched, Need
from policy_opt.part import Part
from policy_opt.preferences import log_ratios, whole
from policy_opt.recipe import Recipe
from policy_opt.surrogates import Streams
from policy_opt.terms import Term
from policy_opt.vectors import Vectors

MISMATCHED = Need("mismatched_BT", LogProb(), view=Mismatched(), when="step")
MISMATCHED_REF = Need("mismatched_ref_BT", LogProb(), model="ref", view=Mismatched(), when="step")


@dataclass(frozen=True)
class ProspectValue(Part):
    """w (1 - sigmoid(+-beta (s - z0))), per trajectory; its further rows give 0."""

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "batch"
    gives: ClassVar[str] = "B"
    beta: float = 0.1
    """Steepness of the value around the reference point."""
    desirable_weight: float = 1.0
    """w_D."""
    undesirable_weight: float = 1.0
    """w_U."""
    by: str = "correct_B"
    """Above 0.5 is desirable."""
    reference_point: Literal["mismatched", "zero"] = "mismatched"
    """zero: no KL estimate, z0 = 0."""

    def __post_init__(self) -> None:
        if self.beta <= 0 or self.desirable_weight < 0 or self.undesirable_weight < 0:
            raise ValueError(
                f"beta > 0 and weights >= 0, not {self.beta}, {self.desirable_weight}, {self.undesirable_weight}"
            )

    @property
    def needs(self) -> tuple[Need, ...]:
        estimate = (MISMATCHED, MISMATCHED_REF) if self.reference_point == "mismatched" else ()
        return LOGP, LOGP_REF, *estimate

    models = WITH_REFERENCE

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({self.by})

    def estimate(self, b: Batch) -> Tensor:
        """Mean log-ratio of the mismatched pairs, which may be negative."""
        if self.reference_point == "zero":
            return b.logp_sampler_BT.new_zeros(())
        gap_B = whole(b, (b["mismatched_BT"] - b["mismatched_ref_BT"]).sum(1))
        return gap_B[b.once()].mean()

    def z0(self, b: Batch) -> Tensor:
        """The reference point."""
        return self.estimate(b).clamp(min=0)

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        gain_B = self.beta * (log_ratios(s, b) - self.z0(b))
        good_B = b[self.by] > 0.5
        right, wrong = gain_B.new_tensor([self.desirable_weight, self.undesirable_weight])
        weight_B = torch.where(good_B, right, wrong)
        return weight_B * torch.where(good_B, -gain_B, gain_B).sigmoid() * b.once()

    def report(self, s: Streams, b: Batch) -> dict[str, Tensor]:
        log_ratio_B = log_ratios(s, b)
        z0_B = self.z0(b).expand(b.B)
        return {"log_ratio": log_ratio_B, "implicit_reward": self.beta * log_ratio_B, "z0": z0_B}


def arrange(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Mismatched rows are 0 outside their mask, as a learner gives them; both kinds of rows get one width."""
    width = max(len(inputs["mask"][0]), len(inputs["kl_mask"][0]))

    def on_mask(name: str) -> list[list[float]]:
        pairs = zip(inputs[name], inputs["kl_mask"], strict=True)
        return padded([[x if m else 0.0 for x, m in zip(*pair, strict=True)] for pair in pairs], width)

    logp = {name: padded(inputs[name], width) for name in ("logp_new", "logp_ref", "mask")}
    return {**inputs, **logp, "kl_logp_new": on_mask("kl_logp_new"), "kl_logp_ref": on_mask("kl_logp_ref")}


recipe = Recipe(
    slug="kto",
    title="saturating value of each trajectory's log-ratio around a KL reference point; no pairs",
    level="preference",
    cite="Ethayarajh et al. 2024, arXiv 2402.01306",
    evidence="loss, reference point, mismatched pairs and weights read in code (TRL kto_trainer.py) and executed",
    deviations="labels are the verdicts of rollouts; mismatched partners follow unit ids, not the order of rows",
    terms=(Term(ProspectValue(), agg=SequenceSum()),),
    variants={"apo_zero": ("terms.reference_point=zero",)},
    vectors=Vectors(
        params={
            "beta": "terms.beta",
            "desirable_weight": "terms.desirable_weight",
            "undesirable_weight": "terms.undesirable_weight",
        },
        columns={
            "label": lambda label: {"correct_B": torch.tensor(label)},
            "kl_logp_new": ("mismatched_BT",),
            "kl_logp_ref": ("mismatched_ref_BT",),
        },
        arrange=arrange,
        outputs={
            "seq_logratio": lambda t: t.report("log_ratio"),
            "kl_before_clamp": lambda t: own(t, ProspectValue).estimate(t.batch),
            "kl_z0": lambda t: own(t, ProspectValue).z0(t.batch),
            "per_sample_loss": losses,
            "grad_logp_new": lambda t: t.gradient(t.total)[:, : len(t.given["mask"][0])],
            "implicit_reward": lambda t: t.report("implicit_reward"),
        },
        stages=(),
    ),
)
