"""The table of recipes: `python -m policy_opt` (plain), `--json`, `--markdown`, or one recipe: `python -m
policy_opt grpo`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from policy_opt.catalog import part_name
from policy_opt.errors import RecipeError
from policy_opt.options import __doc__ as grammar
from policy_opt.options import addresses
from policy_opt.recipe import STAGES, Recipe
from policy_opt.registry import get, slugs


def row(recipe: Recipe) -> dict[str, object]:
    """A recipe's line, as data."""
    parts = {stage: [part_name(type(p)) for p in getattr(recipe, stage)] for stage in STAGES}
    return {
        "slug": recipe.slug,
        "idea": recipe.title,
        "level": recipe.level,
        "cite": recipe.cite,
        "evidence": recipe.evidence + (" (reconstructed)" if recipe.reconstructed else ""),
        "deviations": recipe.deviations,
        "learns": recipe.learns,
        "privileged": recipe.privileged,
        "variants": list(recipe.variants),
        "models": list(recipe.models),
        "parts": {stage: names for stage, names in parts.items() if names},
        "terms": {term.name: part_name(type(term.loss)) for term in recipe.terms if term.on},
    }


def plain_table(recipes: list[Recipe]) -> str:
    """Slug, level, idea and citation in columns."""
    lines = [("recipe", "level", "idea", "paper")]
    lines += [(r.slug, r.level, _idea(r), r.cite) for r in recipes]
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    padded = (
        "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[3]])
        for line in lines
    )
    return "\n".join(padded)


def markdown_table(recipes: list[Recipe]) -> str:
    """The same for the README."""
    lines = ["| recipe | idea | level | paper |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *(f"| `{r.slug}` | {_idea(r)} | {r.level} | {r.cite} |" for r in recipes)])


def _idea(recipe: Recipe) -> str:
    marks = [
        m for m, on in (("reconstructed", recipe.reconstructed), ("privileged", recipe.privileged)) if on
    ]
    return recipe.title + (f" ({', '.join(marks)})" if marks else "")


def card(recipe: Recipe) -> str:
    """One recipe: where it comes from, its parts, every option that --set knows."""
    lines = [f"{recipe.slug}: {recipe.title}", f"  {recipe.cite}; {recipe.level} level"]
    lines += [f"  evidence: {row(recipe)['evidence']}", f"  deviations: {recipe.deviations}"]
    if recipe.variants:
        lines.append(f"  variants: {', '.join(recipe.variants)}")
    lines.append("  options:")
    for address in addresses(recipe):
        if not dataclasses.is_dataclass(address.value) and not isinstance(address.value, tuple):
            lines.append(f"    {address.full}={address.value!r}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was asked for; 2 on an unknown recipe."""
    parser = argparse.ArgumentParser(
        prog="python -m policy_opt",
        description="The table of recipes.",
        epilog=grammar,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", help="show one recipe with its options")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table")
    options = parser.parse_args(arguments)
    try:
        recipes = [get(options.recipe)] if options.recipe else [get(slug) for slug in slugs()]
    except RecipeError as error:
        print(f"python -m policy_opt: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([row(recipe) for recipe in recipes], indent=1))
    elif options.markdown:
        print(markdown_table(recipes))
    else:
        print(card(recipes[0]) if options.recipe else plain_table(recipes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
