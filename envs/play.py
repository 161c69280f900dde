"""Playing an environment with a script: used by checks, demonstrations and scripted engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from envs.core import ChatEnv, Message, Script, Verdict, one_of


@dataclass(frozen=True)
class Played:
    """A scripted episode."""

    task_id: str
    texts: tuple[str, ...]
    """What the script said, turn by turn."""
    messages: tuple[Message, ...]
    """The whole conversation."""
    tools: tuple[dict[str, Any], ...]
    """The tools that were on offer, in OpenAI style."""
    verdict: Verdict
    reward: float
    """Sum of the steps' rewards."""
    stop_reason: str


def run_script(
    env: ChatEnv, script: str | Script, rng: np.random.Generator, options: Mapping[str, Any] | None = None
) -> Played:
    """Play one episode with a script (a name out of the environment's scripts or hacks, or a coroutine).

    A script that has no more to say before the episode ends makes the environment finish it (`script_ended`).
    """
    player = find_script(env, script) if isinstance(script, str) else script
    observation, _ = env.reset(seed=int(rng.integers(2**31)), options=dict(options or {}))
    tools = observation["tools"]
    turns = player(env, rng)
    texts: list[str] = []
    total = 0.0
    info: dict[str, Any] = {}
    try:
        text = next(turns)
        while True:
            texts.append(text)
            observation, reward, terminated, truncated, info = env.step(text)
            total += reward
            if terminated or truncated:
                break
            text = turns.send(observation)
    except StopIteration:
        reward, info = env.finish("script_ended")
        total += reward
    finally:
        turns.close()
    messages = tuple(env.episode.messages)
    return Played(env.episode.task.task_id, tuple(texts), messages, tools, info["verdict"], total, info["stop_reason"])


def find_script(env: ChatEnv, name: str) -> Script:
    """A script or hack by name."""
    everything = {**env.hacks, **env.scripts}
    return everything[one_of(name, everything, f"script of {env.name}")]
