"""The check of a recipe before anything is sampled: follows the columns through the flow.

Refused, with the reason: a part that reads what nothing before it writes, or writes what is there already, or
whose columns nothing reads (an option that would be ignored); a need of a model that the bank lacks; token
weights on a loss that has no tokens; facts that the environment does not deliver.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from policy_opt.batch import CORE, UNITS, is_stem, spellings
from policy_opt.controllers import Dual
from policy_opt.errors import RecipeError
from policy_opt.need import LOGP_REF, SHAPE, Need
from policy_opt.part import Part, walk
from policy_opt.recipe import STAGES, Recipe
from policy_opt.terms import Term

UPDATED = ("mask_BT", "w_B", "w_BT", "group_weight_B")
"""Columns that every part narrows or multiplies, so that overwriting one keeps what was there."""
VERDICT = ("reward_B", "correct_B", "length_B", "truncated_B", "scores_BK")
"""Columns that every actor delivers."""


def check(recipe: Recipe, columns: Collection[str] | None = None) -> None:
    """RecipeError where the recipe, or one of its phases, cannot run. See Recipe.check."""
    if not recipe.phases:
        _Flow(recipe, columns).follow()
        return
    if any(phase.iterations is None for phase in recipe.phases[:-1]):
        raise RecipeError(f"{recipe.slug}: only the last phase may be open-ended")
    for phase in recipe.phases:
        check(phase.recipe, columns)


class _Flow:
    """Who has written which column, and which columns were read since."""

    def __init__(self, recipe: Recipe, columns: Collection[str] | None) -> None:
        self.recipe = recipe
        self.facts = columns
        self.writer: dict[str, str] = dict.fromkeys((*CORE, *UNITS, *VERDICT, *(columns or ())), "the actor")
        self.read: set[str] = set()
        self.written: dict[str, frozenset[str]] = {}

    def fail(self, reason: str) -> RecipeError:
        return RecipeError(f"{self.recipe.slug}: {reason}")

    def follow(self) -> None:
        recipe = self.recipe
        for path, part in recipe.parts:
            try:
                part.check()
            except ValueError as error:
                raise self.fail(f"{path}: {error}") from None
        for need in recipe.needs:
            self.need(need)
        # A part inside another is called by that one, which declares what both read and write.
        inner = {id(p) for s in STAGES for x in getattr(recipe, s) for _, p in walk(x, s) if p is not x}
        staged = [(path, p) for path, p in recipe.parts if p.stage in STAGES and id(p) not in inner]
        others = [
            (path, part) for path, part in recipe.parts if part.stage in ("curriculum", "accept", "order")
        ]
        for path, part in others:
            if part.needs:
                raise self.fail(
                    f"{path} needs `{part.needs[0].name}`, but it is asked before anything is scored"
                )
            self.part(path, part)
        for path, part in (x for x in staged if x[1].stage == "expand"):
            self.part(path, part)
        for need in recipe.needs:
            if need.when != "loss":
                self.write("a need", need.name)
        # Step-time parts run after all others, on the mini-batch.
        for path, part in sorted(
            (x for x in staged if x[1].stage != "expand"), key=lambda x: x[1].when == "step"
        ):
            self.part(path, part)
        self.terms()
        for path, names in self.written.items():
            if not names & self.read:
                listed = ", ".join(f"`{name}`" for name in sorted(names))
                raise self.fail(f"{path} writes {listed}, but nothing after it reads that")

    def need(self, need: Need) -> None:
        suffix = SHAPE[type(need.what)]
        if not need.name.endswith(f"_{suffix}"):
            raise self.fail(f"need `{need.name}` is {need.what}, so its name must end in _{suffix}")
        for name in {need.model, getattr(need.what, "model", need.model)} - {"policy"}:
            if name not in self.recipe.models:
                raise self.fail(f"need `{need.name}` names model `{name}`, which is not in the bank")

    def part(self, path: str, part: Part) -> None:
        for name in part.reads:
            self.reads(path, name)
        self.deliver(path, part)
        for name in part.writes:
            self.write(path, name)
        replaced = {self.find(path, name) if is_stem(name) else name for name in part.overwrites}
        for name in replaced:
            before = self.writer.get(name)
            if before in self.written and name not in self.read and name not in UPDATED:
                raise self.fail(f"{before} writes `{name}`, but {path} replaces it before anything reads that")
            self.writer[name] = path
            self.read.discard(name)
        if part.writes or replaced:
            self.written[path] = part.writes | replaced

    def deliver(self, path: str, part: Part) -> None:
        for name in part.facts:
            if self.facts is not None and name not in self.writer:
                raise self.fail(f"{path} reads the fact `{name}`, which the environment does not deliver")
            self.read.add(name)

    def write(self, path: str, name: str) -> None:
        if name in self.writer:
            raise self.fail(f"{path} writes `{name}`, which {self.writer[name]} has written already")
        self.writer[name] = path

    def reads(self, path: str, name: str) -> None:
        self.read.add(self.find(path, name))

    def find(self, path: str, name: str) -> str:
        """The column that a name or stem stands for."""
        for spelling in spellings(name):
            if spelling in self.writer:
                return spelling
        stem = name if is_stem(name) else name.rsplit("_", 1)[0]
        near = [f"`{n}` by {w}" for n, w in sorted(self.writer.items()) if n.rsplit("_", 1)[0] == stem]
        hint = f"; there is {', '.join(near)}" if near else ""
        raise self.fail(f"{path} reads `{name}`, which nothing before it writes{hint}")

    def terms(self) -> None:
        recipe = self.recipe
        sets = [recipe.terms, *(step.terms for step in recipe.schedule.steps if step.terms is not None)]
        for number, terms in enumerate(sets):
            active = [term for term in terms if term.on]
            if not active and (number > 0 or any(step.terms is None for step in recipe.schedule.steps)):
                raise self.fail("no term of the loss is on")
            if len({term.name for term in active}) < len(active):
                raise self.fail(f"two terms have one name: {[term.name for term in active]}")
            for term in active:
                self.term(term)
                self.follows(term, active)
        for step in recipe.schedule.steps:
            for part in step.parts:
                self.read |= {s for name in part.reads for s in spellings(name)} & self.writer.keys()

    def follows(self, term: Term, active: Sequence[Term]) -> None:
        """A multiplier whose metric nothing measures would stay where it starts."""
        if not isinstance(term.coef, Dual):
            return
        of, measured = term.coef.of, {f"loss_{other.name}" for other in active if len(active) > 1}
        if of.startswith("loss_") and of not in measured:
            known = ", ".join(f"`{name}`" for name in sorted(measured)) or "`loss` alone, for there is one term"
            raise self.fail(f"terms.{term.name}.coef follows `{of}`, which nothing measures; there is {known}")
        if of == "kl_ref" and all(need.name != LOGP_REF.name for need in self.recipe.needs):
            raise self.fail(f"terms.{term.name}.coef follows `kl_ref`, but no part needs `{LOGP_REF.name}`")

    def term(self, term: Term) -> None:
        path = f"terms.{term.name}"
        for name in term.reads:
            self.reads(path, name)
        self.deliver(path, term.loss)
        for stem in term.weights:
            self.read |= {f"{stem}_B", f"{stem}_BT"} & self.writer.keys()
            if f"{stem}_BT" in self.writer and term.loss.gives != "BT":
                unit = "row" if term.loss.gives else "batch"
                raise self.fail(
                    f"{path} has one loss per {unit}, so {self.writer[f'{stem}_BT']} cannot weight its tokens"
                )
            if f"{stem}_B" in self.writer and term.loss.gives == "":
                raise self.fail(
                    f"{path} has one loss per batch, so {self.writer[f'{stem}_B']} cannot weight its rows"
                )
