"""Random compositions: a shipped recipe with parts of any other recipe or of the catalog set into it.

What does not fit is repaired as a person would who reads the reason of the refusal: a part that writes what is
missing is added, a part whose columns nobody reads is taken out. A composition is in the end a list of settings as
they stand on the command line, so that a failing one can be tried with `--algo SLUG --set ...`.
"""

from __future__ import annotations

import dataclasses
import random
import re
import typing
from collections.abc import Iterator
from functools import cache, cached_property
from typing import Any

import policy_opt
from policy_opt import Optim, Part, Recipe, RecipeError
from policy_opt.bank import OPTIMIZERS
from policy_opt.catalog import common, part_name, parts_of
from policy_opt.curriculum import Curriculum
from policy_opt.options import hints_of
from policy_opt.part import walk
from policy_opt.recipe import STAGES
from policy_opt.registry import shipped
from policy_opt.schedule import Schedule, Step
from policy_opt.table import TableActor
from policy_opt.terms import Term

SMALL: dict[str, Any] = {
    "warmup": 1, "window": 2, "every": 1, "iterations": 2, "rollouts": 2, "max_len": 4, "cache_len": 3, "length": 4,
    "max_length": 4, "groups": 2, "rows": 2, "tasks": 3, "max_rounds": 3, "kl_beta": 0.1,
    "tau_f": 3.0, "tau_h": 3.0, "size": 2,
}  # fmt: skip
"""Options at the scale of a table whose runs last two iterations; those that switch a part off by default, on."""
REPAIRS = 12


@dataclasses.dataclass(frozen=True)
class Composition:
    """A recipe made of settings."""

    slug: str
    specs: tuple[str, ...]

    @cached_property
    def recipe(self) -> Recipe:
        """Parsed as the command line parses it."""
        return policy_opt.get(self.slug).set(*self.specs)

    @property
    def command(self) -> str:
        """To try it by hand."""
        return " ".join([f"--algo {self.slug}", *(f"--set {spec!r}" for spec in self.specs)])


# -- parts --------------------------------------------------------------------------------------------------


@cache
def forms() -> tuple[Recipe, ...]:
    """Every shipped recipe and each of its variants; methods made of phases come as their phases."""
    found = []
    for slug in shipped():
        recipe = policy_opt.get(slug)
        for form in (recipe, *(recipe.set(f"variant={name}") for name in recipe.variants)):
            found += [phase.recipe for phase in form.phases] or [form]
    return tuple(found)


@cache
def stock() -> dict[str, tuple[Any, ...]]:
    """Parts by stage: of the catalog where their options have defaults, and those that recipes use as they use them."""
    found: dict[str, dict[str, Any]] = {}
    for stage, kinds in common().items():
        for kind in kinds.values():
            if isinstance(kind, type) and issubclass(kind, Part):
                try:
                    part = kind()
                except TypeError:
                    continue
                found.setdefault(stage, {})[repr(part)] = part
    for recipe in forms():
        for _, part in recipe.parts:
            found.setdefault(part.stage, {})[repr(part)] = part
    return {stage: tuple(parts[key] for key in sorted(parts)) for stage, parts in found.items()}


@cache
def fragments(stage: str) -> tuple[tuple[Any, ...], ...]:
    """What recipes put at a stage, as a whole."""
    found = {repr(getattr(recipe, stage)): getattr(recipe, stage) for recipe in forms()}
    return tuple(found[key] for key in sorted(found))


# -- settings -----------------------------------------------------------------------------------------------


def spell(value: Any) -> str:
    """A value as it is written in a setting; options at their defaults are left out."""
    if isinstance(value, tuple):
        inner = ", ".join(map(spell, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if not dataclasses.is_dataclass(value) and not isinstance(value, Part):
        return repr(value)
    if not dataclasses.is_dataclass(value):
        return f"{_name(value)}()"
    given = []
    for field in dataclasses.fields(value):
        now = getattr(value, field.name)
        if isinstance(value, Optim) and field.name == "name":
            continue
        if field.default is dataclasses.MISSING or now != field.default:
            given.append(f"{field.name}={spell(now)}")
    return f"{_name(value)}({', '.join(given)})"


def _name(value: Any) -> str:
    if isinstance(value, Optim):
        return value.name
    name, module = part_name(type(value)), type(value).__module__
    if module.startswith("policy_opt.recipes.") and name in parts_of(module):
        return f"{module.rpartition('.')[2]}.{name}"
    return name


def settings(recipe: Recipe) -> tuple[str, ...]:
    """Every stage of a recipe as a setting."""
    specs = [f"{stage}={spell(getattr(recipe, stage))}" for stage in (*STAGES, "terms")]
    specs.append(f"curriculum={spell(recipe.curriculum)}")
    specs.append(f"schedule.steps={spell(recipe.schedule.steps)}")
    if recipe.optimizer is not None:
        specs.append(f"optimizer={spell(recipe.optimizer)}")
    return tuple(spec.replace("=()", "=none") if spec.endswith("=()") else spec for spec in specs)


# -- drawing ------------------------------------------------------------------------------------------------


def varied(part: Any, rng: random.Random) -> Any:
    """The part at the scale of the table, and perhaps with one option changed to another value that it takes."""
    if not dataclasses.is_dataclass(part):
        return part
    part = shrunk(part)
    options = [f for f in dataclasses.fields(part) if f.name not in SMALL]
    if not options or rng.random() < 0.5:
        return part
    field = rng.choice(options)
    hint = hints_of(type(part))[field.name]
    now = getattr(part, field.name)
    values: list[Any] = []
    if typing.get_origin(hint) is typing.Literal:
        values = [v for v in typing.get_args(hint) if v != now]
    elif isinstance(now, bool):
        values = [not now]
    elif isinstance(now, float):
        values = [round(now * rng.uniform(0.5, 1.5), 6)]
    return _tried(part, {field.name: rng.choice(values)}) if values else part


def shrunk(part: Any) -> Any:
    """Options of time and length at the table's scale, also of the parts inside."""
    if isinstance(part, tuple):
        return tuple(map(shrunk, part))
    if not dataclasses.is_dataclass(part) or isinstance(part, type):
        return part
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(part):
        now = getattr(part, field.name)
        if dataclasses.is_dataclass(now) or (isinstance(now, tuple) and any(map(dataclasses.is_dataclass, now))):
            changes[field.name] = shrunk(now)
        elif field.name in SMALL and now is not None:
            changes[field.name] = type(now)(SMALL[field.name])
    return _tried(part, {k: v for k, v in changes.items() if v != getattr(part, k)})


def _tried(part: Any, changes: dict[str, Any]) -> Any:
    """The part with options changed, or as it was where they do not fit together."""
    try:
        found = dataclasses.replace(part, **changes)
        for _, inner in walk(found, ""):
            inner.check()
    except ValueError:
        return part
    return found


def drawn(rng: random.Random) -> Recipe:
    """A recipe with some of its parts replaced by others, whether they fit or not."""
    recipe = rng.choice(forms())
    recipe = recipe.replace(variants={}, vectors=None, schedule=shrunk(recipe.schedule))
    for stage in STAGES:
        recipe = recipe.replace(**{stage: shrunk(getattr(recipe, stage))})
    for stage in rng.sample(["reward", "advantage", "advantage", "credit", "terms", "terms"], rng.randint(2, 4)):
        recipe = _with(recipe, stage, rng)
    steps = recipe.schedule.steps
    if len(steps) == 1 and steps[0].terms is None and not steps[0].parts:
        fresh = [Step(), Step(epochs=2), Step(minibatches=2), Step(epochs=2, minibatches=2)]
        recipe = recipe.replace(schedule=dataclasses.replace(recipe.schedule, steps=(rng.choice(fresh),)))
    order, accept = rng.choice(stock()["order"]), rng.choice([None, *stock()["accept"]])
    extra = recipe.curriculum.extra if rng.random() < 0.7 else 1
    changes = {"order": varied(order, rng), "extra": extra, "max_rounds": 3}
    if accept is None or rng.random() < 0.4:
        changes["accept"] = varied(accept, rng)
    recipe = recipe.replace(curriculum=_tried(recipe.curriculum, changes))
    return recipe.replace(optimizer=Optim(rng.choice(OPTIMIZERS)))


def _with(recipe: Recipe, stage: str, rng: random.Random) -> Recipe:
    """Another content of a stage."""
    if stage == "terms":
        return _with_term(recipe, rng)
    if stage == "credit":
        more = tuple(varied(part, rng) for part in rng.sample(stock()["credit"], rng.randint(1, 2)))
        return recipe.replace(credit=(*(recipe.credit if rng.random() < 0.5 else ()), *more))
    if rng.random() < 0.5:
        return recipe.replace(**{stage: tuple(varied(part, rng) for part in rng.choice(fragments(stage)))})
    part = varied(rng.choice(stock()[stage]), rng)
    before = getattr(recipe, stage) if part.overwrites else ()
    return recipe.replace(**{stage: (*before, part)})


def _with_term(recipe: Recipe, rng: random.Random) -> Recipe:
    """Another surrogate or aggregation, or one more term."""
    terms = tuple(term for term in recipe.terms if term.on)
    agg = varied(rng.choice(stock()["agg"]), rng)
    choice = rng.random()
    if terms and choice < 0.3:
        at = rng.randrange(len(terms))
        changed = dataclasses.replace(terms[at], agg=agg)
        return recipe.replace(terms=(*terms[:at], changed, *terms[at + 1 :]))
    loss = varied(rng.choice(stock()["surrogate"]), rng)
    if choice < 0.65:
        return recipe.replace(terms=(Term(loss, agg=agg), *(t for t in terms[1:] if t.name != "policy")))
    coef = varied(rng.choice([0.1, 0.5, *stock()["coef"]]), rng)
    return recipe.replace(terms=(*terms, Term(loss, agg=agg, coef=coef, name="more")))


# -- repairing ----------------------------------------------------------------------------------------------


@cache
def compose(seed: int) -> tuple[Composition, list[tuple[Recipe, str]]]:
    """A composition that passes its check, and all that was refused on the way to it, with the reasons."""
    rng = random.Random(seed)
    refused: list[tuple[Recipe, str]] = []
    while True:
        recipe: Recipe | None = drawn(rng)
        for _ in range(REPAIRS):
            assert recipe is not None
            try:
                recipe.check(TableActor.columns)
            except RecipeError as error:
                refused.append((recipe, str(error)))
                recipe = repaired(recipe, str(error), rng)
                if recipe is None:
                    break
                continue
            return Composition(recipe.slug, settings(recipe)), refused


def repaired(recipe: Recipe, reason: str, rng: random.Random) -> Recipe | None:
    """What a person would try next; None where that is another composition."""
    if match := re.search(r"(\S+) reads `(\w+)`, which nothing before it writes", reason):
        return _provided(recipe, match[1], match[2], rng)
    match = re.search(r"(\S+) writes `\w+`.*(?:but nothing after it reads|has written already)", reason)
    return _without(recipe, match[1]) if match else None


def _provided(recipe: Recipe, path: str, column: str, rng: random.Random) -> Recipe | None:
    """With a part that writes a column, right before the one that reads it."""
    reader = path.split(".")[0]
    names = {column} | ({f"{column}_BT", f"{column}_B"} if "_" not in column or column.islower() else set())
    makers = [
        part for stage in STAGES[1:] for part in stock()[stage] if names & (part.writes | part.overwrites)
    ]
    if not makers:
        return None
    part = shrunk(rng.choice(makers))
    stage = part.stage
    order = [*STAGES, "terms"]
    if reader in order and order.index(stage) > order.index(reader):
        return None
    at = int(path.split(".")[1].split(":")[0]) if reader == stage else len(getattr(recipe, stage))
    now = getattr(recipe, stage)
    return recipe.replace(**{stage: (*now[:at], part, *now[at:])})


def _without(recipe: Recipe, path: str) -> Recipe | None:
    stage, _, rest = path.partition(".")
    if stage not in STAGES:
        return None
    at = int(rest.split(":")[0].split(".")[0])
    now = getattr(recipe, stage)
    return recipe.replace(**{stage: (*now[:at], *now[at + 1 :])})


def without(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """The recipe with each of its declared parts left out in turn, whether that fits or not."""
    for stage in STAGES:
        now = getattr(recipe, stage)
        for at, part in enumerate(now):
            yield f"{stage}.{at}:{type(part).__name__}", recipe.replace(**{stage: (*now[:at], *now[at + 1 :])})
    on = [term for term in recipe.terms if term.on]
    for term in on if len(on) > 1 else ():
        yield f"terms.{term.name}", recipe.replace(terms=tuple(t for t in recipe.terms if t is not term))
    for term in on:
        if isinstance(term.coef, Part):
            plain = dataclasses.replace(term, coef=1.0)
            terms = tuple(plain if t is term else t for t in recipe.terms)
            yield f"terms.{term.name}.coef", recipe.replace(terms=terms)
    empty = Curriculum(max_rounds=recipe.curriculum.max_rounds)
    for name in ("order", "accept"):
        if getattr(recipe.curriculum, name) != getattr(empty, name):
            changed = dataclasses.replace(recipe.curriculum, **{name: getattr(empty, name)})
            yield f"curriculum.{name}", recipe.replace(curriculum=changed)
    if recipe.schedule.steps != Schedule().steps:
        yield "schedule", recipe.replace(schedule=dataclasses.replace(recipe.schedule, steps=Schedule().steps))
