"""Parts by stage and name: what `--set stage=part(...)` may name."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from policy_opt.bank import OPTIMIZERS, Optim
from policy_opt.errors import RecipeError, unknown
from policy_opt.part import Part
from policy_opt.schedule import Step
from policy_opt.terms import Term

_MODULES = (
    "advantages",
    "aggregate",
    "calibration",
    "baselines",
    "bundles",
    "controllers",
    "credits",
    "curriculum",
    "curvature",
    "gates",
    "optimizers.kappa",
    "pairs",
    "preferences",
    "group_weights",
    "progress",
    "proximity",
    "orders",
    "rewards",
    "schedule",
    "sources",
    "surrogates",
    "token_credit",
    "tool_rewards",
    "trust",
)
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def part_name(kind: type) -> str:
    """GroupNorm -> group_norm, KLPenalty -> kl_penalty, GAE -> gae."""
    return _HUMP.sub("_", kind.__name__).lower()


def parts_of(module: str) -> dict[str, type[Part]]:
    """Parts defined in a module, by name."""
    content = vars(importlib.import_module(module)).values()
    own = [v for v in content if isinstance(v, type) and issubclass(v, Part) and v.__module__ == module]
    return {part_name(kind): kind for kind in own if kind.stage}


@cache
def common() -> dict[str, dict[str, Callable[..., Any]]]:
    """{stage: {name: part}} of the parts that recipes share."""
    found: dict[str, dict[str, Callable[..., Any]]] = {"terms": {"term": Term}, "step": {"step": Step}}
    found["optimizer"] = {name: partial(Optim, name) for name in OPTIMIZERS}
    for module in _MODULES:
        for name, kind in parts_of(f"policy_opt.{module}").items():
            found.setdefault(kind.stage, {})[name] = kind
    return found


def find(stage: str, name: str) -> Callable[..., Any]:
    """The part of that name at that stage; `slug.part` is a part that stands in a recipe's own file."""
    owner, _, local = name.rpartition(".")
    if owner:
        own = {n: k for n, k in parts_of(_file_of(owner)).items() if k.stage == stage}
        if local not in own:
            raise RecipeError(unknown(f"{stage} part of {owner}", local, own))
        return own[local]
    known = common().get(stage, {})
    if name in known:
        return known[name]
    elsewhere = [other for other, parts in common().items() if name in parts]
    if elsewhere:
        raise RecipeError(f"`{name}` stands at `{elsewhere[0]}`, not at `{stage}`")
    raise RecipeError(unknown(f"{stage} part", name, known))


def _file_of(slug: str) -> str:
    from policy_opt.registry import plugins, shipped

    if slug in shipped():
        return f"policy_opt.recipes.{slug}"
    if slug in plugins():
        return plugins()[slug].value.partition(":")[0]
    raise RecipeError(unknown("recipe", slug, (*shipped(), *plugins())))
