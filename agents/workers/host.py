"""Environments in a worker: a request in, a reply out, both as bytes. The same for a process and for a Ray actor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np

import envs
from agents.workers.wire import decode, encode
from tools import get_format

Script = Generator[str, Mapping[str, Any], None]


class _Lost(Exception):
    """There is no running episode of that number: it began in a worker that has ended since."""


@dataclasses.dataclass
class _Place:
    """One environment and what its proxy knows of it."""

    env: Any
    obs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The last observation."""
    tools: Any = None
    """The tools that the proxy was told of."""
    script: Script | None = None
    """A script of the environment at play."""


class Host:
    """Environments of one spec, by number. They are made at their first reset.

    Args:
        spec: as `envs.make` takes it; resolved here, in this process.
        arguments: keywords of the constructor, plain data.

    Raises:
        Exception: whatever making one environment raises.
    """

    def __init__(self, spec: str, arguments: Mapping[str, Any]) -> None:
        self.spec, self.arguments = spec, dict(arguments)
        self._spare: list[Any] = [self._make()]
        self._places: dict[int, _Place] = {}

    def facts(self) -> dict[str, Any]:
        """What is the same for all of them, as plain data."""
        env = self._spare[0].unwrapped
        return {
            "name": env.name,
            "class_name": type(env).__name__,
            "splits": list(env.splits),
            "tasks": {split: env.task_count(split) for split in env.splits},
            "lowest_reward": float(env.lowest_reward),
            "demonstrators": dict(env.demonstrators),
            "scripts": list(env.scripts),
            "hacks": list(env.hacks),
            "privileged": callable(getattr(env, "privileged", None)),
            "call_format": _named(env.call_format),
        }

    def handle(self, request: bytes) -> bytes:
        """Do what a request asks: {"ok": result}, {"error": [type, text]} or {"lost": true}."""
        operation, number, arguments, gone = decode(request)
        for old in gone:
            self._close(old)
        try:
            return encode({"ok": self._OPERATIONS[operation](self, number, *arguments)})
        except _Lost:
            return encode({"lost": True})
        except MemoryError as error:
            self._close(number)
            return encode({"error": ["MemoryError", str(error)[:500]]})
        except (Exception, SystemExit) as error:
            return encode({"error": [type(error).__name__, str(error)[:2000]]})

    def close(self) -> None:
        """Close all environments."""
        for number in list(self._places):
            self._close(number)

    # ------------------------------------------------------------ operations

    def _reset(self, number: int, seed: int | None, options: Mapping[str, Any] | None) -> list[Any]:
        place = self._places.get(number)
        if place is None:
            place = self._places[number] = _Place(self._spare.pop() if self._spare else self._make())
        place.script = None
        place.obs, info = place.env.reset(seed=seed, options=options)
        return [_observation(place), _info(info, "task_id", "split", "index", "level")]

    def _step(self, number: int, text: str) -> list[Any]:
        place = self._running(number)
        place.obs, reward, terminated, truncated, info = place.env.step(text)
        return [_observation(place), float(reward), bool(terminated), bool(truncated), _info(info, "stop_reason")]

    def _finish(self, number: int, reason: str) -> list[Any]:
        reward, info = self._running(number).env.finish(reason)
        return [float(reward), _info(info, "stop_reason")]

    def _script(self, number: int, name: str, state: Mapping[str, Any]) -> str | None:
        place = self._running(number)
        env = place.env.unwrapped
        bits = getattr(np.random, str(state["bit_generator"]))()
        bits.state = state
        place.script = {**env.scripts, **env.hacks}[name](env, np.random.Generator(bits))
        return next(place.script, None)

    def _next(self, number: int) -> str | None:
        place = self._running(number)
        if place.script is None:
            raise _Lost
        try:
            return place.script.send(place.obs)
        except StopIteration:
            return None

    def _privileged(self, number: int, index: int, kind: str, level: int) -> Any:
        place = self._places.get(number)
        if place is None:
            place = self._places[number] = _Place(self._spare.pop() if self._spare else self._make())
        return place.env.unwrapped.privileged(index, kind, level)

    _OPERATIONS: Mapping[str, Callable[..., Any]] = {
        "reset": _reset, "step": _step, "finish": _finish, "script": _script, "next": _next,
        "privileged": _privileged,
    }  # fmt: skip

    # ------------------------------------------------------------ inside

    def _make(self) -> Any:
        return envs.make(self.spec, **self.arguments)

    def _running(self, number: int) -> _Place:
        place = self._places.get(number)
        if place is None:
            raise _Lost
        return place

    def _close(self, number: int) -> None:
        place = self._places.pop(number, None)
        if place is not None:
            try:
                place.env.close()
            except Exception as error:
                print(f"closing an environment of {self.spec}: {error!r}")


def _observation(place: _Place) -> list[Any]:
    """New messages, and the tools where they are others than before."""
    tools = place.obs.get("tools", ())
    same = tools is place.tools
    place.tools = tools
    return [list(place.obs["messages"]), None if same else list(tools)]


def _info(info: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """What a rollout reads of an info."""
    out = {key: info[key] for key in keys if key in info}
    if "verdict" in info:
        verdict = info["verdict"]
        out["verdict"] = [float(verdict.reward), dict(verdict.scores), dict(verdict.facts), verdict.failure]
    if results := info.get("tool_results"):
        out["tool_results"] = [[getattr(r.call, "name", None), r.error] for r in results]
    return out


def _named(call_format: Any) -> list[Any]:
    """A call format by name, or as [module, class, fields] where it is a dataclass that the project does not know."""
    try:
        if get_format(call_format.name) == call_format:
            return [call_format.name]
    except ValueError:
        pass
    module, qualname = type(call_format).__module__, type(call_format).__qualname__
    if not dataclasses.is_dataclass(type(call_format)) or "<locals>" in qualname:
        raise TypeError(f"the call format {qualname} is no dataclass of a module, so that no worker can name it")
    fields = {f.name: getattr(call_format, f.name) for f in dataclasses.fields(call_format) if f.init}
    return [module, qualname, fields]
