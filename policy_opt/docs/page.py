"""One recipe as a Markdown page, one optimizer likewise, and the index of papers."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, cast

from policy_opt.bank import OWN_OPTIONS, Optim
from policy_opt.catalog import common
from policy_opt.docs.source import blocks, class_doc, field_doc, one_line, spelled
from policy_opt.need import ENTROPY, Same
from policy_opt.optimizers import METHODS
from policy_opt.options import Address, addresses
from policy_opt.recipe import STAGES, Recipe
from policy_opt.schedule import Step
from policy_opt.terms import Term

_MARKED = re.compile(r"(`[^`]*`)")
_SIGN = re.compile(r"(?<!\*)\*(?!\*)|(?<!\w)_|_(?!\w)")
"""Stars and underscores that Markdown would take for emphasis."""
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")
_NOTE = "<!-- generated: python -m policy_opt docs -->\n"
_SHARED = ("curriculum", "sampler", "schedule", "optimizer", "bank")
"""Roots of options that every recipe has."""


def recipe_page(recipe: Recipe, curve: str) -> str:
    """The page. curve: where the picture of its smoke task stands, relative to it."""
    module = sys.modules[f"policy_opt.recipes.{recipe.slug}"]
    sections = [
        _NOTE + f"# `{recipe.slug}`: {prose(recipe.title)}",
        facts(recipe),
        "## Method",
        method(module.__doc__ or ""),
        "## Run it",
        commands(recipe),
        "## Smoke task",
        smoke(recipe, curve),
        "## Parts",
        parts(recipe),
        asked(recipe),
        "## Options",
        options(a for a in leaves(recipe) if a.names[0] not in _SHARED),
        folded(
            "Those of curriculum, sampler, schedule, optimizer and bank",
            options(a for a in leaves(recipe) if a.names[0] in _SHARED),
        ),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def facts(recipe: Recipe) -> str:
    """Where it comes from, as a table."""
    evidence = recipe.evidence + ("; **reconstructed**" if recipe.reconstructed else "")
    rows = [
        ("paper", cited(recipe.cite)),
        ("level", recipe.level),
        ("evidence", prose(evidence)),
        ("deviations", prose(recipe.deviations)),
    ]
    if recipe.privileged:
        rows.append(("privileged", "it brings in text that the task does not show"))
    return table(("", ""), rows)


def method(docstring: str) -> str:
    """The docstring: prose as prose, indented stretches as they are."""
    return "\n\n".join(
        f"```text\n{text}\n```" if indented else prose(text) for indented, text in blocks(docstring)
    )


def commands(recipe: Recipe) -> str:
    """How it is run, its variants, and its golden numbers."""
    lines = [f"python -m agents.train --algo {recipe.slug}"]
    lines += [f"python -m agents.train --algo {recipe.slug} --set variant={name}" for name in recipe.variants]
    vectors = (recipe.vectors.method if recipe.vectors else "") or recipe.slug
    lines.append(f"python -m policy_opt.conformance tests/vectors/{vectors}.json")
    text = "```\n" + "\n".join(lines) + "\n```"
    if recipe.variants:
        rows = [(f"`{name}`", ", ".join(f"`{s}`" for s in specs)) for name, specs in recipe.variants.items()]
        text += "\n\n" + table(("variant", "stands for"), rows)
    return text


def smoke(recipe: Recipe, curve: str) -> str:
    """The picture, or why there is none."""
    if recipe.learns.startswith("none"):
        return f"It has none: {prose(recipe.learns.removeprefix('none: '))}."
    return (
        f"![share of right answers by iteration]({curve})\n\n"
        f"`{recipe.learns}`: a softmax table with 4 tasks, 2 turns of 2 tokens, 32 episodes per iteration; mean, "
        "lowest and highest of 3 seeds." + "".join(f" `--set {spec}`" for spec in recipe.smoke)
    )


def parts(recipe: Recipe) -> str:
    """What stands at every stage."""
    rows: list[tuple[str, str, str]] = []
    placed: list[tuple[str, Any]] = [("curriculum", recipe.curriculum)]
    placed += [(stage, part) for stage in STAGES for part in getattr(recipe, stage)]
    for stage, part in placed:
        rows.append((stage, f"`{spelled(part)}`", prose(class_doc(type(part)))))
    for number, step in enumerate(recipe.schedule.steps):
        name = "schedule" if len(recipe.schedule.steps) == 1 else f"schedule, step {number}"
        rows.append((name, f"`{spelled(step)}`", prose(class_doc(Step))))
    for term in recipe.terms:
        rows.append((f"term `{term.name}`", f"`{summand(term)}`", prose(class_doc(type(term.loss)))))
    text = table(("stage", "part", "what it does"), rows)
    phases = [(p.name, f"`{p.recipe.slug}`", str(p.iterations or "to the end")) for p in recipe.phases]
    return text + ("\n\n" + table(("phase", "recipe", "iterations"), phases) if phases else "")


def summand(term: Term) -> str:
    """coefficient * surrogate, its aggregation, and masks that are not the policy's tokens."""
    coef = f"{term.coef:g}" if isinstance(term.coef, int | float) else spelled(term.coef)
    text = f"{coef} * {spelled(term.loss)}, {spelled(term.agg)}"
    masks = [f"{which}={name}" for which, name in (("num", term.num), ("den", term.den)) if name != "mask"]
    return ", ".join([text, *masks]) + ("" if term.on else " (off)")


def asked(recipe: Recipe) -> str:
    """Forwards that its parts ask for, beside what is always there."""
    rows = []
    for need in recipe.needs:
        if need == ENTROPY:
            continue
        view = "same text" if need.view == Same() else f"`{spelled(need.view)}`"
        rows.append((f"`{need.name}`", f"`{spelled(need.what)}`", need.model, view, need.when))
    return table(("asks for", "what", "of model", "view", "when"), rows) if rows else ""


def leaves(recipe: Recipe) -> Iterable[Address]:
    """Options that hold a value, not further parts."""
    for address in addresses(recipe):
        value = address.value
        nested = isinstance(value, tuple) and any(dataclasses.is_dataclass(item) for item in value)
        if not dataclasses.is_dataclass(value) and not nested:
            yield address


def options(found: Iterable[Address]) -> str:
    """Options, what they are, and what they mean."""
    rows = []
    for address in found:
        single = address.owner is Optim and address.names[-1] in (*OWN_OPTIONS, "eps")
        if single or (address.owner is Term and address.names[-1] == "name"):
            continue
        meaning = field_doc(address.owner or Recipe, address.names[-1])
        rows.append((f"`{address.full}`", f"`{address.value!r}`", prose(meaning)))
    return table(("option", "default", "meaning"), rows) if rows else "None."


# -- optimizers and index -------------------------------------------------------------------------------


def optimizer_page(name: str) -> str:
    """The page of an optimizer."""
    module = METHODS[name]
    card = module.card
    evidence = card.evidence + ("; **reconstructed**" if card.reconstructed else "")
    rows = [
        ("paper", cited(card.cite)), ("kind", "optimizer"), ("evidence", prose(evidence)),
        ("deviations", prose(card.deviations)),
    ]  # fmt: skip
    hidden = {"name"} | {o for o, owner in OWN_OPTIONS.items() if owner != name} | {"eps"}
    described = [
        (f"`{f.name}`", f"`{getattr(Optim(name), f.name)!r}`", prose(field_doc(Optim, f.name)))
        for f in dataclasses.fields(Optim)
        if f.name not in hidden
    ]
    command = "\n".join(
        [
            "```",
            f"python -m agents.train --optim.name {name}",
            f"python -m agents.train --algo grpo --set optimizer={name}",
            f"python -m policy_opt.conformance tests/vectors/{name}.json",
            "```",
        ]
    )
    sections = [
        _NOTE + f"# `{name}`: {prose(card.title)}", table(("", ""), rows), "## Method", method(module.__doc__ or ""),
        "## Run it", command, "## Options", table(("option", "default", "meaning"), described),
    ]  # fmt: skip
    if name == "lion_k":
        sections += ["## Convex functions", table(("kappa", "what it is"), kappas())]
    return "\n\n".join(sections) + "\n"


def kappas() -> Iterable[tuple[str, str]]:
    """The convex functions that lion_k may take, with their options."""
    for name, kind in common()["kappa"].items():
        options = [f"{f.name}={f.default!r}" for f in dataclasses.fields(cast(Any, kind))]
        yield f"`{name}({', '.join(options)})`", prose(class_doc(cast(type, kind)))


def index(recipes: Sequence[Recipe]) -> str:
    """Every paper, the recipes made of it, how to run them, and what to mind."""
    rows = [(r.cite, r.slug, config(r), caveat(r)) for r in recipes]
    rows += [
        (m.card.cite, name, f"`--optim.name {name}`", caveat_of(m.card.reconstructed, False, "", m.card.deviations))
        for name, m in METHODS.items()
    ]
    lines = [
        (cited(cite), f"[`{slug}`]({slug}.md)", run, prose(mind))
        for cite, slug, run, mind in sorted(rows, key=lambda row: (row[0].lower(), row[1]))
    ]
    head = (
        f"{_NOTE}# Papers and recipes\n\nEvery row is a page: idea, equations, parts, options with their defaults, "
        "evidence, and a learning curve. Recipes run as `python -m agents.train CONFIG`; `--set` changes any part "
        "(`python -m policy_opt --help`)."
    )
    return head + "\n\n" + table(("paper", "recipe", "config", "mind"), lines) + "\n"


def config(recipe: Recipe) -> str:
    """Options of the trainer that select it, variants included."""
    forms = [f"`--algo {recipe.slug}`", *(f"`--set variant={name}`" for name in recipe.variants)]
    return ", ".join(forms)


def caveat(recipe: Recipe) -> str:
    """What a reader of the paper should know."""
    return caveat_of(recipe.reconstructed, recipe.privileged, recipe.learns, recipe.deviations)


def caveat_of(reconstructed: bool, privileged: bool, learns: str, deviations: str) -> str:
    """The same from its pieces; `none` where there is nothing."""
    found = [word for word, on in (("reconstructed", reconstructed), ("privileged", privileged)) if on]
    if learns.startswith("none: "):
        found.append("no smoke task: " + learns.removeprefix("none: "))
    if deviations != "none":
        found.append(deviations)
    return "; ".join(found) or "none"


# -- Markdown -------------------------------------------------------------------------------------------


def prose(text: str) -> str:
    """Text whose signs are meant as such, outside backticks."""
    pieces = _MARKED.split(text)
    for i in range(0, len(pieces), 2):
        pieces[i] = _SIGN.sub(r"\\\g<0>", pieces[i]).replace("<", "&lt;")
    return "".join(pieces)


def cited(text: str) -> str:
    """A citation with its link."""
    return _ARXIV.sub(r"[\g<0>](https://arxiv.org/abs/\g<1>)", prose(text))


def folded(title: str, text: str) -> str:
    """Text that is shown on a click."""
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; line breaks and bars inside cells are taken care of."""
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in rows:
        cells = [one_line(text).replace("|", "\\|") for text in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
