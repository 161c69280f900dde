"""The schedule: which optimizer steps an iteration takes, on which data.

An iteration takes `steps` one after the other. Each draws a batch from its source, and passes over it
`epochs` times in `minibatches` parts that never split a group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from policy_opt.batch import Batch
from policy_opt.part import Ctx, Part


@dataclass(frozen=True)
class Fresh(Part):
    """This iteration's rollout."""

    stage: ClassVar[str] = "source"

    def draw(self, fresh: Batch, ctx: Ctx) -> Batch | None:
        """The fresh batch itself."""
        return fresh


@dataclass(frozen=True)
class Step:
    """One pass of optimizer steps over one batch."""

    source: Any = Fresh()
    """Where the batch comes from: fresh, previous, replay, pool, demonstrations."""
    epochs: int = 1
    """Passes over the batch."""
    minibatches: int = 1
    """Optimizer steps in a pass; fewer where there are fewer groups."""
    parts: tuple[Any, ...] = ()
    """Parts run on the drawn batch before its steps (e.g. a new advantage for an old batch)."""
    terms: tuple[Any, ...] | None = None
    """Its own loss; None: the recipe's."""
    lr_scale: float = 1.0
    """Factor on the learning rate."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.minibatches < 1:
            raise ValueError(f"epochs and minibatches are at least 1, not {self.epochs}, {self.minibatches}")


@dataclass(frozen=True)
class Schedule:
    """The optimizer steps of an iteration."""

    steps: tuple[Step, ...] = (Step(),)
    """In order."""
    unit: str = "group_B"
    """Rows with the same id here stay in one mini-batch (group_B, or a unit above it)."""

    def minibatches(self, b: Batch, step: Step, ctx: Ctx, number: int) -> list[torch.Tensor]:
        """Row indices of every optimizer step of `step` (the `number`-th of the iteration), in order.

        The shuffle is over unit ids, so it does not depend on the order of rows.
        """
        index_B, count = b.index(self.unit)
        splits: list[torch.Tensor] = []
        for epoch in range(step.epochs):
            if step.minibatches == 1:
                splits.append(torch.arange(b.B, device=index_B.device))
                continue
            order = torch.randperm(count, generator=ctx.generator("minibatch", ctx.step, number, epoch))
            for units in order.to(index_B.device).tensor_split(min(step.minibatches, count)):
                splits.append(torch.isin(index_B, units).nonzero().squeeze(1))
        return splits
