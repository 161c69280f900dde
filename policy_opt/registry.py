"""Where recipes are found: a file in `policy_opt/recipes`, an installed plugin, or `module:recipe`."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from policy_opt.errors import RecipeError, unknown
from policy_opt.recipe import Recipe

GROUP = "palaestra.recipes"


@cache
def shipped() -> tuple[str, ...]:
    """Slugs of the files in policy_opt/recipes, sorted."""
    folder = Path(__file__).parent / "recipes"
    return tuple(sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_")))


def plugins() -> dict[str, EntryPoint]:
    """Recipes of installed distributions by slug; RecipeError where two have one name or one hides ours."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        if point.name in shipped():
            raise RecipeError(
                f"plugin {point.value} calls its recipe `{point.name}`, as one of Palaestra's is called"
            )
        if point.name in found and found[point.name].value != point.value:
            raise RecipeError(
                f"two plugins call a recipe `{point.name}`: {found[point.name].value} and {point.value}"
            )
        found[point.name] = point
    return found


def slugs() -> tuple[str, ...]:
    """Every recipe that `get` knows by name."""
    return tuple(sorted((*shipped(), *plugins())))


def get(name: str) -> Recipe:
    """The recipe of a slug, or of `package.module:attribute`; RecipeError with a suggestion where there is
    none.
    """
    if ":" in name:
        return _load(name, name)
    if name in shipped():
        return _load(f"policy_opt.recipes.{name}:recipe", name)
    found = plugins()
    if name not in found:
        raise RecipeError(unknown("recipe", name, (*shipped(), *found)))
    return _load(found[name].value, name)


def _load(spec: str, name: str) -> Recipe:
    module, _, attribute = spec.partition(":")
    try:
        value = getattr(importlib.import_module(module), attribute or "recipe")
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"recipe `{name}`: cannot load {spec}: {error}") from error
    if not isinstance(value, Recipe):
        raise RecipeError(f"recipe `{name}`: {spec} is a {type(value).__name__}, not a policy_opt.Recipe")
    return value
