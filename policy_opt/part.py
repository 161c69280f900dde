"""Part: one function at one stage of the flow, as a frozen dataclass of its options; and the context it is
given.

A part is pure: it sees the whole batch, uses no gradient, and returns a batch with more columns. What it must
remember stands in `ctx.state(self)`, which is checkpointed for it. What it reads, writes and needs is
declared, so that a recipe can be checked before anything is sampled."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from policy_opt.bank import ModelSpec
from policy_opt.batch import Batch, spellings
from policy_opt.errors import BatchError
from policy_opt.need import Need

if TYPE_CHECKING:
    from policy_opt.protocols import Actor, Learner, Sampler


class Part:
    """What every part declares. Sub-classes are frozen dataclasses; `stage` says where they may stand.

    Roles and their call:
        expand, signals, reward, advantage, credit    (b, ctx) -> Batch
        surrogate    (streams, b) -> [B, T], [B] or a scalar
        agg          tokens(num_BT, den_BT) -> [B, T];  rows(num_BT, den_BT) -> [B]
        coef         value(ctx) -> float
        accept       (b, ctx) -> keep_B
        order        (n, tasks, ctx) -> task indices
        source       draw(fresh, ctx) -> Batch or None
    """

    stage: ClassVar[str] = ""
    """The role: where in a recipe the part may stand."""
    privileged: ClassVar[bool] = False
    """Does it bring in text that the task does not show (hints, solutions, feedback)?"""

    @property
    def when(self) -> Literal["rollout", "step"]:
        """step: run on every mini-batch, before its optimizer step, instead of once after the rollout."""
        return "rollout"

    @property
    def needs(self) -> tuple[Need, ...]:
        """Quantities of models; their names are read as columns or, with when="loss", as streams."""
        return ()

    @property
    def reads(self) -> frozenset[str]:
        """Columns that must be there. A stem without suffix (`adv`) means adv_BT or adv_B, the finer one."""
        return frozenset()

    @property
    def facts(self) -> frozenset[str]:
        """Columns that must come from the environment's verdict, e.g. tool_calls_B."""
        return frozenset()

    @property
    def writes(self) -> frozenset[str]:
        """Columns that it adds."""
        return frozenset()

    @property
    def overwrites(self) -> frozenset[str]:
        """Columns that it replaces; where one is not there yet, it adds it. Stems as in `reads`."""
        return frozenset()

    @property
    def models(self) -> Mapping[str, ModelSpec]:
        """Models of the bank that its needs name."""
        return {}

    @property
    def hook(self) -> str | None:
        """Name of the sampler's rule that its `sampling` turns on; see `policy_opt.sampling`."""
        return None

    def sampling(self, sampler: Sampler, ctx: Ctx) -> Sampler:
        """Called before every rollout: how its tokens are drawn, e.g. with options from the part's state."""
        return sampler

    def check(self) -> None:
        """ValueError where its options contradict each other; called by the recipe's check."""

    def after_step(self, b: Batch, ctx: Ctx) -> None:
        """Called after every optimizer step with that step's mini-batch and streams."""

    def played(self, b: Batch, ctx: Ctx) -> None:
        """Called once an iteration, before anything is learned, with all that was played: rejected groups too."""

    def observe(self, b: Batch, ctx: Ctx) -> None:
        """Called once at the end of every iteration with the whole batch: the place to write state."""


def walk(value: Any, path: str) -> Iterator[tuple[str, Part]]:
    """Every part inside a part, tuple or dataclass, with a stable path: the key of its state."""
    if isinstance(value, Part):
        yield f"{path}:{type(value).__name__}", value
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from walk(item, f"{path}.{i}")
    elif is_dataclass(value) and not isinstance(value, type):
        for f in fields(value):
            yield from walk(getattr(value, f.name), f"{path}.{f.name}")


@dataclass
class Ctx:
    """What a part may know besides the batch: where the run stands, random streams, its state, the actor."""

    step: int = 0
    """Iteration, from 0."""
    seed: int = 0
    """Seed of the run."""
    version: int = 0
    """Policy version (optimizer steps taken) when the iteration began: that of its fresh tokens."""
    tasks: int = 0
    """Size of the pool of tasks."""
    recipe: str = "?"
    """Slug, for messages."""
    lr: float = 0.0
    """Learning rate of the policy in this iteration."""
    states: MutableMapping[str, dict[str, Any]] = field(default_factory=dict)
    """State of every part by its path; see `state`."""
    paths: Mapping[int, str] = field(default_factory=dict)
    """id(part) -> path, for the parts of the recipe that runs."""
    actor: Actor | None = None
    learner: Learner | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    """Numbers of this iteration."""
    step_metrics: dict[str, float] = field(default_factory=dict)
    """Numbers of the optimizer step just taken, for `after_step`."""
    step_reports: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """What the surrogates said of that step, per token, row or pair, for `after_step`."""

    def generator(self, purpose: str, *ids: int) -> torch.Generator:
        """A random stream of its own, a function of (run seed, purpose, ids) only."""
        words = "/".join(str(w) for w in (self.seed, purpose, *ids))
        digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def state(self, part: Part) -> dict[str, Any]:
        """The part's own dict: tensors, numbers, text, Store or Batch. Saved with the run."""
        path = self.paths.get(id(part), type(part).__name__)
        return self.states.setdefault(path, {})

    def log(self, name: str, value: float) -> None:
        """Put a number into this iteration's metrics."""
        self.metrics[name] = float(value)


def run(path: str, part: Any, b: Batch, ctx: Ctx) -> Batch:
    """A part's call; BatchError names recipe and part, also where it wrote an undeclared column."""
    try:
        found = part(b, ctx)
    except BatchError as error:
        raise BatchError(f"{ctx.recipe}: {path}: {error}") from error
    allowed = {s for name in part.writes | part.overwrites for s in spellings(name)}
    wrong = found.cols.keys() - b.cols.keys() - allowed
    if wrong:
        raise BatchError(f"{ctx.recipe}: {path} wrote {sorted(wrong)}, which it does not declare")
    return found
