"""How tool calls are written in an assistant's text: a small parser interface, and the Hermes / Qwen format.

Model text is hostile: parsing is linear in its length, bounded, and never raises. What cannot be read
becomes a `BadCall`, which is answered with an error message like any other call.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from tools import strict_json

MAX_CALLS_PER_TURN = 32
_MAX_RAW = 2_000  # characters of an unreadable call that are kept


@dataclass(frozen=True)
class ToolCall:
    """A call that could be read."""

    name: str
    """Which tool."""
    arguments: Mapping[str, Any]
    """Arguments by name; any JSON values."""
    raw: str = field(default="", compare=False)
    """The text it was read from."""


@dataclass(frozen=True)
class BadCall:
    """Something that began like a call and could not be read."""

    error: str
    """``invalid_json``, ``not_an_object``, ``no_name``, ``bad_arguments``, ``unclosed`` or ``too_many_calls``."""
    message: str
    """What is wrong, in words for the agent."""
    raw: str = field(default="", compare=False)
    """The text, cut at 2,000 characters."""


class ParsedTurn(NamedTuple):
    """An assistant's turn: its words and its calls, in order."""

    content: str
    """The text outside the calls."""
    calls: tuple[ToolCall | BadCall, ...] = ()
    """What it called."""


class CallFormat(Protocol):
    """A way to write calls into text. Implementations are stateless and picklable."""

    @property
    def name(self) -> str:
        """What a configuration calls this format."""
        ...

    def parse(self, text: str) -> ParsedTurn:
        """Read a turn. Never raises; linear in the length of the text."""
        ...

    def render(self, content: str, calls: Sequence[ToolCall]) -> str:
        """Write a turn such that `parse` reads it back."""
        ...


@dataclass(frozen=True)
class Hermes:
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, as Hermes and Qwen models write calls."""

    name: str = "hermes"
    """What a configuration calls this format."""
    open: str = "<tool_call>"
    """Starts a call."""
    close: str = "</tool_call>"
    """Ends it."""

    def parse(self, text: str) -> ParsedTurn:
        start = text.find(self.open)
        if start < 0:
            return ParsedTurn(text)
        words: list[str] = []
        calls: list[ToolCall | BadCall] = []
        position = 0
        while start >= 0:
            words.append(text[position:start])
            body = start + len(self.open)
            if len(calls) == MAX_CALLS_PER_TURN:
                calls.append(BadCall("too_many_calls", f"more than {MAX_CALLS_PER_TURN} calls in one turn"))
                position = len(text)
                break
            end = text.find(self.close, body)
            if end < 0:
                calls.append(BadCall("unclosed", f"no {self.close}", text[start : start + _MAX_RAW]))
                position = len(text)
                break
            calls.append(_read_call(text[body:end]))
            position = end + len(self.close)
            start = text.find(self.open, position)
        words.append(text[position:])
        return ParsedTurn("".join(words).strip(), tuple(calls))

    def render(self, content: str, calls: Sequence[ToolCall]) -> str:
        parts = [content] if content else []
        for call in calls:
            body = json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)
            # A tag inside a value would end the call early; JSON may write "<" as an escape.
            body = body.replace(self.open, "\\u003c" + self.open[1:]).replace(self.close, "\\u003c" + self.close[1:])
            parts.append(f"{self.open}{body}{self.close}")
        return "".join(parts)


def _read_call(body: str) -> ToolCall | BadCall:
    raw = body[:_MAX_RAW]
    try:
        value = strict_json.loads(body)
    except strict_json.JsonError as error:
        return BadCall("invalid_json", str(error), raw)
    if not isinstance(value, dict):
        return BadCall("not_an_object", "a call is an object with name and arguments", raw)
    name, arguments = value.get("name"), value.get("arguments", {})
    if not isinstance(name, str) or not name:
        return BadCall("no_name", "a call needs a name", raw)
    if not isinstance(arguments, dict):
        return BadCall("bad_arguments", "arguments must be an object", raw)
    return ToolCall(name, arguments, raw)


HERMES = Hermes()
FORMATS: Mapping[str, CallFormat] = {"hermes": HERMES}


def get_format(name: str) -> CallFormat:
    """The call format of that name.

    Raises:
        ValueError: unknown name, with the nearest known one.
    """
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name, FORMATS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(FORMATS)}"
    raise ValueError(f"unknown call format {name!r}{hint}")
