"""A random agent for any environment: nonsense, calls with random arguments, random answers."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import numpy as np

from envs.core import ChatEnv, text_of
from tools import ToolCall


def random_agent(env: ChatEnv, rng: np.random.Generator) -> Generator[str, Mapping[str, Any], None]:
    """Says random words of what it has read; calls tools at random; answers in the end, or not at all."""
    words = _words(env)
    while True:
        schemas = list(env.episode.toolbox.tools.values())
        roll = rng.random()
        if schemas and roll < 0.6:
            tool = schemas[int(rng.integers(len(schemas)))]
            arguments = {k: _value(rng, v, words) for k, v in tool.parameters.get("properties", {}).items()}
            said = env.call_format.render("", [ToolCall(tool.name, arguments)])
        elif roll < 0.9:
            said = f"<answer>{_pick(rng, words)}</answer>"
        else:
            said = " ".join(_pick(rng, words) for _ in range(int(rng.integers(1, 8))))
        observation = yield said
        words += [w for m in observation["messages"] for w in text_of(m["content"]).split()][:50]


def _words(env: ChatEnv) -> list[str]:
    return [w for m in env.episode.messages for w in text_of(m["content"]).split()] or ["hello"]


def _pick(rng: np.random.Generator, words: list[str]) -> str:
    return words[int(rng.integers(len(words)))].strip("?.,")


def _value(rng: np.random.Generator, schema: Mapping[str, Any], words: list[str]) -> Any:
    if "enum" in schema:
        return schema["enum"][int(rng.integers(len(schema["enum"])))]
    kind = schema.get("type")
    if kind == "integer":
        return int(rng.integers(-10, 1000))
    if kind == "number":
        return float(rng.normal() * 100)
    if kind == "boolean":
        return bool(rng.integers(2))
    if kind == "array":
        return [_pick(rng, words) for _ in range(int(rng.integers(3)))]
    return {} if kind == "object" else _pick(rng, words)
