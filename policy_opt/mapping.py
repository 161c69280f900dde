"""What mappings of golden numbers share: params that only some forms of a recipe know, ids, what parts report.

`policy_opt.vectors` drives a case through a recipe; here are the small pieces that a recipe's `Vectors` is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from policy_opt.part import Part
from policy_opt.recipe import Recipe
from policy_opt.vectors import Trace

P = TypeVar("P", bound=Part)
Put = Callable[[Recipe, Any], Recipe]
"""What a param does to a recipe."""


# -- params ---------------------------------------------------------------------------------------------


def optional(*paths: str) -> Put:
    """A param of those options at `paths` that the recipe has; to forms without them it means nothing."""

    def put(recipe: Recipe, value: Any) -> Recipe:
        from policy_opt.options import assign, knows

        for path in paths:
            recipe = assign(recipe, path, value) if knows(recipe, path) else recipe
        return recipe

    return put


def variant(default: str) -> Put:
    """A param that names a variant; `default` is the recipe as it stands."""
    return lambda recipe, name: recipe if name == default else recipe.set(f"variant={name}")


def every_group(recipe: Recipe, inputs: Mapping[str, Any]) -> Recipe:
    """`Vectors.adapt`: the file's groups are what is trained on, none is left to be replaced."""
    return recipe.set("curriculum.accept=none")


# -- inputs ---------------------------------------------------------------------------------------------


def numbered(values: Sequence[Any]) -> list[int]:
    """Ids or texts as numbers from 0, in order of first appearance."""
    known = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return [known[value] for value in values]


def padded(rows: Sequence[Sequence[float]], width: int, fill: float = 0.0) -> list[list[float]]:
    """Lists of different lengths, filled up on the right."""
    return [[*row, *[fill] * (width - len(row))] for row in rows]


# -- outputs --------------------------------------------------------------------------------------------


def own(t: Trace | Recipe, kind: type[P]) -> P:
    """The recipe's part of a kind, wherever it stands."""
    recipe = t.recipe if isinstance(t, Trace) else t
    return next(part for _, part in recipe.parts if isinstance(part, kind))


def reported(*names: str) -> dict[str, Callable[[Trace], Tensor]]:
    """Outputs that a surrogate reports under the very name."""
    return {name: partial(Trace.report, name=name) for name in names}


def losses(t: Trace) -> Tensor:
    """What the first term's surrogate gives, 0 outside the mask where it is per token."""
    found = t.recipe.terms[0].loss(t.clean, t.batch)
    return found * t.batch.mask_BT if found.ndim == 2 else found


def by_id(t: Trace, value_B: Tensor, ids: str = "group") -> dict[str, Any]:
    """A quantity that all rows with one id share, by the id's text; null for NaN."""
    values = [None if v != v else v for v in value_B.tolist()]
    return dict(zip(map(str, t.inputs[ids]), values, strict=True))
