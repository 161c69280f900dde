"""Recipe: one published method as a sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from policy_opt.bank import ModelSpec, Optim
from policy_opt.curriculum import Curriculum
from policy_opt.errors import RecipeError
from policy_opt.need import ENTROPY, Need, OtherPrompt
from policy_opt.part import Part, walk
from policy_opt.protocols import Sampler
from policy_opt.schedule import Schedule
from policy_opt.terms import Term

if TYPE_CHECKING:
    from policy_opt.vectors import Vectors

STAGES = ("expand", "signals", "reward", "advantage", "credit")
"""Stages that are sequences of parts, in the order of the flow."""
_CURRICULUM, _SAMPLER, _SCHEDULE = Curriculum(), Sampler(), Schedule()


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
    """The idea in a line."""
    level: Literal["token", "sequence", "trajectory", "preference", "value", "control"]
    """What the loss and the credit speak of."""
    cite: str
    """Authors, year, identifier."""
    evidence: str
    """Where the formulas were read: paper text, authors' code, a reference implementation."""
    terms: tuple[Term, ...] = ()
    """The loss."""
    curriculum: Curriculum = _CURRICULUM
    sampler: Sampler = _SAMPLER
    expand: tuple[Any, ...] = ()
    signals: tuple[Any, ...] = ()
    reward: tuple[Any, ...] = ()
    advantage: tuple[Any, ...] = ()
    credit: tuple[Any, ...] = ()
    schedule: Schedule = _SCHEDULE
    phases: tuple[Phase, ...] = ()
    """Where the method is a sequence of stages, each with its own recipe; this one's parts are then not used.
    """
    bank: Mapping[str, ModelSpec] = field(default_factory=dict)
    """Models in place of those that the parts would ask for."""
    optimizer: Optim | None = None
    """The policy's optimizer; None: the trainer's."""
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Named forms of the method, as settings: `--set variant=NAME`."""
    deviations: str = "none"
    """Where it departs from the paper or the authors' code."""
    learns: str = "identity"
    """Smoke task that it must learn: identity | pairs | critic | none: reason."""
    smoke: tuple[str, ...] = ()
    """Settings for that task where the defaults are for the scale of a language model (thresholds on its step)."""
    reconstructed: bool = False
    """Formulas that could not be read were reconstructed."""
    vectors: Vectors | None = None
    """How its golden numbers map to its parts."""

    def replace(self, **changes: Any) -> Recipe:
        """The recipe with other parts."""
        return dataclasses.replace(self, **changes)

    def set(self, *specs: str) -> Recipe:
        """The recipe with settings changed, e.g. `advantage=group_centre()`, `terms.clip_high=0.28`.

        The grammar stands in `policy_opt.options`. RecipeError with a suggestion on an unknown name.
        """
        from policy_opt.options import apply

        recipe = self
        for spec in specs:
            recipe = apply(recipe, spec)
        return recipe

    def check(self, columns: Collection[str] | None = None) -> None:
        """RecipeError, with the reason, where the parts do not fit together.

        columns: what the environment's verdicts deliver besides the standard columns; None: not known yet, so
        facts are taken on trust.
        """
        from policy_opt.check import check

        check(self, columns)

    # -- what it is made of -------------------------------------------------------------------------------

    @cached_property
    def parts(self) -> tuple[tuple[str, Part], ...]:
        """Every part with its path, in the order of the flow; terms that are off are left out."""
        found = list(walk(self.curriculum, "curriculum"))
        for stage in STAGES:
            found += walk(getattr(self, stage), stage)
        for number, step in enumerate(self.schedule.steps):
            path = f"schedule.steps.{number}"
            found += [*walk(step.source, f"{path}.source"), *walk(step.parts, f"{path}.parts")]
            for term in step.terms or ():
                found += walk(term, f"{path}.terms.{term.name}") if term.on else ()
        for term in self.terms:
            found += walk(term, f"terms.{term.name}") if term.on else ()
        return tuple(found)

    @cached_property
    def needs(self) -> tuple[Need, ...]:
        """Every need of its parts, once by name; ENTROPY rides along with the loss, for the display."""
        found: dict[str, Need] = {}
        for path, part in self.parts:
            for need in part.needs:
                if found.setdefault(need.name, need) != need:
                    other = found[need.name]
                    raise RecipeError(
                        f"{self.slug}: {path} needs `{need.name}` as {need}, another part as {other}"
                    )
        found.setdefault(ENTROPY.name, ENTROPY)
        return tuple(found.values())

    @cached_property
    def models(self) -> dict[str, ModelSpec]:
        """The bank: models by name."""
        found: dict[str, ModelSpec] = {}
        for path, part in self.parts:
            for name, spec in part.models.items():
                if name not in self.bank and found.setdefault(name, spec) != spec:
                    raise RecipeError(
                        f"{self.slug}: {path} wants model `{name}` as {spec}, another part as {found[name]}"
                    )
        return {**found, **self.bank}

    @property
    def hooks(self) -> frozenset[str]:
        """Sampler rules that the actor must serve: see `policy_opt.sampling`."""
        if self.phases:
            return frozenset(name for phase in self.phases for name in phase.recipe.hooks)
        named = (self.sampler.hook, *(part.hook for _, part in self.parts))
        return frozenset(name for name in named if name is not None)

    @property
    def privileged(self) -> bool:
        """Does the policy or a view of it see text that the task does not show?"""
        if self.phases:
            return any(phase.recipe.privileged for phase in self.phases)
        return any(isinstance(n.view, OtherPrompt) for n in self.needs) or any(
            p.privileged for _, p in self.parts
        )
