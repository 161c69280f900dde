"""POWER-DL: robust rewards and dynamic labels. Rashidinejad and Tian 2024, arXiv 2412.09544. *Reconstructed.*

Preference learning without a reference: weighted entropy regularises, a max-min over rewards that fit the data adds the
likelihood of the preferred response, and labels move to what the policy persistently believes, so that a pair whose
label is wrong loses its gradient.

    S(y)  = sum_t m_t logp,   w = 1 / length (or 1)
    d     = beta [ w_c S_c - w_r S_r + (w_c - w_r) ]
    L     = mean over pairs of  -[ l log sigmoid(d) + (1 - l) log sigmoid(-d) ] - eta beta w_c S_c
    l    <- (1 - gamma) l + gamma sigmoid(d)                  after the loss, at each visit of the pair; at first 1

w_c - w_r comes with the weighted entropy; without it and with eta = gamma = 0 this is SimPO, with w = 1 DPO from a
uniform reference. The paper's text could not be read: the place of eta and beta, the label rule and all values are
reconstructed from its abstract and a summary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from policy_opt.batch import Batch
from policy_opt.mapping import own
from policy_opt.need import LOGP
from policy_opt.pairs import GroupPairs
from policy_opt.part import Part
from policy_opt.preferences import DynamicLabels, contrast, lengths, logistic, mean_over_pairs, whole
from policy_opt.recipe import Recipe
from policy_opt.surrogates import Streams
from policy_opt.terms import Term
from policy_opt.vectors import Trace, Vectors


@dataclass(frozen=True)
class RobustPairs(Part):
    """Logistic loss with label_P on the margin of weighted entropy, and the likelihood of the preferred response."""

    stage: ClassVar[str] = "surrogate"
    scope: ClassVar[str] = "batch"
    gives: ClassVar[str] = ""
    beta: float = 2.5
    """Scale of the margin."""
    eta: float = 1e-3
    """Weight of the robust term; 0: none."""
    weight: Literal["inverse_length", "one"] = "inverse_length"
    """w of a response."""
    length_margin: bool = True
    """Keep w_c - w_r in the margin."""

    def __post_init__(self) -> None:
        if self.beta <= 0 or self.eta < 0:
            raise ValueError(f"beta > 0 and eta >= 0, not {self.beta}, {self.eta}")

    needs = (LOGP,)
    reads = frozenset({"pairs_P2", "label_P"})

    def weights(self, s: Streams, b: Batch) -> Tensor:
        """w, 1 for a row without tokens: [B]."""
        length_B = lengths(b, s["logp_BT"]).clamp(min=1)
        return 1 / length_B if self.weight == "inverse_length" else torch.ones_like(length_B)

    def scores(self, s: Streams, b: Batch) -> Tensor:
        """w S: [B]."""
        return self.weights(s, b) * whole(b, (s["logp_BT"] * b.mask_BT).sum(1))

    def margins(self, s: Streams, b: Batch) -> Tensor:
        """d: [P]."""
        score_B = self.scores(s, b)
        return self.beta * contrast(b, score_B + self.weights(s, b) if self.length_margin else score_B)

    def preference(self, s: Streams, b: Batch) -> Tensor:
        """The logistic part of each pair's loss: [P]."""
        return logistic(self.margins(s, b), b["label_P"])

    def imitation(self, s: Streams, b: Batch) -> Tensor:
        """The robust part of each pair's loss: [P]."""
        return -self.eta * self.beta * self.scores(s, b)[b["pairs_P2"][:, 0]]

    def __call__(self, s: Streams, b: Batch) -> Tensor:
        return mean_over_pairs(self.preference(s, b) + self.imitation(s, b))

    def report(self, s: Streams, b: Batch) -> dict[str, Tensor]:
        margin_P = self.margins(s, b)
        return {"margin_P": margin_P, "preferred_P": margin_P > 0, "trusted_P": b["label_P"]}


def arrange(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Pairs as one list; every row is a trajectory with an id of its own."""
    pairs = [list(pair) for pair in zip(inputs["chosen"], inputs["rejected"], strict=True)]
    return {**inputs, "pairs": pairs, "rows": list(range(len(inputs["mask"])))}


def remember(t: Trace) -> None:
    """The input labels: the store before the step."""
    part = own(t, DynamicLabels)
    for key, label in zip(part.keys(t.start()).tolist(), t.inputs["labels"], strict=True):
        part.store(t.ctx).put(key, label)


def labels_after(t: Trace) -> Tensor:
    """The store after the step, by pair."""
    part = own(t, DynamicLabels)
    return part.store(t.stepped()).column(part.keys(t.batch))


recipe = Recipe(
    slug="power_dl",
    title="reference-free pairs: weighted entropy, robust rewards, labels that move to what the policy believes",
    level="preference",
    cite="Rashidinejad and Tian 2024, arXiv 2412.09544",
    evidence="reconstructed from the abstract and a secondary summary; weighted-entropy form derived",
    reconstructed=True,
    deviations="constants are recommendations, not the paper's; pairs from the verdicts of groups",
    advantage=(GroupPairs(),),
    credit=(DynamicLabels(gamma=0.1),),
    terms=(Term(RobustPairs()),),
    learns="pairs",
    vectors=Vectors(
        params={
            "beta": "terms.beta",
            "eta": "terms.eta",
            "gamma": "credit.gamma",
            "weight": "terms.weight",
            "length_margin": "terms.length_margin",
        },
        columns={"pairs": ("pairs_P2",), "rows": ("member_B",)},
        arrange=arrange,
        prime=remember,
        outputs={
            "weights": lambda t: t.recipe.terms[0].loss.weights(t.clean, t.batch),
            "margin": lambda t: t.report("margin_P"),
            "pref_loss": lambda t: t.recipe.terms[0].loss.preference(t.clean, t.batch),
            "sft_term": lambda t: t.recipe.terms[0].loss.imitation(t.clean, t.batch),
            "new_labels": labels_after,
        },
        stages=("credit",),
    ),
)
