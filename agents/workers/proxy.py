"""What the agent's side sees of an environment in a worker: what `agents` uses of a `ChatEnv`, and nothing more."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from agents.workers.errors import WorkerBroken, WorkerDied, WorkerError
from agents.workers.supervisor import Supervisor
from envs.core import Message, Verdict
from envs.spaces import Schemas, is_message
from tools import BadCall, CallFormat, ToolCall, ToolResult, get_format

Observed = dict[str, Any]
Script = Callable[[Any, np.random.Generator], Generator[str, Mapping[str, Any], None]]


@dataclass(frozen=True)
class Facts:
    """What is the same for all environments of a run; a worker tells it when it starts, before it reads model text."""

    name: str
    """The environment's short name."""
    class_name: str
    """Name of its class."""
    splits: tuple[str, ...]
    """Its splits."""
    tasks: Mapping[str, int | None]
    """Tasks by split; None for as many as one likes."""
    lowest_reward: float
    """What a failed verifier gives."""
    demonstrators: Mapping[str, float]
    """Scripts that warm a policy up, with weights."""
    scripts: tuple[str, ...]
    """Names of its scripts."""
    hacks: tuple[str, ...]
    """Names of its cheats."""
    privileged: bool
    """Whether it offers hints."""
    call_format: CallFormat
    """How calls are written."""

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Facts:
        """The facts as a worker tells them."""
        lists = {key: tuple(told[key]) for key in ("splits", "scripts", "hacks")}
        return cls(**{**told, **lists, "call_format": _call_format(*told["call_format"])})


class Places(Protocol):
    """Where environments may live."""

    def place(self) -> Supervisor:
        """The worker for one more environment. WorkersBroken where there is none."""
        ...


class RemoteEnv:
    """An environment in a worker. It is made there at its first reset, and again at a reset after the worker was lost.

    Between two resets the worker's loss raises WorkerError: the episode that it held is gone.
    """

    def __init__(self, places: Places, facts: Facts, number: int) -> None:
        self._places, self._facts, self._number = places, facts, number
        self.worker = places.place()
        self.worker.load += 1
        self._tools: Sequence[Mapping[str, Any]] = ()
        self.name, self.splits, self.lowest_reward = facts.name, facts.splits, facts.lowest_reward
        self.demonstrators, self.call_format = facts.demonstrators, facts.call_format
        self.scripts: Mapping[str, Script] = {name: partial(_script, name) for name in facts.scripts}
        self.hacks: Mapping[str, Script] = {name: partial(_script, name) for name in facts.hacks}
        self.privileged = self._privileged if facts.privileged else None

    @property
    def unwrapped(self) -> RemoteEnv:
        """Itself."""
        return self

    def __repr__(self) -> str:
        return f"<{self._facts.class_name} in a worker>"

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observed, dict[str, Any]]:
        """As `ChatEnv.reset`.

        A worker may have ended while it was idle and be found dead only now. Whether that or this reset ended it
        cannot be told from here, so it is made once more, in a new worker: one that ends again is to blame.
        """
        arguments = (seed, None if options is None else dict(options))
        try:
            observed, info = self._anywhere("reset", *arguments)
        except WorkerDied:
            observed, info = self._anywhere("reset", *arguments)
        return self._observation(observed), _info(info)

    def step(self, action: str) -> tuple[Observed, float, bool, bool, dict[str, Any]]:
        """As `ChatEnv.step`."""
        observed, reward, terminated, truncated, info = self._here("step", action)
        return self._observation(observed), float(reward), bool(terminated), bool(truncated), _info(info)

    def finish(self, stop_reason: str) -> tuple[float, dict[str, Any]]:
        """As `ChatEnv.finish`."""
        reward, info = self._here("finish", stop_reason)
        return float(reward), _info(info)

    def close(self) -> None:
        """The worker is told with its next call."""
        self.worker.load -= 1
        self.worker.forget(self._number)

    def task_count(self, split: str) -> int | None:
        """As `ChatEnv.task_count`."""
        return self._facts.tasks[split]

    def _privileged(self, index: int, kind: str, level: int) -> str | None:
        try:
            return self._anywhere("privileged", index, kind, level)
        except WorkerError:  # it is counted as lost; a hint that is not to be had is none
            return None

    # ------------------------------------------------------------ inside

    def _here(self, operation: str, *arguments: Any) -> Any:
        """In the worker that holds the episode."""
        try:
            return self.worker.call(operation, self._number, *arguments)
        except WorkerBroken as error:
            raise WorkerDied("its worker was lost in another episode and cannot be started again") from error

    def _anywhere(self, operation: str, *arguments: Any) -> Any:
        """In this worker, or in another one where it cannot be started any more: what needs no running episode."""
        while True:
            try:
                return self.worker.call(operation, self._number, *arguments)
            except WorkerBroken:
                self.worker.load -= 1
                self.worker = self._places.place()
                self.worker.load += 1

    def _observation(self, observed: Sequence[Any]) -> Observed:
        messages, tools = observed
        if tools is not None:
            self._tools = Schemas(tools)
        if not all(is_message(m) for m in messages):
            raise WorkerDied("its worker wrote what is no message")
        said: tuple[Message, ...] = tuple(messages)
        return {"messages": said, "tools": self._tools}


def _script(name: str, env: RemoteEnv, rng: np.random.Generator) -> Generator[str, Mapping[str, Any], None]:
    """A script of the environment: it runs in the worker, beside the environment, and sees the same observations."""
    text = env._here("script", name, rng.bit_generator.state)
    while text is not None:
        yield str(text)
        text = env._here("next")


def _info(told: Mapping[str, Any]) -> dict[str, Any]:
    """An info with its records rebuilt."""
    info = dict(told)
    if "verdict" in info:
        reward, scores, facts, failure = info["verdict"]
        info["verdict"] = Verdict(float(reward), dict(scores), dict(facts), failure)
    info["tool_results"] = tuple(
        ToolResult(BadCall(str(error), "") if name is None else ToolCall(str(name), {}), "", error)
        for name, error in info.get("tool_results", ())
    )
    return info


def _call_format(name: str, qualname: str | None = None, fields: Mapping[str, Any] | None = None) -> CallFormat:
    if qualname is None:
        return get_format(name)
    kind: Any = importlib.import_module(name)
    for part in qualname.split("."):
        kind = getattr(kind, part)
    return kind(**(fields or {}))
