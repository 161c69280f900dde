"""An actor and a learner that give what they are told: the loop's own arithmetic on any numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from policy_opt import Batch, Job, Loop, ModelSpec, Need, Optim, Recipe, RunSize
from policy_opt.need import SHAPE, Mismatched, TopKIds, TopKLogProb
from policy_opt.protocols import Pull
from policy_opt.sampling import RULES
from policy_opt.schedule import Schedule, Step

STREAM_OF = {"logp_BT": "logp_new", "values_BT": "values_new", "entropy_BT": "entropy"}
COLUMN_OF = {
    "logp_old_BT": "logp_old",
    "logp_ref_BT": "logp_ref",
    "values_old_BT": "values_old",
    "entropy_old_BT": "entropy",
}


class FixedActor:
    """Plays one batch, always the same."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.columns = batch.columns
        self.hooks = frozenset(RULES)
        self.jobs: list[Sequence[Job]] = []

    def play(self, jobs: Sequence[Job]) -> Batch:
        self.jobs.append(jobs)
        return self.batch


class FixedLearner:
    """Streams and columns by name; records the cotangents that the loop pulls, and takes no step.

    What is not given is a small random tensor, the same in every call.
    """

    def __init__(
        self, given: Mapping[str, Tensor], dtype: torch.dtype = torch.float64, micro_rows: int = 10**6
    ):
        self.given, self.dtype, self.micro_rows = given, dtype, micro_rows
        self.version, self.lr = 0, 1.0
        self.cotangents: list[dict[str, Tensor]] = []
        self.masks: list[Tensor] = []
        self.scored: list[tuple[str, ...]] = []

    def prepare(
        self, models: Mapping[str, ModelSpec], needs: Sequence[Need], optimizer: Optim | None
    ) -> None:
        self.needs = needs

    def number(self, need: Need, b: Batch) -> Tensor:
        name = STREAM_OF.get(need.name) or COLUMN_OF.get(need.name, need.name)
        if name in self.given:
            value = torch.as_tensor(self.given[name])
            value = value.to(self.dtype) if value.is_floating_point() else value
            value = value.expand(b.B, b.T) if value.ndim == 0 else value
        else:
            generator = torch.Generator().manual_seed(len(need.name))
            tail = () if SHAPE[type(need.what)] == "BT" else (min(getattr(need.what, "k", 3), 5),)
            value = torch.rand(b.B, b.T, *tail, generator=generator, dtype=self.dtype) - 1.5
            value = value.argsort(-1) if isinstance(need.what, TopKIds) else value
            value = value.sort(descending=True).values if isinstance(need.what, TopKLogProb) else value
        place_BT = {"actions": b.mask_BT, "prompt": b.opening_BT, "all": b.real_BT}[need.where]
        if isinstance(need.view, Mismatched) and name in self.given:
            # Its entries stand where the other row has its tokens; the numbers given are 0 elsewhere.
            return value
        return torch.where(place_BT.reshape(b.B, b.T, *[1] * (value.ndim - 2)), value, 0)

    def score(self, b: Batch, needs: Sequence[Need]) -> dict[str, Tensor]:
        self.scored.append(tuple(need.name for need in needs))
        return {need.name: self.number(need, b) for need in needs}

    def backward(self, b: Batch, needs: Sequence[Need], pull: Pull) -> dict[str, Tensor]:
        streams = {need.name: self.number(need, b) for need in needs}
        found = {name: torch.zeros_like(value) for name, value in streams.items()}
        for rows_R in torch.arange(b.B).split(self.micro_rows):
            pulled = pull(rows_R, {name: value[rows_R] for name, value in streams.items()})
            for name, value in pulled.items():
                found[name][rows_R] = value
        self.cotangents.append(found)
        self.masks.append(b.mask_BT)
        return streams

    def step(self, lr_scale: float = 1.0) -> dict[str, float]:
        self.version += 1
        return {"grad_norm": 0.0}

    def sync(self, name: str, decay: float = 0.0) -> None: ...


def whole(recipe: Recipe) -> Recipe:
    """One rollout, steps on the whole batch, and logp_old scored apart from the live streams (2 epochs)."""
    return recipe.set("curriculum.max_rounds=1").replace(schedule=Schedule((Step(epochs=2),)))


def batch(
    rewards: Sequence[float], groups: Sequence[int], mask: Sequence[Sequence[int]], **columns: Tensor
) -> Batch:
    """A rollout in float64 with the standard columns."""
    reward_B = torch.tensor(rewards, dtype=torch.float64)
    mask_BT = torch.tensor(mask)
    given: dict[str, object] = {
        "reward_B": reward_B,
        "correct_B": (reward_B > 0.5).double(),
        "length_B": mask_BT.sum(1),
        "truncated_B": torch.zeros_like(reward_B),
        "tool_calls_B": torch.arange(len(rewards)) % 4,
        "first_call_B": torch.arange(len(rewards)) % 4 - 1,
        "finished_B": (torch.arange(len(rewards)) % 3 < 2).double(),
        "proximity_B": (torch.arange(len(rewards)) % 5) / 4,
        "level_B": torch.tensor(groups) % 2,
        "answer_B": torch.arange(len(rewards)) % 3 - 1,
        "scores_BK": torch.stack([reward_B, (torch.arange(len(rewards)) % 3).double()], 1),
        "real_BT": torch.ones_like(mask_BT),
        "logp_sampler_BT": torch.zeros(mask_BT.shape, dtype=torch.float64),
    }
    return Batch.build(mask_BT=mask_BT, group_B=torch.tensor(groups), **{**given, **columns})


def run(
    recipe: Recipe,
    b: Batch,
    given: Mapping[str, Tensor],
    states: Mapping[str, dict[str, Any]] | None = None,
    **options: object,
):
    """One iteration on fixed numbers, from the parts' states by phase: (batch, metrics, learner)."""
    learner = FixedLearner(given, **options)
    count = b.index()[1]
    loop = Loop(recipe, FixedActor(b), learner, RunSize(tasks=max(count, 1), groups=count, group_size=1))
    loop.states.update(states or {})
    found, metrics = loop.iterate()
    return found, metrics, learner
