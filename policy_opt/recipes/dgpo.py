"""DGPO: Difficulty-aware GRPO (MathForge). Dai et al. 2026, arXiv 2601.20614.

GRPO's update is largest on questions of medium difficulty. Here every question has the same total update, and
harder ones are then given more.

    A_i      = G (R_i - mean_g R) / (sum_g |R - mean_g R| + 1e-4)                                        DGAE
    lambda_q = B_v softmax(-m / T) over the B_v questions whose rewards differ, m = mean main reward     DQW
    L        = sum over the tokens of valid questions of l(lambda_q A_i) / their number,   l as in GRPO

A question without contrast is out of the denominator too: leaving it out of the batch changes nothing. Where the
rewards differ but no main reward does from 0, m := 1: such a question teaches the format, not the hard task. The
reward is the verdict's and the main reward `correct`; `--set reward=weighted_scores(weights=(1,0.5))` sums scores.
The data part of the paper (questions reformulated in three ways) is no part of the update.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from policy_opt.aggregate import TokenMean
from policy_opt.baselines import Balanced
from policy_opt.group_weights import DifficultyWeight, SignalMask
from policy_opt.mapping import by_id, own
from policy_opt.recipe import Recipe
from policy_opt.surrogates import Clip
from policy_opt.terms import Term
from policy_opt.vectors import Trace, Vectors


def components(value: Sequence[Sequence[float]]) -> dict[str, Tensor]:
    """The input reward_components: scores, the first of which is the main reward."""
    scores_BK = torch.tensor(value, dtype=torch.float64)
    return {"scores_BK": scores_BK, "main_B": scores_BK[:, 0], "reward_B": torch.zeros(len(value))}


def summed(recipe: Recipe, weights: Sequence[float]) -> Recipe:
    """The param reward_weights."""
    by = ["advantage.by=main_B"] if any(isinstance(part, DifficultyWeight) for part in recipe.advantage) else []
    return recipe.set(f"reward=weighted_scores(weights={tuple(weights)})", *by)


def sum_of_all(recipe: Recipe, inputs: Mapping[str, Any]) -> Recipe:
    """Without the param reward_weights the components are summed."""
    return recipe if recipe.reward else summed(recipe, [1.0] * len(inputs["reward_components"][0]))


def diluted(t: Trace) -> Tensor:
    """Tokens of the batch per token of a valid question; 1 where there is none of these."""
    valid = t["contrast_BT"].double().sum()
    return t["mask_BT"].sum() / valid if valid else torch.ones(())


def by_question(t: Trace, value_B: Tensor) -> list[float]:
    """A row quantity that all rows of a group share, in order of the groups."""
    return list(by_id(t, value_B.double()).values())


recipe = Recipe(
    slug="dgpo",
    title="mean absolute deviation as scale, harder questions weigh more, groups without contrast do not count",
    level="token",
    cite="Dai et al. 2026, arXiv 2601.20614",
    evidence="read in code (MathForge grpo_trainer.py, TRL 0.20); the objective also in summaries of the paper",
    deviations="a group of one is not valid (its standard deviation is undefined)",
    advantage=(Balanced(eps=1e-4), DifficultyWeight(temperature=2.0)),
    credit=(SignalMask(),),
    terms=(Term(Clip(clip_low=0.2, clip_high=0.2), den="contrast", agg=TokenMean()),),
    vectors=Vectors(
        params={
            "reward_weights": summed,
            "temperature": "advantage.temperature",
            "eps": "advantage.eps",
            "loss_agg": (),
            "dqw": lambda recipe, on: recipe if on else recipe.set("advantage-=difficulty_weight"),
        },
        columns={"reward_components": components},
        adapt=sum_of_all,
        outputs={
            "balanced_advantage": lambda t: t.after(Balanced)["adv_B"],
            "question_weight": lambda t: by_question(
                t, t["group_weight_B"] if "group_weight_B" in t.batch else torch.ones(t.batch.B)
            ),
            "valid_group": lambda t: by_question(t, own(t, SignalMask).valid(t.batch)),
            "zero_mask_ratio": diluted,
            "advantage_per_traj": lambda t: t["adv_B"] * diluted(t),
        },
    ),
)
