"""Sources of a step's batch besides the fresh rollout. What they hold back is part of the run's state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from policy_opt.batch import Batch, concat
from policy_opt.part import Ctx, Part
from policy_opt.protocols import Job


@dataclass(frozen=True)
class Previous(Part):
    """The batch of the iteration before, with all its columns; nothing in the first iteration."""

    stage: ClassVar[str] = "source"

    def draw(self, fresh: Batch, ctx: Ctx) -> Batch | None:
        """The stored batch."""
        return ctx.state(self).get("batch")

    def observe(self, b: Batch, ctx: Ctx) -> None:
        """Store this iteration's batch."""
        ctx.state(self)["batch"] = b


@dataclass(frozen=True)
class Replay(Part):
    """Whole groups of earlier iterations, with the log-probs of the policy that played them."""

    stage: ClassVar[str] = "source"
    groups: int = 16
    """How many are drawn, without replacement; fewer while fewer are stored."""
    capacity: int = 64
    """How many are kept; the oldest go first."""
    fresh: bool = False
    """Mix them with this iteration's rollout, in one batch."""

    def check(self) -> None:
        if not 0 < self.groups <= self.capacity:
            raise ValueError(f"0 < groups <= capacity, not {self.groups}, {self.capacity}")

    def draw(self, fresh: Batch, ctx: Ctx) -> Batch | None:
        """Groups drawn at random; the fresh rows first, where they are mixed in."""
        stored: list[Batch] = ctx.state(self).get("groups", [])
        if not stored:
            return fresh if self.fresh else None
        order = torch.randperm(len(stored), generator=ctx.generator("replay", ctx.step))
        return concat([*[fresh] * self.fresh, *(stored[i] for i in order[: self.groups].tolist())])

    def observe(self, b: Batch, ctx: Ctx) -> None:
        """Store this iteration's groups."""
        state = ctx.state(self)
        state["groups"] = [*state.get("groups", []), *split_groups(b)][-self.capacity :]


@dataclass(frozen=True)
class Pool(Part):
    """Rows that a column selects, gathered over iterations until there are enough; then drawn."""

    stage: ClassVar[str] = "source"
    by: str
    """Rows where this column is above 0 go into the pool."""
    rows: int = 1
    """Draws only when so many are there."""

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({self.by})

    def draw(self, fresh: Batch, ctx: Ctx) -> Batch | None:
        """The pool, this iteration's rows included, or nothing while there are too few."""
        state = ctx.state(self)
        chosen = (fresh[self.by] > 0).nonzero().squeeze(1)
        if chosen.numel():
            state["batches"] = [*state.get("batches", []), fresh.rows(chosen)]
        if sum(b.B for b in state.get("batches", [])) < self.rows:
            return None
        return concat(state.pop("batches"))


@dataclass(frozen=True)
class Demos(Part):
    """Demonstrations, played by the actor anew in each iteration."""

    stage: ClassVar[str] = "source"
    tasks: int = 8
    """How many tasks, in the order of the pool, wrapping around."""

    def draw(self, fresh: Batch, ctx: Ctx) -> Batch | None:
        """One demonstration per task; group ids are negative, so that they meet no played group's."""
        assert ctx.actor is not None
        state = ctx.state(self)
        start = int(state.get("next", 0))
        state["next"] = start + self.tasks
        pool = max(ctx.tasks, 1)
        return ctx.actor.play([Job(i % pool, -1 - i, 0, demo=True) for i in range(start, start + self.tasks)])


def split_groups(b: Batch) -> list[Batch]:
    """One batch per group, in order of id."""
    index_B, count = b.index()
    return [b.rows((index_B == q).nonzero().squeeze(1)) for q in range(count)]
