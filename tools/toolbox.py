"""The toolbox of one episode: runs calls, bounds them, and turns every failure into text for the agent."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from tools import images, worker
from tools.calls import BadCall, ToolCall
from tools.tool import Tool, ToolError

CUT = "...[cut]"
_ECHO = 40  # characters of the agent's own text that an error message repeats


@dataclass(frozen=True)
class ToolResult:
    """What came of a call."""

    call: ToolCall | BadCall
    """The call."""
    text: str
    """The result's words, or ``error: ...``; always encodable as UTF-8."""
    error: str | None = None
    """None, or: ``unknown_tool``, ``invalid_json`` (unreadable call), ``schema`` (wrong arguments),
    ``timeout``, ``too_many_calls``, ``too_large`` (more images, or larger ones, than a result may hold),
    ``tool_error`` (the tool reports a failure), ``exception`` (the tool broke)."""
    truncated: bool = False
    """Whether the text was cut at the limit."""
    parts: tuple[dict[str, Any], ...] | None = None
    """None for a plain text; else texts and RGB images in order, as parts of a message's content."""


class Toolbox:
    """Tools by name, with the limits of one episode.

    Args:
        tools: the tools; names must differ.
        max_calls: calls that are run in an episode; further ones are refused.
        max_output_chars: longest result text.
        timeout_s: time limit for tools that have none of their own; None runs these in place.
    """

    def __init__(
        self,
        tools: Iterable[Tool] = (),
        *,
        max_calls: int = 32,
        max_output_chars: int = 4_000,
        timeout_s: float | None = None,
    ) -> None:
        self.tools: dict[str, Tool] = {}
        for tool in tools:
            if tool.name in self.tools:
                raise ValueError(f"two tools are named {tool.name!r}")
            self.tools[tool.name] = tool
        self.max_calls, self.max_output_chars, self.timeout_s = max_calls, max_output_chars, timeout_s
        self.calls = 0
        """Calls that were run so far, those that failed included."""
        for tool in self.tools.values():
            if self._limit(tool) is not None:
                worker.check_importable(tool.fn, f"tool {tool.name!r} has a time limit")

    def schemas(self) -> tuple[dict[str, Any], ...]:
        """The tools in OpenAI style, in order."""
        return tuple(tool.openai() for tool in self.tools.values())

    def call(self, call: ToolCall | BadCall) -> ToolResult:
        """Run a call. Never raises: failures come back as text and an error kind."""
        if isinstance(call, BadCall):
            kind = "too_many_calls" if call.error == "too_many_calls" else "invalid_json"
            return self._failed(call, kind, call.message)
        if self.calls >= self.max_calls:
            return self._failed(call, "too_many_calls", "too many calls")
        self.calls += 1
        tool = self.tools.get(call.name)
        if tool is None:
            return self._failed(call, "unknown_tool", self._unknown(call.name))
        wrong = _schema_error(tool.parameters, call.arguments)
        if wrong is not None:
            return self._failed(call, "schema", wrong)
        return self._run(tool, call)

    def _run(self, tool: Tool, call: ToolCall) -> ToolResult:
        limit = self._limit(tool)
        if limit is not None:
            # Two more, so that words that end at the limit, and a space, do not look whole.
            outcome = worker.run(tool.fn, dict(call.arguments), limit, self.max_output_chars + 2)
            if outcome.error is not None:
                return self._failed(call, outcome.error, outcome.text)
            return self._done(call, outcome.value)
        try:
            return self._done(call, as_result(tool.fn(**call.arguments)))
        except images.TooLarge as error:
            return self._failed(call, "too_large", str(error))
        except ToolError as error:
            return self._failed(call, "tool_error", str(error))
        except (Exception, SystemExit) as error:
            return self._failed(call, "exception", f"{type(error).__name__}: {error}")

    def _limit(self, tool: Tool) -> float | None:
        return tool.timeout_s if tool.timeout_s is not None else self.timeout_s

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name[:_ECHO], self.tools, n=1)
        hint = f"did you mean {near[0]}?" if near else f"tools: {', '.join(self.tools)}"
        return f"no tool {name[:_ECHO]!r}; {hint}"

    def _done(self, call: ToolCall, value: str | list[Any]) -> ToolResult:
        if isinstance(value, str):
            text, cut = self._bounded(value)
            return ToolResult(call, text, None, cut)
        cut = len(images.words_of(value)) > self.max_output_chars
        if cut:
            value = [*images.clip(value, self.max_output_chars - len(CUT) - 1), CUT]
        shown = [encodable(part) if isinstance(part, str) else part for part in value]
        return ToolResult(call, images.words_of(shown), None, cut, tuple(map(_part, shown)))

    def _failed(self, call: ToolCall | BadCall, kind: str, message: str) -> ToolResult:
        text, cut = self._bounded(f"error: {message}")
        return ToolResult(call, text, kind, cut)

    def _bounded(self, text: str) -> tuple[str, bool]:
        cut = len(text) > self.max_output_chars
        if cut:
            text = text[: max(0, self.max_output_chars - len(CUT))] + CUT
        return encodable(text), cut


def as_result(value: Any) -> str | list[Any]:
    """A tool's return value as text, or as a list of texts and RGB images where there is an image in it.

    Raises:
        TooLarge, ValueError, TypeError: images that cannot be shown.
    """
    parts = images.parts_of(value)
    return as_text(value) if parts is None else parts


def as_text(value: Any) -> str:
    """A tool's return value as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=_named)


def _named(value: Any) -> str:
    if images.is_image(value):
        raise TypeError("an image inside other data cannot be shown: return it alone, or in a list with texts")
    return str(value)


def _part(part: Any) -> dict[str, Any]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}


def encodable(text: str) -> str:
    """`text` with what UTF-8 cannot encode (lone surrogates) replaced."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _schema_error(schema: Mapping[str, Any], arguments: Mapping[str, Any]) -> str | None:
    """Why the arguments do not fit, or None."""
    try:
        validator = _validator(json.dumps(schema, sort_keys=True))
        if validator.is_valid(arguments):
            return None
        error = best_match(validator.iter_errors(arguments))
        where = ".".join(str(p) for p in error.absolute_path)
        return f"{where}: {error.message}"[:200] if where else error.message[:200]
    except RecursionError:
        return "arguments nested too deep"


@lru_cache(maxsize=1024)
def _validator(schema: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads(schema))
