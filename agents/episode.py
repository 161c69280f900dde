"""One episode in an environment: whatever the environment does, it ends with an outcome."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from agents.engines.base import Key, stream
from agents.trajectory import Trajectory, TurnInfo
from agents.workers.errors import WorkersBroken
from policy_opt.protocols import Job

MakeEnv = Callable[[], Any]


@dataclass(frozen=True)
class Limits:
    """What an episode may use up, on the agent's side."""

    max_turns: int = 16
    """Policy turns; the environment may end the episode earlier."""
    max_new_tokens: int = 128
    """Tokens per turn."""
    max_context: int = 2048
    """Tokens per episode (per segment of it), fed and sampled; at most the engine's own limit."""
    error_reward: float = 0.0
    """Reward of an episode whose environment failed; should be the lowest that the environment gives."""

    def __post_init__(self) -> None:
        for name in ("max_turns", "max_new_tokens", "max_context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class Episode:
    """One job in play: its environment, conversation and record.

    Never raises for what the environment does; WorkersBroken where no environment can be had at all.
    """

    def __init__(self, job: Job, env: Any, seed: int, limits: Limits) -> None:
        self.job, self.env, self.limits = job, env, limits
        self.obs: Mapping[str, Any] = {}
        self.tools: Sequence[Mapping[str, Any]] = ()
        self.over = False
        self.broken = False
        self.result = Trajectory(
            task_id="", task_index=job.task_index, split=job.split, level=0,
            group=job.group, member=job.member, seed=seed,
        )  # fmt: skip

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far."""
        return self.result.messages

    def reset(self, options: Mapping[str, Any]) -> None:
        """Start the environment. The members of a group share its seed, hence their start state."""
        shared = int(stream((self.result.seed, self.job.group)).generate_state(1)[0])
        chosen = {"index": self.job.task_index, "split": self.job.split, **options}
        try:
            self.obs, info = self.env.reset(seed=shared, options=chosen)
            self.messages.extend(dict(m) for m in self.obs["messages"])
            self.tools = self.obs.get("tools", ())
            self.result.task_id = str(info.get("task_id", ""))
            self.result.level = int(info.get("level", options.get("level") or 0))
        except WorkersBroken:  # no episode can be had any more: the run stops, and can be resumed
            raise
        except Exception as error:
            self.fail(error)

    def say(self, text: str, stop: str) -> None:
        """Give a turn to the environment."""
        turn = len(self.result.turns)
        self.messages.append({"role": "assistant", "content": text})
        try:
            self.obs, reward, terminated, truncated, info = self.env.step(text)
            calls, errors = _calls_of(info)
            self.result.turns.append(TurnInfo(text, float(reward), calls, errors, stop))
            if terminated or truncated:
                self._conclude(info)
            elif turn + 1 >= self.limits.max_turns:
                self.finish("max_turns")
            else:
                self.messages.extend(dict(m) for m in self.obs["messages"])
                self.tools = self.obs.get("tools", self.tools)
        except Exception as error:
            if len(self.result.turns) == turn:
                self.result.turns.append(TurnInfo(text, stop=stop))
            self.fail(error)

    def finish(self, reason: str) -> None:
        """End the episode from the agent's side; it is graded as it stands."""
        if self.over:
            return
        try:
            reward, info = self.env.finish(reason)
            if self.result.turns:
                self.result.turns[-1] = replace(self.result.turns[-1], reward=float(reward))
            self._conclude({"stop_reason": reason, **info})
        except Exception as error:
            self.fail(error)

    def _conclude(self, info: Mapping[str, Any]) -> None:
        self.over = True
        self.result.verdict = info["verdict"]
        self.result.reward = float(info["verdict"].reward)
        self.result.stop_reason = str(info["stop_reason"])
        facts = info["verdict"].facts
        if not self.result.level and isinstance(facts.get("level"), int):
            self.result.level = facts["level"]

    def fail(self, error: Exception) -> None:
        """End the episode for what went wrong in its environment."""
        self.over = self.broken = True
        self.result.verdict = None
        self.result.reward = self.limits.error_reward
        self.result.stop_reason = f"error:{type(error).__name__}"
        self.result.facts["error"] = str(error)[:500]


class EnvPool:
    """Environments that wait for their next episode. Those that failed are closed, not used again."""

    def __init__(self, make_env: MakeEnv) -> None:
        self._make = make_env
        self._idle: deque[Any] = deque()  # its ends are safe to use from several threads

    def take(self) -> Any:
        """An idle environment, or a new one."""
        try:
            return self._idle.pop()
        except IndexError:
            return self._make()

    def give(self, env: Any, *, broken: bool) -> None:
        """Hand an environment back."""
        if not broken:
            self._idle.append(env)
            return
        with suppress(Exception):
            env.close()

    def close(self) -> None:
        """Close all idle environments."""
        while self._idle:
            self.give(self._idle.pop(), broken=True)


def key_of(job: Job) -> Key:
    """Name of a job's episode."""
    return job.group, job.member


def _calls_of(info: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the tools called in a step, and the kinds of error among their results."""
    results = info.get("tool_results", ())
    names = tuple(str(getattr(r.call, "name", "?")) for r in results)
    return names, tuple(str(r.error) for r in results if r.error)
