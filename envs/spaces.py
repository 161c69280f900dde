"""Leaf spaces with O(1) membership: texts, messages, tool schemas.

Gymnasium's `Text` admits 62 alphanumerics by default and walks over every character (285 µs for 4,000 of
them); these look at types and lengths only. The observation space itself is a real `gymnasium.spaces.Dict`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from tools.images import is_image

ROLES = ("system", "user", "assistant", "tool")
_LETTERS = "abcdefghijklmnopqrstuvwxyz    ABCDEFGH 0123456789 {}<>:,.\"'\n"


def _random_text(rng: np.random.Generator, longest: int = 40) -> str:
    size = int(rng.integers(1, longest + 1))
    return "".join(_LETTERS[i] for i in rng.integers(0, len(_LETTERS), size))


class Text(spaces.Space[str]):
    """Any Unicode string of at most `max_length` characters."""

    def __init__(self, max_length: int, seed: int | np.random.Generator | None = None) -> None:
        self.max_length = int(max_length)
        super().__init__(None, None, seed)

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        return _random_text(self.np_random, min(40, self.max_length))

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= self.max_length

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"Text(max_length={self.max_length})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Text) and other.max_length == self.max_length


class Messages(spaces.Space[tuple]):
    """A tuple of chat messages, at most `max_messages`: dicts with a role and a content (text or parts)."""

    def __init__(self, max_messages: int, seed: int | np.random.Generator | None = None) -> None:
        self.max_messages = int(max_messages)
        super().__init__(None, None, seed)

    def sample(self, mask: Any = None, probability: Any = None) -> tuple[dict[str, Any], ...]:
        return (
            {
                "role": ROLES[int(self.np_random.integers(len(ROLES)))],
                "content": _random_text(self.np_random),
            },
        )

    def contains(self, x: Any) -> bool:
        # The first message stands for all: membership stays O(1) however much an environment says.
        # `envs.check` looks at every message.
        return type(x) is tuple and len(x) <= self.max_messages and (not x or is_message(x[0]))

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"Messages(max_messages={self.max_messages})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Messages) and other.max_messages == self.max_messages


class Schemas(tuple):
    """Tool schemas that nobody can change: whoever takes one out gets a copy.

    Observations must share no mutable data (Gymnasium checks it), and copying the schemas at every step would
    cost more than the step; so they are copied when they are looked at. The object itself stays the same as
    long as the tools do, so that those who format tools may remember by identity.
    """

    def __iter__(self) -> Iterator[Any]:
        return map(copied, super().__iter__())

    def __getitem__(self, key: Any) -> Any:
        return copied(super().__getitem__(key))


def copied(value: Any) -> Any:
    """A deep copy of JSON data and of messages; images, which nobody changes, are shared."""
    if isinstance(value, Mapping):
        return {k: copied(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(v) for v in value)
    return value


class ToolSchemas(spaces.Space[tuple]):
    """A tuple of OpenAI-style tool schemas, at most `max_tools`."""

    def __init__(self, max_tools: int = 256, seed: int | np.random.Generator | None = None) -> None:
        self.max_tools = int(max_tools)
        super().__init__(None, None, seed)

    def sample(self, mask: Any = None, probability: Any = None) -> tuple[dict[str, Any], ...]:
        function = {
            "name": "sample",
            "description": _random_text(self.np_random),
            "parameters": {"type": "object"},
        }
        return ({"type": "function", "function": function},)

    def contains(self, x: Any) -> bool:
        return isinstance(x, tuple) and len(x) <= self.max_tools

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def __repr__(self) -> str:
        return f"ToolSchemas(max_tools={self.max_tools})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ToolSchemas) and other.max_tools == self.max_tools


class Observation(spaces.Dict):
    """``{"messages": the new messages, "tools": the tools on offer}``."""

    def __init__(self, max_messages: int = 256, max_tools: int = 256) -> None:
        self._most_messages, self._most_tools = max_messages, max_tools
        super().__init__({"messages": Messages(max_messages), "tools": ToolSchemas(max_tools)})

    def contains(self, x: Any) -> bool:
        # What `spaces.Dict` would ask its leaves, without the calls: this stands in every step of every user.
        try:
            messages, tools = x["messages"], x["tools"]
            if type(x) is not dict or len(x) != 2 or type(messages) is not tuple:
                return False
            if len(messages) > self._most_messages or not isinstance(tools, tuple):
                return False
            if messages:
                first = messages[0]
                if type(first) is not dict or first["role"] not in ROLES:
                    return False
                if type(first["content"]) is not str and type(first["content"]) is not list:
                    return False
            return len(tools) <= self._most_tools
        except (KeyError, TypeError, IndexError):
            return False


def is_message(x: Any) -> bool:
    """Whether `x` has the shape of a message: a known role, and text or parts."""
    return (
        type(x) is dict and "role" in x and "content" in x
        and x["role"] in ROLES and isinstance(x["content"], (str, list))
    )  # fmt: skip


def message_problem(message: Any) -> str | None:
    """Why `message` is no chat message, or None; looks at everything, unlike the spaces."""
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        return f"needs a role out of {', '.join(ROLES)}"
    content = message.get("content")
    if isinstance(content, str):
        return _text_problem(content)
    if not isinstance(content, Sequence):
        return "content must be text or a list of parts"
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") not in ("text", "image"):
            return "a part needs a type, text or image"
        if part["type"] == "text" and (problem := _text_problem(part.get("text"))):
            return problem
        if part["type"] == "image" and (problem := _image_problem(part)):
            return problem
    return None


def _image_problem(part: Mapping[str, Any]) -> str | None:
    if "image" not in part:
        return "an image part holds a PIL image under `image`, and there is none"
    image = part["image"]
    if not is_image(image):
        return f"an image part holds a PIL image under `image`, got {type(image).__name__}"
    if 0 in image.size:
        return f"an image of {image.width} x {image.height} pixels shows nothing"
    return None


def _text_problem(text: Any) -> str | None:
    if not isinstance(text, str):
        return f"text expected, got {type(text).__name__}"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "text that UTF-8 cannot encode"
    return None
