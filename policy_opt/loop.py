"""The flow, once, for any recipe, any actor and any model.

    curriculum -> rollout -> expand -> signals -> reward -> advantage -> credit -> loss -> update -> observe

The loop knows no algorithm: what a method does stands in its recipe's parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from policy_opt import metrics
from policy_opt.batch import Batch, concat
from policy_opt.errors import BatchError, RecipeError
from policy_opt.need import Need
from policy_opt.part import Ctx
from policy_opt.protocols import Actor, Job, Learner
from policy_opt.recipe import Recipe
from policy_opt.state import decode, encode
from policy_opt.step import Known, check_finite, optimize, score

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


class Loop:
    """A run: iterate() plays and learns once; state_dict() is all that it remembers, weights apart."""

    def __init__(self, recipe: Recipe, actor: Actor, learner: Learner, size: RunSize) -> None:
        recipe.check(getattr(actor, "columns", None))
        self.recipe, self.actor, self.learner, self.size = recipe, actor, learner, size
        self.step = 0
        self.next_group = 0
        self.states: dict[str, dict[str, Any]] = {}
        self.prepared: str | None = None

    def iterate(self) -> tuple[Batch, dict[str, float]]:
        """One iteration: (the batch that was trained on, with all columns; its numbers)."""
        recipe, ctx = self.enter()
        b = self.rollout(recipe, ctx)
        b = self.columns(recipe, b, ctx)
        b = self.update(recipe, b, ctx)
        for _, part in recipe.parts():
            part.observe(b, ctx)
        for name, spec in recipe.models.items():
            if spec.sync_every and (self.step + 1) % spec.sync_every == 0:
                self.learner.sync(name)
        self.step += 1
        return b, ctx.metrics

    # -- stages ---------------------------------------------------------------------------------------------------

    def enter(self) -> tuple[Recipe, Ctx]:
        """The recipe of the phase that the run is in, its models built, and this iteration's context."""
        name, recipe, start, sync = "", self.recipe, 0, ()
        for phase in self.recipe.phases:
            name, recipe, sync = phase.name, phase.recipe, phase.sync
            if phase.iterations is None or self.step < start + phase.iterations:
                break
            start += phase.iterations
        if self.prepared != name:
            self.learner.prepare(recipe.models, recipe.needs, recipe.optimizer)
            self.prepared = name
        if self.step == start:
            for model in sync:
                self.learner.sync(model)
        ctx = Ctx(
            step=self.step,
            seed=self.size.seed,
            recipe=recipe.slug,
            lr=self.learner.lr,
            states=self.states.setdefault(name, {}),
            paths={id(part): path for path, part in recipe.parts()},
            actor=self.actor,
            learner=self.learner,
        )
        return recipe, ctx

    def rollout(self, recipe: Recipe, ctx: Ctx) -> Batch:
        """Play until enough groups are accepted, at most curriculum.max_rounds times."""
        curriculum = recipe.curriculum
        missing, played, kept = self.size.groups, [], []
        for _ in range(curriculum.max_rounds):
            b = self.actor.play(self.jobs(recipe, missing, ctx))
            validate(b, recipe.slug)
            keep_B = curriculum.screen(b, ctx)
            played.append(b)
            if keep_B.any():
                kept.append(b.rows(keep_B.nonzero().squeeze(1)))
                missing -= kept[-1].index()[1]
            if missing <= 0:
                break
        everything = concat(played)
        ctx.metrics |= metrics.of_rollout(everything)
        accepted = sum(b.index()[1] for b in kept)
        ctx.log("groups_rejected", everything.index()[1] - accepted)
        ctx.log("rollout_rounds", len(played))
        if not kept:
            return everything.silence(torch.zeros(everything.B, dtype=torch.bool))
        return concat(kept)

    def jobs(self, recipe: Recipe, groups: int, ctx: Ctx) -> list[Job]:
        """Episodes to play for so many groups: unfinished ones go on, the rest are new tasks."""
        size, curriculum = self.size.group_size + recipe.curriculum.extra, recipe.curriculum
        sampler = recipe.sampler
        jobs = [Job(t, g, m, self.size.split, resume=True, sampler=sampler) for t, g, m in curriculum.unfinished(ctx)]
        fresh = max(groups - -(-len(jobs) // size), 0)
        for task in curriculum.order(fresh, self.size.tasks, ctx) if fresh else ():
            jobs += [Job(task, self.next_group, m, self.size.split, sampler=sampler) for m in range(size)]
            self.next_group += 1
        return jobs

    def columns(self, recipe: Recipe, b: Batch, ctx: Ctx) -> Batch:
        """Expand, score what the parts need, then signals, reward, advantage and credit."""
        for part in recipe.expand:
            b = part(b, ctx)
        deferred = self.deferred(recipe)
        needs = [n for n in recipe.needs if n.when == "rollout"]
        self.known = Known(self.learner.version, {n.quantity: n.name for n in needs}, deferred)
        values = score(self.learner, b, [n for n in needs if n.name not in deferred], recipe.slug)
        b = b.put(**values)
        for part in (*recipe.signals, *recipe.reward, *recipe.advantage, *recipe.credit):
            if part.when == "rollout":
                b = part(b, ctx)
        return b

    def deferred(self, recipe: Recipe) -> dict[str, str]:
        """Columns that the step's own forward gives: {column: stream}.

        A single step on the fresh batch starts from the weights that gave logp_old, so its live streams *are* that
        column, unless a part reads it before or a loss looks at several rows at once.
        """
        steps = recipe.schedule.steps
        single = len(steps) == 1 and steps[0].epochs == steps[0].minibatches == 1 and not steps[0].parts
        terms = [t for t in recipe.terms if t.on]
        if not (single and steps[0].terms is None and type(steps[0].source).__name__ == "Fresh"):
            return {}
        if any(t.loss.scope != "row" for t in terms):
            return {}
        stages = (recipe.expand, recipe.signals, recipe.reward, recipe.advantage, recipe.credit)
        early = {n.name for stage in stages for part in stage for n in part.needs}
        live: dict[tuple, Need] = {n.quantity: n for n in recipe.needs if n.when == "loss"}
        return {
            n.name: live[n.quantity].name
            for n in recipe.needs
            if n.when == "rollout" and n.quantity in live and n.name not in early
        }

    def update(self, recipe: Recipe, fresh: Batch, ctx: Ctx) -> Batch:
        """The schedule's optimizer steps; returns the fresh batch with what they added."""
        steps = []
        timely = [p for stage in ("signals", "advantage", "credit") for p in getattr(recipe, stage) if p.when == "step"]
        for number, step in enumerate(recipe.schedule.steps):
            b = step.source.draw(fresh, ctx)
            if b is None or not b.mask_BT.any():
                continue
            known = self.known if b is fresh else Known()
            terms = recipe.terms if step.terms is None else step.terms
            b = self.complete(b, (*step.parts, *(t.loss for t in terms if t.on)), known, ctx)
            for part in step.parts:
                b = part(b, ctx)
            for rows in recipe.schedule.minibatches(b, step, ctx, number):
                some = b if rows.numel() == b.B else b.rows(rows)
                if not some.mask_BT.any():
                    continue
                some, streams, loss, numbers = optimize(terms, timely, some, ctx, known, step.lr_scale)
                steps.append({**numbers, **metrics.of_step(loss, streams, some)})
                for _, part in recipe.parts():
                    part.after_step(some, ctx)
                self.average(recipe)
            if known.deferred:
                fresh = some
        ctx.metrics |= metrics.over_steps(steps)
        ctx.log("optimizer_steps", len(steps))
        ctx.log("logp_gap", metrics.logp_gap(fresh))
        return fresh

    def complete(self, b: Batch, parts: tuple[Any, ...], known: Known, ctx: Ctx) -> Batch:
        """Score the rollout-time needs that a drawn batch (a demonstration, say) does not carry yet."""
        lacking = {n.name: n for p in parts for n in p.needs if n.when == "rollout" and n.name not in b}
        return b.put(**score(self.learner, b, [n for k, n in lacking.items() if k not in known.deferred], ctx.recipe))

    def average(self, recipe: Recipe) -> None:
        """Move the bank's averages towards the policy."""
        for name, spec in recipe.models.items():
            if spec.ema is not None:
                self.learner.sync(name, spec.ema)

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything but weights and optimizers, as tensors, numbers and text."""
        return {"step": self.step, "next_group": self.next_group, "states": encode(self.states)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; RecipeError where it is not one."""
        try:
            self.step, self.next_group = int(state["step"]), int(state["next_group"])
            self.states = decode(state["states"])
        except (KeyError, TypeError, ValueError) as error:
            raise RecipeError(f"not the state of a loop: {error!r}") from error


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
        raise BatchError(f"{recipe}: mask_BT of shape {tuple(b.mask_BT.shape)} is set where real_BT says there is no token")
    check_finite({"logp_sampler_BT": b.logp_sampler_BT}, b, recipe)
