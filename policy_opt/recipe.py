"""Recipe: one published method as a sentence, and the check that its parts fit before anything is sampled."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from policy_opt.bank import ModelSpec, Optim
from policy_opt.batch import CORE, UNITS
from policy_opt.curriculum import Curriculum
from policy_opt.errors import RecipeError
from policy_opt.need import ENTROPY, SHAPE, Need, OtherPrompt
from policy_opt.part import Part, walk
from policy_opt.protocols import Sampler
from policy_opt.schedule import Schedule
from policy_opt.terms import Term

VERDICT = ("reward_B", "correct_B", "length_B", "truncated_B", "scores_BK")
"""Columns that every actor delivers."""
STAGES = ("expand", "signals", "reward", "advantage", "credit")
"""Stages that are sequences of parts, in the order of the flow."""


@dataclass(frozen=True)
class Phase:
    """A stretch of iterations with a recipe of its own, for methods made of stages."""

    name: str
    recipe: Recipe
    iterations: int | None = None
    """How many; None: until the end (last phase only)."""
    sync: tuple[str, ...] = ()
    """Bank models that take over the policy's weights when the phase starts."""


@dataclass(frozen=True)
class Recipe:
    """Which parts stand at each stage, and where the method comes from."""

    slug: str
    """Its name on the command line: the name of its file."""
    title: str
    """Name and idea in a line."""
    level: Literal["token", "sequence", "trajectory", "preference", "value", "control"]
    """What the loss and the credit speak of."""
    cite: str
    """Authors, year, identifier."""
    evidence: str
    """Where the formulas were read: paper text, authors' code, a reference implementation; or reconstructed."""
    terms: tuple[Term, ...]
    """The loss."""
    curriculum: Curriculum = Curriculum()
    sampler: Sampler = Sampler()
    expand: tuple[Any, ...] = ()
    signals: tuple[Any, ...] = ()
    reward: tuple[Any, ...] = ()
    advantage: tuple[Any, ...] = ()
    credit: tuple[Any, ...] = ()
    schedule: Schedule = Schedule()
    phases: tuple[Phase, ...] = ()
    """Where the method is a sequence of stages, each with its own recipe; this recipe's parts are then not used."""
    bank: Mapping[str, ModelSpec] = field(default_factory=dict)
    """Models in place of those that the parts would ask for."""
    optimizer: Optim | None = None
    """The policy's optimizer; None: the trainer's."""
    deviations: str = "none"
    """Where it departs from the paper or the authors' code."""
    learns: str = "identity"
    """Smoke task that it must learn: identity | pairs | critic | none: reason."""
    reconstructed: bool = False
    """Formulas that could not be read were reconstructed."""

    def replace(self, **changes: Any) -> Recipe:
        """The recipe with other parts."""
        return dataclasses.replace(self, **changes)

    def set(self, *specs: str) -> Recipe:
        """The recipe with options changed: `stage=part(opt=val)`, `stage+=part()`, `stage.opt=val`. See `options`."""
        from policy_opt.options import apply

        recipe = self
        for spec in specs:
            recipe = apply(recipe, spec)
        return recipe

    # -- what it is made of ---------------------------------------------------------------------------------------

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Every part with its path, in the order of the flow; terms that are off are left out."""
        yield from walk(self.curriculum, "curriculum")
        for stage in STAGES:
            yield from walk(getattr(self, stage), stage)
        yield from walk(self.schedule, "schedule")
        for term in self.terms:
            if term.on:
                yield from walk(term, f"terms.{term.name}")

    @property
    def needs(self) -> tuple[Need, ...]:
        """Every need of its parts, once by name; ENTROPY rides along with the loss, for the display."""
        found: dict[str, Need] = {}
        for path, part in self.parts():
            for need in part.needs:
                if found.setdefault(need.name, need) != need:
                    raise RecipeError(f"{self.slug}: {path} needs `{need.name}` as {need}, another part as {found[need.name]}")
        found.setdefault(ENTROPY.name, ENTROPY)
        return tuple(found.values())

    @property
    def models(self) -> dict[str, ModelSpec]:
        """The bank: models by name."""
        found: dict[str, ModelSpec] = {}
        for path, part in self.parts():
            for name, spec in part.models.items():
                if name not in self.bank and found.setdefault(name, spec) != spec:
                    raise RecipeError(f"{self.slug}: {path} wants model `{name}` as {spec}, another part as {found[name]}")
        return {**found, **self.bank}

    @property
    def privileged(self) -> bool:
        """Does the policy or a view of it see text that the task does not show?"""
        return any(isinstance(n.view, OtherPrompt) for n in self.needs) or any(
            getattr(part, "privileged", False) for _, part in self.parts()
        )

    def check(self, columns: Collection[str] | None = None) -> None:
        """RecipeError, with the reason, where the parts do not fit.

        columns: what the actor's verdicts deliver besides VERDICT; None: not known yet, facts are taken on trust.
        """
        for phase in self.phases:
            phase.recipe.check(columns)
        if self.phases:
            if any(p.iterations is None for p in self.phases[:-1]):
                raise RecipeError(f"{self.slug}: only the last phase may be open-ended")
            return
        _Flow(self, columns).check()


class _Flow:
    """Follows the columns through a recipe: who writes what, and whether anyone reads it."""

    def __init__(self, recipe: Recipe, columns: Collection[str] | None) -> None:
        self.recipe = recipe
        self.known = columns
        self.writer: dict[str, str] = dict.fromkeys((*CORE, *UNITS, *VERDICT, *(columns or ())), "the actor")
        self.read: set[str] = set()

    def check(self) -> None:
        recipe = self.recipe
        models = recipe.models
        for need in recipe.needs:
            self._need(need, models)
        for path, part in walk(recipe.curriculum, "curriculum"):
            self._reads(path, part)
        order = [(p, q) for p, q in recipe.parts() if q.stage in STAGES]
        written = []
        before = [x for x in order if x[1].stage == "expand"]
        after = [x for x in order if x[1].stage != "expand"]
        # Step-time parts run after all others, on the mini-batch.
        after.sort(key=lambda x: x[1].when == "step")
        for path, part in before:
            self._part(path, part, written)
        for need in recipe.needs:
            if need.when != "loss":
                self._write("a need", need.name)
        for path, part in after:
            self._part(path, part, written)
        self._terms()
        for path, part in written:
            if not (part.writes | part.overwrites) & self.read:
                names = ", ".join(f"`{c}`" for c in sorted(part.writes | part.overwrites))
                raise RecipeError(f"{recipe.slug}: {path} writes {names}, but nothing after it reads that")

    def _need(self, need: Need, models: Mapping[str, ModelSpec]) -> None:
        suffix = SHAPE[type(need.what)]
        if not need.name.endswith(f"_{suffix}"):
            raise RecipeError(f"{self.recipe.slug}: need `{need.name}` is {need.what}, so its name must end in _{suffix}")
        for name in {need.model, getattr(need.what, "model", need.model)} - {"policy"}:
            if name not in models:
                raise RecipeError(f"{self.recipe.slug}: need `{need.name}` names model `{name}`, which is not in the bank")

    def _write(self, path: str, column: str) -> None:
        if column in self.writer:
            raise RecipeError(f"{self.recipe.slug}: {path} writes `{column}`, which {self.writer[column]} has written already")
        self.writer[column] = path

    def _part(self, path: str, part: Part, written: list[tuple[str, Part]]) -> None:
        self._reads(path, part)
        for column in part.writes:
            self._write(path, column)
        for column in part.overwrites:
            self.writer[column] = path
            self.read.discard(column)
        if part.writes | part.overwrites:
            written.append((path, part))

    def _reads(self, path: str, part: Part) -> None:
        for column in part.reads:
            self._read(path, column)
        for fact in part.facts:
            if self.known is not None and fact not in self.writer:
                raise RecipeError(f"{self.recipe.slug}: {path} reads the fact `{fact}`, which the environment does not deliver")
            self.read.add(fact)

    def _read(self, path: str, column: str) -> None:
        names = [column] if column.split("_")[-1].isupper() else [f"{column}_BT", f"{column}_B"]
        for name in names:
            if name in self.writer:
                self.read.add(name)
                return
        stem = column.removesuffix("_" + column.split("_")[-1]) if len(names) == 1 else column
        near = sorted(f"`{c}` (by {w})" for c, w in self.writer.items() if c.rsplit("_", 1)[0] == stem)
        hint = f"; there is {', '.join(near)}" if near else ""
        raise RecipeError(f"{self.recipe.slug}: {path} reads `{column}`, which nothing before it writes{hint}")

    def _terms(self) -> None:
        terms = [t for t in self.recipe.terms if t.on]
        if not terms:
            raise RecipeError(f"{self.recipe.slug}: no term of the loss is on")
        if len({t.name for t in terms}) < len(terms):
            raise RecipeError(f"{self.recipe.slug}: two terms have one name: {[t.name for t in terms]}")
        for step in self.recipe.schedule.steps:
            terms = terms + [t for t in step.terms or () if t.on]
        for term in terms:
            path = f"terms.{term.name}"
            for column in term.reads:
                self._read(path, column)
            for stem in term.weights:
                self.read |= {f"{stem}_B", f"{stem}_BT"} & self.writer.keys()
                if f"{stem}_BT" in self.writer and term.loss.gives != "BT":
                    raise RecipeError(
                        f"{self.recipe.slug}: {path} has one loss per {'row' if term.loss.gives else 'batch'}, "
                        f"so {self.writer[f'{stem}_BT']} cannot weight its tokens"
                    )
