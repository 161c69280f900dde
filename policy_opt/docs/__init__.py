"""The pages under docs/recipes, made from what the recipes say of themselves: `python -m policy_opt docs`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from policy_opt.docs.curve import curve, drawn
from policy_opt.docs.page import index, optimizer_page, recipe_page
from policy_opt.errors import RecipeError
from policy_opt.optimizers import METHODS
from policy_opt.recipe import Recipe
from policy_opt.registry import get, shipped

FOLDER = Path("docs/recipes")
CURVES = "curves"


def pages(recipes: Sequence[Recipe]) -> dict[str, str]:
    """{file name: content} of every page but the curves, for these recipes and all optimizers."""
    found = {f"{recipe.slug}.md": recipe_page(recipe, f"{CURVES}/{recipe.slug}.svg") for recipe in recipes}
    found |= {f"{name}.md": optimizer_page(name) for name in METHODS}
    return {**found, "index.md": index(recipes)}


def write(folder: Path, curves: bool) -> int:
    """Write all pages and the curves that are missing, or all of those too. 1 where a recipe does not load."""
    recipes, status = [], 0
    for slug in shipped():
        try:
            recipes.append(get(slug))
        except (RecipeError, ValueError, TypeError) as error:
            print(f"{slug}: left out: {error}", file=sys.stderr)
            status = 1
    (folder / CURVES).mkdir(parents=True, exist_ok=True)
    kept = pages(recipes)
    for page in (*folder.glob("*.md"), *(folder / CURVES).glob("*.svg")):
        if f"{page.stem}.md" not in kept and page.stem not in shipped():
            page.unlink()
    for name, content in kept.items():
        (folder / name).write_text(content, encoding="utf-8")
    for recipe in recipes:
        picture = folder / CURVES / f"{recipe.slug}.svg"
        if picture.exists() and not curves:
            continue
        try:
            points = curve(recipe)
        except (RecipeError, ValueError) as error:
            print(f"{recipe.slug}: no curve: {error}", file=sys.stderr)
            status = 1
            continue
        if points is not None:
            picture.write_text(drawn(points, recipe.slug), encoding="utf-8")
    print(f"{len(kept)} pages in {folder}")
    return status
