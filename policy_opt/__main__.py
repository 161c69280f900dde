"""The table of recipes and optimizers: `python -m policy_opt` (plain), `--json`, `--markdown`; one of them: `python
-m policy_opt grpo`; their pages under docs/recipes: `python -m policy_opt docs [--curves]`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from policy_opt.bank import OWN_OPTIONS, Optim
from policy_opt.catalog import part_name
from policy_opt.errors import RecipeError, unknown
from policy_opt.optimizers import METHODS
from policy_opt.options import __doc__ as grammar
from policy_opt.options import addresses
from policy_opt.recipe import STAGES, Recipe
from policy_opt.registry import get, slugs

LEVELS = ("token", "sequence", "trajectory", "preference", "value", "control", "optimizer")
"""Sections of the plain table, in order."""


def row(recipe: Recipe) -> dict[str, object]:
    """A recipe's line, as data."""
    parts = {stage: [part_name(type(p)) for p in getattr(recipe, stage)] for stage in STAGES}
    return {
        "slug": recipe.slug,
        "kind": "recipe",
        "idea": recipe.title,
        "level": recipe.level,
        "cite": recipe.cite,
        "evidence": recipe.evidence + (" (reconstructed)" if recipe.reconstructed else ""),
        "reconstructed": recipe.reconstructed,
        "deviations": recipe.deviations,
        "learns": recipe.learns,
        "privileged": recipe.privileged,
        "variants": list(recipe.variants),
        "models": list(recipe.models),
        "parts": {stage: names for stage, names in parts.items() if names},
        "terms": {term.name: part_name(type(term.loss)) for term in recipe.terms if term.on},
    }


def optimizer_row(name: str) -> dict[str, object]:
    """An optimizer's line, as data."""
    card = METHODS[name].card
    return {
        "slug": name,
        "kind": "optimizer",
        "idea": card.title,
        "level": "optimizer",
        "cite": card.cite,
        "evidence": card.evidence + (" (reconstructed)" if card.reconstructed else ""),
        "reconstructed": card.reconstructed,
        "deviations": card.deviations,
        "learns": "identity",
        "privileged": False,
        "variants": [],
    }


def marked(line: dict[str, object]) -> str:
    """The idea, and what must be said wherever the method is listed."""
    marks = [mark for mark in ("reconstructed", "privileged") if line[mark]]
    return f"{line['idea']}" + (f" ({', '.join(marks)})" if marks else "")


def plain_table(lines: Sequence[dict[str, object]], width: int | None = None) -> str:
    """Slug, idea and citation in columns, a section per level. width: ideas are cut so that lines fit it."""
    names = max(len(str(line["slug"])) for line in lines)
    cites = max(len(str(line["cite"])) for line in lines)
    ideas = max(len(marked(line)) for line in lines)
    if width is not None:
        ideas = min(ideas, max(width - names - cites - 6, 24))
    found = []
    for level in LEVELS:
        here = [line for line in lines if line["level"] == level]
        found += ["", f"{level} ({len(here)})"] if here else []
        for line in here:
            idea = marked(line)
            idea = idea if len(idea) <= ideas else idea[: ideas - 1] + "…"
            found.append(f"  {line['slug']!s:<{names}}  {idea:<{ideas}}  {line['cite']}")
    return "\n".join(found[1:])


def markdown_table(lines: Sequence[dict[str, object]]) -> str:
    """The same for the README, every slug linked to its page."""
    head = ["| recipe | idea | level | paper |", "| --- | --- | --- | --- |"]
    for line in lines:
        slug, level, cite = line["slug"], line["level"], line["cite"]
        idea = marked(line).replace("|", "\\|")
        head.append(f"| [`{slug}`](docs/recipes/{slug}.md) | {idea} | {level} | {cite} |")
    return "\n".join(head)


def card(recipe: Recipe) -> str:
    """One recipe: where it comes from, its parts, every option that --set knows."""
    lines = [f"{recipe.slug}: {recipe.title}", f"  {recipe.cite}; {recipe.level} level"]
    lines += [f"  evidence: {row(recipe)['evidence']}", f"  deviations: {recipe.deviations}"]
    if recipe.variants:
        lines.append(f"  variants: {', '.join(recipe.variants)}")
    lines.append("  options:")
    for address in addresses(recipe):
        if address.owner is Optim and address.names[-1] in (*OWN_OPTIONS, "eps"):
            continue  # of single optimizers: they stand on their cards
        if not dataclasses.is_dataclass(address.value) and not isinstance(address.value, tuple):
            lines.append(f"    {address.full}={address.value!r}")
    return "\n".join(lines)


def optimizer_card(name: str) -> str:
    """One optimizer: where it comes from, its options."""
    line = optimizer_row(name)
    lines = [f"{name}: {marked(line)}", f"  {line['cite']}; optimizer"]
    lines += [f"  evidence: {line['evidence']}", f"  deviations: {line['deviations']}", "  options:"]
    others = {option for option, owner in OWN_OPTIONS.items() if owner != name} | {"name", "eps"}
    plain = Optim(name)
    options = [f.name for f in dataclasses.fields(Optim) if f.name not in others]
    return "\n".join([*lines, *(f"    optimizer.{option}={getattr(plain, option)!r}" for option in options)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was asked for; 2 on an unknown name."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["docs"]:
        return docs(given[1:])
    parser = argparse.ArgumentParser(
        prog="python -m policy_opt",
        description="The table of recipes and optimizers. `docs` writes their pages: python -m policy_opt docs --help",
        epilog=grammar,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", help="show one recipe or optimizer with its options")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--markdown", action="store_true", help="as a Markdown table")
    options = parser.parse_args(given)
    try:
        recipes, optimizers = named(options.recipe)
    except RecipeError as error:
        print(f"python -m policy_opt: {error}", file=sys.stderr)
        return 2
    lines = [*(row(recipe) for recipe in recipes), *(optimizer_row(name) for name in optimizers)]
    if options.json:
        print(json.dumps(lines, indent=1))
    elif options.markdown:
        print(markdown_table(lines))
    elif options.recipe:
        print(card(recipes[0]) if recipes else optimizer_card(optimizers[0]))
    else:
        print(plain_table(lines, shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    return 0


def named(name: str | None) -> tuple[list[Recipe], list[str]]:
    """(recipes, optimizers) of a name; all of them without one. RecipeError with a suggestion."""
    if name is None:
        return [get(slug) for slug in slugs()], list(METHODS)
    if name in METHODS:
        return [], [name]
    if ":" not in name and name not in slugs():
        raise RecipeError(unknown("recipe", name, (*slugs(), *METHODS)))
    return [get(name)], []


def docs(arguments: Sequence[str]) -> int:
    """Write the pages; 1 where a recipe did not load."""
    from policy_opt.docs import FOLDER, write

    parser = argparse.ArgumentParser(
        prog="python -m policy_opt docs", description="Write a page per recipe and optimizer, and their index."
    )
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help=f"where to (default: {FOLDER})")
    parser.add_argument(
        "--curves", action="store_true", help="draw all learning curves anew, not only missing ones (minutes)"
    )
    options = parser.parse_args(arguments)
    return write(options.folder, options.curves)


if __name__ == "__main__":
    sys.exit(main())
