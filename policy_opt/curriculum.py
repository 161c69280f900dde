"""The curriculum: which tasks are played, and which finished groups are accepted.

It proposes from a finite pool with stable ids, looks at finished groups, and asks for more in place of those
it rejects: bounded, and counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from policy_opt.batch import Batch
from policy_opt.part import Ctx, Part


@dataclass(frozen=True)
class Shuffled(Part):
    """Every task once per epoch, in an order drawn anew for each epoch."""

    stage: ClassVar[str] = "order"

    def __call__(self, n: int, tasks: int, ctx: Ctx) -> list[int]:
        """The next n task indices of 0..tasks-1; a batch may span two epochs."""
        state = ctx.state(self)
        taken = int(state.get("taken", 0))
        state["taken"] = taken + n
        orders = {
            epoch: torch.randperm(tasks, generator=ctx.generator("curriculum", epoch)).tolist()
            for epoch in range(taken // tasks, (taken + n - 1) // tasks + 1)
        }
        return [orders[i // tasks][i % tasks] for i in range(taken, taken + n)]


@dataclass(frozen=True)
class Mixed(Part):
    """Accept a group only if its members differ: 0 < number of successes < group size (DAPO's dynamic
    sampling).
    """

    stage: ClassVar[str] = "accept"
    by: str = "correct_B"
    """The raw outcome, before any shaping; above 0.5 is a success."""

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({self.by})

    def __call__(self, b: Batch, ctx: Ctx) -> Tensor:
        index_B, count = b.index()
        good_B = (b[self.by] > 0.5).long()
        good_Q = torch.zeros(count, dtype=torch.long, device=index_B.device).index_add_(0, index_B, good_B)
        size_Q = torch.bincount(index_B, minlength=count)
        return ((good_Q > 0) & (good_Q < size_Q))[index_B]


@dataclass(frozen=True)
class Curriculum(Part):
    """What to play next, and what to keep of it."""

    stage: ClassVar[str] = "curriculum"
    order: Any = Shuffled()
    """Proposes tasks."""
    accept: Any = None
    """Keeps or rejects finished groups; None keeps all."""
    max_rounds: int = 10
    """At most so many rollouts in one iteration; what is missing then stays missing, and is counted."""
    extra: int = 0
    """Members sampled in excess of the group size."""
    resume: bool = False
    """Go on in the next iteration with rows whose finished_B is 0, in place of new tasks."""
    window: int | None = None
    """Tokens that an episode may sample in one iteration; what is cut off has finished_B 0. Needs `resume`."""

    def __post_init__(self) -> None:
        if self.max_rounds < 1 or self.extra < 0:
            raise ValueError(f"max_rounds >= 1 and extra >= 0, not {self.max_rounds}, {self.extra}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window is at least 1 token, not {self.window}")

    def check(self) -> None:
        if self.window is not None and not self.resume:
            raise ValueError("a window cuts episodes off, and with resume=False nobody goes on with them")

    @property
    def facts(self) -> frozenset[str]:
        return frozenset({"finished_B"} if self.resume else ())

    def screen(self, b: Batch, ctx: Ctx) -> Tensor:
        """keep_B, the same for all rows of a group."""
        if self.accept is None:
            return torch.ones(b.B, dtype=torch.bool, device=b.mask_BT.device)
        return self.accept(b, ctx)

    def unfinished(self, ctx: Ctx) -> list[tuple[int, int, int]]:
        """(task, group, member) of the episodes to go on with; each is handed out once."""
        return [tuple(ids) for ids in ctx.state(self).pop("unfinished", [])] if self.resume else []

    def remember(self, b: Batch, ctx: Ctx) -> None:
        """Note which of the accepted episodes are not finished; called when the rollout is over."""
        if self.resume:
            ids = torch.stack([b["task_B"], b["group_B"], b["member_B"]], 1)
            ctx.state(self)["unfinished"] = ids[(b["finished_B"] == 0) & b.once()].tolist()
