"""The flow, once, for any recipe, any actor and any model.

    curriculum -> rollout -> expand -> signals -> reward -> advantage -> credit -> loss -> update -> observe

The loop knows no algorithm: what a method does stands in its recipe's parts.

With a bound on staleness the rollout is one iteration ahead: as soon as the batch of iteration k is there, the
episodes of k + 1 are chosen and sent out, under the policy of then; they are played while k is learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from policy_opt import metrics
from policy_opt.ahead import Account, Ages, Sent, drift
from policy_opt.batch import Batch, concat
from policy_opt.errors import BatchError, RecipeError
from policy_opt.need import LOGP_OLD
from policy_opt.part import Ctx, run
from policy_opt.protocols import Actor, AheadActor, Job, Learner
from policy_opt.recipe import STAGES, Recipe
from policy_opt.schedule import Fresh
from policy_opt.state import decode, encode
from policy_opt.step import Known, check_finite, optimize, score
from policy_opt.terms import reports

__all__ = ["Actor", "Job", "Learner", "Loop", "RunSize"]


@dataclass(frozen=True)
class RunSize:
    """How much an iteration plays."""

    tasks: int
    """Size of the finite pool of training tasks."""
    groups: int = 16
    """Groups per iteration."""
    group_size: int = 8
    """Members of a group: episodes from one start state."""
    seed: int = 0
    """Seed of the run; every random stream derives from it."""
    split: str = "train"
    """Which tasks."""


class Loop:
    """A run: iterate() plays and learns once; state_dict() is all that it remembers, weights apart.

    staleness: the largest age of a token, in iterations, where rollouts are one iteration ahead; the actor must be
        able to `send` and `collect`. None: play, then learn.
    """

    def __init__(
        self, recipe: Recipe, actor: Actor, learner: Learner, size: RunSize, staleness: int | None = None
    ) -> None:
        recipe.check(getattr(actor, "columns", None))
        unserved = recipe.hooks - getattr(actor, "hooks", frozenset())
        if unserved:
            raise RecipeError(f"{recipe.slug}: the actor has no sampler rule `{min(unserved)}`")
        if staleness is not None and not isinstance(actor, AheadActor):
            raise RecipeError(f"{type(actor).__name__} has no send and collect: it cannot play one iteration ahead")
        self.recipe, self.actor, self.learner, self.size = recipe, actor, learner, size
        self.step = 0
        self.next_group = 0
        self.states: dict[str, dict[str, Any]] = {}
        self.prepared: str | None = None
        self.known = Known()
        self.account = Account()
        self.ages = Ages(staleness) if staleness is not None else None
        self.sent: Sent | None = None

    def iterate(self, more: bool = True) -> tuple[Batch, dict[str, float]]:
        """One iteration: (the batch that was trained on, with all columns; its numbers).

        more: another one follows, so that its rollout may begin before this one's batch is learned.
        """
        recipe, ctx = self.enter()
        b = self.rollout(recipe, ctx)
        if self.ages is not None and more:
            self.send()
        b = self.columns(recipe, b, ctx)
        b = self.update(recipe, b, ctx)
        self.observe(recipe, b, ctx)
        self.step += 1
        return b, ctx.metrics

    # -- stages -------------------------------------------------------------------------------------------

    def phase(self, step: int) -> tuple[Recipe, str, int, tuple[str, ...]]:
        """The phase that a step is in: (its recipe, name, first step, syncs)."""
        name, recipe, start = "", self.recipe, 0
        sync: tuple[str, ...] = ()
        for phase in self.recipe.phases:
            name, recipe, sync = phase.name, phase.recipe, phase.sync
            if phase.iterations is None or step < start + phase.iterations:
                break
            start += phase.iterations
        return recipe, name, start, sync

    def prepare(self) -> tuple[Recipe, str, int, tuple[str, ...]]:
        """Build the models of the phase that the run is in; see `phase`.

        Called by every iteration; a trainer calls it before it loads the bank's weights from a checkpoint.
        """
        recipe, name, start, sync = self.phase(self.step)
        if self.prepared != name:
            self.learner.prepare(recipe.models, recipe.needs, recipe.optimizer)
            self.prepared = name
        return recipe, name, start, sync

    def enter(self) -> tuple[Recipe, Ctx]:
        """This iteration's recipe and context."""
        recipe, name, start, sync = self.prepare()
        if self.step == start:
            for model in sync:
                self.learner.sync(model)
        ctx = self.context(recipe, name, self.step)
        if self.sent is not None:
            ctx.version = self.sent.version
            ctx.metrics |= self.sent.metrics
        return recipe, ctx

    def context(self, recipe: Recipe, phase: str, step: int) -> Ctx:
        """What the parts of an iteration are told."""
        return Ctx(
            step=step,
            seed=self.size.seed,
            version=self.learner.version,
            tasks=self.size.tasks,
            recipe=recipe.slug,
            lr=self.learner.lr,
            states=self.states.setdefault(phase, {}),
            paths={id(part): path for path, part in recipe.parts},
            actor=self.actor,
            learner=self.learner,
        )

    def rollout(self, recipe: Recipe, ctx: Ctx) -> Batch:
        """Play until enough groups are accepted, at most curriculum.max_rounds times."""
        curriculum = recipe.curriculum
        missing, played, kept, account = self.size.groups, [], [], Account()
        if self.ages is not None:
            self.ages.begin(self.learner.version)
        for _ in range(curriculum.max_rounds):
            b = self.play(recipe, missing, ctx)
            validate(b, recipe.slug)
            played.append(b)
            young = b if self.ages is None else self.ages.young(b)
            keep_B = curriculum.screen(young, ctx) if young.B else young.mask_BT.any(1)
            some = young if keep_B.all() else young.rows(keep_B.nonzero().squeeze(1))
            account.note(b, young, some)
            if some.B:
                kept.append(some)
                missing -= some.index()[1]
            if missing <= 0:
                break
        everything = concat(played)
        ctx.metrics |= metrics.of_rollout(everything)
        for _, part in recipe.parts:
            part.played(everything, ctx)
        ctx.log("groups_rejected", account.rejected.groups)
        ctx.log("rollout_rounds", len(played))
        self.account.settle(account)
        curriculum.remember(concat(kept) if kept else young, ctx)
        # With nothing accepted there is nothing to learn: the last rollout stands for it, with an empty mask.
        found = concat(kept) if kept else played[-1].silence(torch.zeros_like(played[-1]["reward_B"]))
        if self.ages is not None:
            self.ages.log(found, ctx)
            ctx.metrics |= account.losses() | self.account.totals()
        return found

    def play(self, recipe: Recipe, groups: int, ctx: Ctx) -> Batch:
        """Episodes of so many groups: those that were sent out an iteration ago, else played now."""
        if self.sent is not None:
            self.sent = None
            assert isinstance(self.actor, AheadActor)
            return self.actor.collect()
        jobs = self.jobs(recipe, groups, ctx)
        self.account.sent += len(jobs)
        return self.actor.play(jobs)

    def send(self) -> None:
        """Choose the episodes of the next iteration and have them played, with the weights as they are now."""
        recipe, name, *_ = self.phase(self.step + 1)
        ctx = self.context(recipe, name, self.step + 1)
        jobs = self.jobs(recipe, self.size.groups, ctx)
        assert isinstance(self.actor, AheadActor)
        self.actor.send(jobs)
        self.account.sent += len(jobs)
        self.sent = Sent(len(jobs), self.learner.version, ctx.metrics)

    def jobs(self, recipe: Recipe, groups: int, ctx: Ctx) -> list[Job]:
        """Episodes to play for so many groups: unfinished ones go on, the rest are new tasks."""
        curriculum, sampler, split = recipe.curriculum, recipe.sampler, self.size.split
        for _, part in recipe.parts:
            sampler = part.sampling(sampler, ctx)
        size = self.size.group_size + curriculum.extra
        job = partial(Job, split=split, sampler=sampler, budget=curriculum.window)
        jobs = [job(*ids, resume=True) for ids in curriculum.unfinished(ctx)]
        fresh = max(groups - -(-len(jobs) // size), 0)
        for task in curriculum.order(fresh, self.size.tasks, ctx) if fresh else ():
            jobs += [job(task, self.next_group, member) for member in range(size)]
            self.next_group += 1
        return jobs

    def columns(self, recipe: Recipe, b: Batch, ctx: Ctx) -> Batch:
        """Expand, score what the parts need, then signals, reward, advantage and credit."""
        for part in recipe.expand:
            b = part(b, ctx)
        needs = [need for need in recipe.needs if need.when == "rollout"]
        self.known = Known(self.learner.version, {n.quantity: n.name for n in needs}, deferred(recipe))
        wanted = [need for need in needs if need.name not in self.known.deferred]
        b = b.put(**score(self.learner, b, wanted, recipe.slug))
        for stage in STAGES[1:]:
            for i, part in enumerate(getattr(recipe, stage)):
                if part.when == "rollout":
                    b = run(f"{stage}.{i}", part, b, ctx)
        return b

    def update(self, recipe: Recipe, fresh: Batch, ctx: Ctx) -> Batch:
        """The schedule's optimizer steps; returns the fresh batch with what they added."""
        steps: list[dict[str, float]] = []
        gap = 0.0
        own = self.learner.version if self.ages is not None else None
        timely = [(path, part) for path, part in recipe.parts if part.stage in STAGES and part.when == "step"]
        for number, step in enumerate(recipe.schedule.steps):
            b = step.source.draw(fresh, ctx)
            if b is None or not b.mask_BT.any():
                continue
            known = self.known if b is fresh else Known()
            terms = recipe.terms if step.terms is None else step.terms
            b = self.complete(b, (*step.parts, *(term.loss for term in terms if term.on)), known, ctx)
            for i, part in enumerate(step.parts):
                b = run(f"schedule.steps.{number}.parts.{i}", part, b, ctx)
            for rows_R in recipe.schedule.minibatches(b, step, ctx, number):
                some = b if rows_R.numel() == b.B else b.rows(rows_R)
                if not some.mask_BT.any():
                    continue
                unmoved = self.learner.version == known.version
                taken = optimize(terms, timely, some, ctx, known, step.lr_scale)
                if unmoved and "logp_BT" in taken.streams:
                    gap = max(gap, metrics.logp_gap(taken.streams["logp_BT"], taken.batch, own))
                ctx.step_reports = reports(taken.loss.terms, taken.streams, taken.batch)
                numbers = metrics.of_step(taken.loss, taken.streams, taken.batch, ctx.step_reports)
                steps.append({**taken.numbers, **numbers})
                self.after_step(recipe, taken.batch, steps[-1], ctx)
                if known.deferred:
                    fresh = taken.batch
        ctx.metrics |= metrics.over_steps(steps)
        ctx.log("optimizer_steps", len(steps))
        if "logp_old_BT" in fresh:
            gap = metrics.logp_gap(fresh["logp_old_BT"], fresh, own)
        if self.ages is not None:
            ctx.log("stale_kl", drift(fresh) if "logp_old_BT" in fresh else 0.0)
            gap = max(gap, getattr(self.actor, "gap", 0.0))
        ctx.log("logp_gap", gap)
        return fresh

    def complete(self, b: Batch, parts: tuple[Any, ...], known: Known, ctx: Ctx) -> Batch:
        """Score the rollout-time needs that a drawn batch (a demonstration, say) does not carry yet."""
        needs = {need.name: need for part in parts for need in part.needs if need.when == "rollout"}
        lacking = [need for name, need in needs.items() if name not in b and name not in known.deferred]
        return b.put(**score(self.learner, b, lacking, ctx.recipe))

    def after_step(self, recipe: Recipe, b: Batch, numbers: dict[str, float], ctx: Ctx) -> None:
        """Parts that react to a step, and the bank's moving averages."""
        ctx.step_metrics = numbers
        for _, part in recipe.parts:
            part.after_step(b, ctx)
        for name, spec in recipe.models.items():
            if spec.ema is not None:
                self.learner.sync(name, spec.ema)

    def observe(self, recipe: Recipe, b: Batch, ctx: Ctx) -> None:
        """Parts that keep state write it; models that follow the policy at intervals take its weights."""
        for _, part in recipe.parts:
            part.observe(b, ctx)
        for name, spec in recipe.models.items():
            if spec.sync_every and (self.step + 1) % spec.sync_every == 0:
                self.learner.sync(name)

    # -- state --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything but weights and optimizers, as tensors, numbers and text."""
        return {
            "step": self.step,
            "next_group": self.next_group,
            "states": encode(self.states),
            "account": self.account.state_dict(),
            "sent": None if self.sent is None else asdict(self.sent),
            "versions": [] if self.ages is None else list(self.ages.versions),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; RecipeError where it is not one."""
        try:
            self.step, self.next_group = int(state["step"]), int(state["next_group"])
            self.states = decode(state["states"])
            self.account = Account.from_state(state["account"])
            self.sent = None if state["sent"] is None else Sent(**state["sent"])
            if self.ages is not None:
                self.ages.versions = list(state["versions"])
        except (KeyError, TypeError, ValueError) as error:
            raise RecipeError(f"not the state of a loop: {error!r}") from error


def deferred(recipe: Recipe) -> dict[str, str]:
    """Columns that the step's own forward gives: {column: stream}; logp_old also where no part asks for it.

    A single step on the fresh batch starts from the weights that gave logp_old, so its live streams *are*
    that column, unless a part reads it before or a loss looks at several rows at once.
    """
    steps, terms = recipe.schedule.steps, [term for term in recipe.terms if term.on]
    one = len(steps) == 1 and steps[0].epochs == steps[0].minibatches == 1
    if not one or steps[0].parts or steps[0].terms is not None or not isinstance(steps[0].source, Fresh):
        return {}
    if any(term.loss.scope != "row" for term in terms):
        return {}
    early = {n.name for stage in STAGES for part in getattr(recipe, stage) for n in part.needs}
    live = {need.quantity: need.name for need in recipe.needs if need.when == "loss"}
    wanted = (*recipe.needs, LOGP_OLD)
    waiting = [n for n in wanted if n.when == "rollout" and n.quantity in live and n.name not in early]
    return {need.name: live[need.quantity] for need in waiting}


def validate(b: Batch, recipe: str) -> None:
    """BatchError where a rollout is not one: names the tensor, its shape and the recipe."""
    if b.B == 0:
        raise BatchError(f"{recipe}: the rollout has no rows: tokens_BT has shape {tuple(b.tokens_BT.shape)}")
    for name in ("reward_B", "correct_B"):
        if name not in b:
            raise BatchError(f"{recipe}: the rollout has no column `{name}`; it has {sorted(b.columns)}")
        if not torch.isfinite(b[name]).all():
            raise BatchError(f"{recipe}: `{name}` of shape {tuple(b[name].shape)} holds NaN or infinity")
    if (b.mask_BT & ~b.real_BT).any():
        shape = tuple(b.mask_BT.shape)
        raise BatchError(
            f"{recipe}: mask_BT of shape {shape} is set where real_BT says that there is no token"
        )
    check_finite({"logp_sampler_BT": b.logp_sampler_BT}, b, recipe)
