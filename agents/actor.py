"""Plays episodes for training and evaluation; with several processes each plays its share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from agents.batching import OWN, batch_of, numbers_of
from agents.carried import Carried
from agents.chat import ChatFormat
from agents.demonstrate import demonstrated
from agents.dist import World
from agents.engines.base import Engine
from agents.rollout import EnvPool, Kept, Limits, MakeEnv, OnProgress, Progress, play
from agents.trajectory import Trajectory
from policy_opt.batch import Batch
from policy_opt.errors import RecipeError
from policy_opt.protocols import Ask, Job, JudgeFailure

if TYPE_CHECKING:
    from agents.ahead import Ahead
    from agents.sync import WeightSync
    from envs import Verdict


class Player:
    """Token engine, chat format and environments as one call: jobs in, trajectories out, the same on every process.

    Args:
        world: the processes; each plays its share.
        version: called for the policy's version whenever play begins.
        sync: brings an engine with weights of its own to a version, verified; None: it samples from the policy itself.
        whole: while it is open, whoever samples or takes over weights finds them whole, on every process.
    """

    def __init__(
        self,
        make_env: MakeEnv,
        chat: ChatFormat,
        engine: Engine,
        limits: Limits,
        seed: int,
        world: World | None = None,
        version: Callable[[], int] = lambda: 0,
        sync: WeightSync | None = None,
        whole: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        self.make_env, self.chat, self.engine, self.limits, self.seed = make_env, chat, engine, limits, seed
        self.world = world or World()
        self.version, self.sync, self.whole = version, sync, whole
        self.pool = EnvPool(make_env)
        self.carried = Carried()

    def __call__(
        self,
        jobs: Sequence[Job],
        *,
        seed: int | None = None,
        options: Mapping[str, Any] | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[Trajectory]:
        """Trajectories in the order of the jobs. `on_progress` speaks of all processes."""
        homes = self.carried.homes(jobs, self.world.size)
        mine = [job for job, home in zip(jobs, homes, strict=True) if home == self.world.rank]
        kept = self.carried.take(mine, self.pool, self.limits)
        tell = self._scaled(on_progress, len(mine), len(jobs))
        version = self.follow()
        with self.whole() if self.sync is None else nullcontext():
            played = self.perform(mine, kept, version, seed=seed, options=options, on_progress=tell)
        shares = [iter(share) for share in self.world.gather(played)]
        everything = [next(shares[home]) for home in homes]
        self.carried.put(jobs, everything, homes, kept, options or {})
        return everything

    def perform(
        self,
        jobs: Sequence[Job],
        kept: Kept,
        version: int,
        *,
        seed: int | None = None,
        options: Mapping[str, Any] | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[Trajectory]:
        """Play jobs in this process; speaks to no other, so that it may be called in a thread.

        kept: unfinished episodes that jobs go on with; those that are cut off again are put there.
        """
        self.engine.version = version
        with self.world.autocast():
            played = play(
                jobs, self.make_env, self.chat, self.engine, self.limits, self.seed if seed is None else seed,
                None, on_progress, options=options, pool=self.pool, kept=kept,
            )  # fmt: skip
        self.engine.reset()
        return played

    def follow(self) -> int:
        """Bring the engine to the policy's weights of now, and return their version. All processes call it together.

        Raises EngineFailure where the engine verifiably does not have them.
        """
        version = self.version()
        if self.sync is not None:
            with self.whole():
                self.sync(version)
        return version

    def demonstrate(self, jobs: Sequence[Job]) -> list[Trajectory]:
        """Episodes of the environment's demonstrators; scripts cost little, so that every process plays them all."""
        return demonstrated(self.make_env, self.chat, jobs, self.seed, self.limits, self.version())

    def _scaled(self, on_progress: OnProgress | None, mine: int, total: int) -> OnProgress | None:
        """Progress of this process as an estimate of the whole."""
        if on_progress is None or mine == 0:
            return None
        factor = total / mine
        return lambda p: on_progress(Progress(round(p.done * factor), total, round(p.tokens * factor)))


class LMActor:
    """`policy_opt.loop.Actor` for a language model.

    `played` holds the trajectories of the iteration so far, rejected groups included; `begin` empties it.

    Args:
        sample: a verdict of the environment, whose scores and numeric facts become columns from the first batch
            on, whatever that one's verdicts hold.

    Attributes:
        columns: what every batch has besides the core and the units; None where there is no sample to tell.
        hooks: sampler rules that the engine serves.
        ahead: where episodes are played while the learner learns; None: nowhere.
        gap: largest difference of log-probs found when the weights that played what was collected were sent.
    """

    def __init__(self, player: Player, dtype: torch.dtype = torch.float32, sample: Verdict | None = None):
        self.player, self.dtype, self.sample = player, dtype, sample
        self.hooks: frozenset[str] = getattr(player.engine, "hooks", frozenset())
        facts = None if sample is None else [f"{name}_B" for name in numbers_of(sample.facts)]
        self.columns = None if facts is None else frozenset((*OWN, *facts))
        self.scores: list[str] | None = None
        self.facts: list[str] | None = None
        self.played: list[Trajectory] = []
        self.on_progress: OnProgress | None = None
        self.ahead: Ahead | None = None
        self.gap = 0.0

    def begin(self) -> None:
        """Forget the trajectories of the last iteration, and unfinished ones that it did not go on with."""
        self.played, self.gap = [], 0.0
        self.player.carried.grow_old(self.player.pool)

    def play(self, jobs: Sequence[Job]) -> Batch:
        """One row per episode (or segment of it), in the order of the jobs."""
        self.free()
        demos = [job for job in jobs if job.demo]
        shown = iter(self.player.demonstrate(demos) if demos else ())
        sampled = [job for job in jobs if not job.demo]
        played = iter(self.player(sampled, on_progress=self.on_progress) if sampled else ())
        return self._batch([next(shown if job.demo else played) for job in jobs])

    def send(self, jobs: Sequence[Job]) -> None:
        """Begin to play with the weights as they are now, whatever they become."""
        assert self.ahead is not None
        self.ahead.send(jobs)

    def collect(self) -> Batch:
        """What was sent last, as a batch; waits for it."""
        assert self.ahead is not None
        trajectories, self.gap = self.ahead.collect(self.on_progress)
        return self._batch(trajectories)

    def free(self) -> None:
        """Wait until the player may be used: its own engine may be taken by what was sent."""
        if self.ahead is not None:
            self.ahead.free()

    def settle(self) -> None:
        """Wait for what was sent, so that it can be saved. All processes call it together."""
        if self.ahead is not None:
            self.ahead.settle(self.on_progress)

    def _batch(self, trajectories: list[Trajectory]) -> Batch:
        self.played += trajectories
        if self.facts is None:  # later batches get the same columns, so that rounds can be joined
            verdicts = [v for v in (self.sample, *(t.verdict for t in trajectories)) if v is not None]
            self.scores = sorted({name for v in verdicts for name in v.scores})
            self.facts = sorted({name for v in verdicts for name in numbers_of(v.facts)})
        sees = self.player.chat.pictures is not None
        return batch_of(trajectories, scores=self.scores, facts=self.facts, dtype=self.dtype, sees=sees)

    def state_dict(self) -> dict[str, Any]:
        """Which scores and facts are columns, the unfinished episodes, and the rollout that was sent ahead."""
        carried = self.player.carried.state_dict()
        ahead = self.ahead.state_dict() if self.ahead is not None else None
        return {"scores": self.scores, "facts": self.facts, "carried": carried, "ahead": ahead}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.scores, self.facts = state["scores"], state["facts"]
        self.player.carried.load_state_dict(state.get("carried", []))
        if self.ahead is not None:
            self.ahead.load_state_dict(state["ahead"])

    def judge(self, asks: Sequence[Ask]) -> Sequence[str | JudgeFailure]:
        """There is no judge behind this actor: every ask fails, typed."""
        return [JudgeFailure("error:no_judge") for _ in asks]

    def privileged(self, task_index: int, kind: str, level: int) -> str | None:
        """Hints of an environment that offers them (`env.privileged`); None otherwise."""
        env = self.player.pool.take()
        try:
            offer = getattr(getattr(env, "unwrapped", env), "privileged", None)
            return offer(task_index, kind, level) if offer is not None else None
        finally:
            self.player.pool.give(env, broken=False)


def refuse_truncated(top_k: int, top_p: float, temperature: float) -> None:
    """RecipeError where tokens with probability could never be drawn: log-probs would not be those of the sampler."""
    if top_k > 0 or top_p < 1:
        raise RecipeError(
            f"training samples from the full distribution, not with top_k={top_k}, top_p={top_p}: what is never "
            f"drawn would still be in the trainer's softmax. Leave both out, or use them in evaluation only"
        )
    if temperature <= 0:
        raise RecipeError(f"training needs a temperature above 0, got {temperature}")


def facts_mean(trajectories: Sequence[Trajectory], name: str) -> float | None:
    """Mean of a numeric verdict fact over the episodes that have it."""
    values = [float(t.verdict.facts[name]) for t in trajectories if t.verdict and name in t.verdict.facts]
    return float(torch.tensor(values, dtype=torch.float64).mean()) if values else None
