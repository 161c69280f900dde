"""A tool: a name, a description, a JSON Schema of its arguments, and a function that returns text or images."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_ARGUMENT = re.compile(r"^\s*(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)$")
_SECTION = re.compile(r"^(Args|Arguments|Returns|Raises|Yields|Examples?|Notes?):\s*$")
_SIMPLE: Mapping[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object"}


class ToolError(Exception):
    """A failure that a tool reports in words meant for the agent, e.g. ``no entity 'Zanvl'``."""


@dataclass(frozen=True)
class Tool:
    """Something an agent may call."""

    name: str
    """What a call names: letters, digits, ``_ . -``, at most 64."""
    description: str
    """One line that the agent reads."""
    parameters: Mapping[str, Any]
    """JSON Schema of the arguments (an object schema)."""
    fn: Callable[..., Any]
    """Called with the arguments as keywords. Text is passed on as it is, a PIL image, or a list or tuple of texts
    and PIL images, as parts of a message (bounded as `tools.images` says), anything else as JSON."""
    timeout_s: float | None = None
    """Seconds after which a call is given up. With a limit the function runs in a process of its own, which
    is killed when time is up: it must be importable and what it changes there is lost. Without one it runs
    in place and must itself be bounded."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"tool name {self.name!r} must be letters, digits, '_', '.', '-', at most 64 of them")
        if self.parameters.get("type") != "object":
            raise ValueError(f"tool {self.name}: parameters must be a JSON Schema of type 'object'")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise ValueError(f"tool {self.name}: timeout_s must be positive, got {self.timeout_s}")

    @classmethod
    def from_function(cls, fn: Callable[..., Any], *, name: str | None = None, timeout_s: float | None = None) -> Tool:
        """Tool from a function: its name, the first paragraph of its docstring, a schema from its type hints.

        Descriptions of single arguments are read from a Google-style ``Args:`` section.

        Raises:
            TypeError: a parameter has no type hint, or one that JSON cannot express.
        """
        summary, notes = _read_docstring(inspect.getdoc(fn) or "")
        hints = typing.get_type_hints(fn)
        properties: dict[str, Any] = {}
        required: list[str] = []
        for parameter in inspect.signature(fn).parameters.values():
            if parameter.name == "self":  # an unbound method; give `fn` its object before use
                continue
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
                raise TypeError(f"tool {fn.__name__}: parameter {parameter.name!r} cannot be given by name")
            if parameter.name not in hints:
                raise TypeError(f"tool {fn.__name__}: parameter {parameter.name!r} needs a type hint")
            schema = schema_of(hints[parameter.name], f"tool {fn.__name__}, parameter {parameter.name!r}")
            if parameter.name in notes:
                schema = {**schema, "description": notes[parameter.name]}
            if parameter.default is parameter.empty:
                required.append(parameter.name)
            properties[parameter.name] = schema
        parameters = {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
        return cls(name or fn.__name__, summary, parameters, fn, timeout_s)

    def openai(self) -> dict[str, Any]:
        """The tool as OpenAI-style chat APIs and chat templates take it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


def schema_of(hint: Any, where: str = "type hint") -> dict[str, Any]:
    """JSON Schema of a type hint: str, int, float, bool, list, dict, Literal, Optional and unions of these."""
    if hint in _SIMPLE:
        return {"type": _SIMPLE[hint]}
    if hint is list:
        return {"type": "array"}
    if hint is type(None):
        return {"type": "null"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return {"type": "array", "items": schema_of(arguments[0], where)}
    if origin is dict:
        return {"type": "object", "additionalProperties": schema_of(arguments[1], where)}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [schema_of(a, where) for a in arguments]}
    raise TypeError(f"{where}: {hint!r} has no JSON Schema; use str, int, float, bool, list, dict, Literal or unions")


def _read_docstring(doc: str) -> tuple[str, dict[str, str]]:
    """(first paragraph as one line, descriptions from the Args section)."""
    lines = doc.splitlines()
    summary: list[str] = []
    for line in lines:
        if not line.strip() or _SECTION.match(line):
            break
        summary.append(line.strip())
    notes: dict[str, str] = {}
    section = current = ""
    for line in lines:
        header = _SECTION.match(line)
        if header:
            section, current = header.group(1), ""
            continue
        if not section.startswith("Arg") or not line.strip():
            continue
        depth = len(line) - len(line.lstrip())
        found = _ARGUMENT.match(line) if depth <= 4 else None
        if found:
            current = found.group(1)
            notes[current] = found.group(2).strip()
        elif current:
            notes[current] = f"{notes[current]} {line.strip()}".strip()
    return " ".join(summary), notes
