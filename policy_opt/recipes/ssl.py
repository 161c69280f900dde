"""SSL: Sweet Spot Learning. Wu et al. 2026, arXiv 2601.22491.

GRPO whose reward also says how near the episode came to the solution, in a few zones: a failure far off and one close
by differ, so that a group of failures still teaches, while noise inside a zone does not.

    S_i = mean over steps of the proximity s_t in [0, 1] to the reference             (a fact of the environment)
    Z_i = floor(K S_i + 1e-9) / K (progress: steps, cells)  or  ceil(K S_i - 1e-9) / K (distance: clicks)
    R_i = C_i + alpha Z_i,   C_i in {0, 1};   then A_i and the loss of GRPO

A click: `signals=click_proximity` with `reward.by=click_proximity_B`; a grid:
`signals=block_proximity` with `reward.by=blocks_BS`, `reward.several=zones`. Read in secondary summaries: the form of
R, K = 4, aggregation before the zones, Gaussian fields for clicks, blocks for grids. Reconstructed: width of the
Gaussian, borders and values of the zones, alpha, the block rule, that failures are paid too; each is an option.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from policy_opt.errors import RecipeError, unknown
from policy_opt.mapping import padded
from policy_opt.proximity import SweetSpot
from policy_opt.recipe import Recipe
from policy_opt.recipes.grpo import recipe as GRPO
from policy_opt.vectors import Trace, Vectors


def clicks(recipe: Recipe, sigma: float = 0.5) -> Recipe:
    """The recipe on clicks and boxes."""
    return recipe.set(
        f"signals=click_proximity(sigma={sigma})", "reward.by=click_proximity_B", "reward.outcome=click_inside_B"
    )


def grids(recipe: Recipe, block: int = 3) -> Recipe:
    """The recipe on grids."""
    zones = "reward.by=blocks_BS", "reward.outcome=solved_B", "reward.several=zones"
    return recipe.set(f"signals=block_proximity(block={block})", *zones)


def fitting(recipe: Recipe, inputs: Mapping[str, Any]) -> Recipe:
    """What a case's inputs ask for, where its params have not said so."""
    if "step_proximity" in inputs:
        return recipe.set("reward.by=steps_BS")
    if recipe.signals:
        return recipe
    return clicks(recipe) if "points" in inputs else grids(recipe, math.isqrt(len(inputs["ground_truth"])))


def deviation(recipe: Recipe, name: str) -> Recipe:
    """The param grpo_std."""
    kinds = {"population": 0, "unbiased": 1}
    if name not in kinds:
        raise RecipeError(f"{recipe.slug}: {unknown('grpo_std', name, kinds)}")
    return recipe.set(f"advantage.ddof={kinds[name]}")


def first_word(text: str) -> str:
    """Of a param that goes on to explain itself."""
    return re.split(r"\W", text, maxsplit=1)[0]


def numbers(names: Sequence[str], values: Any) -> dict[str, Tensor]:
    """Columns of a table."""
    return dict(zip(names, torch.tensor(values, dtype=torch.float64).unbind(1), strict=True))


def cells(grid: Any) -> list[Any]:
    """A grid row by row."""
    return [cell for row in grid for cell in row]


def flat(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Grids row by row, the solution beside every prediction."""
    if "predictions" not in given:
        return given
    truth = [cells(given["ground_truth"])] * len(given["predictions"])
    return {**given, "predictions": [cells(grid) for grid in given["predictions"]], "ground_truth": truth}


def steps(values: Sequence[Sequence[float]]) -> dict[str, Tensor]:
    """Lists of different lengths, filled up with NaN."""
    width = max((len(v) for v in values), default=0)
    filled = torch.tensor(padded(values, width, float("nan")), dtype=torch.float64)
    return {"steps_BS": filled.reshape(len(values), width)}


def binary(t: Trace) -> Tensor:
    """The advantage of the bare outcome."""
    (norm,) = t.recipe.advantage
    return norm(t.start().over(reward_B=t[t.recipe.reward[0].outcome]), t.ctx)["adv_B"]


recipe: Recipe = GRPO.replace(
    slug="ssl",
    title="GRPO; the reward also pays for coming near the solution, in a few zones",
    level="trajectory",
    cite="Wu et al. 2026, arXiv 2601.22491",
    evidence="abstract and secondary summaries; zones, widths and alpha reconstructed",
    deviations="everything that the summaries do not say: see the docstring",
    reconstructed=True,
    reward=(SweetSpot(alpha=0.5, zones=4),),
    vectors=Vectors(
        params={
            "sigma_fraction_of_size": clicks,
            "block": grids,
            "K": "reward.zones",
            "alpha": "reward.alpha",
            "zone_rule": lambda recipe, text: recipe.set(f"reward.rule={first_word(text)}"),
            "aggregate": lambda recipe, text: recipe.set(f"reward.several={first_word(text)}"),
            "grpo_std": lambda recipe, text: deviation(recipe, first_word(text)),
            "grpo_eps": "advantage.eps",
        },
        arrange=flat,
        adapt=fitting,
        columns={
            "points": lambda values: numbers(("click_x_B", "click_y_B"), values),
            "boxes": lambda values: numbers(("box_left_B", "box_top_B", "box_right_B", "box_bottom_B"), values),
            "predictions": ("cells_BN",),
            "ground_truth": ("solution_BN",),
            "step_proximity": steps,
            "correct": ("correct_B",),
        },
        stages=("signals", "reward", "advantage"),
        outputs={
            "mahalanobis_sq": lambda t: t["click_distance_B"],
            "proximity": lambda t: t["nearness_B"],
            "trajectory_proximity": lambda t: t["nearness_B"],
            "block_accuracy": lambda t: t["blocks_BS"],
            "zone_score": lambda t: t["zone_B"],
            "correct": lambda t: t[t.recipe.reward[0].outcome],
            "reward": lambda t: t["reward_B"],
            "advantages_binary": binary,
        },
    ),
)
