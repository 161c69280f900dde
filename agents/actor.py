"""Plays episodes for training and evaluation; with several processes each plays its share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from agents.batching import batch_of
from agents.chat import ChatFormat
from agents.dist import World
from agents.engines.base import Engine
from agents.rollout import EnvPool, Limits, MakeEnv, OnProgress, Progress, play
from agents.trajectory import Trajectory
from policy_opt.batch import Batch
from policy_opt.errors import RecipeError
from policy_opt.protocols import Ask, Job, JudgeFailure


class Player:
    """Token engine, chat format and environments as one call: jobs in, trajectories out, the same on every process.

    Args:
        world: the processes; each plays its share.
        version: called for the policy's version whenever play begins.
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
    ):
        self.make_env, self.chat, self.engine, self.limits, self.seed = make_env, chat, engine, limits, seed
        self.world = world or World()
        self.version = version
        self.pool = EnvPool(make_env)

    def __call__(
        self,
        jobs: Sequence[Job],
        *,
        seed: int | None = None,
        options: Mapping[str, Any] | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[Trajectory]:
        """Trajectories in the order of the jobs. `on_progress` speaks of all processes."""
        self.engine.version = self.version()
        mine = self.world.share(jobs)
        tell = self._scaled(on_progress, len(mine), len(jobs))
        with self.world.autocast():
            played = play(
                mine, self.make_env, self.chat, self.engine, self.limits, self.seed if seed is None else seed,
                None, tell, options=options, pool=self.pool,
            )  # fmt: skip
        self.engine.reset()
        shares = self.world.gather(played)
        return [shares[i % self.world.size][i // self.world.size] for i in range(len(jobs))]

    def _scaled(self, on_progress: OnProgress | None, mine: int, total: int) -> OnProgress | None:
        """Progress of this process as an estimate of the whole."""
        if on_progress is None or mine == 0:
            return None
        factor = total / mine
        return lambda p: on_progress(Progress(round(p.done * factor), total, round(p.tokens * factor)))


class LMActor:
    """`policy_opt.loop.Actor` for a language model.

    `played` holds the trajectories of the iteration so far, rejected groups included; `begin` empties it.
    """

    columns: tuple[str, ...] | None = None

    def __init__(self, player: Player, dtype: torch.dtype = torch.float32):
        self.player, self.dtype = player, dtype
        self.scores: list[str] | None = None
        self.facts: list[str] | None = None
        self.played: list[Trajectory] = []
        self.on_progress: OnProgress | None = None

    def begin(self) -> None:
        """Forget the trajectories of the last iteration."""
        self.played = []

    def play(self, jobs: Sequence[Job]) -> Batch:
        """One row per episode (or segment of it), in the order of the jobs."""
        trajectories = self.player(jobs, on_progress=self.on_progress)
        self.played += trajectories
        b = batch_of(trajectories, scores=self.scores, facts=self.facts, dtype=self.dtype)
        if self.facts is None:  # later batches get the same columns, so that rounds can be joined
            self.scores = list(b.names.get("scores_BK", ()))
            self.facts = sorted(fact_names(trajectories) & {c.removesuffix("_B") for c in b.cols})
        return b

    def state_dict(self) -> dict[str, Any]:
        """Which scores and facts are columns."""
        return {"scores": self.scores, "facts": self.facts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.scores, self.facts = state["scores"], state["facts"]

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


def fact_names(trajectories: Sequence[Trajectory]) -> set[str]:
    """Names of all facts of these episodes' verdicts."""
    return {name for t in trajectories if t.verdict is not None for name in t.verdict.facts}


def facts_mean(trajectories: Sequence[Trajectory], name: str) -> float | None:
    """Mean of a numeric verdict fact over the episodes that have it."""
    values = [float(t.verdict.facts[name]) for t in trajectories if t.verdict and name in t.verdict.facts]
    return float(torch.tensor(values, dtype=torch.float64).mean()) if values else None
