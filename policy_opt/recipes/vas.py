"""VAS: Variance-Aware Sampling. Leng et al. 2025, arXiv 2509.21268 (MMR1).

GRPO that plays more often what promises variance: a group whose rewards are all equal teaches nothing, and one whose
responses are all alike soon will.

    OVS(x) = P (1 - P),  P = pass rate of N fresh responses          outcome variance, at most 1/4
    TDS(x) = diversity of these responses                            distinct n-grams, or 1 - self-BLEU
    VPS(x) = alpha OVS + beta TDS
    batch  = floor(lambda n) tasks drawn with replacement, P(x) = VPS(x) / sum VPS, and n - floor(lambda n) uniformly

All tasks are rated before training and every 35 iterations, with rollouts that train nothing; with
`curriculum.order.refresh=online` training's own groups rate their tasks and only the others are played. The authors'
code weighs by the min-max of VPS over the data (`curriculum.order.weights=minmax`), walks a fixed permutation for
the uniform part (as here), adds self-BLEU itself where it is configured (here 1 - self-BLEU), and runs on
outcome variance alone (`variant=released`). Equal scores everywhere give uniform draws.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from policy_opt.curriculum import Curriculum
from policy_opt.diversity import Said, edit_distance, self_bleu
from policy_opt.orders import Rating, VarianceAware, alternate, min_max, proportional, walk
from policy_opt.recipe import Recipe
from policy_opt.recipes.grpo import recipe as GRPO
from policy_opt.surrogates import K3, Clip
from policy_opt.terms import Term
from policy_opt.vectors import Trace, Vectors


def rows(given: Mapping[str, Any]) -> dict[str, Any]:
    """A case's responses [D, N, *] as rows, padded; a case of the sampler alone has an empty row."""
    if "sequences" not in given:
        return {**given, "mask": [[0]]}
    said = [s for group in given["sequences"] for s in group]
    width = max((len(s) for s in said), default=0) or 1
    return {
        **given,
        "mask": [[1] * len(s) + [0] * (width - len(s)) for s in said],
        "tokens": [s + [0] * (width - len(s)) for s in said],
        "group": [d for d, group in enumerate(given["sequences"]) for _ in group],
        "correct": [c for group in given["correct"] for c in group],
    }


def order(t: Trace) -> VarianceAware:
    """The recipe's sampler."""
    return t.recipe.curriculum.order


def rating(t: Trace) -> Rating:
    """Scores of the case's prompts."""
    return order(t).rate(t.batch)


def vps(t: Trace) -> Tensor:
    """VPS as computed, or as given."""
    return torch.tensor(t.inputs["vps"], dtype=torch.float64) if "vps" in t.inputs else rating(t).vps_Q


def weights(t: Trace) -> Tensor:
    """The authors' weights: min-max, then momentum."""
    before = t.inputs.get("previous_weights")
    return order(t).weigh(vps(t), None if before is None else torch.tensor(before, dtype=torch.float64))


def batches(t: Trace) -> tuple[list[list[int]], int]:
    """(tasks of each batch, position of the walk after them)."""
    size, found, position = int(t.params["batch_size"]), [], t.inputs["random_position"]
    count = order(t).weighted(size)
    for i in range(int(t.params["batches"])):
        walked, position = walk(t.inputs["random_pool"], position, size - count)
        found.append(alternate(t.inputs["weighted_draws"][i * count : (i + 1) * count], walked))
    return found, position


recipe: Recipe = GRPO.replace(
    slug="vas",
    title="GRPO; half of the tasks drawn by the variance that they promise",
    level="control",
    cite="Leng et al. 2025, arXiv 2509.21268",
    evidence="read in the paper text (Sec. 3.1, 3.2, 6.1) and in code (LengSicong/MMR1 verl/curriculum)",
    deviations="distinct 3-grams of the policy's own tokens as diversity; no padding in the n-grams",
    curriculum=Curriculum(order=VarianceAware(alpha=0.8, beta=0.2, mix=0.5, rollouts=32, every=35)),
    terms=(Term(Clip(clip_low=0.2, clip_high=0.2)), Term(K3(), coef=0.01, name="kl", weights=())),
    variants={
        "released": (
            "curriculum.order.weights=minmax",
            "curriculum.order.alpha=1",
            "curriculum.order.beta=0",
            "curriculum.order.rollouts=8",
            "curriculum.order.every=4",
        )
    },
    vectors=Vectors(
        params={
            "alpha": "curriculum.order.alpha",
            "beta": "curriculum.order.beta",
            "diversity": "curriculum.order.diversity",
            "distinct_n": "curriculum.order.n",
            "self_bleu": (),
            "momentum": "curriculum.order.momentum",
            "minmax_eps": "curriculum.order.minmax_eps",
            "mix_ratio": "curriculum.order.mix",
            "batch_size": (),
            "batches": (),
        },
        arrange=rows,
        adapt=lambda recipe, _: recipe.set("curriculum.order.weights=minmax"),
        columns={"tokens": ("tokens_BT",), "correct": ("correct_B",)},
        stages=(),
        sentences=frozenset({"required_behaviour"}),
        outputs={
            "pass_rate": lambda t: rating(t).pass_rate_Q,
            "ovs": lambda t: rating(t).ovs_Q,
            "tds": lambda t: rating(t).tds_Q,
            "vps": vps,
            "weights_minmax": lambda t: min_max(vps(t), order(t).minmax_eps),
            "weights_after_momentum": weights,
            "paper_sampling_probability": lambda t: proportional(vps(t)),
            "self_bleu_123": lambda t: self_bleu(Said.of(t.batch)),
            "pairwise_edit_distance": lambda t: edit_distance(Said.of(t.batch)),
            "n_weighted_per_batch": lambda t: order(t).weighted(t.params["batch_size"]),
            "n_random_per_batch": lambda t: t.params["batch_size"] - order(t).weighted(t.params["batch_size"]),
            "batches": lambda t: batches(t)[0],
            "random_position_after": lambda t: batches(t)[1],
        },
    ),
)
